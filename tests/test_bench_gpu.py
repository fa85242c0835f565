"""One command measures everything on a GPU: rehearsed here without one, and told apart from a measurement."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import gpu
import pytest
from generation import contest
from generation.plan import Entry, Pair
from generation.protocol import Answer, Counts, Task
from generation.rows import Record, Turn
from gpu_parts import about, end_to_end, first, models, page, parts, rows, runner, suites, trace
from gpu_parts.context import Context, FailedError, Settings, SkippedError
from gpu_parts.entrants import COMPILED, NO_GRAPHS, Builder, System
from gpu_parts.parts import Part
from pairs import SHAPES

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]
HERE = {"has_cuda": False, "machine": "a machine", "cpus": 1, "torch": "2", "commit": "abc"}
COMMON = {
    *("part", "rehearsal", "machine", "processor", "instruction_set", "commit", "transformers", "torch"),
    *("specengine", "python", "date"),
}


def settings(tmp_path: Path, **changes: Any) -> Settings:
    given = Settings("cpu", "float32", True, 60.0, str(tmp_path), str(tmp_path / "work"), HERE)
    return replace(given, **changes)


def context(tmp_path: Path, *, part: str = "a-part", **arguments: Any) -> Context:
    return Context(part, arguments, settings(tmp_path), tmp_path / "rows.jsonl")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# The rehearsal: the code of a real run, with the bundled pair


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    """(the page, the rows)."""
    directory = tmp_path_factory.mktemp("gpu")
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "benchmarks" / "results").iterdir()}
    out = directory / "rows.jsonl"
    command = [*COMMAND, "--device", "cpu", "--tiny", "--out", str(out), "--work", str(directory / "work")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    after = {path: path.stat().st_mtime_ns for path in (ROOT / "benchmarks" / "results").iterdir()}
    assert before == after, "a rehearsal writes only where --out says"
    return done.stdout, read(out)


def test_a_rehearsal_runs_every_kind_of_part_and_says_what_it_is(
    rehearsed: tuple[str, list[dict[str, Any]]],
) -> None:
    shown, found = rehearsed
    assert shown.startswith(page.REHEARSAL)
    ended = {row["part"]: row["status"] for row in found if row["kind"] == "part"}
    expected = ["machine", "first", "graphs-medium", "generate-medium", "forced-medium"]
    assert ended == dict.fromkeys(expected, "ok")
    assert all(f"== {name}: ok" in shown for name in expected)
    assert {row["rehearsal"] for row in found} == {gpu.REHEARSAL}
    for row in found:
        assert row.keys() >= COMMON


def test_the_end_to_end_rows_have_the_documented_fields(
    rehearsed: tuple[str, list[dict[str, Any]]],
) -> None:
    measured = [row for row in rehearsed[1] if row["part"] == "generate-medium" and row["kind"] == "generate"]
    names = {field.name for field in fields(rows.Row)}
    assert all(name in (rows.Row.__doc__ or "") for name in names - UNSAID)
    for row in measured:
        assert row.keys() <= names | COMMON | {"triton"}
        assert row["is_models_output"]
        assert "forced_acceptance" not in row
    by_system = {(row["system"], row["batch_size"], row["num_speculative_tokens"]): row for row in measured}
    assert by_system.keys() == {
        *(("ours", 1, 0), ("ours", 1, 2), (NO_GRAPHS, 1, 0), (NO_GRAPHS, 1, 2)),
        *(("transformers", 1, 0), ("transformers", 1, None), ("transformers", 1, 2), (COMPILED, 1, 0)),
        *(("ours", 2, 0), ("ours", 2, 2), ("transformers", 2, 0), ("transformers", 2, 2), (COMPILED, 2, 0)),
    }
    assert "one prompt at a time" in by_system.pop(("transformers", 2, 2))["reason"]
    for row in by_system.values():
        assert row["equal_tokens"] == 1.0, row
        assert "first_difference" not in row
        assert row["tokens_per_second"] > 0
        assert row["us_per_token"].keys() == {"minimum", "median", "p90"}
    plain, speculative = by_system["ours", 1, 0], by_system["ours", 1, 2]
    assert plain["ratio_to_plain"] == by_system[COMPILED, 1, 0]["ratio_to_compiled"] == 1.0
    assert plain["num_phases"] == 8 * 5 + 3
    assert speculative["num_phases"] == plain["num_phases"] + 2 * (2 * 5 + 2)
    overhead = (plain["us_per_round"]["median"] - plain["floor_us"]) / plain["num_phases"]
    assert plain["overhead_us_per_phase"] == pytest.approx(overhead, rel=1e-3)
    assert speculative["mean_acceptance_length"] > 1


UNSAID = {
    *("batch_size", "system", "mode", "dtype", "settings", "num_prompts", "prompt_tokens", "max_new_tokens"),
    *("repetitions", "versions", "prompt_ms", "acceptance_rate", "mean_acceptance_length", "reason"),
}


def test_forced_rows_are_marked_and_accept_what_they_are_told(
    rehearsed: tuple[str, list[dict[str, Any]]],
) -> None:
    shown, found = rehearsed
    forced = [row for row in found if row["kind"] == "forced"]
    assert {row["forced_acceptance"]: row["acceptance_rate"] for row in forced} == {0.0: 0.0, 1.0: 1.0}
    for row in forced:
        assert row["is_models_output"] is False
        assert "FORCED" in row["system"]
        assert "equal_tokens" not in row, "it is not the model's output: there is nothing to compare"
    assert page.FORCED in shown


def test_steady_rows_say_where_the_trace_is(rehearsed: tuple[str, list[dict[str, Any]]]) -> None:
    steady = [row for row in rehearsed[1] if row["kind"] == "steady"]
    kinds = {(row["has_graphs"], row["batch_size"], row["num_speculative_tokens"]) for row in steady}
    assert kinds == {(True, 1, 0), (True, 2, 2), (False, 1, 0), (False, 2, 2)}
    for row in steady:
        assert row["us_per_round"]["median"] > 0
        assert any(event.get("name") == trace.STEADY for event in trace.read(Path(row["trace"])))
        assert row["reason"] == "no kernels in the trace"
    captures = [row for row in rehearsed[1] if row["kind"] == "capture"]
    assert [row["has_graphs"] for row in captures] == [True, False]


# Parts that go wrong

PLANTED = """
import os, signal, subprocess, sys, time
from gpu_parts.context import FailedError, SkippedError

def good(context):
    context.add({"kind": "plain", "value": context.arguments["value"]})

def crash(context):
    context.add({"kind": "plain", "value": "before the crash"})
    os.kill(os.getpid(), signal.SIGSEGV)

def hang(context):
    context.add({"kind": "plain", "value": "before the hang"})
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    context.path(".pid").write_text(str(child.pid))
    time.sleep(600)

def fail(context):
    raise FailedError("a bad sign")

def trip(context):
    print("what a library says", file=sys.stderr)
    return {}["nothing"]

def skip(context):
    raise SkippedError("no such tool")
"""


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "planted_parts.py").write_text(PLANTED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(runner, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(gpu, "describe", lambda: HERE)
    return tmp_path


def plant(name: str, **more: Any) -> Part:
    return Part(name, "planted", f"planted_parts:{name}", {"value": 1}, **{"needs_cuda": False, **more})


def test_a_part_that_goes_wrong_takes_no_other_along(
    planted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, work = planted / "rows.jsonl", planted / "work"
    given = gpu.parse(["--limit", "2", "--out", str(out), "--work", str(work)])
    chosen = [plant(name) for name in ("crash", "hang", "fail", "trip", "skip", "good")]
    assert gpu.run(given, chosen, work) == 1
    found = read(out)
    ended = {row["part"]: (row["status"], row.get("reason")) for row in found if row["kind"] == "part"}
    assert ended["hang"] == ("timed out", "ended after 2 s")
    assert ended["fail"] == ("failed", "a bad sign")
    assert ended["trip"] == ("failed", "KeyError: 'nothing'")
    assert ended["skip"] == ("skipped", "no such tool")
    assert ended["good"] == ("ok", None)
    status, reason = ended["crash"]
    assert status == "failed"
    assert "SIGSEGV" in str(reason)
    values = {row["part"]: row["value"] for row in found if row["kind"] == "plain"}
    assert values == {"crash": "before the crash", "hang": "before the hang", "good": 1}
    pid = int((work / "hang.pid").read_text())
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}/environ").exists() and time.monotonic() < deadline:
        if not Path(f"/proc/{pid}/cmdline").read_bytes():  # it only waits to be noticed
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{pid}").exists(), (
            "what a part started in a session of its own is ended with it"
        )
    shown = capsys.readouterr().out
    assert "== hang: timed out, " in shown
    assert "good   ok" in shown
    assert "what a library says" in (work / "trip.log").read_text()


def test_all_well_is_0_and_a_skipped_part_is_no_failure(planted: Path) -> None:
    given = gpu.parse(["--work", str(planted)])
    assert gpu.run(given, [plant("good"), plant("skip")], planted) == 0


def test_without_a_gpu_parts_that_need_one_say_so(planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = gpu.parse(["--work", str(planted)])
    assert gpu.run(given, [plant("good"), plant("fail", needs_cuda=True)], planted) == 2
    captured = capsys.readouterr()
    assert "== fail: needs a CUDA device" in captured.out
    assert "== good: ok" in captured.out
    lines = [line for line in captured.err.splitlines() if line.startswith("gpu.py: ")]
    assert lines == [
        "gpu.py: needs a CUDA device, and there is none; not run: fail (--device cpu --tiny rehearses)"
    ]
    assert not list(planted.glob("**/gpu_*.jsonl"))


# Arguments


def test_the_list_has_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[: len(parts.PARTS)]] == [part.name for part in parts.PARTS]
    assert lines[len(parts.PARTS)] == "visit 1: machine, first, tests-linear"
    assert lines[-1] == "groups: machine, first, tests, sanitize, tune, micro, graphs, generate, forced"


def test_listing_loads_nothing_heavy() -> None:
    code = "import sys; sys.argv[1:] = ['--list']; import gpu; gpu.main(); print('torch' in sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "benchmarks", capture_output=True, text=True, check=True
    )
    assert output.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "generat"], "--only: 'generat' is none of the parts or groups"),
        (["--only", "machine,nothing"], "'nothing' is none of"),
        (["--device", "cpu"], "--device cpu needs --tiny"),
        (["--limit", "481"], "--limit must be above 0 and at most 480, got 481"),
        (["--tiny", "--only", "micro"], "none of these parts can be rehearsed"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--visit", "5"], "invalid choice: 5"),
        (["--visit", "1", "--only", "tests"], "--visit has parts of its own"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        gpu.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_a_group_is_all_its_parts_and_tuning_has_to_be_named() -> None:
    def names(*only: str) -> list[str]:
        return [part.name for part in parts.select(only)]

    assert names("forced", "machine") == ["machine", "forced-medium", "forced-xl", "forced-xl-gpt2"]
    assert names("generate-xl") == ["generate-xl"]
    assert names("tune") == ["tune-768", "tune-1024", "tune-1600"]
    assert set(names()) == {part.name for part in parts.PARTS if part.group != "tune"}


def test_visits_have_parts_that_exist_and_share_the_time_of_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = {part.name for part in parts.PARTS}
    assert all(set(visit) <= names for visit in parts.VISITS)
    limits = []

    def run(part: Part, given: Settings) -> runner.Outcome:
        limits.append(given.limit)
        time.sleep(0.3)
        return runner.Outcome(part.name, runner.OK)

    monkeypatch.setattr(gpu, "describe", lambda: HERE | {"has_cuda": True})
    monkeypatch.setattr(runner, "run", run)
    out = ["--out", str(tmp_path / "rows.jsonl"), "--work", str(tmp_path)]
    assert gpu.main(["--visit", "1", "--limit", "400", *out]) == 0
    assert len(limits) == len(parts.VISITS[0])
    assert 399 < limits[0] <= 400
    assert limits[0] - 0.3 >= limits[1] >= limits[2] + 0.3
    limits.clear()
    assert gpu.main(["--only", "machine", "first", "--limit", "400", *out]) == 0
    assert limits == [400, 400]


def test_other_bits_of_another_way_to_launch_are_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    digests = iter("abcdefgh")
    monkeypatch.setattr(first, "_digest", lambda results: next(digests))
    with pytest.raises(FailedError, match="graphs, dependent, k = 0: a; graphs, dependent, k = 4: b"):
        first.run(context(tmp_path, part="first"))


def test_every_part_can_be_found_and_fits_its_machine() -> None:
    for part in parts.PARTS:
        module, _, function = part.entry.partition(":")
        assert callable(getattr(__import__(module, fromlist=[function]), function)), part.entry
        if "pair" in part.arguments:
            assert set(part.arguments["pair"].split(":")) <= SHAPES.keys()
    real = models.REAL
    assert real.max_seq_len <= SHAPES["gpt2-xl"].num_positions
    prompts = models.read_prompts(32, real.prompt_length)
    assert {len(prompt) for prompt in prompts} == {real.prompt_length}
    assert len(set(map(tuple, prompts))) == 32
    assert real.middle_context == 512


def test_pytest_is_asked_for_files_that_there_are() -> None:
    for part in parts.PARTS:
        for argument in part.arguments.get("arguments", ()):
            if "/" in argument:
                assert (ROOT / argument.partition("=")[2]).exists(), argument
                assert (ROOT / argument.rpartition("=")[2]).exists(), argument


# Rows


def build_record(k: int | None, seconds: float, *, batch_size: int = 1, repetitions: int = 3) -> Record:
    """9 tokens of each sequence after the first in so many seconds; with drafts, in 4 rounds each."""
    task = Task([[1, 2]] * batch_size, 10, k, batch_size > 1)
    counts = Counts(4 * batch_size, 8 * batch_size, 5 * batch_size) if k != 0 else None
    answer = Answer([[7] * 10] * batch_size, [0.5] * batch_size, seconds, 9 * batch_size, counts)
    return Record(
        Entry("ours", "batch" if batch_size > 1 else "generate", task),
        versions={"specengine": "1"},
        turns=[Turn(answer, 4300.0)] * repetitions,
    )


def build_block(pair: str = "distilgpt2:gpt2-medium", **changes: Any) -> rows.Block:
    draft, target = pair.split(":")

    def cost(name: str) -> models.Cost:
        shape = SHAPES[name]
        weights = 2.0 * (12 * shape.num_layers * shape.num_features**2 + 50257 * shape.num_features)
        kv_bytes = 4.0 * shape.num_layers * shape.num_features
        return models.Cost(weights, kv_bytes, 5 * shape.num_layers + 2)

    block = rows.Block(Pair(draft, target), "float16", models.REAL, 1, cost(target), cost(draft), 4300.0)
    return replace(block, **changes)


def test_the_floor_is_that_of_the_table_of_targets() -> None:
    """The table of targets, where the floor has the biases too."""
    for name, target in (("gpt2-medium", 375), ("gpt2-xl", 1150)):
        block = build_block(f"distilgpt2:{name}")
        floor = models.Floor.of([block.target], num_tokens=0, bandwidth=block.bandwidth)
        assert floor.target_us == pytest.approx(target, rel=0.05)


def test_a_row_stands_beside_its_floor_and_its_target() -> None:
    plain = build_record(0, 9 * 500e-6)
    block = build_block(plain=plain, compiled=build_record(0, 9 * 800e-6))
    row = rows.build_row(plain, System("ours", is_ours=True), block)
    assert row.us_per_token is not None
    assert row.us_per_token["median"] == pytest.approx(500)
    assert row.ratio_to_compiled == pytest.approx(1.6)
    assert (row.target_us, row.target_ratio_to_compiled, row.target_ratio) == (375.0, 1.5, None)
    assert row.num_phases == 123
    assert row.overhead_us_per_phase == pytest.approx((500 - 706.9 / 4.3) / 123, rel=1e-3)

    speculative = rows.build_row(build_record(2, 9 * 250e-6), System("ours", is_ours=True), block)
    assert speculative.us_per_round is not None
    assert speculative.us_per_round["median"] == pytest.approx(9 * 250 / 4)
    assert speculative.ratio_to_plain == pytest.approx(2)
    assert (speculative.acceptance_rate, speculative.mean_acceptance_length) == (5 / 8, 2.25)
    assert (speculative.target_us, speculative.target_ratio) == (None, 1.4)
    assert speculative.num_phases == 123 + 2 * 32

    peer = rows.build_row(build_record(None, 9e-3), System("transformers"), block)
    assert (peer.floor_us, peer.num_phases, peer.target_ratio) == (None, None, None)
    assert "num_speculative_tokens" in peer.to_json()


def test_a_batch_takes_as_long_as_its_steps() -> None:
    plain = build_record(0, 9 * 1e-3, batch_size=8)
    row = rows.build_row(plain, System("ours", is_ours=True), build_block(batch_size=8, plain=plain))
    assert row.tokens_per_second == pytest.approx(8000)
    assert row.us_per_token is not None
    assert row.us_per_round is not None
    assert row.us_per_token["median"] == row.us_per_round["median"] == pytest.approx(1000)
    assert row.target_us is None, "the targets are one sequence's"
    speculative = rows.build_row(
        build_record(2, 9 * 1e-3, batch_size=8), System("ours", is_ours=True), build_block(batch_size=8)
    )
    assert speculative.us_per_round is not None
    assert speculative.us_per_round["median"] == pytest.approx(9000 / 4)


def test_only_the_forced_row_of_the_targets_acceptance_has_the_target() -> None:
    def target(rate: float) -> float | None:
        system = System("ours, FORCED", is_ours=True, forced=rate)
        return rows.build_row(build_record(2, 1.0), system, build_block()).target_ratio

    assert (target(0.5), target(0.7), target(0.9)) == (None, 1.4, None)


def test_the_first_difference_is_over_all_prompts() -> None:
    assert rows.first_difference([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 0, 6]]) == 1
    assert rows.first_difference([[1, 2, 3]], [[1, 2, 3]]) is None


# What is said comes before how fast


class FakeWorker:
    """Continues every prompt with its last token, or with something else."""

    def __init__(self, name: str, lies: dict[str, int | None]) -> None:
        self.about = {"settings": "fake", "instruction_set": "fake", "versions": {"fake": "1"}}
        self._name, self._lies = name, lies

    def generate(self, task: Task) -> Answer:
        is_lie = self._name in self._lies and self._lies[self._name] == task.num_speculative_tokens
        tokens = [[prompt[-1] + is_lie] * task.max_new_tokens for prompt in task.prompts]
        count = (task.max_new_tokens - 1) * len(tokens)
        return Answer(tokens, [0.1] * len(tokens), 1.0, count, Counts(1, 2, 1))

    def cpu_seconds(self) -> float:
        return 0.0


@pytest.fixture
def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """measure({name: k, …}) runs a rehearsal in which these systems lie where they draft k tokens; its rows."""
    monkeypatch.setattr(end_to_end, "measure_bandwidth", lambda device: ("read", 2.0))

    def run(lies: dict[str, int | None], dtype: str = "float32") -> list[dict[str, Any]]:
        def start(setups: list[Any], *_: Any, **__: Any) -> Any:
            return {setup.contestant: FakeWorker(setup.contestant, lies) for setup in setups}, {}

        monkeypatch.setattr(contest, "start", start)
        given = context(tmp_path, pair="distilgpt2:gpt2-medium", batch_sizes=(1, 2))
        given.settings = replace(given.settings, dtype=dtype)
        end_to_end.measure(given, (1, 2), Builder.real)
        return read(tmp_path / "rows.jsonl")

    return run


@pytest.mark.parametrize("liar", [{"ours": 2}, {NO_GRAPHS: 0}, {NO_GRAPHS: 2}])
def test_nothing_is_reported_where_ours_is_not_exact(
    measure: Any, tmp_path: Path, liar: dict[str, int]
) -> None:
    with pytest.raises(FailedError, match=r"ours is not exact: .*token 0 is not plain decoding's"):
        measure(liar)
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_peer_that_says_something_else_is_not_timed_in_fp32(measure: Any) -> None:
    found = measure({COMPILED: 0})
    reasons = {row["system"]: row.get("reason") for row in found if row["num_speculative_tokens"] == 0}
    assert reasons[COMPILED] == "in fp32, token 0 is not ours"
    assert not any("ratio_to_compiled" in row for row in found)


def test_in_16_bits_a_peer_is_timed_and_its_row_says_where_it_differs(measure: Any) -> None:
    found = measure({COMPILED: 0}, dtype="float16")
    compiled = next(row for row in found if row["system"] == COMPILED)
    assert (compiled["equal_tokens"], compiled["first_difference"]) == (0.0, 0)
    assert compiled["tokens_per_second"] > 0


def test_where_time_runs_out_rows_say_so(
    tmp_path: Path, measure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([100.0, 20.0])
    monkeypatch.setattr(Context, "remaining", lambda self: next(times))
    with pytest.raises(FailedError, match="ours, plain, batch 2: no time was left in this part"):
        measure({})
    found = read(tmp_path / "rows.jsonl")
    assert all((row.get("reason") == end_to_end.NO_TIME) == (row["batch_size"] == 2) for row in found)


def test_a_repetition_that_would_end_late_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 10.0, 20.0, 30.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    is_late = end_to_end.before_the_last(31.0)
    assert [is_late(), is_late(), is_late()] == [False, False, True]


# Traces


def event(
    name: str, category: str, start: float, length: float, correlation: int | None = None
) -> dict[str, Any]:
    return {
        **{"ph": "X", "name": name, "cat": category, "ts": start, "dur": length},
        "args": {} if correlation is None else {"correlation": correlation},
    }


TRACE = [
    event(trace.STEADY, "user_annotation", 100, 100),
    event("cudaGraphLaunch", "cuda_runtime", 90, 1, 1),  # before
    event("spec_head", "kernel", 95, 20, 1),
    event("cudaGraphLaunch", "cuda_runtime", 101, 1, 2),
    event("spec_norm_qkv", "kernel", 110, 10, 2),
    event("spec_head", "kernel", 125, 15, 2),
    event("cudaMemcpyAsync", "cuda_runtime", 103, 1, 3),
    event("Memcpy DtoH (Device -> Pinned)", "gpu_memcpy", 140, 2, 3),
    event("cudaGraphLaunch", "cuda_runtime", 150, 1, 4),
    event("spec_norm_qkv", "kernel", 150, 20, 4),  # the device had nothing to do from 142 to 150
    event("cudaEventQuery", "cuda_runtime", 160, 1),
    event("cudaDeviceSynchronize", "cuda_runtime", 250, 1),  # the profiler's own
]


def test_idle_is_the_time_between_launches() -> None:
    found = trace.steady(TRACE)
    assert (found.num_graph_launches, found.num_kernels) == (2, 3)
    assert found.idle_share == pytest.approx(8 / 60)
    assert found.gap_share == pytest.approx((8 + 5) / 60)
    assert found.device_us == 47
    assert found.blocking == {}
    assert found.num_pageable_copies == 0


def test_whatever_makes_the_host_wait_is_counted() -> None:
    waits = [
        event("cudaStreamSynchronize", "cuda_runtime", 170, 1, 8),
        event("cudaMemcpyAsync", "cuda_runtime", 175, 1, 9),
        event("Memcpy DtoH (Device -> Pageable)", "gpu_memcpy", 176, 2, 9),
    ]
    found = trace.steady([*TRACE, *waits])
    assert found.blocking == {"cudaStreamSynchronize": 1}
    assert found.num_pageable_copies == 1


def test_a_trace_without_the_annotation_is_refused() -> None:
    with pytest.raises(ValueError, match="no annotation"):
        trace.steady(TRACE[1:])


# Other commands


def test_a_command_that_takes_too_long_is_interrupted_and_still_says_how_far_it_got(tmp_path: Path) -> None:
    given = context(tmp_path)
    given.settings = replace(given.settings, limit=1.0)
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('3 passed so far')"
    ended = suites.execute(given, [sys.executable, "-c", code])
    assert ended.is_interrupted
    with pytest.raises(FailedError, match="not done in time: 3 passed so far"):
        ended.check()
    row = read(tmp_path / "rows.jsonl")[0]
    assert (row["kind"], row["summary"], row["is_complete"]) == ("suite", "3 passed so far", False)


def test_pytest_runs_without_the_repository_on_its_path(tmp_path: Path) -> None:
    """In it a folder is called `kernels`, as a package that transformers looks for."""
    test = tmp_path / "test_path.py"
    test.write_text(f"import sys\ndef test_path():\n    assert not {{'', {str(ROOT)!r}}} & set(sys.path)\n")
    ended = suites.execute(
        context(tmp_path), [*suites.PYTEST, "--rootdir", str(tmp_path), "-c", os.devnull, str(test)]
    )
    ended.check()
    assert "1 passed" in ended.summary


def test_a_summary_has_what_was_counted_and_what_came_last(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("3 passed, 2 skipped in 4.05s\n========= ERROR SUMMARY: 0 errors\n")
    assert suites.summary(log) == "3 passed, 2 skipped in 4.05s; ERROR SUMMARY: 0 errors"


def test_the_parts_have_every_test_of_a_kernel_once() -> None:
    """Whatever else is in tests/ is in `tests-engine`, or in a part that this one leaves out."""
    given = {part.name: part.arguments["arguments"] for part in parts.PARTS if part.group == "tests"}
    engine = given.pop("tests-engine")
    named = [path for paths in given.values() for path in paths]
    assert len(named) == len(set(named))
    folder = ROOT / "tests"
    assert {ROOT / path for path in named if path.startswith("tests/kernels/")} == {
        *folder.glob("kernels/test_*.py")
    }
    left_out = {ROOT / text.removeprefix("--ignore=") for text in engine[1:]}
    assert left_out == {folder / "kernels"} | {ROOT / path for path in named if "kernels/" not in path}
    assert all(path.exists() for path in left_out)


def test_no_tests_are_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "NUM_WORKERS", 0)
    given = context(tmp_path, arguments=["-k", "no_such_test", "tests/test_rng.py"])
    with pytest.raises(FailedError, match="no test was found"):
        suites.run_tests(given)


def test_a_machine_without_the_sanitizer_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "find_sanitizer", lambda: None)
    with pytest.raises(SkippedError, match="compute-sanitizer is neither"):
        suites.run_sanitizer(context(tmp_path, tool="memcheck", arguments=[]))


def test_what_nvidia_smi_says_is_read_and_its_absence_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert about.nvidia_smi() == {}
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '580.159.04, 1980, 1980, 3201, 700.00, 35'\n")
    program.chmod(0o755)
    assert about.nvidia_smi()["driver"] == "580.159.04"
    assert about.nvidia_smi()["sm_clock_mhz"] == "1980"


def test_an_interrupted_command_ends_its_part(planted: Path) -> None:
    code = (
        "import gpu; from gpu_parts import runner; from gpu_parts.parts import Part; from pathlib import Path\n"
        f"gpu.describe = lambda: {HERE!r}; runner.GRACE_SECONDS = 0.2\n"
        f"work = Path({str(planted)!r})\n"
        "given = gpu.parse(['--work', str(work)])\n"
        "gpu.run(given, [Part('hang', '', 'planted_parts:hang', needs_cuda=False)], work)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT / "benchmarks",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a background job's is ignored
    )
    pid_file = planted / "hang.pid"
    deadline = time.monotonic() + 30
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode != 0
    status = Path(f"/proc/{pid_file.read_text()}/cmdline")
    assert not status.exists() or not status.read_bytes()
