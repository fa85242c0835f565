"""The harness itself, on a GPU and beside a FlashInfer that are not there."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import flashinfer_rivals
import gpu_timing
import pytest
import torch
from attention_cases import build_case
from gpu_timing import MAX_CALLS, MIN_CALLS, REPLAYS, WARM_UP_REPLAYS, DeviceClock, Gpu
from kernel_cases import TRITON, random_layer, random_rows
from measure import Report, Subject, append_rows
from timing import Call
from torch import Tensor
from tune import Notes

from specengine import _C
from specengine.kernels import reference
from specengine.ops.load import load_backend

SECONDS = {"ours": 64e-6, "torch": 640e-6}  # of a replay


class FakeDevice:
    """Calls say their names, into `events`, and a replay takes that name's SECONDS."""

    name = "a GPU that is not there"
    device = torch.device("cpu")
    l2_bytes = 1 << 20

    def __init__(self, cost: float) -> None:
        self.events: list[str] = []
        self._cost = cost

    def cost(self, call: Call) -> float:
        call(0)
        return self._cost

    def capture(self, calls: Callable[[], None]) -> Callable[[], None]:
        self.events.clear()
        calls()
        name = self.events[0] if self.events else "copy"
        return lambda: self.events.append(f"replay {name}")

    def seconds(self, replay: Callable[[], None]) -> float:
        replay()
        return SECONDS.get(self.events[-1].removeprefix("replay "), 1.0)

    def says(self, name: str) -> Call:
        return lambda turn: self.events.append(name)


class FakeBenchmark:
    """pytest-benchmark's part: rounds with a setup before each, by its timer."""

    def __init__(self, clock: DeviceClock) -> None:
        self.extra_info: dict[str, Any] = {}
        self.seconds: list[float] = []
        self._clock = clock

    def pedantic(
        self, target: Callable[[], None], setup: Callable[[], None], rounds: int, warmup_rounds: int
    ) -> None:
        for _ in range(warmup_rounds + rounds):
            setup()
            start = self._clock()
            target()
            self.seconds.append(self._clock() - start)


def build_gpu(cost: float = 1e-6) -> tuple[Gpu, FakeDevice, FakeBenchmark]:
    device, clock = FakeDevice(cost), DeviceClock()
    return Gpu(device, load_backend("reference", device.device), clock), device, FakeBenchmark(clock)


def missing(turn: int) -> None:
    raise ModuleNotFoundError("No module named 'rival'\nand more")


def test_replays_take_turns_and_a_missing_rival_is_a_note() -> None:
    gpu, device, benchmark = build_gpu()
    rivals = {"missing": missing, "torch": device.says("torch")}
    measured = gpu.measure(benchmark, device.says("ours"), rivals)
    assert measured.seconds == [SECONDS["ours"] / MAX_CALLS] * REPLAYS
    assert measured.rivals == {"torch": [SECONDS["torch"] / MAX_CALLS] * REPLAYS}
    assert measured.notes == ("missing: ModuleNotFoundError: No module named 'rival'",)
    replays = [event for event in device.events if event.startswith("replay")]
    assert replays == ["replay torch", "replay ours"] * (WARM_UP_REPLAYS + REPLAYS)
    assert benchmark.seconds == pytest.approx([SECONDS["ours"] / MAX_CALLS] * len(benchmark.seconds))


def test_slow_calls_share_a_graph_with_fewer_others() -> None:
    gpu, device, benchmark = build_gpu(cost=1.0)
    measured = gpu.measure(benchmark, device.says("ours"), {})
    assert measured.seconds[0] == SECONDS["ours"] / MIN_CALLS


def test_copies_outgrow_the_cache_twice_or_serve_a_call_each() -> None:
    gpu, device, _ = build_gpu()
    assert [gpu.num_copies(size) for size in (1, device.l2_bytes, 100 * device.l2_bytes)] == [MAX_CALLS, 3, 2]


def test_rows_say_what_was_measured_on_what(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_timing, "COPY_BYTES", 1 << 10)
    gpu, device, benchmark = build_gpu()
    report = Report()
    subject = Subject("an_op", "1x1", rows=9, num_bytes=3000, target_us=3.0)
    rivals = {"torch": device.says("torch"), "missing": missing}
    report.compare(benchmark, subject, device.says("ours"), rivals, timer=gpu)
    report.append_to(tmp_path / "rows.jsonl")
    row = json.loads((tmp_path / "rows.jsonl").read_text(encoding="utf-8"))
    assert (row["machine"], row["us"]["median"], row["torch_us"]["median"]) == (device.name, 1.0, 10.0)
    assert (row["gigabytes_per_second"], row["target_us"], row["launches"]) == (3.0, 3.0, 0)
    assert row["share"] == pytest.approx(3.0 / (2 << 10) * 1e9, rel=1e-3)
    assert {"torch", "triton", "commit", "copy_bandwidth", "notes"} <= set(row)
    head, columns, cells, *notes = report.lines()
    assert head.startswith(device.name)
    assert columns.split()[:6] == ["op", "shape", "rows", "launches", "target", "us"]
    assert cells.split()[-1] == "10.00"
    assert notes == ["an_op: missing: ModuleNotFoundError: No module named 'rival'"]


def test_every_row_names_the_processor_and_its_instruction_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of the native ops, of a GPU's, as pytest-benchmark keeps them, and in files, whoever writes them."""
    monkeypatch.setattr(gpu_timing, "COPY_BYTES", 1 << 10)
    expected = _C.build_info()["instruction_set"]
    gpu, device, benchmark = build_gpu()
    report = Report(1)
    report.compare(benchmark, Subject("an_op", "1x1"), device.says("ours"), {}, timer=gpu)
    assert benchmark.extra_info["instruction_set"] == expected
    benchmark.stats = SimpleNamespace(stats=SimpleNamespace(data=[1.0]))  # type: ignore[attr-defined]
    report.record(benchmark, Subject("an_op", "1x1"), calls_per_round=1)
    heads = [line for line in report.lines() if device.name in line or f", {expected}, " in line]
    assert len(heads) == 2, "the device's, and the processor's with its instruction set"
    path = tmp_path / "rows.jsonl"
    report.append_to(path)
    append_rows([{"kind": "any"}, {"kind": "a peer's", "instruction_set": "its own"}], path)
    Notes(tmp_path / "notes.jsonl", {}).add("copy", "tune", 1)
    files = (path, tmp_path / "notes.jsonl")
    rows = [json.loads(line) for each in files for line in each.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 5
    assert all(row["processor"] for row in rows)
    said = [row["instruction_set"] for row in rows]
    assert said == [expected, expected, expected, "its own", expected]


@pytest.mark.triton
def test_launches_are_counted() -> None:
    layer, x = random_layer(32, 16, torch.float32, ops=TRITON), random_rows(2, 32)

    def twice(turn: int) -> None:
        for _ in range(2):
            TRITON.linear_residual(x, layer.packed, x[:, :16].contiguous())

    assert gpu_timing.count_launches(twice) == 2


class FakeWrapper:
    """FlashInfer's interface of paged attention: pages, and queries where there are several, by indptr."""

    def __init__(self, workspace: Tensor, kv_layout: str) -> None:
        assert kv_layout == "HND"

    def plan(self, *arguments: Any, causal: bool = True, q_data_type: torch.dtype) -> None:
        (*q_indptr, indptr, indices, last_page_len), sizes = arguments[:-4], arguments[-4:]
        num_heads, num_kv_heads, self.head_dim, page_size = sizes
        assert (num_heads, num_kv_heads) == (16, 16)
        pages = [indices[first:last] for first, last in itertools.pairwise(indptr)]
        lengths = torch.tensor([(len(own) - 1) * page_size for own in pages]) + last_page_len
        q_start = q_indptr[0] if q_indptr else torch.arange(len(pages) + 1)
        self.layout = (torch.stack(pages), torch.arange(len(pages)), q_start, lengths)

    def run(self, query: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        out = reference.paged_attention(query.float(), torch.stack(cache), *self.layout)
        return out.unflatten(1, (-1, self.head_dim))


@pytest.mark.parametrize("q_len", [1, 5])
def test_flashinfer_attends_to_the_same(monkeypatch: pytest.MonkeyPatch, q_len: int) -> None:
    fake = ModuleType("flashinfer")
    fake.BatchDecodeWithPagedKVCacheWrapper = fake.BatchPrefillWithPagedKVCacheWrapper = FakeWrapper
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    case = build_case((16, 64), torch.float16, (2, q_len, 64), lambda _: 2, torch.device("cpu"))
    exact = case.run(reference.paged_attention, case.query.double(), 0)

    def attend(blocks: Tensor) -> Tensor:
        query = case.query.to(case.caches.dtype)
        return flashinfer_rivals.attention(query, case.cache_at, blocks, exact)["flashinfer"](0)

    attend(case.blocks)
    with pytest.raises(AssertionError):
        attend(case.blocks.roll(1, dims=0))


def test_another_chain_sampling_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = ModuleType("flashinfer.sampling")
    fake.softmax = torch.softmax
    fake.chain_speculative_sampling = lambda draft_probs, draft_token_ids, uniform_samples: None
    monkeypatch.setitem(sys.modules, "flashinfer.sampling", fake)
    empty = torch.zeros(1, 2, 8)
    [call] = flashinfer_rivals.verify_chain(lambda _: empty, lambda _: empty, lambda _: empty).values()
    with pytest.raises(TypeError, match="takes uniform_samples"):
        call(0)
