"""Causal attention of ragged query chunks over the paged KV cache, in one launch.

A program takes sixteen rows of one sequence and one head, and a split of 128 cached tokens or all of them in turn.
Where every split has its own program, each leaves its part of the softmax in scratch memory, and the last to arrive
merges them. Splits start at multiples of 128 and are merged one by one in the order of the context either way, by
one function in one compiled kernel: a row's bits depend on its own context only. Reads the query, the visible part of
the cache and the batch's layout, writes the output; see `specengine.kernels.reference.paged_attention`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from specengine.kernels.device.dependent import wait
from specengine.kernels.device.launch import IS_INTERPRETED, ceil_div, launch
from specengine.kernels.device.rounding import as_operand, round_to
from specengine.kernels.device.workspace import scratch, zeroed

KV_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
BLOCK_Q = 16  # rows of every query tile: one mma.sync tile, so that one row costs what sixteen do
SPLIT = 128  # cached tokens of a split
# Query tiles times heads that keep a GPU busy without splitting the context, which then would only cost scratch
# memory and its traffic: four programs for each of an H200's 132 multiprocessors.
BUSY_PROGRAMS = 512

_SEQUENCES = tl.constexpr(64)  # of the batch, looked at together
_LOWEST = tl.constexpr(-1e38)  # the largest score of none: finite, so that no difference of two is NaN


def choose_tile(dtype: torch.dtype, head_dim: int) -> tuple[int, int]:
    """Cached tokens that are multiplied at a time, and warps: the largest tile of which no register is spilled."""
    if IS_INTERPRETED:
        return SPLIT, 4
    if dtype == torch.float32:
        return (32, 4) if head_dim <= 64 else (64, 8) if head_dim <= 128 else (16, 8)
    return (128, 4) if head_dim <= 128 else (64, 8)


@triton.jit
def find_sequence(q_start_ptr, num_sequences, tile, BLOCK_Q: tl.constexpr):
    """The sequence that a query tile belongs to, the sequence's first row, and the tile's first row in it.

    Tiles of sequence b start at q_start[b] // BLOCK_Q + b. No two sequences share one; those left over belong to the
    sequence before them, behind its last row.
    """
    sequence = -1
    for first in tl.range(0, num_sequences, _SEQUENCES):
        sequences = first + tl.arange(0, _SEQUENCES)
        q_start = tl.load(q_start_ptr + sequences, mask=sequences < num_sequences, other=0)
        is_before = (sequences < num_sequences) & (q_start // BLOCK_Q + sequences <= tile)
        sequence += tl.sum(is_before.to(tl.int32), axis=0)
    q_start = tl.load(q_start_ptr + sequence)
    return sequence, q_start, (tile - q_start // BLOCK_Q - sequence) * BLOCK_Q


@triton.jit
def attend(
    query,
    positions,
    key_ptr,
    value_ptr,
    blocks_ptr,
    first_token,
    num_visible,
    kv_head,
    scale,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The part that BLOCK_KV cached tokens have in each row's softmax: the largest score, in powers of two, and the
    sum of 2**(score - largest), `[BLOCK_Q]` each, and the values so weighted, `[BLOCK_Q, BLOCK_D]`.

    positions:   `[BLOCK_Q]`, the last token that each row sees
    num_visible: tokens from there on are not read
    """
    columns = tl.arange(0, BLOCK_D)
    is_feature = columns < HEAD_DIM
    tokens = first_token + tl.arange(0, BLOCK_KV)
    is_read = tokens < num_visible
    block = tl.load(blocks_ptr + tokens // BLOCK_SIZE, mask=is_read, other=0).to(tl.int64)
    start = (block * NUM_KV_HEADS + kv_head) * (BLOCK_SIZE * HEAD_DIM) + (tokens % BLOCK_SIZE) * HEAD_DIM
    key_at = start[None, :] + columns[:, None]
    key = tl.load(key_ptr + key_at, mask=is_read[None, :] & is_feature[:, None], other=0.0)
    value_at = start[:, None] + columns[None, :]
    value = tl.load(value_ptr + value_at, mask=is_read[:, None] & is_feature[None, :], other=0.0)
    scores = tl.dot(query, as_operand(key), input_precision="ieee") * scale
    scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
    largest = tl.maximum(tl.max(scores, axis=1), _LOWEST)
    weights = tl.exp2(scores - largest[:, None])
    operand = as_operand(round_to(weights, value.dtype))
    return largest, tl.sum(weights, axis=1), tl.dot(operand, as_operand(value), input_precision="ieee")


@triton.jit
def merge(part, other):
    """Two parts of each row's softmax in one; (_LOWEST, 0, 0) changes no bit of the other."""
    largest = tl.maximum(part[0], other[0])
    scale = tl.exp2(part[0] - largest)
    other_scale = tl.exp2(other[0] - largest)
    total = part[1] * scale + other[1] * other_scale
    return largest, total, part[2] * scale[:, None] + other[2] * other_scale[:, None]


@triton.jit
def merge_splits(
    part, nothing, parts_ptr, counter_ptr, split, num_splits, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Leaves this program's part behind; for the last of a tile, the parts of all splits merged, and True."""
    PART: tl.constexpr = BLOCK_Q * (2 + BLOCK_D)
    rows = tl.arange(0, BLOCK_Q)
    matrix = 2 * BLOCK_Q + rows[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    own_ptr = parts_ptr + split * PART
    tl.store(own_ptr + rows, part[0])
    tl.store(own_ptr + BLOCK_Q + rows, part[1])
    tl.store(own_ptr + matrix, part[2])
    tl.debug_barrier()
    is_last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == num_splits - 1
    if is_last:
        tl.store(counter_ptr, 0)
        part = nothing
        for other in tl.range(0, num_splits, loop_unroll_factor=4):
            other_ptr = parts_ptr + other * PART
            largest = tl.load(other_ptr + rows, cache_modifier=".cg")
            total = tl.load(other_ptr + BLOCK_Q + rows, cache_modifier=".cg")
            part = merge(part, (largest, total, tl.load(other_ptr + matrix, cache_modifier=".cg")))
    return part, is_last


@triton.jit(do_not_specialize=["num_sequences"])
def spec_paged_attention(
    query_ptr,
    key_ptr,
    value_ptr,
    table_ptr,
    table_stride,
    slots_ptr,
    q_start_ptr,
    context_len_ptr,
    out_ptr,
    out_stride,
    parts_ptr,
    counter_ptr,
    scale,
    num_sequences,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    sequence, q_start, first_row = find_sequence(q_start_ptr, num_sequences, tl.program_id(0), BLOCK_Q)
    q_len = tl.load(q_start_ptr + sequence + 1) - q_start
    num_before = tl.load(context_len_ptr + sequence) - q_len
    num_visible = num_before + tl.minimum(first_row + BLOCK_Q, q_len)
    num_splits = (num_visible + SPLIT - 1) // SPLIT
    split = tl.program_id(2)
    if (first_row >= q_len) | (split >= num_splits):
        return
    head = tl.program_id(1)
    rows = first_row + tl.arange(0, BLOCK_Q)
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < q_len)[:, None] & (columns < HEAD_DIM)[None, :]
    row = (q_start + rows).to(tl.int64)[:, None]
    column = head * HEAD_DIM + columns[None, :]
    query = tl.load(query_ptr + row * (GROUP * NUM_KV_HEADS * HEAD_DIM) + column, mask, other=0.0)
    query = as_operand(round_to(query, key_ptr.dtype.element_ty))
    blocks_ptr = table_ptr + tl.load(slots_ptr + sequence).to(tl.int64) * table_stride

    is_split = tl.num_programs(2) > 1
    lowest = tl.full((BLOCK_Q,), _LOWEST, tl.float32)
    nothing = (lowest, tl.full((BLOCK_Q,), 0.0, tl.float32), tl.full((BLOCK_Q, BLOCK_D), 0.0, tl.float32))
    part = nothing
    for current in tl.range(split, tl.where(is_split, split + 1, num_splits)):
        split_part = nothing
        for first in tl.range(0, SPLIT, BLOCK_KV):
            tokens_part = attend(
                query,
                num_before + rows,
                key_ptr,
                value_ptr,
                blocks_ptr,
                current * SPLIT + first,
                num_visible,
                head // GROUP,
                scale,
                NUM_KV_HEADS,
                HEAD_DIM,
                BLOCK_SIZE,
                BLOCK_KV,
                BLOCK_D,
            )
            split_part = merge(split_part, tokens_part)
        part = merge(part, split_part)
    if is_split & (num_splits > 1):
        tile = (tl.program_id(0) * tl.num_programs(1) + head).to(tl.int64)
        parts_ptr += tile * tl.num_programs(2) * (BLOCK_Q * (2 + BLOCK_D))
        part, is_last = merge_splits(
            part, nothing, parts_ptr, counter_ptr + tile, split, num_splits, BLOCK_Q, BLOCK_D
        )
        if not is_last:
            return
    tl.store(out_ptr + row * out_stride + column, part[2] / part[1][:, None], mask)


def paged_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    slots: Tensor,
    q_start: Tensor,
    context_len: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """See `specengine.kernels.reference.paged_attention`.

    out: `[T, H * head_dim]` fp32 with contiguous rows to write to; rows that belong to no sequence are left alone
    """
    _check(query, kv_cache, block_table, slots, q_start, context_len, out)
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads, block_size = kv_cache.shape[2:4]
    if out is None:
        out = torch.empty(num_rows, num_heads * head_dim, device=query.device)
    num_tiles = num_rows // BLOCK_Q + slots.shape[0]
    num_splits = ceil_div(block_table.shape[1] * block_size, SPLIT)
    if num_tiles * num_heads >= BUSY_PROGRAMS:
        num_splits = 1
    block_d = max(16, triton.next_power_of_2(head_dim))
    block_kv, num_warps = choose_tile(kv_cache.dtype, head_dim)
    num_parts = num_tiles * num_heads * num_splits if num_splits > 1 else 0
    launch(
        spec_paged_attention,
        (num_tiles, num_heads, num_splits),
        query,
        kv_cache[0],
        kv_cache[1],
        block_table,
        block_table.stride(0),
        slots,
        q_start,
        context_len,
        out,
        out.stride(0),
        scratch(num_parts * BLOCK_Q * (2 + block_d), torch.float32, query.device),
        zeroed(num_tiles * num_heads, torch.int32, query.device),
        math.log2(math.e) * head_dim**-0.5,
        slots.shape[0],
        GROUP=num_heads // num_kv_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        SPLIT=SPLIT,
        BLOCK_Q=BLOCK_Q,
        BLOCK_KV=block_kv,
        BLOCK_D=block_d,
        num_warps=num_warps,
        num_stages=3,
    )
    return out


def _check(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    slots: Tensor,
    q_start: Tensor,
    context_len: Tensor,
    out: Tensor | None,
) -> None:
    _expect("kv_cache", kv_cache, (2, None, None, None, None), KV_DTYPES)
    num_kv_heads, block_size, head_dim = kv_cache.shape[2:]
    if not (num_kv_heads and block_size and 1 <= head_dim <= MAX_HEAD_DIM):
        raise ValueError(
            f"kv_cache: {list(kv_cache.shape)} has an empty size or a head of more than {MAX_HEAD_DIM}"
        )
    _expect("query", query, (None, None, head_dim), (torch.float32,))
    num_rows, num_heads = query.shape[:2]
    if num_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"query: {num_heads} heads are no multiple of {num_kv_heads} key/value heads")
    _expect("block_table", block_table, (None, None), (torch.int32,), has_row_stride=True)
    _expect("slots", slots, (None,), (torch.int32,))
    num_sequences = slots.shape[0]
    if num_rows and not num_sequences:
        raise ValueError(f"slots: no sequence for {num_rows} rows")
    _expect("q_start", q_start, (num_sequences + 1,), (torch.int32,))
    _expect("context_len", context_len, (num_sequences,), (torch.int32,))
    if out is not None:
        _expect("out", out, (num_rows, num_heads * head_dim), (torch.float32,), has_row_stride=True)


def _expect(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    *,
    has_row_stride: bool = False,
) -> None:
    """Raises `ValueError` naming `name` unless the tensor has one of the types, this shape (None: any size), and
    contiguous elements; with `has_row_stride`, contiguous rows."""
    sizes = zip(tensor.shape, shape, strict=False)
    is_right = tensor.dim() == len(shape) and all(wanted in (None, size) for size, wanted in sizes)
    is_dense = tensor.is_contiguous() or (has_row_stride and tensor[:1].is_contiguous())
    if not (is_right and is_dense and tensor.dtype in dtypes):
        sizes_text = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(
            f"{name}: expected contiguous [{sizes_text}] {' or '.join(map(str, dtypes))}, got "
            f"{list(tensor.shape)} {tensor.dtype} with strides {tensor.stride()}"
        )
