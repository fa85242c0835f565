"""The machine: what it is, and how fast its memory is."""

from __future__ import annotations

from gpu_parts.about import nvidia_smi
from gpu_parts.context import Context


def run(context: Context) -> None:
    """One row. Where there is no CUDA device, of the CPU."""
    about = context.settings.about
    name, bandwidth = measure_bandwidth("cuda" if about["has_cuda"] else "cpu")
    clocks = nvidia_smi() if about["has_cuda"] else {}  # once more: now they are those of work
    known = {name: value for name, value in {**about, **clocks}.items() if value is not None}
    context.add({"kind": "machine", **known, f"{name}_bandwidth": round(bandwidth, 1)})


def measure_bandwidth(device: str) -> tuple[str, float]:
    """("copy", GB/s read and written) of a GPU, ("read", GB/s) of a CPU; leaves no memory allocated."""
    if device == "cpu":
        from cpu_timing import Cpu

        return "read", Cpu().bandwidth()
    import torch
    from gpu_timing import Cuda, DeviceClock, Gpu

    from specengine.ops.load import load_backend

    cuda = Cuda()
    bandwidth = Gpu(cuda, load_backend("triton", cuda.device), DeviceClock()).bandwidth()
    del cuda
    torch.cuda.empty_cache()
    return "copy", bandwidth
