"""Where the time of decoding goes: `specengine profile`. docs/profiling.md tells how to read it.

Three generations: one warms up, one is measured, one is traced, since tracing slows what it looks at. On a CPU the
second is timed, part by part. On CUDA the host only queues work: there the parts are what the device was busy with by
the trace, and the host's part is the time in which it had nothing to do.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from specengine import ranges
from specengine.call import Call
from specengine.engine import Engine
from specengine.errors import SpecEngineError
from specengine.measure.timeline import DECODE, Part, PartTimes, TraceRanges, device_parts, read_trace
from specengine.outputs import GenerationResult
from specengine.runtime.graphs import GraphReport
from specengine.runtime.sequence import MAX_ROUNDS_UNREAD


@dataclass(frozen=True)
class Memory:
    """Bytes. weights: by model; kv_reserved: what the KV cache may grow to; kv_used: what this text takes of it.

    peak:         the most that was in use while decoding: resident on a CPU, allocated on CUDA; None where the system
                  does not tell
    process_peak: the most that was ever resident in the host's memory, loading included
    """

    weights: dict[str, int]
    kv_reserved: int
    kv_used: int
    peak: int | None
    process_peak: int


@dataclass(frozen=True)
class Profile:
    """What one generation did.

    parts:          they add up to the time from the first token to the last; empty where nobody timed them
    is_by_device:   whether parts are times of the device, in the traced generation, instead of the measured one's
    decode_seconds: of the measured generation
    graphs:         what recording rounds as CUDA graphs cost; None where none were to be recorded
    """

    parts: tuple[Part, ...]
    is_by_device: bool
    decode_seconds: float
    result: GenerationResult
    memory: Memory
    graphs: GraphReport | None = None

    @property
    def num_rounds(self) -> int:
        return self.result.metrics.speculative_decoding.num_rounds

    @property
    def tokens_per_second(self) -> float:
        """Of decoding: without the prompt, and without the first token, which the prompt gives."""
        return (len(self.result.token_ids) - 1) / self.decode_seconds

    def to_dict(self) -> dict[str, Any]:
        metrics = self.result.metrics
        return {
            "parts": [
                {
                    "name": part.name,
                    "calls": part.calls,
                    "ms": part.seconds * 1e3,
                    "ms_per_round": part.seconds * 1e3 / self.num_rounds,
                    "share": part.seconds / self._seconds,
                }
                for part in self.parts
            ],
            "is_by_device": self.is_by_device,
            "num_rounds": self.num_rounds,
            "num_tokens": len(self.result.token_ids),
            "prompt_ms": metrics.prompt_time * 1e3,
            "decode_ms": self.decode_seconds * 1e3,
            "tokens_per_second": self.tokens_per_second,
            "mean_acceptance_length": metrics.speculative_decoding.mean_acceptance_length,
            "memory": {field.name: getattr(self.memory, field.name) for field in fields(self.memory)},
            "graphs": None if self.graphs is None else asdict(self.graphs),
        }

    @property
    def _seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    def parts_table(self) -> Table:
        """A row a part, for people."""
        calls = "launches" if self.is_by_device else "calls"
        table = Table("part", box=None, pad_edge=False)
        for title in (calls, "ms", "ms a round", "share"):
            table.add_column(title, justify="right")
        for part in (*self.parts, Part("total", 0, self._seconds)):
            milliseconds = part.seconds * 1e3
            table.add_row(
                part.name,
                str(part.calls) if part.calls else "",
                f"{milliseconds:.2f}",
                f"{milliseconds / self.num_rounds:.3f}",
                f"{part.seconds / self._seconds:.1%}",
            )
        return table

    def figures_table(self) -> Table:
        """Everything but the parts, for people."""
        metrics, memory = self.result.metrics, self.memory
        weights = ", ".join(f"{name} {_megabytes(size)}" for name, size in memory.weights.items())
        rows = [
            ("tokens", f"{len(self.result.token_ids)} in {self.num_rounds} rounds"),
            ("prompt", f"{metrics.num_prompt_tokens} tokens, {metrics.prompt_time * 1e3:.1f} ms"),
            ("decode", f"{self.decode_seconds * 1e3:.1f} ms, {self.tokens_per_second:.1f} tokens/s"),
            (
                "mean acceptance length",
                f"{metrics.speculative_decoding.mean_acceptance_length:.2f} tokens a round",
            ),
            ("weights", weights),
            ("KV cache", f"{_megabytes(memory.kv_used)} in use, {_megabytes(memory.kv_reserved)} reserved"),
            ("peak memory", "unknown" if memory.peak is None else _megabytes(memory.peak)),
            ("process's peak", _megabytes(memory.process_peak)),
        ]
        if (graphs := self.graphs) is not None:
            cost = f"{graphs.num_graphs} recorded in {graphs.seconds:.2f} s, {_megabytes(graphs.num_bytes)}"
            rows.append(("CUDA graphs", cost))
        table = Table(show_header=False, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*row)
        return table


def print_profile(profile: Profile) -> None:
    """Both tables, on stdout."""
    console = Console(highlight=False)
    if profile.parts:
        console.print(profile.parts_table())
        console.print()
    console.print(profile.figures_table())


def profile_call(call: Call, engine: Engine, *, trace_path: Path | None) -> Profile:
    """Runs a call of one prompt and one sample three times, and writes a Chrome trace of the third.

    trace_path: a `.json` or `.json.gz`; None for no trace: the second run is then framed by cudaProfilerStart and
                cudaProfilerStop, for a profiler that waits for them

    Raises `SpecEngineError` when the first token is the last: then there is nothing to see.
    """
    is_cuda = engine.device.type == "cuda"
    _decode(call, engine, nullcontext())
    times = PartTimes()
    during: AbstractContextManager[object] = ranges.record(times)
    if is_cuda:
        during = torch.cuda.profiler.profile() if trace_path is None else nullcontext()
    peaks = Peaks(engine.device)
    result, seconds = _decode(call, engine, during)
    memory = _memory(engine, result, peaks)
    parts = () if is_cuda else times.parts(seconds)
    if trace_path is not None:
        _trace(call, engine, trace_path)
        if is_cuda:
            parts = device_parts(read_trace(trace_path))
    return Profile(parts, is_cuda, seconds, result, memory, engine.graph_report)


def _decode(
    call: Call, engine: Engine, during: AbstractContextManager[object]
) -> tuple[GenerationResult, float]:
    """The result, and the seconds from the first token to the last, which run within `during`. Nobody waits for each
    token, as in `generate`."""
    with closing(engine.stream(call.prompt, call.params, stream_interval=MAX_ROUNDS_UNREAD)) as events:
        last = next(events)
        with during:
            began = time.perf_counter()
            for event in events:
                last = event
            seconds = time.perf_counter() - began
    assert last.result is not None, "the last event carries the result"
    if last.result.finish_reason == "error":
        raise SpecEngineError(f"there is nothing to profile: {last.result.outputs[0].error}")
    if not last.result.metrics.speculative_decoding.num_rounds:
        raise SpecEngineError(
            "there is nothing to profile: the text ended with its first token; give another prompt or --ignore-eos"
        )
    return last.result, seconds


def _trace(call: Call, engine: Engine, path: Path) -> None:
    # Else PyTorch's profiler says on stderr that it begins and ends. What it may fail at shows in the trace.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    activities = [torch.profiler.ProfilerActivity.CPU]
    if engine.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler, ranges.record(TraceRanges()):
        _decode(call, engine, torch.profiler.record_function(DECODE))
    profiler.export_chrome_trace(str(path))


# Memory


def _memory(engine: Engine, result: GenerationResult, peaks: Peaks) -> Memory:
    num_tokens = len(result.prompt_token_ids) + len(result.token_ids)
    peak, process_peak = peaks.read()
    return Memory(
        weights={name: num_bytes(weights) for name, weights in engine.weights.items()},
        kv_reserved=engine.kv_bytes(),
        kv_used=engine.kv_bytes(num_tokens),
        peak=peak,
        process_peak=process_peak,
    )


def num_bytes(value: object) -> int:
    """Memory of all tensors in dataclasses, lists and tuples; what several of them share counts once."""
    storages = (tensor.untyped_storage() for tensor in _tensors(value))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


class Peaks:
    """Peak memory from here on, and of the whole process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._earlier = _peak_resident()
        self._has_restarted = True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux; see proc(5)
        except OSError:
            self._has_restarted = False

    def read(self) -> tuple[int | None, int]:
        """Bytes; the first is None where the system cannot tell."""
        resident = _peak_resident()
        is_cuda = self._device.type == "cuda"
        peak = int(torch.cuda.max_memory_allocated(self._device)) if is_cuda else resident
        return peak if self._has_restarted else None, max(self._earlier, resident)


def _peak_resident() -> int:
    """`ru_maxrss`. Linux has it more exactly, and can restart it."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
