"""Which backend an engine runs on."""

from __future__ import annotations

import os
import sys
from typing import cast

import torch

from specengine.errors import BackendUnavailableError
from specengine.ops.backend import Backend


def load_backend(name: str, device: torch.device, *, num_threads: int | None = None) -> Backend:
    """The backend `auto`, `native`, `triton` or `reference` for a device; `auto` is Triton on CUDA, native on a CPU.

    num_threads: as `Backend.set_num_threads` takes it; None: what the backend has without

    Raises `BackendUnavailableError` when it cannot run there, `ValueError` for an unknown name.
    """
    if name == "auto":
        name = {"cpu": "native", "cuda": "triton"}.get(device.type, "reference")
    if name == "reference":
        from specengine.ops.reference import ReferenceBackend

        backend = cast(Backend, ReferenceBackend())
    elif name == "native":
        return _load_native(device, num_threads)
    elif name == "triton":
        backend = _load_triton(device)
    else:
        raise ValueError(f"backend: {name!r} is unknown; expected auto, native, triton or reference")
    if num_threads is not None:
        backend.set_num_threads(num_threads)
    return backend


def _load_native(device: torch.device, num_threads: int | None) -> Backend:
    if device.type != "cpu":
        raise BackendUnavailableError(
            f"backend='native' runs on a CPU, not on device={str(device)!r}; use backend='triton' or 'reference' there"
        )
    from specengine.ops.native import NativeBackend

    return cast(Backend, NativeBackend(num_threads))


def _load_triton(device: torch.device) -> Backend:
    if device.type not in ("cpu", "cuda"):
        raise BackendUnavailableError(f"backend='triton' runs on CUDA, not on device={str(device)!r}")
    # Without a GPU the kernels run in Triton's interpreter, which must be asked for before Triton is imported.
    wants_interpreter = device.type == "cpu"
    if wants_interpreter and "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        from specengine.kernels.device.launch import IS_INTERPRETED
    except ImportError as error:
        raise BackendUnavailableError(
            "backend='triton' needs the package triton (3.6 or newer): pip install triton"
        ) from error
    if wants_interpreter and not IS_INTERPRETED:
        raise BackendUnavailableError(
            "backend='triton' on a CPU runs in Triton's interpreter, but Triton was already imported without it; "
            "set the environment variable TRITON_INTERPRET=1 before Python starts"
        )
    from specengine.ops.triton import TritonBackend

    return cast(Backend, TritonBackend())
