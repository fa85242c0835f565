"""A Ray cluster: joined where there is one, else begun on this machine and ended with the command."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import ray

from specengine.errors import SpecEngineError

_LOCAL, _FOUND_BY_RAY = "local", "auto"
_CONNECT_SECONDS = 5.0  # Ray itself would try for minutes


class Share(NamedTuple):
    """What each of so many engines gets of a cluster."""

    num_engines: int
    num_cpus: int
    num_gpus: int

    @property
    def resources(self) -> dict[str, int]:
        """As Ray's options of an actor."""
        return {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus}


@contextmanager
def joined(address: str | None) -> Iterator[None]:
    """The cluster at `address`, else at $RAY_ADDRESS; where nothing is said, one of this machine alone, which has no
    dashboard and is gone afterwards. One that this process is in already is left as it is.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or _LOCAL
    options: dict[str, Any] = {}
    if address == _LOCAL:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told
        options = {"include_dashboard": False}
    elif address != _FOUND_BY_RAY:
        _check_is_there(address)
    ray.init(address, log_to_driver=False, logging_level=logging.WARNING, **options)
    try:
        yield
    finally:
        ray.shutdown()


def _check_is_there(address: str) -> None:
    """Raises `SpecEngineError` where nothing listens."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    try:
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise SpecEngineError(f"no Ray cluster at {address}: {error}") from None


def share_cluster(num_engines: int | None, *, on_gpu: bool) -> Share:
    """The cluster's resources, divided among engines; by default there is one for each GPU, else for each machine."""
    return divide([node["Resources"] for node in ray.nodes() if node["Alive"]], num_engines, on_gpu=on_gpu)


def divide(nodes: Sequence[Mapping[str, float]], num_engines: int | None, *, on_gpu: bool) -> Share:
    """An engine never spans two machines, and all get the same.

    nodes:  "CPU" and "GPU" of each machine
    on_gpu: whether an engine takes a GPU where there are any

    Raises `SpecEngineError` where there is no place for so many.
    """
    num_gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if on_gpu and num_gpus:
        num_engines = num_engines or num_gpus
        if num_engines > num_gpus:
            raise SpecEngineError(f"{num_engines} engines want a GPU each; the cluster has {num_gpus}")
        return Share(num_engines, num_cpus=1, num_gpus=1)
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    num_engines = num_engines or max(1, len([each for each in cpus if each]))
    for num_cpus in range(max(cpus, default=0), 0, -1):
        if sum(each // num_cpus for each in cpus) >= num_engines:
            return Share(num_engines, num_cpus, num_gpus=0)
    raise SpecEngineError(f"{num_engines} engines want a CPU each; the cluster has {sum(cpus)}")
