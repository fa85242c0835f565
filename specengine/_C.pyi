# Types of the C++ extension (csrc/python): the ops (meanings in specengine.kernels.reference), a whole decoder
# (meanings in specengine.kernels.types.program), the KV cache manager (meanings in csrc/core/paged_kv_cache.h) and the
# suffix automaton (meanings in csrc/core/suffix_automaton.h).
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specengine.kernels.types.drafts import Drafts, Verdict
from specengine.kernels.types.round import StateTensors
from specengine.kernels.types.rows import SamplingRows
from specengine.kernels.types.transforms import Transforms

_TokenIds = Sequence[int] | NDArray[np.int32]

class PagedKVCache:
    num_blocks: int
    block_size: int
    num_free_blocks: int
    num_cached_blocks: int
    num_hashed_blocks: int
    num_sequences: int
    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_sequences: int,
        max_blocks_per_sequence: int,
        num_models: int,
        block_table_address: int,
        enable_prefix_cache: bool = True,
    ) -> None: ...
    def allocate(self, token_ids: _TokenIds, max_cached_tokens: int) -> int: ...
    def extend(self, slot: int, first_position: int, num_tokens: int) -> list[tuple[int, int]]: ...
    def num_blocks_needed(self, slot: int, first_position: int, num_tokens: int) -> int: ...
    def can_extend(self, slot: int, first_position: int, num_tokens: int) -> bool: ...
    def num_computed_tokens(self, slot: int, model: int) -> int: ...
    def set_computed(self, slot: int, model: int, num_tokens: int) -> None: ...
    def rollback(self, slot: int, num_tokens: int) -> None: ...
    def fork(self, slot: int, num_tokens: int) -> int: ...
    def publish(self, slot: int, token_ids: _TokenIds) -> None: ...
    def trim(self, slot: int, num_tokens: int) -> None: ...
    def free(self, slot: int) -> None: ...
    def reset_prefix_cache(self) -> None: ...
    def capacity(self, slot: int) -> int: ...
    def reference_count(self, block: int) -> int: ...
    def sequence_blocks(self, slot: int) -> list[int]: ...
    def check_invariants(self) -> None: ...

class SuffixAutomaton:
    MAX_BYTES_PER_TOKEN: ClassVar[int]
    num_seen: int
    num_tokens: int
    num_bytes: int
    def __init__(self, max_tokens: int) -> None: ...
    def append(self, tokens: Sequence[int]) -> None: ...
    def draft(self, limit: int, drafted: Sequence[int] = ()) -> tuple[int, list[int]]: ...
    def draft_after(self, context: Sequence[int], limit: int) -> tuple[int, list[int]]: ...

class Ops:
    """The ops that several threads share, and how many may."""

    num_threads: int
    def __init__(self, num_threads: int) -> None: ...
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
    def pack_linear(self, weight: Tensor, dtype: torch.dtype) -> Tensor: ...
    def pack_linear_int8(self, weight: Tensor) -> tuple[Tensor, Tensor]: ...
    def pack_grouped(self, codes: Tensor, scale: Tensor, minimum: Tensor | None, bits: int) -> Tensor: ...
    def embed(
        self, token_ids: Tensor, positions: Tensor, token_table: Tensor, position_table: Tensor | None
    ) -> Tensor: ...
    def norm_linear(
        self,
        hidden: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        eps: float,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        in_features: int,
        out_features: int,
        activation: str,
    ) -> Tensor: ...
    def linear_residual(
        self,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        in_features: int,
        out_features: int,
        residual: Tensor,
    ) -> Tensor: ...
    def head(
        self,
        hidden: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        eps: float,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        in_features: int,
        out_features: int,
        vocab_size: int,
        token_ids: Tensor | None,
    ) -> Tensor: ...
    def head_draw(
        self,
        hidden: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        eps: float,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        in_features: int,
        out_features: int,
        vocab_size: int,
        token_ids: Tensor | None,
        rows: SamplingRows,
        positions: Tensor,
    ) -> tuple[Tensor, Tensor]: ...
    def norm_qkv(
        self,
        hidden: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        eps: float,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        in_features: int,
        out_features: int,
        positions: Tensor,
        kv_slots: Tensor,
        kv_cache: Tensor,
        rotary: Tensor | None,
        head_norm: Tensor | None,
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
    def filter_rows(self, logits: Tensor, rows: SamplingRows) -> Tensor: ...
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
    def token_logprobs(
        self, logits: Tensor, token_ids: Tensor, num_top: int
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    def read_all(self, tensor: Tensor) -> int: ...

class Decoder:
    def __init__(
        self,
        ops: Ops,
        token_table: Tensor,
        position_table: Tensor | None,
        rotary: Tensor | None,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
    ) -> None: ...
    def norm_qkv(
        self,
        layer: int,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        eps: float,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        in_features: int,
        out_features: int,
        head_norm: Tensor | None,
    ) -> None: ...
    def paged_attention(self, layer: int) -> None: ...
    def linear_residual(
        self,
        source: str,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        in_features: int,
        out_features: int,
        residual: str,
        out: str,
    ) -> None: ...
    def norm_linear(
        self,
        source: str,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        eps: float,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        in_features: int,
        out_features: int,
        activation: str,
        out: str,
    ) -> None: ...
    def head(
        self,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        eps: float,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        in_features: int,
        out_features: int,
        token_ids: Tensor | None,
    ) -> None: ...
    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv_slots: Tensor,
        q_start: Tensor,
        context_len: Tensor,
        slots: Tensor,
        block_table: Tensor,
        logit_rows: Tensor,
        kv_cache: Tensor,
        vocab_size: int,
    ) -> Tensor: ...
    def draw(
        self,
        token_ids: Tensor,
        positions: Tensor,
        kv_slots: Tensor,
        q_start: Tensor,
        context_len: Tensor,
        slots: Tensor,
        block_table: Tensor,
        logit_rows: Tensor,
        kv_cache: Tensor,
        vocab_size: int,
        rows: SamplingRows,
        transforms: Transforms | None,
    ) -> tuple[Tensor, Tensor]: ...
    def draft(
        self,
        tokens: Tensor,
        block_table: Tensor,
        slots: Tensor,
        start: Tensor,
        seq_len: Tensor,
        limits: Tensor,
        kv_cache: Tensor,
        vocab_size: int,
        rows: SamplingRows,
        transforms: Transforms | None,
    ) -> tuple[Tensor, Tensor]: ...
    def round(
        self,
        draft: Decoder | None,
        num_fed: int,
        caches: list[Tensor],
        vocab_sizes: list[int],
        state: StateTensors,
        slots: Tensor,
        rows: SamplingRows,
        transforms: Transforms | None,
        given: tuple[Tensor, Tensor] | None,
        k: int,
        draft_positions: int,
        forced_acceptance: float | None,
    ) -> Round: ...

class Round:
    """See `specengine.kernels.types.round.BoundRound`."""

    def run(
        self, max_rounds: int, max_seconds: float, stop_ids: list[int]
    ) -> list[tuple[list[list[int]], tuple[float, float, float]]]: ...
    def drafts(self) -> list[list[int]]: ...

def expand_batch(
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
def row_keys(
    rows: SamplingRows, q_start: Tensor, positions: Tensor, logit_rows: Tensor
) -> tuple[list[Tensor], Tensor]: ...
def plan_round(
    slots: Tensor,
    seq_len: Tensor,
    length_limit: Tensor,
    num_speculative: Tensor,
    k: int,
    draft_positions: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]: ...
def match_draws(
    drawn: Tensor,
    drawn_error: Tensor,
    drafts: Drafts,
    rows: SamplingRows,
    is_running: Tensor,
    verdict: Verdict,
    forced_acceptance: float | None = None,
) -> None: ...
def commit_round(
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
def philox4x32(c0: int, c1: int, c2: int, c3: int, k0: int, k1: int) -> list[int]: ...
def vocabulary_bits(seed: int, position: int, stream: int, round_base: int, vocab: int) -> list[int]: ...
def accept_bits(seed: int, position: int, round_base: int, candidate: int) -> int: ...
def instruction_sets() -> list[str]: ...
def set_instruction_set(name: str) -> None: ...
def build_info() -> dict[str, str | int | bool]: ...
