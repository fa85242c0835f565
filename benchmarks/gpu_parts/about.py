"""The machine and the versions: `python -m gpu_parts.about`, in a process of its own, so that the command itself holds
no memory on the GPU. Prints JSON."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from cpu_timing import machine_name

PACKAGES = ("triton", "transformers")
QUERIES = {
    "driver": "driver_version",
    "sm_clock_mhz": "clocks.sm",
    "max_sm_clock_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}


def describe() -> dict[str, Any]:
    """`has_cuda` and `machine`; with CUDA also the device's properties and, where there is nvidia-smi, its clocks."""
    about: dict[str, Any] = {
        "has_cuda": torch.cuda.is_available(),
        "machine": machine_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": commit(),
    } | {name: installed(name) for name in PACKAGES}
    if about["has_cuda"]:
        properties = torch.cuda.get_device_properties(0)
        about |= {
            "machine": properties.name,
            "host": machine_name(),
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "l2_mb": round(properties.L2_cache_size / 2**20, 1),
        } | nvidia_smi()
    return about


def commit() -> str:
    """As in every results file: "+changes" where the tree is not the commit's."""
    try:
        name, changes = (
            subprocess.run(["git", *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in (
                ["rev-parse", "--short", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no"],
            )
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return name + ("+changes" if changes else "")


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def nvidia_smi() -> dict[str, str]:
    """What nvidia-smi says of the first device; nothing where there is none or it fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    command = [
        program,
        "-i",
        "0",
        f"--query-gpu={','.join(QUERIES.values())}",
        "--format=csv,noheader,nounits",
    ]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in output.strip().split(",")]
    return dict(zip(QUERIES, values, strict=False))


if __name__ == "__main__":
    json.dump(describe(), sys.stdout)
