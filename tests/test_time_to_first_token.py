"""What is said of the time to a request's first token, and of how fast its prompt was read."""

from __future__ import annotations

import time

import pytest
from law_helpers import CheckpointFactory, EngineFactory, make_prompt

from specengine.cli.terminal import metrics_table
from specengine.outputs import GenerationMetrics


def test_the_first_token_is_timed_in_results_and_streams(
    checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    engine = build_engine(checkpoint("gpt2"), prefill_chunk_size=16)
    began = time.perf_counter()
    stream = engine.stream(make_prompt(40), max_new_tokens=4, ignore_eos=True)
    events = [(event, time.perf_counter() - began) for event in stream]
    metrics = events[-1][0].result.metrics
    assert events[0][0].elapsed == metrics.time_to_first_token == metrics.queue_time + metrics.prompt_time
    assert events[-1][0].elapsed == metrics.total_time
    for event, waited in events:
        assert 0 < event.elapsed <= waited, "what is told has happened"
    assert metrics.prompt_tokens_per_second == 40 / metrics.prompt_time
    told = metrics.to_dict()
    assert told["time_to_first_token"] == metrics.time_to_first_token
    assert told["prompt_tokens_per_second"] == metrics.prompt_tokens_per_second


def test_a_prompt_that_is_only_scored_has_a_time(
    checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    engine = build_engine(checkpoint("gpt2"), prefill_chunk_size=16)
    metrics = engine.generate(make_prompt(40), max_new_tokens=0, prompt_logprobs=0).metrics
    assert 0 < metrics.prompt_time <= metrics.total_time
    assert metrics.decode_time == 0


def test_prompt_speed_counts_what_was_computed() -> None:
    metrics = GenerationMetrics(num_prompt_tokens=100, num_cached_tokens=80, queue_time=0.5, prompt_time=0.25)
    assert metrics.time_to_first_token == 0.75
    assert metrics.prompt_tokens_per_second == pytest.approx(80.0)
    assert GenerationMetrics(num_prompt_tokens=3).prompt_tokens_per_second == 0.0
    cells = [list(column.cells) for column in metrics_table(metrics).columns]
    shown = dict(zip(*cells, strict=True))
    assert shown["first token"] == "after 750.0 ms"
    assert shown["prompt"] == "250.0 ms, 80.0 tokens/s"
