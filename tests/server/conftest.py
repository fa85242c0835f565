"""A tiny model that chats, and a server of it that a module's tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_templates import save_chat_model
from running_server import Running

from specengine.engine import Engine


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def server(chat_model: Path) -> Iterator[Running]:
    """A tiny model with a drafter, whose blocks are all back when a module's tests are over."""
    with Running(chat_model, "suffix") as running:
        yield running.ready()
        running.check_clean()


@pytest.fixture(scope="module")
def library(chat_model: Path) -> Iterator[Engine]:
    """The same model without a server, and without drafts."""
    with Engine(chat_model, dtype="float32", block_size=4, num_threads=1) as engine:
        yield engine


@pytest.fixture
def start(chat_model: Path) -> Iterator[Callable[..., Running]]:
    """start(**options): a server of a test's own, ready, ended with it. Options are those of `Running`."""
    running: list[Running] = []

    def begin(draft_model: Any = "suffix", **options: Any) -> Running:
        server = Running(chat_model, draft_model, **options).__enter__()
        running.append(server)
        return server.ready()

    yield begin
    for server in running:
        server.__exit__()
