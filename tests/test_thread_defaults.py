"""How many threads the native ops use where nobody says: the environment, the affinity, the container's quota."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import cast

import pytest
import torch

from specengine.ops.load import load_backend
from specengine.ops.native import NativeBackend
from specengine.ops.threads import default_num_threads


@pytest.fixture(autouse=True)
def affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight processors."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def build_root(directory: Path, membership: str, files: dict[str, str]) -> Path:
    """A root with a process's control groups, and their files under /sys/fs/cgroup."""
    for path, text in {
        "proc/self/cgroup": membership,
        **{f"sys/fs/cgroup/{k}": v for k, v in files.items()},
    }.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_text(text + "\n", encoding="ascii")
    return directory


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 8),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": " +4,2,1 "}, 4),
        ({"OMP_NUM_THREADS": "20"}, 20),
        ({"OMP_NUM_THREADS": "9999"}, 1024),
        ({"OMP_NUM_THREADS": "", "SPECENGINE_NUM_THREADS": ""}, 8),
        ({"OMP_NUM_THREADS": "3", "SPECENGINE_NUM_THREADS": "5"}, 5),
        ({"OMP_NUM_THREADS": "zero", "SPECENGINE_NUM_THREADS": "5"}, 5),
        ({"SPECENGINE_NUM_THREADS": "1024"}, 1024),
    ],
)
def test_the_environment_comes_first(environment: dict[str, str], expected: int, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert default_num_threads(environment, tmp_path) == expected


@pytest.mark.parametrize("text", ["0", "-2", "two", "1.5", "4 5", ",4", "٣"])
def test_malformed_numbers_are_refused_or_ignored_aloud(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="SPECENGINE_NUM_THREADS="):
        default_num_threads({"SPECENGINE_NUM_THREADS": text}, tmp_path)
    with pytest.warns(UserWarning, match="OMP_NUM_THREADS="):
        assert default_num_threads({"OMP_NUM_THREADS": text}, tmp_path) == 8


def test_more_threads_than_can_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="SPECENGINE_NUM_THREADS='1025'"):
        default_num_threads({"SPECENGINE_NUM_THREADS": "1025"}, tmp_path)


V1 = "12:cpuset:/\n4:cpu,cpuacct:/docker/a1\n1:name=systemd:/docker/a1"


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        # Version 2, as a container sees it: its own group is the root.
        ("0::/", {"cpu.max": "250000 100000"}, 3),
        ("0::/", {"cpu.max": "200000 100000"}, 2),
        ("0::/", {"cpu.max": "1000 100000"}, 1),
        ("0::/", {"cpu.max": "1600000 100000"}, 8),
        ("0::/", {"cpu.max": "max 100000"}, 8),
        ("0::/", {"cpu.max": "nonsense"}, 8),
        # A service: its group, and those around it.
        ("0::/a.slice/b.service", {"a.slice/b.service/cpu.max": "400000 100000"}, 4),
        (
            "0::/a/b",
            {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000", "cpu.max": "300000 100000"},
            2,
        ),
        ("0::/a/b", {"a/c/cpu.max": "100000 100000"}, 8),
        ("0::/../outside", {"cpu.max": "300000 100000"}, 3),
        # Version 1, with and without sight of the groups outside.
        (V1, {"cpu/docker/a1/cpu.cfs_quota_us": "350000", "cpu/docker/a1/cpu.cfs_period_us": "100000"}, 4),
        (V1, {"cpu,cpuacct/cpu.cfs_quota_us": "50000", "cpu,cpuacct/cpu.cfs_period_us": "25000"}, 2),
        (V1, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        (V1, {"cpu/cpu.cfs_quota_us": "100000"}, 8),
        # Both, as systems in between have them.
        (
            V1 + "\n0::/",
            {"cpu.max": "600000 100000", "cpu/cpu.cfs_quota_us": "5", "cpu/cpu.cfs_period_us": "1"},
            5,
        ),
        ("", {"cpu.max": "100000 100000"}, 8),
    ],
)
def test_a_containers_quota_counts(
    membership: str, files: dict[str, str], expected: int, tmp_path: Path
) -> None:
    assert default_num_threads({}, build_root(tmp_path, membership, files)) == expected


def test_a_quota_does_not_overrule_the_environment(tmp_path: Path) -> None:
    root = build_root(tmp_path, "0::/", {"cpu.max": "100000 100000"})
    assert default_num_threads({"OMP_NUM_THREADS": "6"}, root) == 6


def test_the_default_is_asked_where_no_number_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECENGINE_NUM_THREADS", "7")
    assert NativeBackend().num_threads == 7
    monkeypatch.setenv("SPECENGINE_NUM_THREADS", "many")
    with pytest.raises(ValueError, match="SPECENGINE_NUM_THREADS='many'"):
        NativeBackend()
    backend = load_backend("native", torch.device("cpu"), num_threads=2)
    assert cast(NativeBackend, backend).num_threads == 2
