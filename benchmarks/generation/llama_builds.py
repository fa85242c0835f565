"""llama.cpp built for this processor: as it would build itself, and, where that does not run, for less.

Its own choice (GGML_NATIVE) uses whatever the compiler sees, AMX too, which not every machine that names it lets one
use. A build is made when it is first wanted, in minutes, and found again under build/llama.cpp as long as the
version, the options and the processor's features are the same.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from generation.protocol import UnavailableError

ROOT = Path(__file__).resolve().parent.parent.parent
BUILDS = ROOT / "build" / "llama.cpp"
CONSTRAINTS = ROOT / "benchmarks" / "constraints.txt"
PACKAGE = "llama-cpp-python"
BUILD_SECONDS = 3600.0
ALWAYS = ("LLAVA_BUILD=OFF",)  # no images here
SERVER = "llama-server"
# One file, which asks nothing of a network; without its page.
SERVER_ALWAYS = (
    *("CMAKE_BUILD_TYPE=Release", "BUILD_SHARED_LIBS=OFF", "LLAMA_OPENSSL=OFF", "LLAMA_USE_PREBUILT_UI=OFF"),
    *("LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF"),
)
# Options of CMake, and what the processor and the system must both allow, as /proc/cpuinfo names it.
FEATURES = {
    "GGML_SSE42": ("sse4_2",),
    "GGML_AVX": ("avx",),
    "GGML_AVX2": ("avx2",),
    "GGML_BMI2": ("bmi2",),
    "GGML_FMA": ("fma",),
    "GGML_F16C": ("f16c",),
    "GGML_AVX_VNNI": ("avx_vnni",),
    "GGML_AVX512": ("avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"),
    "GGML_AVX512_VBMI": ("avx512_vbmi",),
    "GGML_AVX512_VNNI": ("avx512_vnni",),
    "GGML_AVX512_BF16": ("avx512_bf16",),
}
# Only its own choice uses tiles: that they are named says too little.
NEVER_LISTED = ("GGML_AMX_TILE", "GGML_AMX_INT8", "GGML_AMX_BF16")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Build:
    """name: in its rows; options: of CMake"""

    name: str
    options: tuple[str, ...]


def ladder() -> list[Build]:
    """The builds that are tried, the fastest first."""
    builds = [Build("native", ("GGML_NATIVE=ON",))]
    if platform.machine() == "x86_64":
        features = read_features()
        allowed = [name for name, needed in FEATURES.items() if features.issuperset(needed)]
        builds.append(Build("listed features", listed(allowed)))
    return [*builds, Build("portable", listed([]))]


def listed(allowed: list[str]) -> tuple[str, ...]:
    switched = [f"{name}={'ON' if name in allowed else 'OFF'}" for name in FEATURES]
    return ("GGML_NATIVE=OFF", *switched, *(f"{name}=OFF" for name in NEVER_LISTED))


def read_features() -> frozenset[str]:
    """Of the processor, as far as the system lets them be used."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    lines = [line.partition(":") for line in text.splitlines()]
    values = [value for name, _, value in lines if name.strip() in ("flags", "Features")]
    return frozenset(values[0].split()) if values else frozenset()


def read_version() -> str:
    """The version that `benchmarks/constraints.txt` names."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(f"{PACKAGE}=="))


def find_or_make(build: Build, say: Say) -> Path:
    """The directory that the package is imported from. Raises `UnavailableError` where it cannot be built."""

    def make(unfinished: Path, log: Path) -> None:
        options = " ".join(f"-D{option}" for option in (*ALWAYS, *build.options))
        run_or_raise(install_command(unfinished), {"CMAKE_ARGS": options}, log)

    return _find_or_make("", ALWAYS, build, say, make)


def find_or_make_server(build: Build, say: Say) -> Path:
    """llama.cpp's own server, which takes many requests at a time, of the sources that the package brings; needs CMake.

    Raises `UnavailableError` where it cannot be built.
    """

    def make(unfinished: Path, log: Path) -> None:
        if shutil.which("cmake") is None:
            raise UnavailableError("its server needs CMake to be built, and there is none")
        with tempfile.TemporaryDirectory(dir=BUILDS) as scratch:
            run_or_raise(download_command(Path(scratch)), {}, log)
            (archive,) = Path(scratch).glob("*.tar.gz")
            shutil.unpack_archive(archive, scratch)
            (sources,) = Path(scratch).glob("*/vendor/llama.cpp")
            options = [f"-D{option}" for option in (*SERVER_ALWAYS, *build.options)]
            built = Path(scratch) / "built"
            run_or_raise(["cmake", "-S", str(sources), "-B", str(built), *options], {}, log)
            parallel = ["--parallel", str(len(os.sched_getaffinity(0)))]
            run_or_raise(["cmake", "--build", str(built), "--target", SERVER, *parallel], {}, log)
            shutil.move(built / "bin" / SERVER, unfinished / SERVER)

    return _find_or_make("server-", SERVER_ALWAYS, build, say, make) / SERVER


def _find_or_make(
    prefix: str, always: tuple[str, ...], build: Build, say: Say, make: Callable[[Path, Path], None]
) -> Path:
    """The directory of what `make` puts into one, given it and a log."""
    version, recipe = read_version(), (always, build.options, sorted(read_features()))
    key = hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]
    path = BUILDS / f"{version}-{prefix}{build.name.replace(' ', '-')}-{key}"
    if path.exists():
        return path
    say(f"  llama.cpp {version}: building it, {prefix}{build.name} (once; some minutes)")
    BUILDS.mkdir(parents=True, exist_ok=True)
    log = path.with_name(f"{path.name}.log")
    unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=BUILDS))
    try:
        make(unfinished, log)
        with suppress(OSError):  # another benchmark was quicker
            unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return path


def install_command(directory: Path) -> list[str]:
    """From source; what it needs to run is in the environment already."""
    # pip's own cache of wheels does not know of CMake's options.
    how = ["--no-deps", "--no-cache-dir", "--no-binary", PACKAGE, "-c", str(CONSTRAINTS)]
    given = shlex.split(os.environ.get("PIP_FLAGS", ""))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
    return [*pip, *given, *how, "--target", str(directory), PACKAGE]


def download_command(directory: Path) -> list[str]:
    """The package's sources, which have llama.cpp's in them."""
    given = shlex.split(os.environ.get("PIP_FLAGS", ""))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download"]
    how = ["--no-deps", "--no-binary", PACKAGE, "--dest", str(directory)]
    return [*pip, *given, *how, f"{PACKAGE}=={read_version()}"]


def run_or_raise(command: list[str], environment: dict[str, str], log: Path) -> None:
    """Raises `UnavailableError` with what was wrong."""
    if run_quietly(command, environment, log) != 0:
        raise UnavailableError(
            f"it could not be made (see {os.path.relpath(log, ROOT)}): {first_error(log)}"[:300]
        )


def run_quietly(command: list[str], environment: dict[str, str], log: Path) -> int:
    """The status; what it says goes to `log`. No compiler outlives it, whatever happens."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the benchmark
        )
        try:
            return process.wait(BUILD_SECONDS)
        except subprocess.TimeoutExpired:
            raise UnavailableError(f"its build took longer than {BUILD_SECONDS:.0f} s") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def first_error(log: Path) -> str:
    """The line of the log that says most: the first that tells an error, else its last."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    said = [line for line in lines if line]
    return next((line for line in said if "error:" in line.lower()), said[-1] if said else "")
