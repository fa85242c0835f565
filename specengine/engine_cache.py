"""Engines that outlive a call: bounded, shared between threads, closed by their last user."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specengine.engine import Engine
from specengine.errors import InsufficientMemoryError


@dataclass(eq=False)
class _Kept:
    """An engine, or the place of one that is being loaded."""

    lock: threading.Lock
    models: list[Callable[[], object]]
    engine: Engine | None = None
    num_users: int = 0
    is_retired: bool = False


class EngineCache:
    """The engines used last, by what they were built from. One in use is closed by its last user."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._kept: OrderedDict[object, _Kept] = OrderedDict()

    @contextmanager
    def lease(self, key: object, build: Callable[[], Engine], *, in_memory: list[Any]) -> Iterator[Engine]:
        kept = self._check_out(key, in_memory)
        try:
            with kept.lock:
                if kept.engine is None:
                    kept.engine = self._build(key, build)
            yield kept.engine
        finally:
            self._check_in(kept)

    def clear(self) -> None:
        with self._lock:
            self._retire(list(self._kept))

    def forget(self) -> None:
        """For a forked process: the engines are the parent's, and another thread of it may have held the locks."""
        self._lock = threading.Lock()
        self._kept = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def _check_out(self, key: object, in_memory: list[Any]) -> _Kept:
        with self._lock:
            # An id names a model only while it lives, so the dead go before the key is looked up.
            self._retire(
                [key for key, kept in self._kept.items() if any(get() is None for get in kept.models)]
            )
            kept = self._kept.get(key)
            if kept is None:
                kept = _Kept(threading.Lock(), [_reference(model) for model in in_memory])
            self._kept[key] = kept
            self._kept.move_to_end(key)
            self._retire(list(self._kept)[: -self._capacity])
            kept.num_users += 1
            return kept

    def _check_in(self, kept: _Kept) -> None:
        with self._lock:
            kept.num_users -= 1
            _close_if_unused(kept)

    def _build(self, key: object, build: Callable[[], Engine]) -> Engine:
        try:
            try:
                return build()
            except InsufficientMemoryError:
                if not self._retire_idle():
                    raise
                return build()
        except BaseException:
            with self._lock:
                self._retire([key])
            raise

    def _retire_idle(self) -> bool:
        """Closes the engines that nobody uses; whether there was one."""
        with self._lock:
            idle = [key for key, kept in self._kept.items() if kept.num_users == 0]
            self._retire(idle)
            return bool(idle)

    def _retire(self, keys: Sequence[object]) -> None:
        for key in keys:
            kept = self._kept.pop(key, None)
            if kept is not None:
                kept.is_retired = True
                _close_if_unused(kept)


def _close_if_unused(kept: _Kept) -> None:
    if kept.is_retired and kept.num_users == 0 and kept.engine is not None:
        kept.engine.close()
        kept.engine = None


def _reference(model: object) -> Callable[[], object]:
    try:
        return weakref.ref(model)
    except TypeError:
        return lambda: model


def is_in_memory(model: object) -> bool:
    return model is not None and not isinstance(model, str | os.PathLike)


def _file_version(file: Path) -> tuple[str, int, int, int]:
    """What changes when a file is written again, where a link points to, or what it points to is written again."""
    status = file.stat() if file.exists() else file.lstat()
    return file.name, status.st_ino, status.st_size, status.st_mtime_ns


def model_key(model: Any) -> object:
    """Identifies a model: its name, its directory and files, or the object and its weights' versions."""
    if model is None:
        return None
    if isinstance(model, str | os.PathLike):
        path = Path(model).expanduser()
        if path.is_file():
            return str(path.resolve()), _file_version(path)
        if not path.is_dir():
            return str(model)
        return str(path.resolve()), tuple(_file_version(file) for file in sorted(path.iterdir()))
    if isinstance(model, list | tuple):
        return tuple(model_key(item) for item in model)
    weights = model.parameters() if hasattr(model, "parameters") else ()
    return id(model), tuple((weight.data_ptr(), weight._version) for weight in weights)
