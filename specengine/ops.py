"""The only dispatcher: one `Backend` holds every op, in Triton, native C++ or plain PyTorch.

`native` and `triton` promise bits: a row's result never depends on the rows computed with it. `reference`
promises mathematics only. Signatures, shapes and formulas are documented once, in
`specengine.kernels.reference`; every backend has the same.
"""

from __future__ import annotations

from types import ModuleType
from typing import Protocol, cast

import torch
from torch import Tensor

from specengine.errors import BackendUnavailableError
from specengine.kernels.packed import Norm, PackedLinear


class Backend(Protocol):
    """Every op of the engine. See `specengine.kernels.reference.<op>` for what each argument means."""

    name: str
    supported_dtypes: tuple[torch.dtype, ...]

    def set_num_threads(self, num_threads: int) -> None:
        """CPU threads that the ops may use from now on."""

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """Packs `[N, K]` weights, kept in their dtype, for this backend's linears."""

    def embed(
        self, token_ids: Tensor, positions: Tensor, token_table: Tensor, position_table: Tensor | None
    ) -> Tensor: ...

    def norm_linear(self, hidden: Tensor, norm: Norm, weight: PackedLinear, activation: str) -> Tensor: ...

    def norm_qkv(
        self,
        hidden: Tensor,
        norm: Norm,
        weight: PackedLinear,
        positions: Tensor,
        kv_slots: Tensor,
        kv_cache: Tensor,
        rotary: Tensor | None,
    ) -> Tensor: ...

    def paged_attention(
        self,
        query: Tensor,
        kv_cache: Tensor,
        block_table: Tensor,
        slots: Tensor,
        q_start: Tensor,
        context_len: Tensor,
    ) -> Tensor: ...

    def linear_residual(self, x: Tensor, weight: PackedLinear, residual: Tensor) -> Tensor: ...

    def head(self, hidden: Tensor, norm: Norm, weight: PackedLinear, vocab_size: int) -> Tensor: ...

    def filter_rows(
        self, logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
    ) -> Tensor: ...

    def sample_rows(
        self,
        logits: Tensor,
        stats: Tensor,
        temperature: Tensor,
        seeds: Tensor,
        positions: Tensor,
        stream: int,
        round_base: Tensor,
    ) -> tuple[Tensor, Tensor]: ...

    def match_verify(
        self,
        logits: Tensor,
        stats: Tensor,
        row_start: Tensor,
        num_draft: Tensor,
        draft_tokens: Tensor,
        temperature: Tensor,
        seeds: Tensor,
        seq_len: Tensor,
        is_selected: Tensor,
        tokens: Tensor,
        num_accepted: Tensor,
        error: Tensor,
    ) -> None: ...

    def rejection_verify(
        self,
        logits: Tensor,
        stats: Tensor,
        row_start: Tensor,
        num_draft: Tensor,
        draft_tokens: Tensor,
        draft_log_probs: Tensor,
        draft_logits: Tensor | None,
        draft_stats: Tensor | None,
        temperature: Tensor,
        seeds: Tensor,
        seq_len: Tensor,
        is_selected: Tensor,
        tokens: Tensor,
        num_accepted: Tensor,
        error: Tensor,
    ) -> None: ...

    def token_logprobs(
        self, logits: Tensor, token_ids: Tensor, num_top: int
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class _OpsModule:
    """A backend whose ops are the functions of a module."""

    def __init__(self, name: str, module: ModuleType, supported_dtypes: tuple[torch.dtype, ...]) -> None:
        self.name = name
        self.supported_dtypes = supported_dtypes
        self._module = module

    def __getattr__(self, op: str) -> object:
        return getattr(self._module, op)


class _ReferenceBackend(_OpsModule):
    def set_num_threads(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads)

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        return PackedLinear(weight, None if bias is None else bias.float(), weight.shape[1], weight.shape[0])


def load_backend(name: str, device: torch.device) -> Backend:
    """The backend `auto`, `native`, `triton` or `reference` for a device; `auto` is native on a CPU, else reference.

    Raises `BackendUnavailableError` when it cannot run there, `ValueError` for an unknown name.
    """
    if name == "auto":
        name = "native" if device.type == "cpu" else "reference"
    if name == "reference":
        from specengine.kernels import reference

        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        return cast(Backend, _ReferenceBackend("reference", reference, dtypes))
    if name == "native":
        return _load_native(device)
    if name == "triton":
        raise BackendUnavailableError(
            "backend='triton': the Triton kernels are not part of this version; "
            "use backend='native' on a CPU or backend='reference' on any device"
        )
    raise ValueError(f"backend: {name!r} is unknown; expected auto, native, triton or reference")


def _load_native(device: torch.device) -> Backend:
    if device.type != "cpu":
        raise BackendUnavailableError(
            f"backend='native' runs on a CPU, not on device={str(device)!r}; use backend='reference' there"
        )
    from specengine import native

    return cast(Backend, native.NativeBackend())
