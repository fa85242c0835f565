"""Law E of lists of drafters: rows of one batch drafted for in ways at random, and drafts of a model with a lookup's
behind them, sample the target's law."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from law_helpers import choose_ways
from test_law_e_distribution import (
    NUM_SAMPLES,
    VOCAB,
    Filters,
    K,
    MarkovDrafter,
    PointMassDrafter,
    build_pair,
    build_tiny,
    check_distribution,
    check_tally,
    exact_law,
    sample_engine,
    sample_rounds,
)
from torch import Tensor

from specengine.drafters import several
from specengine.drafters.base import DraftProposal, Way
from specengine.drafters.host import HostDrafter
from specengine.drafters.several import SeveralDrafters
from specengine.engine import Engine
from specengine.runtime.state import RunningBatch

# Ways of the list below; those with a lookup behind a model come last, and as often as all the others.
FIRST_TAIL = 4
EVERY_WAY = (0, 1, 2, 3, 4, 4, 5, 5)
# A round has three rows here, so that a tail behind a draft has one token.
OWN_DRAFTS = (0, 1, 1, 1, K)


class PointMassLookup(PointMassDrafter):
    """The same successors of a token always, also behind what another has drafted. Reads the last committed token from
    the state: sequence ids are slots here, or it has heard."""

    name = "lookup"

    def __init__(self, target: torch.nn.Module) -> None:
        super().__init__(target)
        self.last: dict[int, int] = {}

    def hear(self, sequence_id: int, tokens: Sequence[int], num_new: int) -> None:
        self.last[sequence_id] = tokens[-1]

    def follow(self, sequence_id: int, drafted: Sequence[int], limit: int) -> list[int]:
        first = int(self._likely[drafted[-1] if drafted else self.last[sequence_id]])
        return [(first + offset) % VOCAB for offset in range(limit)]


class RandomWays:
    """A list of drafters in rounds that no engine runs: every row of every round gets a way at random, which knows
    nothing of what is drawn."""

    def __init__(self, drafter: SeveralDrafters, lookup: PointMassLookup, ways: Sequence[int]) -> None:
        self._drafter, self._lookup, self._choice = drafter, lookup, ways
        self._chance = np.random.default_rng(3)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._drafter, name)

    def prepare(self, batch: RunningBatch, state: Any) -> Any:
        ways = self._chance.choice(self._choice, size=batch.size).tolist()
        num_own = self._chance.integers(len(OWN_DRAFTS), size=batch.size).tolist()
        self._ways = tuple((way, OWN_DRAFTS[own]) for way, own in zip(ways, num_own, strict=True))
        last = [length - 1 for length in batch.lengths]
        tokens = state.tokens[list(batch.host_slots), last].tolist()
        self._lookup.last = dict(zip(batch.sequence_ids, tokens, strict=True))
        return self._drafter.prepare(batch._replace(ways=self._ways), state)

    def propose(self, batch: RunningBatch, state: Any) -> DraftProposal:
        return self._drafter.propose(batch._replace(ways=self._ways), state)

    def observe(self, batch: RunningBatch, results: Any) -> None:
        self._drafter.observe(batch._replace(ways=self._ways), results)


@pytest.fixture(scope="module")
def target() -> torch.nn.Module:
    return build_tiny(seed=1)


def build_list(target: torch.nn.Module, patch: pytest.MonkeyPatch, ways: Sequence[int]) -> Engine:
    """Two models, draws from a table, and a lookup, in rounds of no engine. ways: those that rows may get"""
    lookup = PointMassLookup(target)
    engine = build_pair(target, [build_tiny(2), MarkovDrafter(), lookup, "self:1"])
    drafter = engine._drafter
    assert isinstance(drafter, SeveralDrafters)
    assert drafter.ways[FIRST_TAIL:] == (Way(0, 2), Way(3, 2))
    patch.setattr(HostDrafter, "hear", lambda *_: None)
    patch.setattr(engine, "_drafter", RandomWays(drafter, lookup, ways))
    return engine


@pytest.mark.parametrize(
    ("acceptance", "filters"),
    [
        ("rejection", Filters(1.0)),
        ("block", Filters(1.0)),
        ("coupled", Filters(1.3, 6, 0.9, 0.05)),
        pytest.param("rejection", Filters(1.3, 6, 0.9, 0.05), marks=pytest.mark.slow),
        pytest.param("block", Filters(0.8, 0, 0.98, 0.0, 1.3, 0.8, -0.5), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_rounds_of_ways_at_random_sample_the_targets_law(
    acceptance: str, filters: Filters, target: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    with build_list(target, monkeypatch, EVERY_WAY) as engine:
        samples = sample_rounds(engine, filters, acceptance, NUM_SAMPLES // 8)
    check_tally(samples)
    check_distribution(samples, exact_law(target, filters))


@pytest.mark.parametrize("acceptance", ["rejection", "block"])
def test_an_engine_with_a_tail_behind_a_model_samples_the_targets_law(
    acceptance: str, target: torch.nn.Module
) -> None:
    with build_pair(target, [build_tiny(2), PointMassLookup(target)]) as engine:
        # Ways: the model, the lookup, both. Which one comes depends on the seed, not on what was drawn.
        choose_ways(engine, lambda sequence, number, _: ((sequence.seed + number) % 4 % 3, 1 + number % 2))
        samples = sample_engine(engine, Filters(1.0), acceptance, NUM_SAMPLES // 25)
    check_tally(samples)
    check_distribution(samples, exact_law(target, Filters(1.0)))


# -- planted faults -----------------------------------------------------------------------------------------------


def tails_have_no_law(patch: pytest.MonkeyPatch) -> None:
    append = several._append

    def faulty(proposal: DraftProposal, row: int, start: int, tokens: list[int]) -> Tensor:
        return append(replace(proposal, logits=None), row, start, tokens)

    patch.setattr(several, "_append", faulty)


def tails_have_the_law_of_the_draft_before(patch: pytest.MonkeyPatch) -> None:
    append = several._append

    def faulty(proposal: DraftProposal, row: int, start: int, tokens: list[int]) -> Tensor:
        drafts = append(replace(proposal, logits=None), row, start, tokens)
        if start and proposal.logits is not None:
            assert proposal.log_probs is not None
            assert proposal.stats is not None
            for values in (proposal.log_probs, proposal.logits, proposal.stats):
                values[row, start : start + len(tokens)] = values[row, start - 1].clone()
        return drafts

    patch.setattr(several, "_append", faulty)


def all_rows_are_draws(patch: pytest.MonkeyPatch) -> None:
    propose = SeveralDrafters.propose

    def faulty(self: SeveralDrafters, batch: RunningBatch, state: Any) -> DraftProposal:
        return replace(propose(self, batch, state), has_law=None)

    patch.setattr(SeveralDrafters, "propose", faulty)


@pytest.mark.parametrize(
    ("plant", "ways", "acceptance"),
    [
        (tails_have_no_law, EVERY_WAY[FIRST_TAIL:], "rejection"),
        (tails_have_no_law, EVERY_WAY[FIRST_TAIL:], "block"),
        (tails_have_the_law_of_the_draft_before, EVERY_WAY[FIRST_TAIL:], "rejection"),
        (all_rows_are_draws, (0, 2), "rejection"),
    ],
)
def test_a_biased_list_is_noticed(
    plant: Callable[[pytest.MonkeyPatch], None],
    ways: Sequence[int],
    acceptance: str,
    target: torch.nn.Module,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with build_list(target, monkeypatch, ways) as engine:
        plant(monkeypatch)
        samples = sample_rounds(engine, Filters(1.0), acceptance, NUM_SAMPLES // 8)
    with pytest.raises(AssertionError):
        check_distribution(samples, exact_law(target, Filters(1.0)))
