"""Rounds in steady state: what recording them cost, how long one takes, and what a trace of them shows."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measure import quantiles
from torch.profiler import ProfilerActivity, profile, record_function

from gpu_parts import trace
from gpu_parts.context import Context, FailedError
from gpu_parts.models import build_models, read_prompts
from specengine import Engine, SamplingParams

TARGET_IDLE_SHARE = 0.03  # docs/gpu.md


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    rounds:  (sequences, draft tokens) of each row
    warm_up: rounds before anything counts
    windows, window: stretches that are timed without a profiler, and rounds of each; as many rounds are traced
    """

    prompt_length: int = 256
    rounds: tuple[tuple[int, int], ...] = ((1, 0), (1, 4), (8, 0), (8, 4))
    warm_up: int = 8
    windows: int = 5
    window: int = 16

    @property
    def max_batch_size(self) -> int:
        return max(size for size, _ in self.rounds)

    def max_new_tokens(self, k: int) -> int:
        """More than the rounds can give: every sequence runs to the end."""
        num_rounds = 2 * self.warm_up + (self.windows + 1) * self.window
        return (num_rounds + 2) * (k + 1) + 1


REAL = Plan()
TINY = Plan(prompt_length=24, rounds=((1, 0), (2, 2)), warm_up=2, windows=2, window=4)


def run(context: Context) -> None:
    """With rounds as graphs, and launched one by one. Raises `FailedError` where a graph's round made the host wait."""
    pair, target, draft = build_models(context)
    settings, plan = context.settings, TINY if context.settings.is_rehearsal else REAL
    wake_profiler(settings.device)
    waits: list[str] = []
    for has_graphs in (True, False):
        context.say(f"{pair}, {'rounds as graphs' if has_graphs else 'launch by launch'}")
        common = {"pair": str(pair), "dtype": settings.dtype, "has_graphs": has_graphs}
        began = time.perf_counter()
        with Engine(
            target,
            draft,
            dtype=settings.dtype,
            device=settings.device,
            max_batch_size=plan.max_batch_size,
            prefill_chunk_size=plan.prompt_length * plan.max_batch_size,
            enable_prefix_cache=False,
            cuda_graphs=has_graphs and settings.device == "cuda",
            rounds_ahead="auto" if has_graphs else 0,
        ) as engine:
            seconds = time.perf_counter() - began
            for size, k in plan.rounds:
                row = Rounds(engine, plan, size, k).measure(context, is_graph=has_graphs)
                context.add({"kind": "steady", **common, **row})
                if has_graphs and row.get("waits_per_round"):
                    waits.append(f"{size} sequences, k = {k}: {row['waits']}")
            context.add(
                {"kind": "capture", **common, "engine_seconds": round(seconds, 3), **captured(engine)}
            )
    if waits:
        raise FailedError(f"the host waited for the device in steady state: {'; '.join(waits)}")


def wake_profiler(device: str) -> None:
    """Before anything is recorded: kernels of a graph that is older than the profiler may be missing in a trace."""
    with profile(activities=activities(device)):
        torch.zeros(1, device=device).add_(1)


def activities(device: str) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")


def captured(engine: Engine) -> dict[str, Any]:
    """Rounds recorded so far, and their seconds and bytes of device memory."""
    report = engine.graph_report
    return {} if report is None else asdict(report)


@dataclass(frozen=True)
class Rounds:
    """A batch that decodes: a step of the engine is a round of it."""

    engine: Engine
    plan: Plan
    size: int
    k: int

    def measure(self, context: Context, *, is_graph: bool) -> dict[str, Any]:
        """The row's numbers, and where the trace is."""
        params = SamplingParams(
            max_new_tokens=self.plan.max_new_tokens(self.k), ignore_eos=True, num_speculative_tokens=self.k
        )
        prompts = read_prompts(self.size, self.plan.prompt_length)
        requests = [self.engine.add_request(prompt, params) for prompt in prompts]
        self._steps(1 + self.plan.warm_up)
        seconds = [self._timed() for _ in range(self.plan.windows)]
        path = context.path(f".{'graphs' if is_graph else 'launches'}-b{self.size}-k{self.k}.json.gz")
        self._trace(path)
        assert self.engine.has_work, "the batch decodes to the end of the trace"
        for request in requests:
            self.engine.abort(request)
        return {
            "batch_size": self.size,
            "num_speculative_tokens": self.k,
            "num_rounds": self.plan.window,
            "us_per_round": asdict(quantiles(seconds)),
            **traced(path, self.plan.window),
            "trace": str(path),
        }

    def _steps(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()

    def _timed(self) -> float:
        """Seconds of a round; the device is waited for before and after the window, not within."""
        self._wait()
        began = time.perf_counter()
        self._steps(self.plan.window)
        self._wait()
        return (time.perf_counter() - began) / self.plan.window

    def _trace(self, path: Path) -> None:
        with profile(activities=activities(self.engine.device.type)) as profiler:
            self._steps(self.plan.warm_up)  # the profiler's own beginning
            with record_function(trace.STEADY):
                self._steps(self.plan.window)
            self._wait()
        profiler.export_chrome_trace(str(path))

    def _wait(self) -> None:
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize(self.engine.device)


def traced(path: Path, num_rounds: int) -> dict[str, Any]:
    """The trace in numbers of a round. `waits` are the calls, `waits_per_round` counts pageable copies too."""
    found = trace.steady(trace.read(path))
    if not found.num_kernels:
        return {"reason": "no kernels in the trace"}
    num_waits = sum(found.blocking.values()) + found.num_pageable_copies
    return {
        "graph_launches_per_round": found.num_graph_launches / num_rounds,
        "kernels_per_round": found.num_kernels / num_rounds,
        "device_us_per_round": round(found.device_us / num_rounds, 3),
        "idle_share": found.idle_share,
        "gap_share": found.gap_share,
        "target_idle_share": TARGET_IDLE_SHARE,
        "waits": {**found.blocking, "pageable copies": found.num_pageable_copies},
        "waits_per_round": num_waits / num_rounds,
    }
