"""What a decoder's forward is, as data: the list of ops that a backend runs, and the batch it runs them on.

The ops read and write named registers: `hidden` and `residual` `[T, D]`, `query` `[T, H, head_dim]`, `attended`
`[T, H * head_dim]`, `expanded` `[T, intermediate]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from specengine.kernels.types.packed import Norm, PackedLinear
from specengine.kernels.types.rows import SamplingRows
from specengine.kernels.types.transforms import Transforms

Register = Literal["hidden", "query", "attended", "residual", "expanded"]


@dataclass(frozen=True)
class NormQkv:
    """query = the queries of norm(hidden); keys and values go to the layer's cache.

    head_norm: `[2, head_dim]`, weights of the RMSNorm of each query's and each key's head, or None
    """

    layer: int
    norm: Norm
    weight: PackedLinear
    head_norm: Tensor | None = None


@dataclass(frozen=True)
class PagedAttention:
    """attended = attention of query over the layer's cache."""

    layer: int


@dataclass(frozen=True)
class LinearResidual:
    """out = source W^T + b + residual."""

    source: Register
    weight: PackedLinear
    residual: Register
    out: Register


@dataclass(frozen=True)
class NormLinear:
    """out = activation(norm(source) W^T + b)."""

    source: Register
    norm: Norm
    weight: PackedLinear
    activation: str
    out: Register


@dataclass(frozen=True)
class ParallelNormLinear:
    """`NormQkv` and expanded = activation(norm(hidden) W^T + b), where attention and MLP both read hidden."""

    layer: int
    norm: Norm
    weight: PackedLinear
    mlp_norm: Norm
    mlp_weight: PackedLinear
    activation: str


@dataclass(frozen=True)
class ParallelLinearResidual:
    """hidden = hidden + attended W^T + b + expanded Wm^T + bm."""

    weight: PackedLinear
    mlp_weight: PackedLinear


Op = NormQkv | PagedAttention | LinearResidual | NormLinear | ParallelNormLinear | ParallelLinearResidual


@dataclass(frozen=True)
class Program:
    """Embedding, the layers' ops in order, final norm and head.

    token_table `[V, D]`; position_table `[max_positions, D]` or None; rotary `[max_positions, 2, rotary_dim / 2]`
    fp32 or None; num_heads query heads attend to num_kv_heads key/value heads of head_dim features

    head_token_ids: `[n]` int32, ascending, the tokens that the head's rows are for; None: row v is token v
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    token_table: Tensor
    position_table: Tensor | None
    rotary: Tensor | None
    ops: tuple[Op, ...]
    final_norm: Norm
    head: PackedLinear
    head_token_ids: Tensor | None = None


class ForwardStart(NamedTuple):
    """What the `begin_forward` op makes: the first six as in a `ForwardBatch`, and as `expand_batch` gives them.

    hidden:   `[T, D]` fp32, what enters the first layer
    row_keys: `[R]` each, what each of `logit_rows` is judged by and the position that it decides, int32
    """

    token_ids: Tensor
    positions: Tensor
    kv_slots: Tensor
    q_start: Tensor
    context_len: Tensor
    logit_rows: Tensor
    hidden: Tensor | None
    row_keys: tuple[SamplingRows, Tensor] | None

    @property
    def expanded(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What `expand_batch` gives."""
        return self[:6]


class ForwardBatch(NamedTuple):
    """A ragged batch of B sequences and T tokens; a prompt chunk, one token or k + 1 tokens are all the same.

    token_ids:   `[T]` int32
    positions:   `[T]` int32, absolute
    kv_slots:    `[T]` int64, block * block_size + offset where this token's keys and values go; -1 = nowhere
    q_start:     `[B + 1]` int32, tokens q_start[b] … q_start[b + 1] - 1 belong to sequence b
    context_len: `[B]` int32, tokens of sequence b in the cache after this forward's writes
    slots:       `[B]` int32, row of each sequence in block_table
    block_table: `[S, max_blocks]` int32
    logit_rows:  `[R]` int64, the tokens whose logits are wanted, ascending
    logit_stride: n where logit row r is token n (r + 1) - 1, padding's too (1: all logits are wanted); 0: none is known
    num_tokens, num_logit_rows: `[1]` int32 on the device where rows from there on are padding; None: there is none,
                 or (of logit rows) padding costs nothing that matters
    hidden, row_keys: what `begin_forward` has made of it already; None: nothing
    """

    token_ids: Tensor
    positions: Tensor
    kv_slots: Tensor
    q_start: Tensor
    context_len: Tensor
    slots: Tensor
    block_table: Tensor
    logit_rows: Tensor
    logit_stride: int = 0
    num_tokens: Tensor | None = None
    num_logit_rows: Tensor | None = None
    hidden: Tensor | None = None
    row_keys: tuple[SamplingRows, Tensor] | None = None


class DrawKeys(NamedTuple):
    """What the draws of a batch depend on.

    rows:        `[B]`, by sequence
    has_filters: whether any of the sequences has a filter, as the host knows it
    transforms:  what is done to the logits first, by slot; None where no sequence asks for anything
    """

    rows: SamplingRows
    has_filters: bool
    transforms: Transforms | None = None


class JudgedLogits(NamedTuple):
    """Logits and what draws and verifications read of them.

    raw:    `[R, V]` fp32 as the `head` op gives them
    logits: what the `transform_rows` op makes of them; the same tensor where no sequence asks for anything
    stats:  `[R, 4]` of `logits`, as the `filter_rows` op gives them
    """

    raw: Tensor
    logits: Tensor
    stats: Tensor


@dataclass(frozen=True)
class DraftRows:
    """What a draft of several tokens reads, B sequences; `[B]` int32 each unless said otherwise.

    tokens:      `[S, max_seq_len]` int32, written: drawn tokens go behind the committed ones
    block_table: `[S, max_blocks]` int32
    slots:       rows of both
    start:       position of the first token that is fed
    seq_len:     committed tokens; the first draw decides this position
    limits:      draws of each sequence
    """

    tokens: Tensor
    block_table: Tensor
    slots: Tensor
    start: Tensor
    seq_len: Tensor
    limits: Tensor
