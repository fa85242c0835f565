"""Profiling: spans cost nothing unwatched and tell the truth watched; `specengine profile` adds up, its trace opens."""

from __future__ import annotations

import gzip
import json
import re
import sqlite3
import subprocess
import sys
import timeit
import types
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from specengine import ranges
from specengine.cli import app, main
from specengine.measure import profile as profiling
from specengine.measure import timeline
from specengine.measure.timeline import PartTimes, device_parts, read_trace

ROOT = Path(__file__).resolve().parent.parent
SIZE = {"batch_size": 4, "k": 5}


class Log:
    """A sink that writes down what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def enter(self, name: str, payload: Mapping[str, int]) -> None:
        self.events.append(("enter", name, dict(payload)))

    def note(self, name: str, payload: Mapping[str, int]) -> None:
        self.events.append(("note", name, dict(payload)))

    def leave(self, name: str) -> None:
        self.events.append(("leave", name))


# Spans


def test_unwatched_spans_are_one_object_that_does_nothing() -> None:
    first, second = ranges.span(ranges.DRAFT, **SIZE), ranges.span(ranges.HOST)
    assert first is second
    with first as part:
        part.note(accepted=3)
    assert not hasattr(first, "__dict__")


def test_an_unwatched_span_costs_less_than_a_microsecond() -> None:
    """About 0.25 µs; the best of many, since the machine may be busy."""

    def step() -> None:
        with ranges.span(ranges.DRAFT, batch_size=4, k=5):
            pass

    assert min(timeit.repeat(step, number=1000, repeat=50)) / 1000 < 1e-6


def test_watched_spans_are_told_in_order() -> None:
    log = Log()
    with ranges.record(log), ranges.span(ranges.HOST, **SIZE) as part:
        part.note(accepted=11)
        with ranges.span(ranges.COMMIT):
            pass
    assert log.events == [
        ("enter", "step/host", SIZE),
        ("note", "step/host", {"accepted": 11}),
        ("enter", "step/commit", {}),
        ("leave", "step/commit"),
        ("leave", "step/host"),
    ]


def test_an_exception_leaves_the_span_and_passes() -> None:
    log = Log()
    with ranges.record(log), pytest.raises(ZeroDivisionError), ranges.span(ranges.VERIFY):
        _ = 1 / 0
    assert log.events[-1] == ("leave", "step/verify")


def test_recording_ends_with_its_block() -> None:
    outer, inner = Log(), Log()
    with ranges.record(outer):
        with pytest.raises(ZeroDivisionError), ranges.record(inner):
            _ = 1 / 0
        with ranges.span(ranges.DRAFT):
            pass
    assert ranges.span(ranges.DRAFT) is ranges.span(ranges.HOST)
    assert (len(outer.events), inner.events) == (2, [])


def test_a_span_is_left_where_it_was_entered() -> None:
    """A recorder that comes or goes while a span is open must not unbalance another."""
    late, early = Log(), Log()
    with ranges.span(ranges.DRAFT), ranges.record(late):
        pass
    with ranges.record(early):
        span = ranges.span(ranges.DRAFT)
        span.__enter__()
    span.__exit__(None, None, None)
    assert late.events == []
    assert early.events == [("enter", "step/draft", {}), ("leave", "step/draft")]


def test_ranges_load_neither_torch_nor_the_package(tmp_path: Path) -> None:
    code = (
        "import sys, specengine.ranges\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('specengine', 'torch')])"
    )
    output = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert output.stdout == "['specengine', 'specengine.ranges']\n", output.stderr


# NVTX


class FakeDomain(Log):
    def push_range(self, *, message: str, payload: Any) -> None:
        fields = {} if payload is None else dict(zip(payload.dtype.names, payload.tolist(), strict=True))
        self.enter(message, fields)

    def mark(self, *, message: str, payload: int) -> None:
        self.events.append(("mark", message, payload))

    def pop_range(self) -> None:
        self.events.append(("pop",))


@pytest.fixture
def nvtx(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A stand-in for the package; `domains` are those that were asked for."""
    domains: dict[str, FakeDomain] = {}
    fake = types.SimpleNamespace(
        domains=domains, get_domain=lambda name: domains.setdefault(name, FakeDomain())
    )
    monkeypatch.setitem(sys.modules, "nvtx", fake)  # type: ignore[arg-type]
    return fake


@pytest.mark.parametrize("environment", [{"NVTX_INJECTION64_PATH": "tool.so"}, {"SPECENGINE_NVTX": "1"}])
def test_nvtx_ranges_have_the_domain_names_and_payload(
    nvtx: types.SimpleNamespace, environment: dict[str, str]
) -> None:
    (sink,) = ranges.nvtx_sinks(environment)
    with ranges.record(sink):
        with ranges.span(ranges.HOST, **SIZE) as part:
            part.note(accepted=11)
        with ranges.span(ranges.COMMIT):
            pass
    assert list(nvtx.domains) == ["specengine"]
    assert nvtx.domains["specengine"].events == [
        ("enter", "step/host", SIZE),
        ("mark", "accepted", 11),
        ("pop",),
        ("enter", "step/commit", {}),
        ("pop",),
    ]


@pytest.mark.parametrize(
    "environment",
    [{}, {"NVTX_INJECTION64_PATH": ""}, {"NVTX_INJECTION64_PATH": "tool.so", "SPECENGINE_NVTX": "0"}],
)
def test_without_a_tool_there_is_no_nvtx(nvtx: types.SimpleNamespace, environment: dict[str, str]) -> None:
    assert ranges.nvtx_sinks(environment) == ()
    assert nvtx.domains == {}


def test_a_tool_without_the_package_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.warns(RuntimeWarning, match="pip install nvtx"):
        assert ranges.nvtx_sinks({"NVTX_INJECTION64_PATH": "tool.so"}) == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ranges.nvtx_sinks({}) == ()


def test_a_wrong_wish_is_refused() -> None:
    with pytest.raises(ValueError, match="SPECENGINE_NVTX='yes'"):
        ranges.nvtx_sinks({"SPECENGINE_NVTX": "yes"})


def test_an_attached_tool_is_found_on_import(tmp_path: Path) -> None:
    (tmp_path / "nvtx.py").write_text("get_domain = str\n")
    code = "from specengine import ranges; print(ranges.span('x') is ranges.span('x'))"
    for value, is_unwatched in (("", True), ("tool.so", False)):
        output = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={"NVTX_INJECTION64_PATH": value, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert output.stdout == f"{is_unwatched}\n", output.stderr


# Times


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """`clock[0]` is the time."""
    now = [100.0]
    monkeypatch.setattr(timeline, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def spend(clock: list[float], name: str, seconds: float, inner: tuple[str, float] | None = None) -> None:
    with ranges.span(name):
        clock[0] += seconds
        if inner is not None:
            spend(clock, *inner)
            clock[0] += seconds


def test_each_part_is_given_its_own_time(clock: list[float]) -> None:
    times = PartTimes()
    with ranges.record(times):
        spend(clock, ranges.DRAFT, 1.0)
        clock[0] += 0.5
        spend(clock, ranges.VERIFY, 2.0, inner=(ranges.DRAFT, 0.25))
        spend(clock, ranges.COMMIT, 0.125)
        spend(clock, ranges.HOST, 1.0)
    parts = {part.name: (part.calls, part.seconds) for part in times.parts(10.0)}
    assert parts == {"draft": (2, 1.25), "verify": (1, 4.0), "commit": (1, 0.125), "host": (1, 4.625)}


def test_time_inside_two_spans_counted_twice_would_be_noticed(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted fault: a span inside another is charged to both."""

    def enter(self: PartTimes, name: str, payload: Mapping[str, int]) -> None:
        self.calls[name] += 1
        self._open.append(name)
        self.seconds[name] -= clock[0]

    def leave(self: PartTimes, name: str) -> None:
        self.seconds[self._open.pop()] += clock[0]

    monkeypatch.setattr(PartTimes, "enter", enter)
    monkeypatch.setattr(PartTimes, "leave", leave)
    with pytest.raises(AssertionError):
        test_each_part_is_given_its_own_time(clock)


# Traces of a GPU


def event(
    category: str, name: str, begin: float, duration: float, correlation: int | None = None
) -> dict[str, Any]:
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": duration, "args": args}


def eager_trace() -> list[dict[str, Any]]:
    """Times in µs. Decoding takes 100; before it, a kernel of the prompt."""
    return [
        event("cuda_driver", "cuLaunchKernel", 5, 1, 1),
        event("kernel", "spec_embed", 6, 4, 1),
        event("user_annotation", "decode", 10, 100),
        event("user_annotation", "step/draft", 12, 10),
        event("gpu_user_annotation", "step/draft", 20, 80),
        event("cuda_driver", "cuLaunchKernel", 13, 1, 2),
        event("cuda_runtime", "cudaMemcpyAsync", 15, 1, 3),
        event("user_annotation", "step/verify", 22, 10),
        event("cuda_driver", "cuLaunchKernelEx", 25, 1, 4),
        event("user_annotation", "step/commit", 32, 4),
        event("cuda_driver", "cuLaunchKernel", 33, 1, 5),
        event("cuda_runtime", "cudaMemcpyAsync", 40, 1, 6),
        event("user_annotation", "step/host", 50, 50),
        event("cpu_op", "aten::to", 51, 5),
        {"ph": "M", "name": "process_name", "args": {}},
        event("kernel", "spec_linear_residual", 30, 10, 2),
        event("gpu_memcpy", "Memcpy HtoD", 42, 3, 3),
        # The next two overlap by 5, as dependent launches do.
        event("kernel", "spec_head_draw", 50, 20, 4),
        event("kernel", "spec_commit_round", 65, 10, 5),
        event("gpu_memcpy", "Memcpy DtoH", 80, 2, 6),
    ]


def parts_of(events: list[dict[str, Any]]) -> dict[str, tuple[int, float]]:
    return {
        part.name: (part.calls, round(part.seconds * 1e6, 6))
        for part in device_parts({"traceEvents": events})
    }


def test_work_of_the_device_belongs_to_the_span_that_launched_it() -> None:
    assert parts_of(eager_trace()) == {
        "draft": (2, 13.0),
        "verify": (1, 20.0),
        "commit": (1, 5.0),
        "other": (1, 2.0),
        "host": (0, 60.0),
    }


def test_kernels_of_a_replay_belong_to_the_graph() -> None:
    events = [
        event("user_annotation", "decode", 0, 50),
        event("cuda_runtime", "cudaGraphLaunch", 2, 1, 7),
        event("kernel", "spec_embed", 5, 10, 7),
        event("kernel", "spec_head_draw", 15, 20, 7),
    ]
    assert parts_of(events) == {
        "draft": (0, 0.0),
        "verify": (0, 0.0),
        "commit": (0, 0.0),
        "graph": (1, 30.0),
        "host": (0, 20.0),
    }


def test_a_trace_without_kernels_is_said() -> None:
    with pytest.raises(profiling.SpecEngineError, match="--no-trace"):
        device_parts({"traceEvents": [event("user_annotation", "decode", 0, 50)]})


# Memory


def test_shared_memory_counts_once() -> None:
    table = torch.zeros(10, 4)
    part = timeline.Part("x", 0, 0.0)
    assert profiling.num_bytes((table, [table.view(40), part], torch.zeros(3, dtype=torch.int8))) == 163


# The command


def invoke(*arguments: str, device: str = "cpu") -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["profile", "--device", device, *arguments])
    return result.exit_code, result.stdout, result.stderr


def check_report(report: dict[str, Any]) -> None:
    """Parts add up, and each of them took time in every round."""
    parts = {part["name"]: part for part in report["parts"]}
    assert list(parts) == ["draft", "verify", "commit", "host"]
    assert sum(part["share"] for part in parts.values()) == pytest.approx(1)
    assert sum(part["ms"] for part in parts.values()) == pytest.approx(report["decode_ms"])
    for name, part in parts.items():
        assert part["calls"] >= report["num_rounds"] > 0, name
        assert part["ms"] > 0, name
        assert part["ms_per_round"] == pytest.approx(part["ms"] / report["num_rounds"])


def check_trace(path: Path, num_rounds: int) -> None:
    """The trace opens, and its events are the spans of every round, all of them in the time of decoding."""
    events = [each for each in read_trace(path)["traceEvents"] if each.get("ph") == "X"]
    (decode,) = [each for each in events if each["name"] == "decode"]
    for name in ranges.PARTS:
        spans = [each for each in events if each["name"] == name]
        inside = [each for each in spans if decode["ts"] <= each["ts"] <= decode["ts"] + decode["dur"]]
        assert len(inside) >= num_rounds, name
        assert sum(each["dur"] for each in inside) > 0, name


def test_profile_of_the_bundled_pair(tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    code, stdout, stderr = invoke("--max-new-tokens", "24", "-k", "4", "--out", str(out), "--json")
    assert (code, stderr, stdout.count("\n")) == (0, "", 1)
    report = json.loads(stdout)
    check_report(report)
    check_trace(out, report["num_rounds"])
    assert report["graphs"] is None
    memory = report["memory"]
    assert report["num_tokens"] == 24
    assert report["mean_acceptance_length"] > 1
    assert (report["is_by_device"], report["trace"], report["backend"]) == (False, str(out), "native")
    assert memory["weights"]["target"] > memory["weights"]["draft"] > 1e6
    assert memory["kv_reserved"] > memory["kv_used"] > 0
    assert memory["process_peak"] >= (memory["peak"] or 0)
    assert memory["process_peak"] > sum(memory["weights"].values())


def test_a_part_that_nobody_names_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: what verification takes is the host's."""
    span = ranges.span
    monkeypatch.setattr(
        ranges,
        "span",
        lambda name, **payload: span("step/other" if name == ranges.VERIFY else name, **payload),
    )
    out = tmp_path / "trace.json"
    code, stdout, _ = invoke("--max-new-tokens", "12", "-k", "4", "--out", str(out), "--json")
    assert code == 0
    with pytest.raises(AssertionError, match="verify"):
        check_report(json.loads(stdout))
    with pytest.raises(AssertionError, match="step/verify"):
        check_trace(out, json.loads(stdout)["num_rounds"])


def test_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Percentages add up but for rounding; the trace has its usual name."""
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = invoke(
        "import os", "--max-new-tokens", "12", "-k", "3", "--temperature", "0.8", "--seed", "1"
    )
    assert code == 0
    shares = [
        float(share)
        for share in re.findall(r"^(?:draft|verify|commit|host) .* ([\d.]+)%$", stdout, re.MULTILINE)
    ]
    assert len(shares) == 4
    assert sum(shares) == pytest.approx(100, abs=0.3)
    for words in ("total", "100.0%", "tokens/s", "mean acceptance length", "KV cache", "peak memory"):
        assert words in stdout
    assert stderr.startswith("specengine: trace written to specengine-trace.json")
    check_trace(tmp_path / "specengine-trace.json", 1)


def test_a_zipped_trace(tmp_path: Path) -> None:
    out = tmp_path / "trace.json.gz"
    assert invoke("--max-new-tokens", "8", "--out", str(out))[0] == 0
    assert json.loads(gzip.decompress(out.read_bytes()))["traceEvents"]
    check_trace(out, 1)


def test_without_a_trace_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = invoke("--max-new-tokens", "8", "-k", "0", "--no-trace", "--json")
    assert (code, stderr, list(tmp_path.iterdir())) == (0, "", [])
    report = json.loads(stdout)
    check_report(report)
    assert (report["trace"], report["num_rounds"], report["mean_acceptance_length"]) == (None, 7, 1.0)


def test_nobody_watches_afterwards(tmp_path: Path) -> None:
    invoke("--max-new-tokens", "8", "--out", str(tmp_path / "trace.json"))
    assert ranges.span(ranges.DRAFT) is ranges.span(ranges.HOST)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "missing/trace.json"], ["--out", "'missing/trace.json'", "No such file or directory"]),
        (["--out", "."], ["--out", "'.'", "not a file"]),
        (["--max-new-tokens", "0"], ["max_new_tokens", "0"]),
        (["-k", "65"], ["num_speculative_tokens", "65"]),
        (["--temperature", "hot"], ["--temperature", "'hot'"]),
        (["--model", "m", "-k", "3"], ["num_speculative_tokens=3", "'m'"]),
        (["--batch", "3"], ["--batch"]),
        ([""], ["prompt", "''"]),
    ],
)
def test_wrong_usage_is_said_before_anything_runs(
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(profiling, "profile_call", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(SystemExit) as caught:
        main(["profile", *arguments])
    out, err = capsys.readouterr()
    assert (caught.value.code, out, err.count("\n")) == (2, "", 1), err
    assert all(word in err for word in words), err
    assert list(tmp_path.iterdir()) == []


def test_the_check_leaves_an_earlier_trace_alone(tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    out.write_text("earlier")
    code, _, err = invoke("--out", str(out), "--model", str(tmp_path / "none"), "-k", "0")
    assert code == 1, err
    assert out.read_text() == "earlier"


def test_graphs_on_a_cpu_are_wrong_usage(tmp_path: Path) -> None:
    code, out, err = invoke("--graphs", "--out", str(tmp_path / "trace.json"))
    assert (code, out) == (2, "")
    assert "cuda_graphs" in err


def test_a_text_of_one_token_has_nothing_to_show(tmp_path: Path) -> None:
    code, out, err = invoke("--max-new-tokens", "1", "--out", str(tmp_path / "trace.json"))
    assert (code, out) == (1, "")
    assert "nothing to profile" in err


def test_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 130, no traceback, and no trace that is half there."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("specengine.speculative.judge", interrupt)
    code, out, err = invoke("--out", str(tmp_path / "trace.json"))
    assert (code, out, err) == (130, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("options", "names"), [([], {"draft", "verify", "commit"}), (["--graphs"], {"graph"})]
)
def test_profile_on_a_gpu(options: list[str], names: set[str], tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    code, stdout, stderr = invoke(*options, "--out", str(out), "--json", device="cuda")
    assert code == 0, stderr
    report = json.loads(stdout)
    busy = {part["name"]: part["ms"] for part in report["parts"] if part["calls"]}
    assert report["is_by_device"]
    assert set(busy) - {"other"} == names
    assert min(busy.values()) > 0
    assert sum(part["share"] for part in report["parts"]) == pytest.approx(1)


@pytest.mark.gpu
def test_a_gpu_without_a_trace_is_left_to_the_tool_that_is_attached() -> None:
    code, stdout, stderr = invoke("--no-trace", device="cuda")
    assert code == 0, stderr
    assert "tokens/s" in stdout
    assert "share" not in stdout


# The page


def test_the_query_for_idle_time_is_right() -> None:
    """docs/profiling.md: three kernels of 30, two of which overlap by 10, in 100."""
    page = (ROOT / "docs" / "profiling.md").read_text(encoding="utf-8")
    (query,) = re.findall(r"sqlite3 \S+ '(.*?)'", page, re.DOTALL)
    database = sqlite3.connect(":memory:")
    database.execute('CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER, "end" INTEGER)')
    database.executemany(
        "INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?, ?)", [(70, 100), (0, 30), (20, 50)]
    )
    assert database.execute(query).fetchall() == [(3, 20.0)]


def test_every_option_on_the_page_exists() -> None:
    page = (ROOT / "docs" / "profiling.md").read_text(encoding="utf-8")
    commands = re.findall(r"specengine profile((?: [^`\n\\|]+| \\\n)*)", page)
    given = {option for command in commands for option in re.findall(r"(?<= )--?[a-z][a-z-]*", command)}
    known = CliRunner().invoke(app, ["profile", "--help"], terminal_width=200).stdout
    assert given
    assert [option for option in given if option not in known] == []
