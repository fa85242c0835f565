"""What the laws of tests/test_law_*.py have in common. Stateless: import it, or use the fixtures of conftest.py.

`plain(engine, prompt, **sampling)` and `spec(engine, prompt, k, **sampling)` generate without and with speculation;
`assert_same(result, expected)` demands equal bits of everything a caller can see but the times.
"""

from __future__ import annotations

import itertools
import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vocabulary_pairs

from specengine import metrics
from specengine.config import SamplingParams
from specengine.drafters import registry
from specengine.engine import Engine, rounds
from specengine.models.decoder import build_program
from specengine.ops.interpreter import Interpreter
from specengine.outputs import GenerationResult, SpeculativeDecodingMetrics
from specengine.runtime.graphs import GraphReport

# The backend of every law. `reference` promises no bits: with it, log-probabilities are compared to 1e-4.
BACKEND = os.environ.get("SPECENGINE_TEST_BACKEND", "native")
HAS_BITS = BACKEND != "reference"
TOLERANCE = 1e-4

CheckpointFactory = Callable[..., Path]
DraftedFactory = Callable[..., tuple[Path, str | Path]]
EngineFactory = Callable[..., Engine]
BuildTwins = Callable[..., tuple[Engine, Engine]]


# Every name of the registry; one that wants an argument has one.
NAMED_DRAFTERS = [{"self": "self:1"}.get(name, name) for name in registry.DRAFTERS]
# What the fixture `drafted` takes: these, lists of drafters, and the pairs of models with two vocabularies. In a list
# what is joined by "+"; "draft" and "other" are models that agree with the target now and then.
LISTS_OF_DRAFTERS = ["ngram+suffix", "draft+self:1", "self:1+draft+other+suffix+ngram"]
ALL_DRAFTERS = [*NAMED_DRAFTERS, *LISTS_OF_DRAFTERS, *vocabulary_pairs.PAIRS]


def drafters_of(name: str, checkpoint: CheckpointFactory, **build: Any) -> Any:
    """A drafter's name, or the list of such a name."""
    noise = {"draft": 0.1, "other": 0.3}
    parts = [checkpoint(**build, noise=noise[part]) if part in noise else part for part in name.split("+")]
    return parts if "+" in name else parts[0]


def choose_ways(engine: Engine, choose: Callable[[Any, int, int], tuple[int, int]] | None = None) -> None:
    """Before each round of a list of drafters, every sequence gets a way and a number of a model's own drafts: those
    that choose(sequence, the round's number, how many ways there are) says, else at random, the same for a prompt's
    round whatever runs beside it. The last call counts."""
    stepper, num_ways = engine._stepper, len(engine._drafter.ways)  # type: ignore[attr-defined]

    def at_random(sequence: Any, number: int, num_ways: int) -> tuple[int, int]:
        chance = random.Random(f"{sequence.request.prompt_ids}, {sequence.sample_index}, {number}")
        return chance.randrange(num_ways), chance.randint(0, 4)

    def choose_each(running: Sequence[Any]) -> None:
        for sequence in running:
            number = sequence.settled.num_rounds + sequence.num_rounds_ahead
            sequence.way, sequence.num_own_drafts = (choose or at_random)(sequence, number, num_ways)

    stepper.chooser = SimpleNamespace(  # type: ignore[assignment]
        reads_text=lambda _: False,
        max_rounds=1,
        choose=choose_each,
        go_on=lambda _: None,
        observe=lambda *_, **__: None,
        release=lambda _: None,
    )


def plain(engine: Engine, prompts: Any, **sampling: Any) -> Any:
    """This engine without speculation: the truth. One prompt gives a result, a list gives a list."""
    return engine.generate(prompts, num_speculative_tokens=0, **sampling)


def spec(engine: Engine, prompts: Any, k: int, **sampling: Any) -> Any:
    """This engine with k draft tokens a round."""
    return engine.generate(prompts, num_speculative_tokens=k, **sampling)


def generate_with_k(
    engine: Engine,
    prompts: Sequence[list[int]],
    params: Sequence[SamplingParams],
    choose_k: Callable[[int, int], int],
    *,
    joins_every: int = 0,
) -> list[GenerationResult]:
    """Results in order, where k changes while requests run: before step s request r gets k = choose_k(s, r).

    joins_every: steps between one request and the next; 0: all at once
    """
    owners: dict[int, int] = {}
    results: dict[int, GenerationResult] = {}
    for step in itertools.count():
        while len(owners) < len(prompts) and step >= joins_every * len(owners):
            row = len(owners)
            owners[engine.add_request(prompts[row], params[row])] = row
        for sequence in engine._scheduler.running:
            sequence.has_auto_k = False
            sequence.num_speculative_tokens = choose_k(step, owners[sequence.request.request_id])
        for event in engine.step():
            if event.result is not None:
                results[owners[event.index]] = event.result
        if len(results) == len(prompts):
            return [results[row] for row in range(len(prompts))]
    raise AssertionError("unreachable")


def run_op_by_op(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target's forward as single ops of its backend, so that a test can replace one of them."""
    decoder = engine._target.decoder
    program = build_program(decoder.spec, decoder.weights)
    monkeypatch.setattr(decoder, "_executor", Interpreter(decoder.backend, program))


def run_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds from Python, one at a time, so that a test can watch or replace a part of one."""
    monkeypatch.setattr(rounds, "bind_round", lambda *_: None)
    monkeypatch.setattr(rounds.Rounds, "may_run_in_a_row", lambda *_: False)


def make_prompt(length: int, seed: int = 0, vocab_size: int = 64) -> list[int]:
    """Random token ids, never 0 (the tiny models' end of text)."""
    return random.Random(f"{length},{seed}").choices(range(1, vocab_size), k=length)


def visible(result: GenerationResult) -> tuple[Any, ...]:
    """Everything a caller sees that speculation must not change, log-probabilities apart."""
    outputs = [
        (o.index, o.token_ids, o.text, o.finish_reason, o.stop_reason, o.error) for o in result.outputs
    ]
    usage = (result.metrics.num_prompt_tokens, result.metrics.num_generated_tokens)
    return result.prompt, result.prompt_token_ids, outputs, usage


def logprob_numbers(result: GenerationResult) -> list[Any]:
    """Log-probabilities as a flat list: per token (id, logprob, top), prompt's first."""
    entries = list(result.prompt_logprobs or [])
    for output in result.outputs:
        entries += [*(output.logprobs or []), output.cumulative_logprob]
    return entries


def name_weights(value: str | dict[str, str]) -> str:
    """Of a test's parameter: a model's type as it is, or the dtypes that an engine is asked for."""
    return value if isinstance(value, str) else "-".join(value.values())


def assert_same(result: GenerationResult, expected: GenerationResult, *, has_bits: bool = HAS_BITS) -> None:
    """Tokens, text, reasons, lengths, usage, and the log-probabilities' bits are equal; without `has_bits` the
    log-probabilities are near."""
    assert visible(result) == visible(expected), f"{visible(result)} is not {visible(expected)}"
    ours, theirs = logprob_numbers(result), logprob_numbers(expected)
    if has_bits:
        assert ours == theirs, "the log-probabilities differ"
        return
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        if isinstance(one, float):
            assert math.isclose(one, other, abs_tol=TOLERANCE * 100)
        elif one is not None:
            assert one.token_id == other.token_id
            assert math.isclose(one.logprob, other.logprob, abs_tol=TOLERANCE)


def check_rounds(result: GenerationResult) -> None:
    """The rounds of all samples make up the tokens and the statistics."""
    rounds = [each for output in result.outputs for each in output.rounds or []]
    counted = SpeculativeDecodingMetrics()
    for each in rounds:
        drafted, accepted, kept = each[:3]
        metrics.record_rounds(counted, num_draft=drafted, num_accepted=accepted, num_kept=kept)
    found = result.metrics.speculative_decoding
    assert counted == replace(found, num_spec_tokens=0, lossless=True)
    for output in result.outputs:
        assert output.rounds is not None
        at = 1
        for each in output.rounds:
            drafts, emitted = each.draft_token_ids, output.token_ids[at : at + each.num_tokens]
            assert len(drafts) == each.num_draft_tokens
            assert drafts[: each.num_accepted_tokens] == emitted[: each.num_accepted_tokens]
            is_recovered = each.num_accepted_tokens < min(each.num_draft_tokens, each.num_tokens)
            if is_recovered and result.lossless:
                assert drafts[each.num_accepted_tokens] != emitted[-1], "what was rejected was emitted"
            at += each.num_tokens
        assert at == len(output.token_ids)


def assert_idle(engine: Engine, num_free_blocks: int) -> None:
    """Nothing is queued, running or referenced any more, and every block came back."""
    manager = engine._kv_cache.manager
    manager.check_invariants()
    assert not engine.has_work
    assert engine._outbox.requests == {}
    assert manager.num_sequences == 0
    assert engine.num_free_blocks == num_free_blocks
    counts = [manager.reference_count(block) for block in range(1, manager.num_blocks)]
    assert set(counts) <= {0}, f"blocks are still referenced: {counts}"


class EagerRecorder:
    """Stands in for CUDA graphs where there are none: what it recorded it runs again, on the batch of then.

    As with a graph, what the host knew at the recording is frozen, and results are the same memory every time (where
    their shapes are).
    """

    def __init__(self) -> None:
        self.report = GraphReport()

    def record(self, name: str, run: Callable[[], Any]) -> Callable[[], Any]:
        outcome, record = run()
        results = [*outcome, record]
        self.report.num_graphs += 1

        def replay() -> Any:
            outcome, record = run()
            for place, value in enumerate([*outcome, record]):
                old = results[place]
                is_same_place = old is not None and value is not None and old.shape == value.shape
                results[place] = old.copy_(value) if is_same_place else value
            return type(outcome)(*results[:-1]), results[-1]

        return replay


@dataclass
class Tally:
    """What was accepted and rejected. The `tally` fixture counts every round of a test here."""

    num_rounds: int = 0
    num_accepted: int = 0
    num_rejected: int = 0

    def check(self, *, accepted: bool = True, rejected: bool = True) -> None:
        """Fails unless, in this test's run, something was accepted and something was rejected."""
        if accepted:
            assert self.num_accepted > 0, "nothing was accepted: this test proves nothing"
        if rejected:
            assert self.num_rejected > 0, "nothing was rejected: this test proves nothing"


class GreedyOracle:
    """A `transformers` model as the judge of token ids: greedy continuation and teacher-forced log-probabilities."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model.float().eval()

    @torch.no_grad()
    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """`model.generate`, greedy, to the end of the budget."""
        ids = torch.tensor([list(prompt)])
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            min_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return output[0, len(prompt) :].tolist()

    @torch.no_grad()
    def logprobs(self, prompt: Sequence[int], continuation: Sequence[int]) -> list[float]:
        """Log-probability of each token of the continuation, given all before it."""
        whole = torch.tensor([[*prompt, *continuation]])
        rows = self.model(whole).logits[0, len(prompt) - 1 : -1].double().log_softmax(dim=-1)
        return rows.gather(1, whole[0, len(prompt) :, None])[:, 0].tolist()
