"""Runs a program op by op on any backend: what a program means."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specengine.kernels.types.drafts import Staging
from specengine.kernels.types.program import (
    DraftRows,
    DrawKeys,
    ForwardBatch,
    JudgedLogits,
    LinearResidual,
    NormLinear,
    NormQkv,
    PagedAttention,
    ParallelLinearResidual,
    ParallelNormLinear,
    Program,
    Register,
)
from specengine.kernels.types.round import RoundTensors
from specengine.kernels.types.rows import SamplingRows
from specengine.kernels.types.statistics import STAT_ERROR
from specengine.ops.backend import Backend, RoundModel
from specengine.rng import STREAM_TARGET


class Interpreter:
    """Runs a program op by op on any backend: what a program means."""

    def __init__(self, backend: Backend, program: Program) -> None:
        self._backend = backend
        self._program = program

    def forward(self, batch: ForwardBatch, kv_cache: Tensor, vocab_size: int) -> Tensor:
        program = self._program
        hidden = self._logit_inputs(batch, kv_cache)
        return self._backend.head(
            hidden, program.final_norm, program.head, vocab_size, **self._head_options(batch)
        )

    def forward_stats(
        self, batch: ForwardBatch, kv_cache: Tensor, vocab_size: int, keys: DrawKeys
    ) -> JudgedLogits:
        program, ops = self._program, self._backend
        hidden = self._logit_inputs(batch, kv_cache)
        rows, _ = row_keys(ops, keys, batch)
        head = (hidden, program.final_norm, program.head, vocab_size)
        if keys.has_filters or keys.transforms is not None or program.head_token_ids is not None:
            return self._judge(ops.head(*head, **self._head_options(batch)), batch, keys, rows)
        logits, stats = ops.head_stats(*head, rows, **_padding(batch.num_logit_rows))
        return JudgedLogits(logits, logits, stats)

    def draw(
        self,
        batch: ForwardBatch,
        kv_cache: Tensor,
        vocab_size: int,
        keys: DrawKeys,
        staging: Staging | None = None,
    ) -> tuple[Tensor, Tensor]:
        program, ops = self._program, self._backend
        hidden = self._logit_inputs(batch, kv_cache)
        rows, positions = row_keys(ops, keys, batch)
        head = (hidden, program.final_norm, program.head, vocab_size)
        options = self._head_options(batch)
        if keys.transforms is not None:
            judged = self._judge(ops.head(*head, **options), batch, keys, rows)
            drawn = (rows, positions, STREAM_TARGET, torch.zeros_like(positions))
            tokens, _ = ops.sample_rows(judged.logits, judged.stats, *drawn, **_padding(batch.num_logit_rows))
            return staged(ops, tokens, judged.stats[:, STAT_ERROR].int(), staging)
        options["has_filters"] = keys.has_filters
        if ops.has_launches:
            options["staging"] = staging
            return ops.head_draw(*head, rows, positions, **options)
        return staged(ops, *ops.head_draw(*head, rows, positions, **options), staging)

    def draft(self, rows: DraftRows, kv_cache: Tensor, vocab_size: int, keys: DrawKeys) -> None:
        return None

    def bind_round(
        self, own: RoundModel, draft: RoundModel | None, num_fed: int, tensors: RoundTensors
    ) -> None:
        return None

    def _judge(self, raw: Tensor, batch: ForwardBatch, keys: DrawKeys, rows: SamplingRows) -> JudgedLogits:
        """What is done to logits between the head and whoever draws from them."""
        ops, padding = self._backend, _padding(batch.num_logit_rows)
        logits = raw
        if keys.transforms is not None:
            where = (batch.slots, batch.q_start, batch.positions, batch.logit_rows)
            logits = ops.transform_rows(raw, keys.rows, *where, keys.transforms, **padding)
        return JudgedLogits(raw, logits, ops.filter_rows(logits, rows, **padding))

    def _head_options(self, batch: ForwardBatch) -> dict[str, Any]:
        return {"token_ids": self._program.head_token_ids, **_padding(batch.num_logit_rows)}

    def _logit_inputs(self, batch: ForwardBatch, kv_cache: Tensor) -> Tensor:
        hidden, stride = self._run_layers(batch, kv_cache), batch.logit_stride
        return hidden[stride - 1 :: stride] if stride else hidden[batch.logit_rows]

    def _run_layers(self, batch: ForwardBatch, kv_cache: Tensor) -> Tensor:
        ops, program = self._backend, self._program
        padding, hidden = _padding(batch.num_tokens), batch.hidden
        if hidden is None:
            tables = (program.token_table, program.position_table)
            hidden = ops.embed(batch.token_ids, batch.positions, *tables, **padding)
        values: dict[Register, Tensor] = {"hidden": hidden}
        for op in program.ops:
            if isinstance(op, NormQkv):
                places = (batch.positions, batch.kv_slots, kv_cache[op.layer], program.rotary)
                where = (*places, op.head_norm)
                values["query"] = ops.norm_qkv(values["hidden"], op.norm, op.weight, *where, **padding)
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


def row_keys(backend: Backend, keys: DrawKeys, batch: ForwardBatch) -> tuple[SamplingRows, Tensor]:
    """What each logit row of a batch is judged by, and the position that it decides: from the `row_keys` op, unless
    `begin_forward` has found it."""
    if batch.row_keys is not None:
        return batch.row_keys
    where = (batch.q_start, batch.positions, batch.logit_rows)
    return backend.row_keys(keys.rows, *where, **_padding(batch.num_logit_rows))


def staged(backend: Backend, drawn: Tensor, error: Tensor, staging: Staging | None) -> tuple[Tensor, Tensor]:
    """Draws, and the `stage_draft` op on them where that is wanted."""
    if staging is not None:
        step, tokens, slots, seq_len, is_drafting, *drafts = staging
        backend.stage_draft(step, tokens, slots, seq_len, is_drafting, drawn, error, *drafts)
    return drawn, error


def _padding(num_rows: Tensor | None) -> dict[str, Any]:
    """Only backends that pad know the argument."""
    return {} if num_rows is None else {"num_rows": num_rows}
