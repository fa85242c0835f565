"""filter_rows: exact thresholds, and distributions equal to float64's in total variation."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import (
    NATIVE,
    NEGATIVE_INFINITY,
    VOCABULARIES,
    assert_row_invariant,
    random_logits,
)
from torch import Tensor

from specengine.kernels import reference

# temperature, top_k, top_p, min_p
SETTINGS = [
    (1.0, 0, 1.0, 0.0),
    (0.0, 5, 0.5, 0.5),
    (0.7, 5, 1.0, 0.0),
    (1.0, 50, 0.9, 0.0),
    (1.3, 0, 0.9, 0.0),
    (0.5, 0, 0.95, 0.02),
    (1.0, 1, 1.0, 0.0),
    (2.5, 300, 0.5, 0.0),
    (1.0, 7000, 0.99, 0.001),
    (0.9, 0, 1e-6, 0.0),
    (1.0, 0, 1.0, 0.1),
    (1.0, 0, 1.0, 1.0),
    (1e-3, 40, 0.9, 0.0),
    (1.0, 2**31 - 1, 0.999999, 0.0),
]


def columns(settings: list[tuple[float, int, float, float]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    temperature, top_k, top_p, min_p = zip(*settings, strict=True)
    return (
        torch.tensor(temperature, dtype=torch.float32),
        torch.tensor(top_k, dtype=torch.int32),
        torch.tensor(top_p, dtype=torch.float32),
        torch.tensor(min_p, dtype=torch.float32),
    )


def exact_law(scaled: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """The filtered distribution of one row in float64, by sorting: independent of thresholds."""
    values, order = scaled.double().sort(descending=True, stable=True)
    is_kept = torch.ones_like(values, dtype=torch.bool)
    if top_k > 0:
        is_kept &= values >= values[min(top_k, values.numel()) - 1]
    mass = torch.where(is_kept, (values - values[0]).exp(), 0.0)
    mass /= mass.sum()
    if top_p < 1:
        last = int((mass.cumsum(0) - mass < top_p).nonzero()[-1])
        is_kept &= values >= values[last]
    if min_p > 0:
        is_kept &= values >= torch.tensor(float(values[0]) + math.log(min_p), dtype=torch.float32).double()
    mass = torch.where(is_kept, (values - values[0]).exp(), 0.0)
    law = torch.zeros_like(mass)
    law[order] = mass / mass.sum()
    return law


def check_total_variation(op, logits: Tensor, settings: list[tuple[float, int, float, float]]) -> None:
    temperature, top_k, top_p, min_p = columns(settings)
    stats = op(logits, temperature, top_k, top_p, min_p)
    for row in range(logits.shape[0]):
        if temperature[row] == 0:
            continue
        scaled = logits[row] / temperature[row]
        exact = exact_law(scaled, int(top_k[row]), float(top_p[row]), float(min_p[row]))
        law = torch.where(scaled >= stats[row, 1], (scaled.double() - stats[row, 2].double()).exp(), 0.0)
        distance = 0.5 * float((law - exact).abs().sum())
        # The normaliser is one fp32 number: its rounding is the only error allowed.
        assert distance <= 2.0**-23 * max(1.0, float(stats[row, 2].abs())), (row, settings[row], distance)


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.usefixtures("instruction_set")
def test_thresholds_are_the_reference_s_exactly(vocab_size: int) -> None:
    logits = random_logits(len(SETTINGS), vocab_size, seed=vocab_size)
    before = logits.clone()
    arguments = columns(SETTINGS)
    stats = NATIVE.filter_rows(logits, *arguments)
    expected = reference.filter_rows(logits, *arguments)
    assert torch.equal(stats[:, [0, 1, 3]], expected[:, [0, 1, 3]])
    assert torch.allclose(stats[:, 2], expected[:, 2], rtol=1.2e-7, atol=0)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("spread", [0.01, 0.5, 3.0, 30.0])
@pytest.mark.parametrize("vocab_size", [50, 1024, 50257])
def test_total_variation_against_float64(vocab_size: int, spread: float) -> None:
    check_total_variation(
        NATIVE.filter_rows, random_logits(len(SETTINGS), vocab_size, vocab_size, spread), SETTINGS
    )


@pytest.mark.parametrize("vocab_size", [64, 1024, 8193])
def test_ties_at_the_threshold_are_kept_together(vocab_size: int) -> None:
    """Logits rounded to 16 values: every threshold falls into a group of equals."""
    logits = (random_logits(len(SETTINGS), vocab_size) * 2).round() / 2
    check_total_variation(NATIVE.filter_rows, logits, SETTINGS)
    arguments = columns(SETTINGS)
    assert torch.equal(
        NATIVE.filter_rows(logits, *arguments)[:, 1], reference.filter_rows(logits, *arguments)[:, 1]
    )


@pytest.mark.usefixtures("instruction_set")
def test_edges() -> None:
    vocab_size = 700
    logits = random_logits(12, vocab_size)
    logits[0, 3] = float("nan")
    logits[1] = NEGATIVE_INFINITY
    logits[2] = float("nan")
    logits[3, 5] = float("inf")
    logits[4, :] = NEGATIVE_INFINITY
    logits[4, -1] = -3.0
    logits[5] = torch.full((vocab_size,), 1e-42)
    logits[6] = 0.0
    logits[7] = torch.where(torch.arange(vocab_size) % 2 == 0, 0.0, -0.0)
    logits[8] = -3e38
    logits[9, 100:] = NEGATIVE_INFINITY
    logits[10] = torch.linspace(-1e4, 1e4, vocab_size)
    logits[11, 640:] = 80.0
    for setting in SETTINGS:
        arguments = columns([setting] * 12)
        stats = NATIVE.filter_rows(logits, *arguments)
        expected = reference.filter_rows(logits, *arguments)
        assert torch.equal(stats[:, [0, 1, 3]], expected[:, [0, 1, 3]]), setting
        assert torch.allclose(stats[:, 2], expected[:, 2], rtol=1.2e-7, atol=1e-45), setting
    assert stats[:4, 3].tolist() == [1, 1, 1, 0]


@pytest.mark.usefixtures("instruction_set")
def test_a_row_keeps_its_bits_whatever_is_filtered_with_it() -> None:
    settings = [SETTINGS[i % len(SETTINGS)] for i in range(64)]
    packed = torch.cat((torch.stack([column.double() for column in columns(settings)], dim=1),), dim=1)
    logits = random_logits(64, 2000)

    def op(rows: Tensor) -> Tensor:
        """The settings travel as the first four columns of the rows."""
        temperature, top_k, top_p, min_p = rows[:, :4].T.double().contiguous().unbind()
        return NATIVE.filter_rows(
            rows[:, 4:].float().contiguous(), temperature.float(), top_k.int(), top_p.float(), min_p.float()
        )

    assert_row_invariant(op, torch.cat((packed, logits.double()), dim=1))


def test_rows_need_not_be_adjacent() -> None:
    logits = random_logits(6, 300)
    arguments = columns(SETTINGS[:3])
    expected = NATIVE.filter_rows(logits[::2].contiguous(), *arguments)
    assert torch.equal(NATIVE.filter_rows(logits[::2], *arguments), expected)
    with pytest.raises(ValueError, match="logits: expected rows with stride 1"):
        NATIVE.filter_rows(logits.T, *columns(SETTINGS[:1] * 300))
    with pytest.raises(ValueError, match="top_k: expected"):
        NATIVE.filter_rows(logits, torch.ones(6), torch.zeros(6).long(), torch.ones(6), torch.zeros(6))


@pytest.mark.parametrize(
    "fault", ["top_p on unfiltered mass", "top_k off by one", "min_p of the raw temperature"]
)
def test_a_planted_fault_is_noticed(fault: str) -> None:
    def faulty(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
        off = torch.zeros_like(top_k), torch.ones_like(top_p), torch.zeros_like(min_p)
        if fault == "top_k off by one":
            return NATIVE.filter_rows(logits, temperature, torch.where(top_k > 0, top_k + 1, 0), top_p, min_p)
        if fault == "min_p of the raw temperature":
            return NATIVE.filter_rows(logits, temperature, top_k, top_p, min_p * 0.5)
        stats = NATIVE.filter_rows(logits, temperature, top_k, off[1], min_p)
        alone = NATIVE.filter_rows(logits, temperature, off[0], top_p, off[2])
        threshold = torch.maximum(stats[:, 1], alone[:, 1])
        scaled = logits / temperature.clamp_min(1e-9)[:, None]
        stats[:, 2] = scaled.masked_fill(scaled < threshold[:, None], NEGATIVE_INFINITY).logsumexp(-1)
        stats[:, 1] = threshold
        return stats

    with pytest.raises(AssertionError):
        check_total_variation(faulty, random_logits(len(SETTINGS), 1024), SETTINGS)
