"""filter_rows: exact thresholds, and distributions equal to float64's in total variation."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from types import ModuleType

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
)
from torch import Tensor

from specengine.kernels import reference
from specengine.kernels.types.rows import SamplingRows
from specengine.ops.backend import Backend

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
# For Triton's interpreter: no filter, greedy, top-k and top-p, top-p and min-p, min-p.
FEW_SETTINGS = [*SETTINGS[:2], SETTINGS[3], SETTINGS[5], SETTINGS[10]]


def columns(settings: list[tuple[float, int, float, float]]) -> SamplingRows:
    temperature, top_k, top_p, min_p = zip(*settings, strict=True)
    return SamplingRows.empty(len(settings))._replace(
        temperature=torch.tensor(temperature, dtype=torch.float32),
        top_k=torch.tensor(top_k, dtype=torch.int32),
        top_p=torch.tensor(top_p, dtype=torch.float32),
        min_p=torch.tensor(min_p, dtype=torch.float32),
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
    stats = op(logits, columns(settings))
    for row, (temperature, *filters) in enumerate(settings):
        if temperature == 0:
            continue
        scaled = logits[row] / torch.tensor(temperature)
        exact = exact_law(scaled, *filters)
        law = torch.where(scaled >= stats[row, 1], (scaled.double() - stats[row, 2].double()).exp(), 0.0)
        distance = 0.5 * float((law - exact).abs().sum())
        # The normaliser is one fp32 number: its rounding is the only error allowed.
        assert distance <= 2.0**-23 * max(1.0, float(stats[row, 2].abs())), (row, settings[row], distance)


def check_against_reference(
    op, logits: Tensor, settings: list[tuple[float, int, float, float]], atol: float = 0.0
) -> Tensor:
    """Maximum, threshold and error bit for bit, the normaliser up to one rounding; returns the statistics."""
    before = logits.clone()
    arguments = columns(settings)
    stats = op(logits, arguments)
    expected = reference.filter_rows(logits, arguments)
    assert torch.equal(stats[:, [0, 1, 3]], expected[:, [0, 1, 3]]), (stats, expected)
    assert torch.allclose(stats[:, 2], expected[:, 2], rtol=1.2e-7, atol=atol), (stats, expected)
    assert torch.equal(logits.nan_to_num(nan=7.0), before.nan_to_num(nan=7.0))
    return stats


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_thresholds_are_the_reference_s_exactly(every_ops: Backend, vocab_size: int) -> None:
    settings = FEW_SETTINGS if every_ops is TRITON and vocab_size != 129 else SETTINGS
    check_against_reference(
        every_ops.filter_rows, random_logits(len(settings), vocab_size, seed=vocab_size), settings
    )


@pytest.mark.parametrize("spread", [0.01, 0.5, 3.0, 30.0])
@pytest.mark.parametrize("vocab_size", [50, 1024, 50257])
def test_total_variation_against_float64(ops: Backend, vocab_size: int, spread: float) -> None:
    settings = SETTINGS
    if ops is TRITON:
        settings = SETTINGS[3:4] if vocab_size == 50257 else SETTINGS[3:5]
    check_total_variation(
        ops.filter_rows, random_logits(len(settings), vocab_size, vocab_size, spread), settings
    )


@pytest.mark.parametrize("vocab_size", [64, 1024, 8193])
def test_ties_at_the_threshold_are_kept_together(ops: Backend, vocab_size: int) -> None:
    """Logits rounded to 16 values: every threshold falls into a group of equals."""
    settings = SETTINGS if ops is NATIVE else SETTINGS[3:5]
    logits = (random_logits(len(settings), vocab_size) * 2).round() / 2
    check_total_variation(ops.filter_rows, logits, settings)
    arguments = columns(settings)
    assert torch.equal(
        ops.filter_rows(logits, arguments)[:, 1], reference.filter_rows(logits, arguments)[:, 1]
    )


def test_edges(every_ops: Backend) -> None:
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
    for setting in SETTINGS if every_ops is NATIVE else SETTINGS[5:6]:
        stats = check_against_reference(every_ops.filter_rows, logits, [setting] * 12, atol=1e-45)
    assert stats[:4, 3].tolist() == [1, 1, 1, 0]


def test_edges_of_several_tiles(every_ops: Backend) -> None:
    """What decides a row lies in its last tile, which holds eight tokens."""
    logits = random_logits(7, 8200)
    logits[0, 8199] = float("nan")
    logits[1, :8192] = NEGATIVE_INFINITY
    logits[2, :8199] = NEGATIVE_INFINITY
    logits[3, 8197] = float("inf")
    logits[4, 8192:] += 30.0
    logits[5] = 1e-42
    logits[6, 8192:] = NEGATIVE_INFINITY
    settings = [SETTINGS[0], *[(0.7, 5, 0.9, 0.0), (1.0, 0, 0.95, 0.01)] * 3]
    stats = check_against_reference(every_ops.filter_rows, logits, settings, atol=1e-45)
    assert stats[:, 3].tolist() == [1, 0, 0, 0, 0, 0, 0]


def test_extreme_temperatures(every_ops: Backend) -> None:
    """Below 1e-37 every scaled logit is infinite: the row has no distribution."""
    temperatures = (1e-38, 1e-30, 1e-3, 50.0, 1e6, 3e38)
    stats = check_against_reference(
        every_ops.filter_rows, random_logits(6, 250), [(value, 100, 0.9, 1e-30) for value in temperatures]
    )
    assert stats[:, 3].tolist() == [1, 0, 0, 0, 0, 0]


def test_a_row_keeps_its_bits_whatever_is_filtered_with_it(every_ops: Backend) -> None:
    is_native = every_ops is NATIVE
    num_rows, vocab_size = (64, 2000) if is_native else (3, 200)
    settings = [SETTINGS[(i + 2) % len(SETTINGS)] for i in range(num_rows)]
    packed = torch.tensor(settings, dtype=torch.float64)
    logits = random_logits(num_rows, vocab_size)

    def op(rows: Tensor) -> Tensor:
        """The settings travel as the first four columns of the rows."""
        settings = [(each[0], int(each[1]), each[2], each[3]) for each in rows[:, :4].tolist()]
        return every_ops.filter_rows(rows[:, 4:].float().contiguous(), columns(settings))

    assert_row_invariant(op, torch.cat((packed, logits.double()), dim=1), is_thorough=is_native)


def test_rows_need_not_be_adjacent(ops: Backend) -> None:
    logits = random_logits(6, 300)
    arguments = columns(SETTINGS[:3])
    expected = ops.filter_rows(logits[::2].contiguous(), arguments)
    assert torch.equal(ops.filter_rows(logits[::2], arguments), expected)
    assert torch.equal(ops.filter_rows(random_logits(6, 310)[::2, :300], arguments).isnan(), expected.isnan())
    with pytest.raises(ValueError, match="logits: expected"):
        ops.filter_rows(logits.T, columns(SETTINGS[:1] * 300))
    with pytest.raises(ValueError, match="top_k: expected"):
        ops.filter_rows(logits, SamplingRows.empty(6)._replace(top_k=torch.zeros(6).long()))


@pytest.mark.parametrize(
    "fault", ["top_p on unfiltered mass", "top_k off by one", "min_p of the raw temperature"]
)
def test_a_planted_fault_is_noticed(ops: Backend, fault: str) -> None:
    def faulty(logits: Tensor, rows: SamplingRows) -> Tensor:
        if fault == "top_k off by one":
            one_more = torch.where(rows.top_k > 0, rows.top_k + 1, 0)
            return ops.filter_rows(logits, rows._replace(top_k=one_more))
        if fault == "min_p of the raw temperature":
            return ops.filter_rows(logits, rows._replace(min_p=rows.min_p * 0.5))
        stats = ops.filter_rows(logits, rows._replace(top_p=torch.ones_like(rows.top_p)))
        alone = ops.filter_rows(logits, rows.without_filters()._replace(top_p=rows.top_p))
        threshold = torch.maximum(stats[:, 1], alone[:, 1])
        scaled = logits / rows.temperature.clamp_min(1e-9)[:, None]
        stats[:, 2] = scaled.masked_fill(scaled < threshold[:, None], NEGATIVE_INFINITY).logsumexp(-1)
        stats[:, 1] = threshold
        return stats

    settings = SETTINGS if ops is NATIVE else [SETTINGS[2], *FEW_SETTINGS]
    with pytest.raises(AssertionError):
        check_total_variation(faulty, random_logits(len(settings), 1024), settings)


# Triton


@pytest.fixture
def kernel() -> ModuleType:
    return importlib.import_module("specengine.kernels.filter_rows")


@pytest.fixture
def filled_memory() -> Iterator[None]:
    """`torch.empty` gives NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.triton
@pytest.mark.usefixtures("filled_memory")
def test_samples_that_mislead(monkeypatch: pytest.MonkeyPatch, kernel: ModuleType) -> None:
    """Sorted rows, few values, impossible tokens, a peak, every magnitude: with small tiles lists overflow and
    brackets are refuted. What lists held before changes nothing."""
    monkeypatch.setattr(kernel, "MAX_TILE", 512)
    logits = random_logits(9, 700)
    logits[0] = logits[0].sort().values
    logits[1] = logits[1].sort(descending=True).values
    logits[2] = torch.where(logits[2] < -58.0, -3.0, 2.0)
    logits[3] = -1.0
    logits[4, logits[4] < -55.0] = NEGATIVE_INFINITY
    logits[5, :100] += 20.0
    logits[6, 77] = 0.0
    logits[7] = (logits[7] + 60.0).sign() * (logits[7] + 60.0).mul(10.0).exp().clamp(max=3e38)
    settings = [
        (1.0, 0, 0.9, 0.0),
        (2.0, 600, 1.0, 0.0),
        (1.0, 0, 0.999, 0.0),
        (0.7, 699, 0.95, 0.0),
        (1.0, 400, 0.9, 0.0),
        (1.0, 40, 0.95, 0.0),
        (1.0, 650, 0.999999, 0.0),
        (1.0, 300, 1.0, 0.0),
        (5.0, 500, 0.9, 0.001),
    ]
    check_against_reference(TRITON.filter_rows, logits, settings)


@pytest.mark.triton
@pytest.mark.usefixtures("filled_memory")
def test_padded_rows_are_left_alone() -> None:
    logits, arguments = random_logits(4, 200), columns(SETTINGS[2:6])
    whole = TRITON.filter_rows(logits, arguments)
    logits[2:] = float("inf")
    num_rows = torch.tensor([2], dtype=torch.int32, device=DEVICE)
    for _ in range(2):
        stats = TRITON.filter_rows(logits, arguments, num_rows=num_rows)
        assert torch.equal(stats[:2], whole[:2])
        assert stats[2:].isnan().all()


@pytest.mark.triton
@pytest.mark.skipif(DEVICE.type != "cpu", reason="passes are counted in Triton's interpreter")
def test_a_typical_row_takes_few_passes(monkeypatch: pytest.MonkeyPatch, kernel: ModuleType) -> None:
    lengths: list[int] = []
    for name in ("row_statistics", "weigh_bracket"):
        function = getattr(kernel, name)

        def counted(source_ptr, length, *rest, function=function):
            lengths.append(int(length.handle.data.item()))
            return function(source_ptr, length, *rest)

        monkeypatch.setattr(kernel, name, counted)
    peaked = random_logits(1, 50257) * 2
    for setting, expected in [
        ((1.0, 0, 1.0, 0.0), [50257]),
        ((0.0, 50, 0.95, 0.0), [50257]),
        ((0.8, 0, 1.0, 0.1), [50257, 50257]),
        ((0.8, 50, 1.0, 0.0), [50257, 50257, 4096]),
        ((0.8, 50, 0.95, 0.0), [50257, 50257, 4096, 4096]),
        ((0.8, 0, 0.95, 0.0), [50257, 50257, 4096]),
    ]:
        lengths.clear()
        TRITON.filter_rows(peaked, columns([setting]))
        assert lengths == expected, setting


@pytest.mark.triton
def test_an_ignored_tail_tile_is_noticed(monkeypatch: pytest.MonkeyPatch, kernel: ModuleType) -> None:
    launch = kernel.launch

    def launch_less(*arguments, **constants):
        constants["VOCAB"] = constants["VOCAB"] // constants["TILE"] * constants["TILE"]
        launch(*arguments, **constants)

    monkeypatch.setattr(kernel, "launch", launch_less)
    with pytest.raises(AssertionError):
        check_against_reference(TRITON.filter_rows, random_logits(1, 8200, spread=0.01), SETTINGS[:1])
    with pytest.raises(AssertionError):
        check_total_variation(TRITON.filter_rows, random_logits(1, 8200, spread=0.01), SETTINGS[4:5])
