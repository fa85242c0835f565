"""What every backend provides: each op, and a way to run a program of them.

Signatures, shapes and formulas are documented once, in `specengine.kernels.reference`; every backend has the same.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from specengine.kernels.types.drafts import Drafts, Staging, Verdict
from specengine.kernels.types.grouped import GroupedWeight
from specengine.kernels.types.packed import Norm, PackedLinear
from specengine.kernels.types.program import (
    DraftRows,
    DrawKeys,
    ForwardBatch,
    ForwardStart,
    JudgedLogits,
    Program,
)
from specengine.kernels.types.round import BoundRound, RoundPlan, RoundTensors
from specengine.kernels.types.rows import SamplingRows
from specengine.kernels.types.transforms import Transforms
from specengine.weight_formats import WeightFormat


class Executor(Protocol):
    """A program, ready to run. kv_cache is `[layers, 2, N, Hkv, block_size, head_dim]`, written."""

    def forward(self, batch: ForwardBatch, kv_cache: Tensor, vocab_size: int) -> Tensor:
        """The logits of `batch.logit_rows`, `[R, V]` fp32 as the `head` op gives them."""

    def forward_stats(
        self, batch: ForwardBatch, kv_cache: Tensor, vocab_size: int, keys: DrawKeys
    ) -> JudgedLogits:
        """`forward`, and what the `transform_rows` and `filter_rows` ops make of these logits."""

    def draw(
        self,
        batch: ForwardBatch,
        kv_cache: Tensor,
        vocab_size: int,
        keys: DrawKeys,
        staging: Staging | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The token that follows each of `batch.logit_rows`, and its error flag, as the `head_draw` op gives them.

        Rows with transforms draw from what the `transform_rows` op makes of their logits. With `staging` the tokens
        are staged, as by the `stage_draft` op.
        """

    def draft(
        self, rows: DraftRows, kv_cache: Tensor, vocab_size: int, keys: DrawKeys
    ) -> tuple[Tensor, Tensor] | None:
        """`draw` again and again, each token fed to the next: tokens and error flags `[B, max limits]` int32.

        None where the executor has no such call; whoever wants it then draws one by one.
        """

    def bind_round(
        self, own: RoundModel, draft: RoundModel | None, num_fed: int, tensors: RoundTensors
    ) -> BoundRound | None:
        """A round of this target in one call. None where the executor has no such call, or not with this draft.

        draft:   the model that draws the drafts; None: they are given, or k is 0
        num_fed: the last committed tokens, 1 or 2, that its first forward feeds
        """


class RoundModel(NamedTuple):
    """A model in a round: what runs it, its keys and values, and ids below which it draws."""

    executor: Executor
    kv_cache: Tensor
    vocab_size: int


class Backend(Protocol):
    """Every op of the engine. See `specengine.kernels.reference.<op>` for what each argument means."""

    name: str
    supported_dtypes: tuple[torch.dtype, ...]
    # Whether `expand_batch` makes batches of the size the host names, padded, and row ops take `num_rows`, which
    # stands on the device; else batches have the size that the lengths say, and no padding.
    has_padding: bool
    # Whether an op is a launch, which takes longer than what many do: then those are used that do several's work
    # (`begin_forward`, `begin_round`, `commit_draws`, and `head_draw` with a `staging`).
    has_launches: bool

    def set_num_threads(self, num_threads: int) -> None:
        """CPU threads that the ops may use from now on: this backend's own, or, where the ops are PyTorch's, those of
        the whole process."""

    def pack_linear(
        self, weight: Tensor | GroupedWeight, bias: Tensor | None, format: WeightFormat | None = None
    ) -> PackedLinear:
        """Packs `[N, K]` weights of any float dtype and strides, converted to `format` in memory of their own, or
        weights by group, which stay as they are.

        Without a format they keep their dtype, and a backend that needs no layout of its own may keep the tensor.
        int8 is rounded per output channel as `specengine.kernels.reference.quantize_rows` does it, groups as
        `quantize_groups` does.
        """

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
    ) -> ForwardStart: ...

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
        head_norm: Tensor | None = None,
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

    def head(
        self,
        hidden: Tensor,
        norm: Norm,
        weight: PackedLinear,
        vocab_size: int,
        *,
        token_ids: Tensor | None = None,
    ) -> Tensor: ...

    def head_stats(
        self, hidden: Tensor, norm: Norm, weight: PackedLinear, vocab_size: int, rows: SamplingRows
    ) -> tuple[Tensor, Tensor]: ...

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
    ) -> tuple[Tensor, Tensor]: ...

    def filter_rows(self, logits: Tensor, rows: SamplingRows) -> Tensor: ...

    def transform_rows(
        self,
        logits: Tensor,
        rows: SamplingRows,
        slots: Tensor,
        q_start: Tensor,
        positions: Tensor,
        logit_rows: Tensor,
        transforms: Transforms,
    ) -> Tensor: ...

    def sample_rows(
        self,
        logits: Tensor,
        stats: Tensor,
        rows: SamplingRows,
        positions: Tensor,
        stream: int,
        round_base: Tensor,
    ) -> tuple[Tensor, Tensor]: ...

    def match_verify(
        self,
        logits: Tensor,
        stats: Tensor,
        drafts: Drafts,
        rows: SamplingRows,
        is_running: Tensor,
        verdict: Verdict,
    ) -> None: ...

    def rejection_verify(
        self,
        logits: Tensor,
        stats: Tensor,
        drafts: Drafts,
        rows: SamplingRows,
        is_running: Tensor,
        verdict: Verdict,
    ) -> None: ...

    def block_verify(
        self,
        logits: Tensor,
        stats: Tensor,
        drafts: Drafts,
        rows: SamplingRows,
        is_running: Tensor,
        verdict: Verdict,
    ) -> None: ...

    def threshold_verify(
        self,
        logits: Tensor,
        stats: Tensor,
        drafts: Drafts,
        rows: SamplingRows,
        is_running: Tensor,
        verdict: Verdict,
    ) -> None: ...

    def typical_verify(
        self,
        logits: Tensor,
        stats: Tensor,
        drafts: Drafts,
        rows: SamplingRows,
        is_running: Tensor,
        verdict: Verdict,
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
    ) -> tuple[RoundPlan, ForwardStart]: ...

    def row_keys(
        self, rows: SamplingRows, q_start: Tensor, positions: Tensor, logit_rows: Tensor
    ) -> tuple[SamplingRows, Tensor]: ...

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
        drafts: Drafts,
        rows: SamplingRows,
        is_running: Tensor,
        verdict: Verdict,
        forced_acceptance: float | None = None,
    ) -> None: ...

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
    ) -> Tensor: ...

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
