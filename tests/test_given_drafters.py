"""A drafter of the caller's: what it may propose, what it is told, and what its errors cost nobody."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from law_helpers import (
    BuildTwins,
    CheckpointFactory,
    EagerRecorder,
    EngineFactory,
    Tally,
    assert_idle,
    assert_same,
    generate_with_k,
    make_prompt,
    plain,
    spec,
)
from scripted_drafters import PerfectDrafter, RandomDrafter, ScriptedDrafter
from torch import Tensor

from specengine import DraftProposal, SamplingParams
from specengine.drafters.base import ListeningDrafter
from specengine.engine import Engine, assembly
from specengine.runtime.state import RunningBatch

VOCAB = 64
PROMPT = make_prompt(6, 1, VOCAB)
SAMPLING: dict[str, Any] = {"max_new_tokens": 14, "ignore_eos": True}
REJECTION: dict[str, Any] = {**SAMPLING, "temperature": 0.9, "seed": 4, "acceptance": "rejection"}


def with_law(proposal: DraftProposal, dtype: torch.dtype = torch.float32) -> DraftProposal:
    """The same tokens, drawn from laws that give each of them a fiftieth."""
    shape = (*proposal.tokens.shape, VOCAB)
    probs = torch.full(shape, 0.98 / (VOCAB - 1)).scatter(2, proposal.tokens.long()[..., None], 0.02)
    law = DraftProposal.from_probs(
        proposal.tokens, proposal.num_tokens, probs, torch.tensor([0.9] * shape[0])
    )
    assert law.log_probs is not None
    assert law.logits is not None
    assert law.stats is not None
    return replace(
        law, log_probs=law.log_probs.to(dtype), logits=law.logits.to(dtype), stats=law.stats.to(dtype)
    )


class BentDrafter(ScriptedDrafter):
    """A scripted drafter whose proposals are bent before it hands them over."""

    name = "bent"

    def __init__(self) -> None:
        super().__init__(vocab_size=VOCAB, counts=(2, 0, 8))
        self.bend: Callable[[DraftProposal], Any] = lambda proposal: proposal

    def propose(self, batch: RunningBatch) -> DraftProposal:
        bent: DraftProposal = self.bend(super().propose(batch))
        return bent


def bent(checkpoint: CheckpointFactory, build_engine: EngineFactory, sampling: dict[str, Any]) -> Any:
    drafter = BentDrafter()
    engine = build_engine(checkpoint(seed=1), drafter)
    drafter.learn(plain(engine, PROMPT, **sampling))
    return engine, drafter


def widen(proposal: DraftProposal) -> DraftProposal:
    """Eight tokens, always: as a drafter of fixed width proposes near the end of a budget."""
    count, width = proposal.tokens.shape
    tokens = torch.cat((proposal.tokens, torch.ones(count, 8 - width, dtype=torch.int32)), dim=1)
    return DraftProposal(tokens, torch.full((count,), 8))


def of_types(tokens: torch.dtype, counts: torch.dtype) -> Callable[[DraftProposal], DraftProposal]:
    return lambda proposal: DraftProposal(proposal.tokens.to(tokens), proposal.num_tokens.to(counts))


def every_second(proposal: DraftProposal) -> DraftProposal:
    """Tensors that are not contiguous."""
    return DraftProposal(proposal.tokens.repeat_interleave(2, 1)[:, ::2], proposal.num_tokens)


TAKEN: dict[str, tuple[dict[str, Any], Callable[[DraftProposal], DraftProposal]]] = {
    "wider than the round": (SAMPLING, widen),
    "int64": (SAMPLING, of_types(torch.int64, torch.int64)),
    "int16 and uint8": (SAMPLING, of_types(torch.int16, torch.uint8)),
    "not contiguous": (SAMPLING, every_second),
    "a wide law": (REJECTION, lambda proposal: with_law(widen(proposal))),
    "a law in fp64": (REJECTION, lambda proposal: with_law(proposal, torch.float64)),
    "a law where none is read": (SAMPLING, with_law),
    "garbage that nobody counts": (
        SAMPLING,
        lambda proposal: DraftProposal(
            torch.cat((proposal.tokens.long(), torch.full((proposal.tokens.shape[0], 1), 2**40)), dim=1),
            proposal.num_tokens,
        ),
    ),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_can_be_taken_is_cut_and_converted(
    name: str, checkpoint: CheckpointFactory, build_engine: EngineFactory, tally: Tally
) -> None:
    sampling, bend = TAKEN[name]
    engine, drafter = bent(checkpoint, build_engine, sampling)
    if sampling is REJECTION:
        drafter.bend = with_law
    expected = spec(engine, PROMPT, 4, **sampling)
    drafter.bend = bend
    result = spec(engine, PROMPT, 4, **sampling)
    assert_same(result, expected)
    tally.check()


REFUSED: dict[str, tuple[Callable[[DraftProposal], Any], type[Exception], str]] = {
    "nothing": (lambda proposal: None, TypeError, "must return a DraftProposal, got None"),
    "lists": (lambda proposal: [[1, 2]], TypeError, r"got \[\[1, 2\]\]"),
    "tokens in a list": (
        lambda proposal: replace(proposal, tokens=[[1]]),
        TypeError,
        r"tokens must be a tensor of int32.*got \[\[1\]\]",
    ),
    "no counts": (
        lambda proposal: replace(proposal, num_tokens=None),
        TypeError,
        "num_tokens must be a tensor",
    ),
    "tokens as floats": (
        lambda proposal: replace(proposal, tokens=proposal.tokens.float()),
        TypeError,
        r"tokens must be .*got a tensor of torch.float32",
    ),
    "counts as booleans": (
        lambda proposal: replace(proposal, num_tokens=proposal.num_tokens > 0),
        TypeError,
        "num_tokens must be .*torch.bool",
    ),
    "an id below 0": (
        lambda proposal: replace(proposal, tokens=proposal.tokens - VOCAB),
        ValueError,
        "token id -",
    ),
    "an id that int32 cannot hold": (
        lambda proposal: replace(proposal, tokens=proposal.tokens.long() + 2**32),
        ValueError,
        r"token id 42949\d*, outside 0",
    ),
    "a count below 0": (
        lambda proposal: replace(proposal, num_tokens=proposal.num_tokens - 9),
        ValueError,
        r"num_tokens must be 0 … 4.*got \[-5\]",
    ),
    "a count beyond the tokens": (
        lambda proposal: replace(proposal, num_tokens=proposal.num_tokens + 1),
        ValueError,
        r"num_tokens must be 0 … 4.*got \[5\]",
    ),
    "another batch": (
        lambda proposal: replace(proposal, tokens=proposal.tokens.repeat(2, 1)),
        ValueError,
        r"got \[2, 4\] and \[1\]",
    ),
    "a device without values": (
        lambda proposal: replace(proposal, tokens=proposal.tokens.to("meta")),
        ValueError,
        "cannot be moved from meta to cpu",
    ),
    "half a law": (lambda proposal: replace(with_law(proposal), stats=None), ValueError, "given together"),
    "a law for some rows": (
        lambda proposal: replace(with_law(proposal), logits=torch.zeros(0, 4, VOCAB)),
        ValueError,
        r"got \[1, 4\], \[0, 4, 64\].*combine",
    ),
    "a law for some tokens": (
        lambda proposal: replace(with_law(proposal), log_probs=torch.zeros(1, 3)),
        ValueError,
        r"must be \[1, 4\].*got \[1, 3\]",
    ),
    "a law in lists": (
        lambda proposal: replace(with_law(proposal), logits=[0.0]),
        TypeError,
        r"logits .*got \[0.0\]",
    ),
    "has_law of another batch": (
        lambda proposal: replace(with_law(proposal), has_law=torch.ones(2).bool()),
        ValueError,
        r"has_law must be \[1\]",
    ),
    "NaN logits": (
        lambda proposal: replace(with_law(proposal), logits=torch.full((1, 4, VOCAB), float("nan"))),
        ValueError,
        "logits must not hold nan",
    ),
    "infinite logits": (
        lambda proposal: replace(with_law(proposal), logits=torch.full((1, 4, VOCAB), float("inf"))),
        ValueError,
        "logits must not hold inf",
    ),
    "NaN stats": (
        lambda proposal: replace(with_law(proposal), stats=torch.full((1, 4, 4), float("nan"))),
        ValueError,
        "stats must not hold nan",
    ),
    "a token that cannot have been drawn": (
        lambda proposal: replace(with_law(proposal), log_probs=torch.full((1, 4), float("-inf"))),
        ValueError,
        "log_probs of proposed tokens must be finite, got -inf",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_taken_is_refused_by_name_and_nothing_is_lost(
    name: str, checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    bend, error, message = REFUSED[name]
    engine, drafter = bent(checkpoint, build_engine, SAMPLING)
    expected = plain(engine, PROMPT, **SAMPLING)
    num_free = engine.num_free_blocks
    engine.add_request(PROMPT, SamplingParams(**SAMPLING, num_speculative_tokens=4))
    engine.step()
    drafter.bend = bend
    with pytest.raises(error, match=f"drafter 'bent'.*{message}"):
        engine.step()
    drafter.bend = lambda proposal: proposal
    assert_same(drain(engine)[0], expected)
    assert_idle(engine, num_free)


def drain(engine: Engine) -> list[Any]:
    """Steps to the end; the results, by request."""
    results = {}
    while engine.has_work:
        results |= {event.index: event.result for event in engine.step() if event.result is not None}
    return [results[request] for request in sorted(results)]


# -- rows with laws of their own ----------------------------------------------------------------------------------


class PartedDrafter(RandomDrafter):
    """Even prompts' first tokens get a law, odd ones a point mass: each row the same in whatever company."""

    name = "parted"
    is_combined = True

    def propose(self, batch: RunningBatch) -> DraftProposal:
        whole = super().propose(batch)
        has_law = [batch.committed(row)[0] % 2 == 0 for row in range(batch.size)]
        if not self.is_combined:
            return replace(with_law(whole), has_law=torch.tensor(has_law))
        parts = []
        for row, is_law in enumerate(has_law):
            part = DraftProposal(whole.tokens[row : row + 1], whole.num_tokens[row : row + 1])
            parts.append(([row], with_law(part) if is_law else part))
        return DraftProposal.combine(batch.size, parts)


@pytest.mark.parametrize("is_combined", [True, False])
def test_rows_with_a_law_run_beside_point_masses(
    is_combined: bool, checkpoint: CheckpointFactory, build_engine: EngineFactory, tally: Tally
) -> None:
    drafter = PartedDrafter(vocab_size=VOCAB)
    engine = build_engine(checkpoint(seed=1, logit_scale=0.1), drafter)
    prompts = [[first, *make_prompt(3 + first, first, VOCAB)] for first in (2, 3, 4, 5)]
    alone = [spec(engine, prompt, 3, **{**REJECTION, "max_new_tokens": 40}) for prompt in prompts]
    drafter.is_combined = is_combined
    together = spec(engine, prompts, 3, **{**REJECTION, "max_new_tokens": 40})
    for result, truth in zip(together, alone, strict=True):
        assert_same(result, truth)
        assert result.metrics.speculative_decoding == truth.metrics.speculative_decoding
    tally.check()


def test_a_law_decides_and_so_does_a_point_mass(
    checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    """The same tokens under the two laws are judged differently, or the test above proves nothing."""
    drafter = PartedDrafter(vocab_size=VOCAB)
    engine = build_engine(checkpoint(seed=1, logit_scale=0.1), drafter)
    prompt = [2, *make_prompt(5, 1, VOCAB)]
    long = {**REJECTION, "max_new_tokens": 40}
    by_law = spec(engine, prompt, 3, **long).metrics.speculative_decoding
    drafter.propose = lambda batch: RandomDrafter.propose(drafter, batch)  # type: ignore[method-assign]
    assert spec(engine, prompt, 3, **long).metrics.speculative_decoding != by_law


# -- a round's own ------------------------------------------------------------------------------------------------


class AlternatingDrafter(ScriptedDrafter):
    """A law in every second round."""

    name = "alternating"

    def propose(self, batch: RunningBatch) -> DraftProposal:
        proposal = super().propose(batch)
        return with_law(proposal) if len(batch.committed(0)) % 2 else proposal


def test_nothing_of_a_round_is_readable_in_the_next(
    checkpoint: CheckpointFactory, build_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds are recorded after the drafter was asked, never with a law, and forget what it said."""
    drafter = AlternatingDrafter(vocab_size=VOCAB, counts=(1, 0, 2))
    asked_at_records: list[int] = []
    num_asked = 0
    engines: list[Engine] = []

    class Spy(EagerRecorder):
        def record(self, name: str, run: Any) -> Any:
            own: Any = engines[0]._drafter
            if "k = 0" not in name:
                asked_at_records.append(num_asked)
                assert own._proposal is None
                assert own._asked is not None
            return super().record(name, run)

    propose = drafter.propose

    def counted(batch: RunningBatch) -> DraftProposal:
        nonlocal num_asked
        num_asked += 1
        return propose(batch)

    monkeypatch.setattr(drafter, "propose", counted)
    monkeypatch.setattr(assembly, "build_recorder", lambda *_: Spy())
    engines.append(build_engine(checkpoint(seed=1), drafter))
    engine = engines[0]
    drafter.learn(plain(engine, PROMPT, max_new_tokens=30, ignore_eos=True))
    params = SamplingParams(max_new_tokens=30, ignore_eos=True)
    own: Any = engine._drafter

    def choose_k(step: int, row: int) -> int:
        assert own._proposal is None
        assert own._asked is None
        return (4, 3, 1, 5, 2)[step % 5]

    (result,) = generate_with_k(engine, [PROMPT], [params], choose_k)
    assert result.token_ids == plain(engine, PROMPT, max_new_tokens=30, ignore_eos=True).token_ids
    assert len(asked_at_records) > 2
    assert asked_at_records[0] > 0
    for tokens, num_tokens in own._uploads.values():
        is_used = torch.arange(tokens.shape[1]) < num_tokens[:, None]
        assert not tokens[~is_used].any()


def test_a_drafter_of_laws_and_point_masses_replays_as_it_runs(
    checkpoint: CheckpointFactory, build_twins: BuildTwins, tally: Tally
) -> None:
    drafter = AlternatingDrafter(vocab_size=VOCAB, counts=(1, 0, 2))
    direct, replayed = build_twins(checkpoint(seed=1), drafter)
    sampling = {**REJECTION, "max_new_tokens": 24}
    drafter.learn(plain(direct, PROMPT, **sampling))
    for k in (4, 2, 3):
        assert_same(spec(replayed, PROMPT, k, **sampling), spec(direct, PROMPT, k, **sampling))
    tally.check()


# -- what it is told ----------------------------------------------------------------------------------------------


class Listener(ScriptedDrafter):
    """Notes what it hears, and that it has heard everything when it is asked."""

    name = "listener"

    def __init__(self) -> None:
        super().__init__(vocab_size=VOCAB, counts=(1, 3))
        self.texts: dict[int, list[int]] = defaultdict(list)
        self.ended: list[list[int]] = []

    def hear(self, sequence_id: int, tokens: Sequence[int], num_new: int) -> None:
        assert num_new > 0
        self.texts[sequence_id] += tokens[len(tokens) - num_new :]
        assert self.texts[sequence_id] == list(tokens)

    def propose(self, batch: RunningBatch) -> DraftProposal:
        for row, sequence_id in enumerate(batch.sequence_ids):
            without_device: Any = batch._replace(tokens=None)
            assert self.texts[sequence_id] == without_device.committed(row)
        return super().propose(batch)

    def release(self, sequence_id: int) -> None:
        super().release(sequence_id)
        self.ended.append(self.texts.pop(sequence_id, []))


@pytest.mark.parametrize("num_blocks", [None, 14])
def test_a_listener_hears_every_token(
    num_blocks: int | None, checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    """Of the prompt, of rounds without drafts, of the last round; from the start after a preemption."""
    listener = Listener()
    assert isinstance(listener, ListeningDrafter)
    assert not isinstance(RandomDrafter(vocab_size=VOCAB), ListeningDrafter)
    engine = build_engine(checkpoint(seed=1), listener, num_blocks=num_blocks, rounds_ahead=2)
    prompts = [make_prompt(length, length, VOCAB) for length in (5, 8, 3)]
    params = [SamplingParams(max_new_tokens=20, ignore_eos=True)] * 3
    results = generate_with_k(
        engine, prompts, params, lambda step, row: (4, 0, 2)[(step // 3 + row) % 3], joins_every=2
    )
    texts = [[*result.prompt_token_ids, *result.token_ids] for result in results]
    assert [text for text in listener.ended if len(text) >= 23] != []
    for text in texts:
        assert text in listener.ended
    if num_blocks is not None:
        assert sum(result.metrics.num_preemptions for result in results) > 0
    assert not listener.texts
    own: Any = engine._drafter
    assert own._heard == {}


def test_rounds_run_ahead_where_nobody_asks_a_drafter(
    checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    drafter = PerfectDrafter(vocab_size=VOCAB)
    engine = build_engine(checkpoint(seed=1), drafter, rounds_ahead=2)
    drafter.learn(plain(engine, PROMPT, max_new_tokens=40, ignore_eos=True))
    under_way: dict[int, set[int]] = {0: set(), 3: set()}
    pattern = [0] * 8 + [3] * 3 + [0] * 8

    def choose_k(step: int, row: int) -> int:
        k = pattern[step] if step < len(pattern) else 3
        if 4 < step < 8:
            under_way[0].add(len(engine._rounds._flights))
        if 9 < step < 11:
            under_way[3].add(len(engine._rounds._flights))
        return k

    (result,) = generate_with_k(
        engine, [PROMPT], [SamplingParams(max_new_tokens=40, ignore_eos=True)], choose_k
    )
    counts = result.metrics.speculative_decoding
    assert counts.num_accepted_draft_tokens == counts.num_draft_tokens > 0
    assert under_way == {0: {2}, 3: {0}}


# -- errors -------------------------------------------------------------------------------------------------------


class Raising(Listener):
    """Raises at the n-th call of a method, before or after it did its work."""

    def __init__(self) -> None:
        super().__init__()
        self.armed: tuple[str, int] | None = None
        self.num_calls = 0

    def _strike(self, method: str) -> None:
        if self.armed is not None and self.armed[0] == method:
            self.num_calls += 1
            if self.num_calls == self.armed[1]:
                raise LookupError(method)

    def propose(self, batch: RunningBatch) -> DraftProposal:
        self._strike("propose")
        return super().propose(batch)

    def observe(self, batch: RunningBatch, num_accepted: Tensor) -> None:
        self._strike("observe")
        super().observe(batch, num_accepted)

    def hear(self, sequence_id: int, tokens: Sequence[int], num_new: int) -> None:
        self._strike("hear")
        super().hear(sequence_id, tokens, num_new)

    def release(self, sequence_id: int) -> None:
        super().release(sequence_id)
        self._strike("release")


@pytest.mark.parametrize("method", ["propose", "observe", "hear", "release"])
def test_an_error_of_a_drafter_loses_nothing_of_any_request(
    method: str, checkpoint: CheckpointFactory, build_engine: EngineFactory
) -> None:
    drafter = Raising()
    engine = build_engine(checkpoint(seed=1), drafter)
    prompts = [make_prompt(length, length, VOCAB) for length in (5, 8, 3)]
    params = [
        SamplingParams(max_new_tokens=size, ignore_eos=True, num_speculative_tokens=3, logprobs=1)
        for size in (9, 14, 6)
    ]
    expected = [
        engine.generate(prompt, replace(each, num_speculative_tokens=0))
        for prompt, each in zip(prompts, params, strict=True)
    ]
    num_free = engine.num_free_blocks
    for strike in range(1, 4):
        drafter.armed, drafter.num_calls = (method, strike), 0
        for prompt, each in zip(prompts, params, strict=True):
            engine.add_request(prompt, each)
        results, num_errors = {}, 0
        while len(results) < len(prompts):
            try:
                events = engine.step()
            except LookupError:
                num_errors += 1
                continue
            results |= {event.index: event.result for event in events if event.result is not None}
        assert num_errors == 1
        for (_, result), truth in zip(sorted(results.items()), expected, strict=True):
            assert_same(result, truth)
        assert_idle(engine, num_free)
