"""What a bug report needs to know about a machine and its installation."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from specengine.ops.threads import default_num_threads

PACKAGES = (
    "specengine",
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface-hub",
    "numpy",
)
# The processor features that choose a kernel or explain a speed.
INSTRUCTION_SETS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
    "sve",
)


def collect_environment() -> dict[str, dict[str, str]]:
    """Sections of name and value, everything as text."""
    return {
        "packages": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "system": {
            "platform": platform.platform(),
            "libc": " ".join(platform.libc_ver()).strip() or "unknown",
        },
        "cpu": _cpu(),
        "gpu": _gpus(),
        "native": _native_build(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu() -> dict[str, str]:
    fields = _cpu_fields()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "instruction sets": " ".join(name for name in INSTRUCTION_SETS if name in flags) or "unknown",
        "cores": f"{os.cpu_count()} ({affinity} usable)",
        "threads": _num_threads(),
        "torch threads": str(torch.get_num_threads()),
        "torch capability": torch.backends.cpu.get_cpu_capability(),
    }


def _num_threads() -> str:
    try:
        return f"{default_num_threads()} by default"
    except ValueError as error:
        return str(error)


def _cpu_fields() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _gpus() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"devices": "none"}
    devices = {f"cuda:{index}": _describe_gpu(index) for index in range(torch.cuda.device_count())}
    return {**devices, "CUDA": str(torch.version.cuda)}


def _describe_gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    memory = f"{properties.total_memory / 2**30:.0f} GiB"
    return f"{properties.name}, {memory}, sm_{properties.major}{properties.minor}"


def _native_build() -> dict[str, str]:
    try:
        from specengine import _C
    except ImportError as error:
        return {"extension": f"not importable: {error}"}
    info = _C.build_info() if hasattr(_C, "build_info") else {}
    return {"extension": str(_C.__file__), **{str(name): str(value) for name, value in dict(info).items()}}
