"""The only dispatcher: one `Backend` holds every op, in Triton, native C++ or plain PyTorch.

`native` and `triton` promise bits: a row's result never depends on the rows computed with it. `reference`
promises mathematics only. Signatures, shapes and formulas are documented once, in
`specengine.kernels.reference`; every backend has the same.
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from specengine.errors import BackendUnavailableError
from specengine.kernels.packed import Norm, PackedLinear
from specengine.kernels.program import (
    DraftRows,
    DrawKeys,
    ForwardBatch,
    LinearResidual,
    NormLinear,
    NormQkv,
    PagedAttention,
    ParallelLinearResidual,
    ParallelNormLinear,
    Program,
    Register,
)
from specengine.kernels.reference.plan_round import RoundPlan


class Executor(Protocol):
    """A program, ready to run. kv_cache is `[layers, 2, N, Hkv, block_size, head_dim]`, written."""

    def forward(self, batch: ForwardBatch, kv_cache: Tensor, vocab_size: int) -> Tensor:
        """The logits of `batch.logit_rows`, `[R, V]` fp32 as the `head` op gives them."""

    def forward_stats(
        self, batch: ForwardBatch, kv_cache: Tensor, vocab_size: int, keys: DrawKeys
    ) -> tuple[Tensor, Tensor]:
        """`forward`, and what the `filter_rows` op gives for these logits: `[R, V]` and `[R, 4]` fp32."""

    def draw(
        self, batch: ForwardBatch, kv_cache: Tensor, vocab_size: int, keys: DrawKeys
    ) -> tuple[Tensor, Tensor]:
        """The token that follows each of `batch.logit_rows`, and its error flag, as the `head_draw` op gives them."""

    def draft(
        self, rows: DraftRows, kv_cache: Tensor, vocab_size: int, keys: DrawKeys
    ) -> tuple[Tensor, Tensor] | None:
        """`draw` again and again, each token fed to the next: tokens and error flags `[B, max limits]` int32.

        None where the executor has no such call; whoever wants it then draws one by one.
        """


class Backend(Protocol):
    """Every op of the engine. See `specengine.kernels.reference.<op>` for what each argument means."""

    name: str
    supported_dtypes: tuple[torch.dtype, ...]
    # Whether `expand_batch` makes batches of the size the host names, padded, and row ops take `num_rows`, which
    # stands on the device; else batches have the size that the lengths say, and no padding.
    has_padding: bool

    def set_num_threads(self, num_threads: int) -> None:
        """CPU threads that the ops may use from now on."""

    def pack_linear(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None
    ) -> PackedLinear:
        """Packs `[N, K]` weights of any float dtype and strides, converted to `dtype` in memory of their own.

        Without a `dtype` they keep theirs, and a backend that needs no layout of its own may keep the tensor.
        """

    def pack_linear_int8(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """The same, rounded to int8 per output channel (`specengine.kernels.reference.quantize_rows`)."""

    def compile(self, program: Program) -> Executor:
        """The program as this backend runs it."""

    def expand_batch(
        self,
        tokens: Tensor,
        block_table: Tensor,
        slots: Tensor,
        start: Tensor,
        q_len: Tensor,
        num_logits: Tensor,
        block_size: int,
        *,
        num_tokens: int | None = None,
        num_logit_rows: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]: ...

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

    def parallel_norm_linear(
        self,
        hidden: Tensor,
        norm: Norm,
        weight: PackedLinear,
        mlp_norm: Norm,
        mlp_weight: PackedLinear,
        activation: str,
        positions: Tensor,
        kv_slots: Tensor,
        kv_cache: Tensor,
        rotary: Tensor | None,
    ) -> tuple[Tensor, Tensor]: ...

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

    def parallel_linear_residual(
        self,
        attended: Tensor,
        weight: PackedLinear,
        expanded: Tensor,
        mlp_weight: PackedLinear,
        residual: Tensor,
    ) -> Tensor: ...

    def head(self, hidden: Tensor, norm: Norm, weight: PackedLinear, vocab_size: int) -> Tensor: ...

    def head_stats(
        self, hidden: Tensor, norm: Norm, weight: PackedLinear, vocab_size: int, temperature: Tensor
    ) -> tuple[Tensor, Tensor]: ...

    def head_draw(
        self,
        hidden: Tensor,
        norm: Norm,
        weight: PackedLinear,
        vocab_size: int,
        temperature: Tensor,
        top_k: Tensor | None,
        top_p: Tensor | None,
        min_p: Tensor | None,
        seeds: Tensor,
        positions: Tensor,
    ) -> tuple[Tensor, Tensor]: ...

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

    def plan_round(
        self,
        slots: Tensor,
        seq_len: Tensor,
        length_limit: Tensor,
        num_speculative: Tensor,
        k: int,
        draft_positions: int,
    ) -> RoundPlan: ...

    def row_keys(
        self,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        seeds: Tensor,
        q_start: Tensor,
        positions: Tensor,
        logit_rows: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]: ...

    def stage_draft(
        self,
        step: int,
        tokens: Tensor,
        slots: Tensor,
        seq_len: Tensor,
        is_drafting: Tensor,
        drawn: Tensor,
        drawn_error: Tensor | None,
        draft_tokens: Tensor,
        num_draft: Tensor,
        log_probs: Tensor | None = None,
        logits: Tensor | None = None,
        stats: Tensor | None = None,
        draft_log_probs: Tensor | None = None,
        draft_logits: Tensor | None = None,
        draft_stats: Tensor | None = None,
    ) -> None: ...

    def match_draws(
        self,
        drawn: Tensor,
        drawn_error: Tensor,
        row_start: Tensor,
        num_draft: Tensor,
        draft_tokens: Tensor,
        is_running: Tensor,
        tokens: Tensor,
        num_accepted: Tensor,
        error: Tensor,
        forced_acceptance: float | None = None,
        seeds: Tensor | None = None,
        seq_len: Tensor | None = None,
    ) -> None: ...

    def commit_round(
        self,
        tokens: Tensor,
        seq_len: Tensor,
        length_limit: Tensor,
        slots: Tensor,
        start: Tensor,
        is_running: Tensor,
        emitted: Tensor,
        num_accepted: Tensor,
        num_draft: Tensor,
        error: Tensor,
    ) -> Tensor: ...


class Interpreter:
    """Runs a program op by op on any backend: what a program means."""

    def __init__(self, backend: Backend, program: Program) -> None:
        self._backend = backend
        self._program = program

    def forward(self, batch: ForwardBatch, kv_cache: Tensor, vocab_size: int) -> Tensor:
        program = self._program
        hidden = self._logit_inputs(batch, kv_cache)
        padding = _padding(batch.num_logit_rows)
        return self._backend.head(hidden, program.final_norm, program.head, vocab_size, **padding)

    def forward_stats(
        self, batch: ForwardBatch, kv_cache: Tensor, vocab_size: int, keys: DrawKeys
    ) -> tuple[Tensor, Tensor]:
        program, ops = self._program, self._backend
        hidden = self._logit_inputs(batch, kv_cache)
        padding = _padding(batch.num_logit_rows)
        temperature, *filters, _, _ = row_keys(ops, keys, batch)
        head = (hidden, program.final_norm, program.head, vocab_size)
        if not keys.has_filters:
            return ops.head_stats(*head, temperature, **padding)
        logits = ops.head(*head, **padding)
        return logits, ops.filter_rows(logits, temperature, *filters, **padding)

    def draw(
        self, batch: ForwardBatch, kv_cache: Tensor, vocab_size: int, keys: DrawKeys
    ) -> tuple[Tensor, Tensor]:
        program, ops = self._program, self._backend
        hidden = self._logit_inputs(batch, kv_cache)
        temperature, top_k, top_p, min_p, seeds, positions = row_keys(ops, keys, batch)
        filters = (top_k, top_p, min_p) if keys.has_filters else (None, None, None)
        drawn = (temperature, *filters, seeds, positions)
        head = (hidden, program.final_norm, program.head, vocab_size)
        return ops.head_draw(*head, *drawn, **_padding(batch.num_logit_rows))

    def draft(self, rows: DraftRows, kv_cache: Tensor, vocab_size: int, keys: DrawKeys) -> None:
        return None

    def _logit_inputs(self, batch: ForwardBatch, kv_cache: Tensor) -> Tensor:
        hidden = self._run_layers(batch, kv_cache)
        return hidden if batch.wants_all_logits else hidden[batch.logit_rows]

    def _run_layers(self, batch: ForwardBatch, kv_cache: Tensor) -> Tensor:
        ops, program = self._backend, self._program
        padding = _padding(batch.num_tokens)
        tables = (program.token_table, program.position_table)
        values: dict[Register, Tensor] = {
            "hidden": ops.embed(batch.token_ids, batch.positions, *tables, **padding)
        }
        for op in program.ops:
            if isinstance(op, NormQkv):
                places = (batch.positions, batch.kv_slots, kv_cache[op.layer], program.rotary)
                values["query"] = ops.norm_qkv(values["hidden"], op.norm, op.weight, *places, **padding)
            elif isinstance(op, ParallelNormLinear):
                places = (batch.positions, batch.kv_slots, kv_cache[op.layer], program.rotary)
                layers = (op.norm, op.weight, op.mlp_norm, op.mlp_weight, op.activation)
                values["query"], values["expanded"] = ops.parallel_norm_linear(
                    values["hidden"], *layers, *places, **padding
                )
            elif isinstance(op, PagedAttention):
                ragged = (batch.block_table, batch.slots, batch.q_start, batch.context_len)
                values["attended"] = ops.paged_attention(values["query"], kv_cache[op.layer], *ragged)
            elif isinstance(op, LinearResidual):
                source, residual = values[op.source], values[op.residual]
                values[op.out] = ops.linear_residual(source, op.weight, residual, **padding)
            elif isinstance(op, ParallelLinearResidual):
                pair = (values["attended"], op.weight, values["expanded"], op.mlp_weight)
                values["hidden"] = ops.parallel_linear_residual(*pair, values["hidden"], **padding)
            elif isinstance(op, NormLinear):
                layer = (op.norm, op.weight, op.activation)
                values[op.out] = ops.norm_linear(values[op.source], *layer, **padding)
        return values["hidden"]


def row_keys(backend: Backend, keys: DrawKeys, batch: ForwardBatch) -> tuple[Tensor, ...]:
    """The `row_keys` op on a batch: temperature, top_k, top_p, min_p, seeds and position of each logit row."""
    by_sequence = (keys.temperature, keys.top_k, keys.top_p, keys.min_p, keys.seeds)
    rows = (batch.q_start, batch.positions, batch.logit_rows)
    return backend.row_keys(*by_sequence, *rows, **_padding(batch.num_logit_rows))


def _padding(num_rows: Tensor | None) -> dict[str, Any]:
    """Only backends that pad know the argument."""
    return {} if num_rows is None else {"num_rows": num_rows}


class _OpsModule:
    """A backend whose ops are the functions of a module."""

    has_padding = False

    def __init__(self, name: str, module: ModuleType, supported_dtypes: tuple[torch.dtype, ...]) -> None:
        self.name = name
        self.supported_dtypes = supported_dtypes
        self._module = module

    def __getattr__(self, op: str) -> object:
        return getattr(self._module, op)

    def compile(self, program: Program) -> Executor:
        return Interpreter(cast(Backend, self), program)


class _TritonBackend:
    """Every op from the module of its name in `specengine.kernels`."""

    name = "triton"
    has_padding = True
    supported_dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def __getattr__(self, op: str) -> object:
        if op.startswith("_"):
            raise AttributeError(op)
        function = getattr(importlib.import_module(f"specengine.kernels.{op}"), op)
        setattr(self, op, function)
        return function

    def set_num_threads(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads)

    def pack_linear(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None
    ) -> PackedLinear:
        from specengine.kernels.device.linear import pack_rows

        return pack_rows(_as_floats(weight, dtype), bias)

    def pack_linear_int8(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        from specengine.kernels.device.linear import pack_rows
        from specengine.kernels.reference import quantize_rows

        quantized, scale = quantize_rows(_as_floats(weight, None))
        return replace(pack_rows(quantized, bias), scale=scale)

    def compile(self, program: Program) -> Executor:
        return Interpreter(cast(Backend, self), program)


class _ReferenceBackend(_OpsModule):
    def set_num_threads(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads)

    def pack_linear(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None
    ) -> PackedLinear:
        weight = _as_floats(weight, dtype)
        return PackedLinear(weight, None if bias is None else bias.float(), weight.shape[1], weight.shape[0])

    def pack_linear_int8(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        from specengine.kernels.reference import quantize_rows

        quantized, scale = quantize_rows(_as_floats(weight, None))
        packed_bias = None if bias is None else bias.float()
        return PackedLinear(quantized, packed_bias, weight.shape[1], weight.shape[0], scale)


def _as_floats(weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`[N, K]` weights, checked; with a `dtype` converted to it in memory of their own."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight: expected [N, K] of floats, got {list(weight.shape)} {weight.dtype}")
    if dtype is None:
        return weight
    return weight.to(dtype, copy=True, memory_format=torch.contiguous_format)


def load_backend(name: str, device: torch.device) -> Backend:
    """The backend `auto`, `native`, `triton` or `reference` for a device; `auto` is Triton on CUDA, native on a CPU.

    Raises `BackendUnavailableError` when it cannot run there, `ValueError` for an unknown name.
    """
    if name == "auto":
        name = {"cpu": "native", "cuda": "triton"}.get(device.type, "reference")
    if name == "reference":
        from specengine.kernels import reference

        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        return cast(Backend, _ReferenceBackend("reference", reference, dtypes))
    if name == "native":
        return _load_native(device)
    if name == "triton":
        return _load_triton(device)
    raise ValueError(f"backend: {name!r} is unknown; expected auto, native, triton or reference")


def _load_native(device: torch.device) -> Backend:
    if device.type != "cpu":
        raise BackendUnavailableError(
            f"backend='native' runs on a CPU, not on device={str(device)!r}; use backend='triton' or 'reference' there"
        )
    from specengine import native

    return cast(Backend, native.NativeBackend())


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
    return cast(Backend, _TritonBackend())
