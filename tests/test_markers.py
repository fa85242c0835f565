"""`pytest -m gpu` finds every test of Triton kernels: one that lacks the marker fails, wherever it runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import markers
import pytest
import torch

from specengine.ops.load import load_backend


def launch_something() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ids = torch.zeros(1, dtype=torch.int32, device=device)
    load_backend("triton", device).embed(ids, ids, torch.ones(2, 16, device=device), None)


def test_a_launch_without_the_marker_fails() -> None:
    unmarked = cast(pytest.Item, SimpleNamespace(nodeid="test_x", get_closest_marker=lambda name: None))
    with markers.running(unmarked), pytest.raises(pytest.fail.Exception, match="test_x launches Triton"):
        launch_something()


@pytest.mark.triton
def test_a_launch_with_it_does_not() -> None:
    launch_something()
