"""`backend="native"`: every op in C++ (`specengine._C`), for CPUs.

Row-invariant by construction: an output row's bits depend on neither the rows computed with it nor the
number of threads. They do depend on the instruction set, which is the best that the processor has: the environment
variable SPECENGINE_INSTRUCTION_SET (avx512_amx, avx512_bf16, avx512_vnni, avx512, avx2, portable; for tests
emulated_tiles) chooses another. Arguments are checked once, in the C++ bindings (`ValueError`).
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from specengine import _C
from specengine.kernels.types.drafts import Drafts, Staging, Verdict
from specengine.kernels.types.grouped import GroupedWeight
from specengine.kernels.types.packed import Norm, PackedLinear
from specengine.kernels.types.program import (
    DraftRows,
    DrawKeys,
    ForwardBatch,
    ForwardStart,
    JudgedLogits,
    LinearResidual,
    NormLinear,
    NormQkv,
    PagedAttention,
    ParallelLinearResidual,
    ParallelNormLinear,
    Program,
)
from specengine.kernels.types.round import BoundRound, RoundPlan, RoundTensors
from specengine.kernels.types.rows import SamplingRows
from specengine.ops.backend import RoundModel
from specengine.ops.encode import encode_groups
from specengine.ops.threads import default_num_threads
from specengine.weight_formats import INT8, WeightFormat


class NativeBackend:
    """The `Backend` protocol of `specengine.ops` on `specengine._C`; see `specengine.kernels.reference`."""

    name = "native"
    has_padding = has_launches = False
    supported_dtypes = (torch.float32, torch.bfloat16, torch.float16)

    expand_batch = staticmethod(_C.expand_batch)
    match_draws = staticmethod(_C.match_draws)
    commit_round = staticmethod(_C.commit_round)

    def __init__(self, num_threads: int | None = None) -> None:
        wanted = os.environ.get("SPECENGINE_INSTRUCTION_SET", "auto")
        if wanted not in (known := ["auto", *_C.instruction_sets()]):
            raise ValueError(f"SPECENGINE_INSTRUCTION_SET={wanted!r}: this processor has {', '.join(known)}")
        self._ops = _C.Ops(default_num_threads() if num_threads is None else num_threads)
        self.embed = self._ops.embed
        self.paged_attention = self._ops.paged_attention
        self.filter_rows = self._ops.filter_rows
        self.transform_rows = self._ops.transform_rows
        self.sample_rows = self._ops.sample_rows
        self.match_verify = self._ops.match_verify
        self.rejection_verify = self._ops.rejection_verify
        self.block_verify = self._ops.block_verify
        self.threshold_verify = self._ops.threshold_verify
        self.typical_verify = self._ops.typical_verify
        self.token_logprobs = self._ops.token_logprobs
        self.stage_draft = self._ops.stage_draft

    @property
    def num_threads(self) -> int:
        return self._ops.num_threads

    def set_num_threads(self, num_threads: int) -> None:
        self._ops.num_threads = num_threads

    @staticmethod
    def row_keys(
        rows: SamplingRows, q_start: Tensor, positions: Tensor, logit_rows: Tensor
    ) -> tuple[SamplingRows, Tensor]:
        columns, decided = _C.row_keys(rows, q_start, positions, logit_rows)
        return SamplingRows._make(columns), decided

    @staticmethod
    def plan_round(
        slots: Tensor,
        seq_len: Tensor,
        length_limit: Tensor,
        num_speculative: Tensor,
        k: int,
        draft_positions: int,
    ) -> RoundPlan:
        return RoundPlan._make(
            _C.plan_round(slots, seq_len, length_limit, num_speculative, k, draft_positions)
        )

    def begin_forward(
        self,
        tokens: Tensor,
        block_table: Tensor,
        slots: Tensor,
        start: Tensor,
        q_len: Tensor,
        num_logits: Tensor,
        block_size: int,
        rows: SamplingRows,
        token_table: Tensor,
        position_table: Tensor | None,
        *,
        num_tokens: int | None = None,
        num_logit_rows: int | None = None,
        num_more: Tensor | None = None,
    ) -> ForwardStart:
        if num_more is not None:
            q_len, num_logits = q_len + num_more, num_logits + num_more
        where = (tokens, block_table, slots, start, q_len, num_logits, block_size)
        token_ids, positions, kv_slots, q_start, context_len, logit_rows = self.expand_batch(*where)
        hidden = self.embed(token_ids, positions, token_table, position_table)
        row_keys = self.row_keys(rows, q_start, positions, logit_rows)
        expanded = (token_ids, positions, kv_slots, q_start, context_len, logit_rows)
        return ForwardStart(*expanded, hidden, row_keys)

    def begin_round(
        self,
        tokens: Tensor,
        block_table: Tensor,
        slots: Tensor,
        seq_len: Tensor,
        length_limit: Tensor,
        num_speculative: Tensor,
        k: int,
        draft_positions: int,
        num_fed: int,
        block_size: int,
        rows: SamplingRows,
        token_table: Tensor,
        position_table: Tensor | None,
    ) -> tuple[RoundPlan, ForwardStart]:
        if num_fed < 1:
            raise ValueError(f"num_fed: {num_fed} is less than 1")
        plan = self.plan_round(slots, seq_len, length_limit, num_speculative, k, draft_positions)
        wanted = plan.is_drafting[0] if k else plan.is_running
        where = (tokens, block_table, slots, plan.seq_len - num_fed, num_fed * wanted, wanted, block_size)
        return plan, self.begin_forward(*where, rows, token_table, position_table)

    def commit_draws(
        self,
        drawn: Tensor,
        drawn_error: Tensor,
        drafts: Drafts,
        rows: SamplingRows,
        is_running: Tensor,
        verdict: Verdict,
        tokens: Tensor,
        seq_len: Tensor,
        length_limit: Tensor,
        slots: Tensor,
        forced_acceptance: float | None = None,
    ) -> Tensor:
        self.match_draws(drawn, drawn_error, drafts, rows, is_running, verdict, forced_acceptance)
        state = (tokens, seq_len, length_limit, slots, drafts.seq_len, is_running)
        judged = (verdict.tokens, verdict.num_accepted, drafts.num_draft, verdict.error)
        return self.commit_round(*state, *judged)

    def pack_linear(
        self, weight: Tensor | GroupedWeight, bias: Tensor | None, format: WeightFormat | None = None
    ) -> PackedLinear:
        out_features, in_features = weight.shape
        packed_bias = None if bias is None else bias.float().contiguous()
        grouped = encode_groups(weight, format)
        if grouped is not None:
            minimum = None if grouped.minimum is None else grouped.minimum.contiguous()
            panels = self._ops.pack_grouped(
                grouped.codes.contiguous(), grouped.scale.contiguous(), minimum, grouped.bits
            )
            return PackedLinear(panels, packed_bias, in_features, out_features)
        assert isinstance(weight, Tensor)
        if format == INT8:
            panels, scale = self._ops.pack_linear_int8(weight)
        else:
            panels, scale = (
                self._ops.pack_linear(weight, weight.dtype if format is None else format.dtype),
                None,
            )
        return PackedLinear(panels, packed_bias, in_features, out_features, scale)

    def norm_linear(self, hidden: Tensor, norm: Norm, weight: PackedLinear, activation: str) -> Tensor:
        return self._ops.norm_linear(hidden, *_layer_arguments(norm, weight), activation)

    def norm_qkv(
        self,
        hidden: Tensor,
        norm: Norm,
        weight: PackedLinear,
        positions: Tensor,
        kv_slots: Tensor,
        kv_cache: Tensor,
        rotary: Tensor | None,
        head_norm: Tensor | None = None,
    ) -> Tensor:
        return self._ops.norm_qkv(
            hidden,
            *_layer_arguments(norm, weight),
            positions,
            kv_slots,
            kv_cache,
            rotary,
            head_norm,
        )

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
    ) -> tuple[Tensor, Tensor]:
        query = self.norm_qkv(hidden, norm, weight, positions, kv_slots, kv_cache, rotary)
        return query, self.norm_linear(hidden, mlp_norm, mlp_weight, activation)

    def parallel_linear_residual(
        self,
        attended: Tensor,
        weight: PackedLinear,
        expanded: Tensor,
        mlp_weight: PackedLinear,
        residual: Tensor,
    ) -> Tensor:
        return self.linear_residual(expanded, mlp_weight, self.linear_residual(attended, weight, residual))

    def linear_residual(self, x: Tensor, weight: PackedLinear, residual: Tensor) -> Tensor:
        return self._ops.linear_residual(x, *_linear_arguments(weight), residual)

    def head(
        self,
        hidden: Tensor,
        norm: Norm,
        weight: PackedLinear,
        vocab_size: int,
        *,
        token_ids: Tensor | None = None,
    ) -> Tensor:
        return self._ops.head(hidden, *_layer_arguments(norm, weight), vocab_size, token_ids)

    def head_stats(
        self, hidden: Tensor, norm: Norm, weight: PackedLinear, vocab_size: int, rows: SamplingRows
    ) -> tuple[Tensor, Tensor]:
        logits = self.head(hidden, norm, weight, vocab_size)
        return logits, self.filter_rows(logits, rows.without_filters())

    def head_draw(
        self,
        hidden: Tensor,
        norm: Norm,
        weight: PackedLinear,
        vocab_size: int,
        rows: SamplingRows,
        positions: Tensor,
        *,
        has_filters: bool = True,
        token_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        # Where a row has none it is left to find that out: a look at three numbers.
        layer = _layer_arguments(norm, weight)
        return self._ops.head_draw(hidden, *layer, vocab_size, token_ids, rows, positions)

    def compile(self, program: Program) -> NativeExecutor:
        return NativeExecutor(program, self._ops)


class NativeExecutor:
    """A program whose whole forward is one call into C++."""

    def __init__(self, program: Program, ops: _C.Ops) -> None:
        self._ops = ops
        tables = (program.token_table, program.position_table, program.rotary)
        heads = (program.num_heads, program.num_kv_heads, program.head_dim)
        self._decoder = _C.Decoder(ops, *tables, *heads)
        add = self._decoder
        for op in program.ops:
            if isinstance(op, NormQkv):
                add.norm_qkv(op.layer, *_layer_arguments(op.norm, op.weight), op.head_norm)
            elif isinstance(op, PagedAttention):
                add.paged_attention(op.layer)
            elif isinstance(op, LinearResidual):
                add.linear_residual(op.source, *_linear_arguments(op.weight), op.residual, op.out)
            elif isinstance(op, NormLinear):
                layer = _layer_arguments(op.norm, op.weight)
                add.norm_linear(op.source, *layer, op.activation, op.out)
            elif isinstance(op, ParallelNormLinear):
                add.norm_qkv(op.layer, *_layer_arguments(op.norm, op.weight), None)
                layer = _layer_arguments(op.mlp_norm, op.mlp_weight)
                add.norm_linear("hidden", *layer, op.activation, "expanded")
            elif isinstance(op, ParallelLinearResidual):
                add.linear_residual("attended", *_linear_arguments(op.weight), "hidden", "residual")
                add.linear_residual("expanded", *_linear_arguments(op.mlp_weight), "residual", "hidden")
        add.head(*_layer_arguments(program.final_norm, program.head), program.head_token_ids)

    def forward(self, batch: ForwardBatch, kv_cache: Tensor, vocab_size: int) -> Tensor:
        return self._decoder.forward(*_batch_arguments(batch), kv_cache, vocab_size)

    def forward_stats(
        self, batch: ForwardBatch, kv_cache: Tensor, vocab_size: int, keys: DrawKeys
    ) -> JudgedLogits:
        raw = logits = self.forward(batch, kv_cache, vocab_size)
        where = (batch.q_start, batch.positions, batch.logit_rows)
        if keys.transforms is not None:
            logits = self._ops.transform_rows(raw, keys.rows, batch.slots, *where, keys.transforms)
        rows, _ = NativeBackend.row_keys(keys.rows, *where)
        return JudgedLogits(raw, logits, self._ops.filter_rows(logits, rows))

    def draw(
        self,
        batch: ForwardBatch,
        kv_cache: Tensor,
        vocab_size: int,
        keys: DrawKeys,
        staging: Staging | None = None,
    ) -> tuple[Tensor, Tensor]:
        where = (*_batch_arguments(batch), kv_cache, vocab_size)
        drawn, error = self._decoder.draw(*where, keys.rows, keys.transforms)
        if staging is not None:
            step, tokens, slots, seq_len, is_drafting, *drafts = staging
            self._ops.stage_draft(step, tokens, slots, seq_len, is_drafting, drawn, error, *drafts)
        return drawn, error

    def draft(
        self, rows: DraftRows, kv_cache: Tensor, vocab_size: int, keys: DrawKeys
    ) -> tuple[Tensor, Tensor]:
        where = (rows.tokens, rows.block_table, rows.slots, rows.start, rows.seq_len, rows.limits)
        return self._decoder.draft(*where, kv_cache, vocab_size, keys.rows, keys.transforms)

    def bind_round(
        self, own: RoundModel, draft: RoundModel | None, num_fed: int, tensors: RoundTensors
    ) -> BoundRound | None:
        models = [own] if draft is None else [own, draft]
        drafting = None if draft is None else draft.executor
        if drafting is not None and not isinstance(drafting, NativeExecutor):
            return None
        return self._decoder.round(
            None if drafting is None else drafting._decoder,
            num_fed,
            [model.kv_cache for model in models],
            [model.vocab_size for model in models],
            *tensors,
        )


def _batch_arguments(
    batch: ForwardBatch,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        batch.token_ids,
        batch.positions,
        batch.kv_slots,
        batch.q_start,
        batch.context_len,
        batch.slots,
        batch.block_table,
        batch.logit_rows,
    )


def _linear_arguments(weight: PackedLinear) -> tuple[Tensor, Tensor | None, Tensor | None, int, int]:
    return weight.weight, weight.scale, weight.bias, weight.in_features, weight.out_features


def _layer_arguments(
    norm: Norm, weight: PackedLinear
) -> tuple[Tensor, Tensor | None, float, Tensor, Tensor | None, Tensor | None, int, int]:
    return norm.weight, norm.bias, norm.eps, *_linear_arguments(weight)
