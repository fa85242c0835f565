"""How many CPU threads the native ops use where `num_threads` is not given."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

MAX_THREADS = 1024


def default_num_threads(environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> int:
    """The first that says something of: `SPECENGINE_NUM_THREADS`, `OMP_NUM_THREADS`, and what the system lets this
    process use: the fewer of the processors in its affinity mask and its container's CPU quota, rounded up.

    root: where `proc` and `sys` lie

    A `SPECENGINE_NUM_THREADS` that is no number from 1 to 1024 is a `ValueError`; an `OMP_NUM_THREADS` that is none,
    which is for others too, is ignored with a warning, as OpenMP does.
    """
    if ours := environment.get("SPECENGINE_NUM_THREADS", "").strip():
        number = _positive(ours)
        if number is None or number > MAX_THREADS:
            raise ValueError(f"SPECENGINE_NUM_THREADS={ours!r} is not a number from 1 to {MAX_THREADS}")
        return number
    if shared := environment.get("OMP_NUM_THREADS", "").strip():
        # A list is one number for each level of nesting.
        number = _positive(shared.split(",")[0])
        if number is not None:
            return min(number, MAX_THREADS)
        warnings.warn(f"OMP_NUM_THREADS={shared!r} is no positive number: ignored", stacklevel=2)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, *_quotas(root), MAX_THREADS)


def _positive(text: str) -> int | None:
    text = text.strip().removeprefix("+")
    return int(text) if text.isascii() and text.isdigit() and int(text) > 0 else None


def _quotas(root: Path) -> Iterator[int]:
    """Processors' worth of time, rounded up, that each control group of this process allows."""
    for directory in _control_groups(root):
        for quota in (_version_2(directory), _version_1(directory)):
            if quota is not None:
                yield quota


def _control_groups(root: Path) -> Iterator[Path]:
    """The process's control groups and all that these lie in: each may have a quota. In a container, which does not
    see the groups outside, its own is the root of them all."""
    membership = _read(root / "proc/self/cgroup") or ""
    mounts = root / "sys/fs/cgroup"
    for line in membership.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            mounted = [mounts]
        elif "cpu" in controllers.split(","):
            mounted = [mounts / "cpu", mounts / "cpu,cpuacct"]
        else:
            continue
        group = PurePosixPath("/", path).relative_to("/")
        for mount in mounted:
            for inside in (group, *group.parents):
                if ".." not in inside.parts:
                    yield mount / inside


def _version_2(group: Path) -> int | None:
    fields = (_read(group / "cpu.max") or "").split()
    return _processors(*fields) if len(fields) == 2 else None


def _version_1(group: Path) -> int | None:
    quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
    return None if quota is None or period is None else _processors(quota.strip(), period.strip())


def _processors(quota: str, period: str) -> int | None:
    """Microseconds of processor time a period, as whole processors; None for "max" and -1, which are no limit."""
    time, length = _positive(quota), _positive(period)
    return None if time is None or length is None else -(-time // length)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
