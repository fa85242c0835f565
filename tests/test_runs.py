"""What all measuring commands share: batches, the order of cases, and what a row says of a batch and of an engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from law_helpers import CheckpointFactory, EngineFactory

from specengine.config import EngineConfig, SamplingParams, field_names
from specengine.measure import runs
from specengine.measure.runs import EngineCase, Run, count_records, measure
from specengine.outputs import GenerationMetrics, GenerationResult, SpeculativeDecodingMetrics

PROMPTS = ["for item", "The quick", "def add"]
PARAMS = SamplingParams(max_new_tokens=6, ignore_eos=True, num_speculative_tokens=2)


@pytest.fixture
def engine(checkpoint: CheckpointFactory, build_engine: EngineFactory) -> Any:
    return build_engine(checkpoint(with_tokenizer=True), checkpoint(with_tokenizer=True, noise=0.05))


class CountingCase:
    """Generates nothing, and notes when it is asked."""

    batch_size = 2

    def __init__(self, name: str, log: list[tuple[str, str, str]]) -> None:
        self.name, self.log = name, log
        self.pair: dict[str, Any] = {}
        self.settings = {"name": name}

    def warm_up(self, prompts: Sequence[Any]) -> dict[str, float]:
        self.log.append(("warm", self.name, prompts[0]))
        return {"draft": len(self.log)}

    def measure(self, prompts: Sequence[Any]) -> dict[str, Any]:
        self.log.append(("measure", self.name, prompts[0]))
        assert len(prompts) == 2
        return {"seconds": 1.0}


def test_cases_take_turns_on_each_batch() -> None:
    log: list[tuple[str, str, str]] = []
    cases = [CountingCase(name, log) for name in "abc"]
    records = list(measure(Run("sweep", "now", {}), cases, PROMPTS, repeats=2))
    assert len(records) == count_records(cases, PROMPTS, repeats=2) == 3 * 2 * 2
    order = "".join(record.settings["name"] for record in records)
    assert order == "abcbcacababc"
    assert [(record.prompt_index, record.repeat) for record in records[::3]] == [
        (0, 0),
        (2, 0),
        (0, 1),
        (2, 1),
    ]
    # Each once, then each of a batch before any of it is measured.
    assert [what for what, *_ in log] == ["warm"] * 3 + (["warm"] * 3 + ["measure"] * 3) * 2 + ["measure"] * 6
    # Shares are those of the same case and prompts, whatever the turn was.
    for record in records:
        which = [
            place for place, entry in enumerate(log, 1) if entry[:2] == ("warm", record.settings["name"])
        ]
        assert record.measured["shares"]["draft"] == which[1 if record.prompt_index == 0 else 2]


def test_the_last_batch_is_filled_up() -> None:
    assert runs.batches_of("abcde", 2) == [(0, ["a", "b"]), (2, ["c", "d"]), (4, ["e", "a"])]
    assert runs.batches_of("ab", 5) == [(0, ["a", "b", "a", "b", "a"])]


def test_settings_say_every_option_of_request_and_engine(engine: Any) -> None:
    params = replace(
        PARAMS,
        min_p=0.1,
        logit_bias={3: 1.5},
        bad_words=["no", [4, 5]],
        stop="x",
        logits_processor=[test_the_last_batch_is_filled_up],
    )
    settings = EngineCase(engine, params, batch_size=3).settings
    assert json.loads(json.dumps(settings)) == settings
    options = {*field_names(SamplingParams), *field_names(EngineConfig)}
    assert {*settings, *runs.describe_pair(engine)} == options | {
        "batch_size",
        "drafter",
        "model",
        "draft_model",
    }
    assert settings["min_p"] == 0.1
    assert settings["logit_bias"] == [[3, 1.5]]
    assert settings["bad_words"] == ["no", [4, 5]]
    assert settings["logits_processor"] == ["test_the_last_batch_is_filled_up"]
    assert (settings["batch_size"], settings["num_threads"], settings["forced_acceptance"]) == (3, 1, None)


def test_a_batch_is_measured_as_a_whole(engine: Any) -> None:
    """Counts are the sums of what the engine said of each, and times hold every request's."""
    seen: list[list[GenerationResult]] = []
    case = EngineCase(engine, PARAMS, batch_size=3, on_results=seen.append)
    (record,) = measure(Run.start("sweep"), [case], PROMPTS, repeats=1)
    (results,) = seen
    each, measured = [result.metrics for result in results], record.measured
    assert [result.prompt for result in results] == PROMPTS
    assert measured["tokens"] == 18
    assert measured["seconds"] == max(one.total_time for one in each)
    assert measured["time_to_first_token"] == max(one.queue_time + one.prompt_time for one in each)
    for name in ("num_rounds", "num_draft_tokens", "num_accepted_draft_tokens"):
        total = sum(getattr(one.speculative_decoding, name) for one in each)
        assert measured["metrics"]["speculative_decoding"][name] == total > 0
    assert sum(measured["shares"].values()) == pytest.approx(1.0)
    assert measured["shares"]["other"] > 0


def test_times_of_a_batch() -> None:
    def part(queue: float, prompt: float, decode: float, tokens: int, forwards: int) -> GenerationMetrics:
        return GenerationMetrics(
            num_generated_tokens=tokens,
            num_target_forwards=forwards,
            queue_time=queue,
            prompt_time=prompt,
            decode_time=decode,
            total_time=queue + prompt + decode,
            speculative_decoding=SpeculativeDecodingMetrics(num_rounds=forwards - 1),
        )

    whole = runs.overall([part(1.0, 2.0, 5.0, 10, 6), part(2.0, 3.0, 2.0, 4, 3)])
    assert (whole.queue_time, whole.prompt_time, whole.decode_time, whole.total_time) == (1.0, 4.0, 3.0, 8.0)
    assert (whole.num_generated_tokens, whole.num_target_forwards, whole.tokens_per_second) == (14, 6, 2.0)
    assert whole.speculative_decoding.num_rounds == 7
    assert whole.time_to_first_token == 5.0


def test_one_prompt_is_what_the_engine_said(engine: Any, tmp_path: Path) -> None:
    seen: list[list[GenerationResult]] = []
    case = EngineCase(engine, PARAMS, on_results=seen.append)
    records = list(measure(Run.start("tune"), [case], PROMPTS, repeats=1))
    assert [record.measured["metrics"] for record in records] == [
        results[0].metrics.to_dict() for results in seen
    ]
