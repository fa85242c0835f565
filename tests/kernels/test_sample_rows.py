"""sample_rows: the Gumbel race of float64 up to near-ties, and never an id that must not win."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator

import pytest
import torch
from kernel_cases import (
    DEVICE,
    NATIVE,
    NEGATIVE_INFINITY,
    TRITON,
    VOCABULARIES,
    assert_row_invariant,
    random_logits,
    random_seeds,
    unfiltered_stats,
)
from torch import Tensor

from specengine import rng
from specengine.kernels import reference
from specengine.kernels.reference.filter_rows import scale_rows
from specengine.kernels.types.rows import SamplingRows
from specengine.ops.backend import Backend


def race_scores(logits: Tensor, stats: Tensor, rows: SamplingRows, noise: tuple) -> Tensor:
    """z / T + g in float64 over the kept tokens; z of greedy rows."""
    temperature = rows.temperature
    scaled = scale_rows(logits, temperature)
    kept = scaled.masked_fill(scaled < stats[:, 1, None], NEGATIVE_INFINITY).double()
    positions, stream, round_base = noise
    bits = rng.vocabulary_bits(rows.seeds, positions, stream, round_base, logits.shape[1])
    return torch.where(temperature[:, None] > 0, kept + rng.gumbel(bits, torch.float64), scaled.double())


def assert_wins(tokens: Tensor, scores: Tensor) -> None:
    """Every token's score is the row's best up to fp32 rounding of scores near 60."""
    chosen = scores.gather(1, tokens.long()[:, None])[:, 0]
    best = scores.max(dim=1).values
    is_won = (chosen >= best - 4e-5 * best.abs().clamp(1, 1e3)) | (best == NEGATIVE_INFINITY)
    assert is_won.all(), (tokens[~is_won], chosen[~is_won], best[~is_won])


def mixed_case(num_rows: int, vocab_size: int) -> tuple[Tensor, Tensor, SamplingRows, tuple]:
    logits = random_logits(num_rows, vocab_size, seed=vocab_size)
    rows = SamplingRows.empty(num_rows)._replace(
        temperature=torch.tensor([0.0, 1.0, 0.6, 1.4]).repeat(num_rows)[:num_rows],
        top_k=torch.tensor([0, 0, 20, 3, 0], dtype=torch.int32).repeat(num_rows)[:num_rows],
        top_p=torch.tensor([1.0, 0.9, 1.0]).repeat(num_rows)[:num_rows],
        seeds=random_seeds(num_rows),
    )
    stats = NATIVE.filter_rows(logits, rows)
    generator = torch.Generator().manual_seed(num_rows)
    positions = torch.randint(0, 2**31 - 1, (num_rows,), generator=generator, dtype=torch.int32)
    return logits, stats, rows, (positions, 1, positions.flip(0))


def check_race(op, num_rows: int, vocab_size: int) -> None:
    logits, stats, rows, noise = mixed_case(num_rows, vocab_size)
    before, temperature = logits.clone(), rows.temperature
    tokens, log_probs = op(logits, stats, rows, *noise)
    assert_wins(tokens, race_scores(logits, stats, rows, noise))
    scaled = scale_rows(logits, temperature)
    assert (scaled.gather(1, tokens.long()[:, None])[:, 0] >= stats[:, 1]).all()
    expected = scaled.gather(1, tokens.long()[:, None])[:, 0] - stats[:, 2]
    assert torch.equal(log_probs, torch.where(temperature > 0, expected, 0.0))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_the_race_is_float64_s(every_ops: Backend, vocab_size: int) -> None:
    num_rows = 64 if vocab_size < 1000 else 15
    check_race(every_ops.sample_rows, num_rows if every_ops is NATIVE else num_rows // 5, vocab_size)


@pytest.mark.triton
def test_triton_draws_what_the_reference_draws() -> None:
    for num_rows, vocab_size in ((24, 300), (4, 8200)):
        case = mixed_case(num_rows, vocab_size)
        expected, _ = reference.sample_rows(*case[:3], *case[3])
        tokens, _ = TRITON.sample_rows(*case[:3], *case[3])
        assert torch.equal(tokens, expected)


def test_peaked_rows_skip_no_winner(every_ops: Backend) -> None:
    """Most tokens are skipped without a logarithm: none of them may have been the winner."""
    count = 200 if every_ops is NATIVE else 8
    for spread in (0.0, 0.1, 1.0, 10.0, 100.0):
        logits = random_logits(count, 1000, seed=int(spread * 10), spread=spread)
        rows = SamplingRows.empty(count)._replace(temperature=torch.ones(count), seeds=random_seeds(count))
        stats = unfiltered_stats(logits, rows.temperature)
        noise = (torch.arange(count).int(), 0, torch.zeros(count, dtype=torch.int32))
        tokens, _ = every_ops.sample_rows(logits, stats, rows, *noise)
        assert_wins(tokens, race_scores(logits, stats, rows, noise))


def test_edges(every_ops: Backend) -> None:
    vocab_size = 8193
    logits = random_logits(8, vocab_size)
    logits[0] = NEGATIVE_INFINITY
    logits[1] = float("nan")
    logits[2, 17] = float("inf")
    logits[3, :-1] = NEGATIVE_INFINITY
    logits[4] = 1e-42
    logits[5] = float("nan")
    logits[5, 4000] = -5.0
    logits[6] = -3e38
    logits[7, 8192:] = NEGATIVE_INFINITY
    for value in (0.0, 1e-3, 1.0, 50.0):
        rows = SamplingRows.empty(8)._replace(temperature=torch.full((8,), value), seeds=random_seeds(8))
        stats = unfiltered_stats(logits, rows.temperature)
        zeros = torch.zeros(8, dtype=torch.int32)
        tokens, _ = every_ops.sample_rows(logits, stats, rows, zeros, 0, zeros)
        assert tokens[[0, 1]].tolist() == [0, 0]
        assert tokens[2] == 17
        assert tokens[3] == 8192
        assert tokens[5] == 4000
        assert ((tokens >= 0) & (tokens < vocab_size)).all()
        assert tokens[7] != 8192
        assert torch.equal(stats[:, 3] > 0, torch.tensor([1, 1, 0, 0, 0, 1, int(value == 1e-3), 0]) > 0)


def test_ties_go_to_the_lowest_id(every_ops: Backend) -> None:
    """Greedy ties; and two tokens whose equal noise cannot separate them do not exist in a race."""
    logits = torch.full((5, 1000), -2.0)
    for row, token in enumerate((0, 5, 130, 511, 990)):
        logits[row, token:] = 7.0
    zeros = torch.zeros(5, dtype=torch.int32)
    tokens, _ = every_ops.sample_rows(
        logits, unfiltered_stats(logits, torch.zeros(5)), SamplingRows.empty(5), zeros, 0, zeros
    )
    assert tokens.tolist() == [0, 5, 130, 511, 990]


def test_a_row_keeps_its_draw_whatever_is_drawn_with_it(ops: Backend) -> None:
    logits, _, _, _ = mixed_case(64 if ops is NATIVE else 8, 500)

    def op(rows: Tensor) -> Tensor:
        temperature = (rows[:, 0].abs() % 1.5).clamp_min(0.1)
        stats = unfiltered_stats(rows, temperature)
        places = (rows[:, 1].abs() * 1000).int()
        drawn = SamplingRows.empty(len(rows))._replace(temperature=temperature, seeds=places.long() << 33)
        tokens, log_probs = ops.sample_rows(rows, stats, drawn, places, 0, places)
        return torch.stack((tokens.double(), log_probs.double()), dim=1)

    assert_row_invariant(op, logits)


def chi_square(tokens: Tensor, law: Tensor) -> float:
    expected = law * tokens.numel()
    counts = torch.bincount(tokens.long(), minlength=law.numel()).double()
    assert float(counts[law == 0].sum()) == 0
    return float(((counts - expected) ** 2 / expected)[law > 0].sum())


def check_distribution(op) -> None:
    """40,000 draws of a filtered 200-token law; 40 more degrees of freedom than six sigmas allow fail."""
    num_rows, vocab_size = 40000, 200
    row = random_logits(1, vocab_size, spread=1.5)
    logits = row.expand(num_rows, -1)
    rows = SamplingRows.empty(num_rows)._replace(
        temperature=torch.full((num_rows,), 0.8),
        top_k=torch.full((num_rows,), 50, dtype=torch.int32),
        top_p=torch.full((num_rows,), 0.97),
        seeds=random_seeds(1).expand(num_rows),
    )
    one = NATIVE.filter_rows(row, rows.take(slice(1)))
    scaled = (row[0] / 0.8).double()
    law = torch.where(scaled >= one[0, 1].double(), (scaled - one[0, 2].double()).exp(), 0.0)
    positions = torch.arange(num_rows).int()
    tokens, _ = op(logits, one.expand(num_rows, -1), rows, positions, 0, torch.zeros_like(positions))
    freedom = int((law > 0).sum()) - 1
    assert chi_square(tokens, law) < freedom + 6 * math.sqrt(2 * freedom)


def test_draws_follow_the_law() -> None:
    check_distribution(NATIVE.sample_rows)


@pytest.mark.parametrize("fault", ["filter ignored", "temperature ignored", "noise shared by positions"])
def test_a_planted_fault_in_the_law_is_noticed(fault: str) -> None:
    def faulty(logits, stats, rows, positions, stream, round_base):
        if fault == "filter ignored":
            stats = stats * torch.tensor([1.0, 1e30, 1.0, 1.0])
        if fault == "temperature ignored":
            rows = rows._replace(temperature=torch.ones_like(rows.temperature))
        if fault == "noise shared by positions":
            positions = positions // 100
        return NATIVE.sample_rows(logits, stats, rows, positions, stream, round_base)

    with pytest.raises(AssertionError):
        check_distribution(faulty)


@pytest.mark.parametrize(
    "fault", ["stream", "round base", "position", "seed's high half", "row", "filter ignored"]
)
def test_a_planted_fault_in_the_draws_is_noticed(ops: Backend, fault: str) -> None:
    def faulty(logits, stats, rows, positions, stream, round_base):
        if fault == "stream":
            stream = 0
        if fault == "round base":
            round_base = torch.zeros_like(round_base)
        if fault == "position":
            positions = positions + 1
        if fault == "seed's high half":
            rows = rows._replace(seeds=rows.seeds & 0xFFFFFFFF)
        if fault == "row":
            logits = logits.roll(1, dims=0)
        if fault == "filter ignored":
            stats = stats * torch.tensor([1.0, 1e30, 1.0, 1.0])
        return ops.sample_rows(logits, stats, rows, positions, stream, round_base)

    check_race(ops.sample_rows, 16, 200)
    with pytest.raises(AssertionError):
        check_race(faulty, 16, 200)


def test_strided_rows_and_wrong_arguments(ops: Backend) -> None:
    logits, stats, rows, noise = mixed_case(5, 70)
    wide = torch.full((5, 100), 1e9)
    wide[:, :70] = logits
    for actual, expected in zip(
        ops.sample_rows(wide[:, :70], stats, rows, *noise),
        ops.sample_rows(logits, stats, rows, *noise),
        strict=True,
    ):
        assert torch.equal(actual, expected)
    wrong = {
        "logits: expected": (logits.T, stats, rows, *noise),
        "stats: expected": (logits, stats[:-1], rows, *noise),
        "temperature: expected": (
            logits,
            stats,
            rows._replace(temperature=rows.temperature.double()),
            *noise,
        ),
        "seeds: expected": (logits, stats, rows._replace(seeds=rows.seeds.int()), *noise),
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=message):
            ops.sample_rows(*arguments)


@pytest.fixture
def shared_workspace(monkeypatch: pytest.MonkeyPatch) -> dict[torch.dtype, Tensor]:
    """The zeroed memory of Triton's sample_rows, the same for every call."""
    kept: dict[torch.dtype, Tensor] = {}

    def zeroed(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return kept.setdefault(dtype, torch.zeros(4096, dtype=dtype, device=device))

    monkeypatch.setattr(importlib.import_module("specengine.kernels.sample_rows"), "zeroed", zeroed)
    return kept


@pytest.fixture
def filled_memory() -> Iterator[None]:
    """`torch.empty` gives the largest integers and NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check_padding(op, workspace: dict[torch.dtype, Tensor]) -> None:
    logits, stats, rows, noise = mixed_case(6, 8200)
    whole = TRITON.sample_rows(logits, stats, rows, *noise)
    logits[4:], rows.temperature[4:], stats[4:] = float("nan"), float("nan"), float("nan")
    num_rows = torch.tensor([4], dtype=torch.int32, device=DEVICE)
    for _ in range(2):
        tokens, log_probs = op(logits, stats, rows, *noise, num_rows=num_rows)
        assert torch.equal(tokens[:4], whole[0][:4])
        assert torch.equal(log_probs[:4], whole[1][:4])
        assert (tokens[4:] == 2**31 - 1).all()
        assert log_probs[4:].isnan().all()
        assert not any(memory.any() for memory in workspace.values())


@pytest.mark.triton
@pytest.mark.usefixtures("filled_memory")
def test_padded_rows_are_left_alone_and_the_workspace_is_zero_again(
    shared_workspace: dict[torch.dtype, Tensor],
) -> None:
    check_padding(TRITON.sample_rows, shared_workspace)

    def pays_no_attention(*arguments, num_rows):
        return TRITON.sample_rows(*arguments)

    with pytest.raises(AssertionError):
        check_padding(pays_no_attention, shared_workspace)


@pytest.mark.triton
def test_an_ignored_tail_tile_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("specengine.kernels.sample_rows")
    monkeypatch.setattr(module, "ceil_div", lambda value, divisor: value // divisor)
    with pytest.raises(AssertionError):
        check_race(TRITON.sample_rows, 16, 12000)
