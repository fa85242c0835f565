"""A peer of the benchmarks is tried before it counts: whatever it does, its row has a reason and the others go on."""

from __future__ import annotations

import os
import re
import shutil
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from generation import contest, llama_builds, process, trial
from generation.protocol import Setup, Task, UnavailableError

# A peer that does what its target is called, when it is asked for several tokens.
FAKE = """
import os, signal, sys, time
from generation.protocol import Answer

DISTRIBUTIONS = ()

def prepare(setup):
    pass

class Fake:
    instruction_set = "fake"

    def __init__(self, setup):
        self.setup = setup
        self.settings = f"fake, {setup.build} build"

    def generate(self, task):
        does = self.setup.target if task.max_new_tokens > 1 else "works"
        if does == f"dies drafting in {self.setup.build}" and task.num_speculative_tokens:
            os.kill(os.getpid(), signal.SIGILL)
        if does == "dies" or does == f"dies in {self.setup.build}":
            print("tile load", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGILL)
        if does == "raises":
            raise RuntimeError("no such kernel")
        if does == "hangs":
            time.sleep(1000)
        return Answer([[0] * task.max_new_tokens] * len(task.prompts), [0.1] * len(task.prompts), 0.0, 0)

def load(setup):
    if setup.target == "cannot load":
        os.kill(os.getpid(), signal.SIGSEGV)
    return Fake(setup)
"""
TASKS = [Task([[1, 2]], 1), Task([[1, 2]], 4)]


@pytest.fixture(autouse=True)
def _fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fake_peer.py").write_text(FAKE, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


def setup(does: str, contestant: str = "fake") -> Setup:
    return Setup(contestant, does, "", "float32", "float32", False, 1, 16, "", module="fake_peer")


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        ("dies", "its process was ended by SIGILL: tile load"),
        ("raises", "no such kernel"),
        ("hangs", "no answer in 20 s"),
        ("cannot load", "its process was ended by SIGSEGV"),
    ],
)
def test_who_fails_the_trial_has_a_reason_and_the_others_go_on(
    does: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if does == "hangs":
        monkeypatch.setattr(trial, "TRIAL_SECONDS", 20.0)  # a busy machine starts a process in as many
    lines: list[str] = []
    with ExitStack() as stack:
        setups = [setup(does, "first"), setup("works", "second")]
        workers, reasons = contest.start(setups, stack, lines.append, tasks=TASKS)
        assert reasons == {"first": reason}
        trying = [f"  {name}: loading and trying" for name in ("first", "second")]
        assert lines == [trying[0], f"  first: {reason}", trying[1]]
        assert list(workers) == ["second"]
        assert workers["second"].timeout == process.TIMEOUT_SECONDS, "the trial's limit ends with it"
        assert workers["second"].generate(TASKS[1]).token_ids == [[0] * 4]


def test_who_failed_is_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    workers: list[process.Worker] = []
    really_close = process.Worker.close
    monkeypatch.setattr(process.Worker, "close", lambda self: (workers.append(self), really_close(self)))
    with pytest.raises(UnavailableError, match="no such kernel"):
        trial.load(setup("raises"), TASKS, print)
    [worker] = workers
    assert not Path(f"/proc/{worker._process.pid}").exists()


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "ended with status 0"),
        (3, "ended with status 3"),
        (-4, "was ended by SIGILL"),
        (-99, "was ended by signal 99"),
    ],
)
def test_an_ending_has_the_name_of_its_signal(status: int, words: str) -> None:
    assert process.ending(status) == words


# Builds of llama.cpp

AVX2 = frozenset({"sse4_2", "avx", "avx2", "bmi2", "fma", "f16c"})
AVX512 = AVX2 | {
    "avx512f",
    "avx512cd",
    "avx512vl",
    "avx512dq",
    "avx512bw",
    "avx512_vnni",
    "amx_tile",
    "amx_int8",
}
FIRST_FAILED = "native build: its process was ended by SIGILL: tile load"


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The options of what was built, on a processor with AVX2."""
    made: list[str] = []

    def run(command: list[str], environment: dict[str, str], log: Path) -> int:
        made.append(environment["CMAKE_ARGS"])
        log.write_text("configuring\nx.cpp:1: error: no such option\nERROR: Failed\n", encoding="utf-8")
        return int("GGML_NATIVE=ON" in environment["CMAKE_ARGS"] and (tmp_path / "no compiler").exists())

    monkeypatch.setattr(llama_builds, "BUILDS", tmp_path / "builds")
    monkeypatch.setattr(llama_builds, "read_features", lambda: AVX2)
    monkeypatch.setattr(llama_builds.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(llama_builds, "run_quietly", run)
    return made


def start(does: str) -> tuple[dict[str, str], str]:
    """(reasons, settings of llama.cpp)"""
    with ExitStack() as stack:
        workers, reasons = contest.start(
            [setup(does, "llama.cpp"), setup("works", "second")], stack, print, tasks=TASKS
        )
        assert "second" in workers
        return reasons, workers["llama.cpp"].about["settings"] if "llama.cpp" in workers else ""


def test_the_first_build_that_runs_counts_and_is_made_once(builds: list[str]) -> None:
    for _ in range(2):
        assert start("dies in native") == ({}, f"fake, listed features build; {FIRST_FAILED}")
    assert [options.split()[1] for options in builds] == ["-DGGML_NATIVE=ON", "-DGGML_NATIVE=OFF"]
    assert start("works") == ({}, "fake, native build")
    assert len(builds) == 2


def test_a_build_that_dies_when_it_drafts_is_passed_over(builds: list[str]) -> None:
    fails = replace(setup("dies drafting in native", "llama.cpp"), speculates=True)
    with ExitStack() as stack:
        workers, reasons = contest.start([fails], stack, print, tasks=TASKS)
        assert reasons == {}
        settings = workers["llama.cpp"].about["settings"]
    assert settings == "fake, listed features build; native build: its process was ended by SIGILL"


def test_where_no_build_runs_the_row_says_what_became_of_each(builds: list[str]) -> None:
    reasons, _ = start("dies")
    names = ["native", "listed features", "portable"]
    died = [f"{name} build: its process was ended by SIGILL: tile load" for name in names]
    assert reasons == {"llama.cpp": "; ".join(died)}
    assert len(builds) == 3


def test_a_build_that_cannot_be_made_is_passed_over(builds: list[str], tmp_path: Path) -> None:
    (tmp_path / "no compiler").touch()
    _, settings = start("works")
    assert settings.startswith("fake, listed features build; native build: it could not be made (see ")
    assert settings.endswith("x.cpp:1: error: no such option")
    assert not list((tmp_path / "builds").glob("unfinished*"))


def test_another_processor_has_builds_of_its_own(builds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    native = llama_builds.find_or_make(llama_builds.ladder()[0], print)
    monkeypatch.setattr(llama_builds, "read_features", lambda: AVX512)
    assert llama_builds.find_or_make(llama_builds.ladder()[0], print) != native
    assert len(builds) == 2


def test_the_server_is_made_of_the_packages_sources_and_once(
    builds: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Downloaded, configured as every build is, and only its program kept."""
    commands: list[list[str]] = []

    def run(command: list[str], environment: dict[str, str], log: Path) -> int:
        commands.append(command)
        if "download" in command:
            source = tmp_path / "package" / "vendor" / "llama.cpp"
            source.mkdir(parents=True)
            shutil.make_archive(
                str(Path(command[command.index("--dest") + 1]) / "package"), "gztar", tmp_path, "package"
            )
        elif "--build" in command:
            program = Path(command[command.index("--build") + 1]) / "bin" / "llama-server"
            program.parent.mkdir(parents=True)
            program.write_text("it", encoding="utf-8")
        return 0

    monkeypatch.setattr(llama_builds, "run_quietly", run)
    monkeypatch.setattr(llama_builds.shutil, "which", lambda name: f"/usr/bin/{name}")
    first, *_ = llama_builds.ladder()
    paths = {llama_builds.find_or_make_server(first, print) for _ in range(2)}
    (path,) = paths
    assert path.read_text(encoding="utf-8") == "it"
    assert [command[1] if command[0] == "cmake" else "pip" for command in commands] == [
        "pip",
        "-S",
        "--build",
    ]
    assert f"llama-cpp-python=={llama_builds.read_version()}" in commands[0]
    assert {"-DGGML_NATIVE=ON", "-DLLAMA_OPENSSL=OFF"} < set(commands[1])
    assert [each.name for each in path.parent.parent.iterdir() if each.is_dir()] == [path.parent.name]
    monkeypatch.setattr(llama_builds.shutil, "which", lambda name: None)
    with pytest.raises(UnavailableError, match="needs CMake"):
        llama_builds.find_or_make_server(llama_builds.ladder()[1], print)


def test_only_what_the_processor_has_is_listed_and_tiles_never(
    builds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_builds, "read_features", lambda: AVX512)
    _, some, none = llama_builds.ladder()
    on = {option.removesuffix("=ON") for option in some.options if option.endswith("=ON")}
    names = ("SSE42", "AVX", "AVX2", "BMI2", "FMA", "F16C", "AVX512", "AVX512_VNNI")
    assert on == {f"GGML_{name}" for name in names}
    assert {f"{name}=OFF" for name in llama_builds.NEVER_LISTED} < set(some.options)
    assert all(option.endswith("=OFF") for option in none.options)
    monkeypatch.setattr(llama_builds.platform, "machine", lambda: "aarch64")
    assert [build.name for build in llama_builds.ladder()] == ["native", "portable"]


def test_no_compiler_outlives_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_builds, "BUILD_SECONDS", 2.0)
    command = ["sh", "-c", f"sleep 1000 & echo $! > {tmp_path}/pid; wait"]
    with pytest.raises(UnavailableError, match="its build took longer"):
        llama_builds.run_quietly(command, {}, tmp_path / "log")
    status = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/status")
    deadline = time.monotonic() + 30
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_features_are_read_from_this_machine() -> None:
    assert llama_builds.read_features()
    assert re.fullmatch(r"[0-9.]+", llama_builds.read_version())
