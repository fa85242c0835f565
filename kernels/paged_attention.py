"""Causal attention of ragged query chunks over the paged KV cache, in one launch.

A program takes sixteen rows of one sequence and one head, and a split of 64 cached tokens or all of them in turn.
Where every split has its own program, each leaves its part of the softmax in scratch memory, and the last to arrive
merges them. Splits start at multiples of 64 and are merged one by one in the order of the context either way, by
one function in one compiled kernel: a row's bits depend on its own context only. Reads the query, the visible part of
the cache and the batch's layout, writes the output; see `specengine.kernels.reference.paged_attention`.

With one program a split nearly all of the time is waiting, so loads follow each other as seldom as can be: the
batch's layout, the block table, keys and values together.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from specengine.kernels.device.dependent import wait
from specengine.kernels.device.launch import INTERPRETED, IS_INTERPRETED, ceil_div, launch
from specengine.kernels.device.rounding import as_operand, round_to
from specengine.kernels.device.workspace import scratch, zeroed

KV_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
BLOCK_Q = 16  # rows of every query tile: one mma.sync tile, so that one row costs what sixteen do
SPLIT = 64  # cached tokens of a split
# Query tiles times heads that keep a GPU busy without splitting the context, which then would only cost scratch
# memory and its traffic: four programs for each of an H200's 132 multiprocessors.
BUSY_PROGRAMS = 512

_SEQUENCES = tl.constexpr(32)  # of the batch, looked at together by each warp
PARTS_AT_ONCE = tl.constexpr(8)  # of a context, asked for together: those of 512 tokens
_LOWEST = tl.constexpr(-1e38)  # the largest score of none: finite, so that no difference of two is NaN


def choose_tile(dtype: torch.dtype, head_dim: int) -> tuple[int, int]:
    """Cached tokens that are multiplied at a time, and warps: the largest tile of which no register is spilled."""
    if IS_INTERPRETED:
        return SPLIT, 4
    if dtype == torch.float32:
        return (32, 4) if head_dim <= 64 else (16, 8) if head_dim <= 128 else (16, 16)
    return (SPLIT, 4) if head_dim <= 128 else (SPLIT, 8)


@triton.jit
def find_sequence(q_start_ptr, context_len_ptr, slots_ptr, num_sequences, tile, BLOCK_Q: tl.constexpr):
    """Of the sequence that a query tile belongs to: slot, first row, number of rows and tokens; and the tile's first
    row in it. Whatever says so is loaded at once, of every sequence.

    Tiles of sequence b start at q_start[b] // BLOCK_Q + b. No two sequences share one; those left over belong to the
    sequence before them, behind its last row.
    """
    slot, q_start, q_len, context_len, first_row = 0, 0, 0, 0, 0
    for first in tl.range(0, num_sequences, _SEQUENCES):
        sequences = first + tl.arange(0, _SEQUENCES)
        exists = sequences < num_sequences
        start = tl.load(q_start_ptr + sequences, exists, other=0)
        end = tl.load(q_start_ptr + 1 + sequences, exists, other=0)
        tokens = tl.load(context_len_ptr + sequences, exists, other=0)
        slots = tl.load(slots_ptr + sequences, exists, other=0)
        first_tile = start // BLOCK_Q + sequences
        is_before_next = (tile <= end // BLOCK_Q + sequences) | (sequences == num_sequences - 1)
        is_own = exists & (first_tile <= tile) & is_before_next
        slot += tl.sum(tl.where(is_own, slots, 0), axis=0)
        q_start += tl.sum(tl.where(is_own, start, 0), axis=0)
        q_len += tl.sum(tl.where(is_own, end - start, 0), axis=0)
        context_len += tl.sum(tl.where(is_own, tokens, 0), axis=0)
        first_row += tl.sum(tl.where(is_own, (tile - first_tile) * BLOCK_Q, 0), axis=0)
    return slot, q_start, q_len, context_len, first_row


@triton.jit
def load_blocks(blocks_ptr, tokens, num_visible, BLOCK_SIZE: tl.constexpr):
    """The cache blocks that tokens are in, int64."""
    return tl.load(blocks_ptr + tokens // BLOCK_SIZE, mask=tokens < num_visible, other=0).to(tl.int64)


@triton.jit
def after(x, other):
    """x, which is used only when `other`, of the same type and shape, has been asked for, too. Left to itself the
    compiler moves x to where it is multiplied first, and asks for `other` when x is there."""
    if INTERPRETED:
        return x
    else:
        PACK: tl.constexpr = 32 // x.dtype.primitive_bitwidth
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1; // $2", "=r,r,r", [x, other], dtype=x.dtype, is_pure=False, pack=PACK
        )


@triton.jit
def load_tile(
    key_ptr,
    value_ptr,
    blocks,
    tokens,
    num_visible,
    kv_head,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Keys and values `[BLOCK_KV, BLOCK_D]` of tokens `[BLOCK_KV]`, 0 from num_visible on."""
    columns = tl.arange(0, BLOCK_D)
    start = (blocks * NUM_KV_HEADS + kv_head) * (BLOCK_SIZE * HEAD_DIM) + (tokens % BLOCK_SIZE) * HEAD_DIM
    at = start[:, None] + columns[None, :]
    mask = (tokens < num_visible)[:, None] & (columns < HEAD_DIM)[None, :]
    key = tl.load(key_ptr + at, mask, other=0.0)
    value = tl.load(value_ptr + at, mask, other=0.0)
    return after(key, value), value


@triton.jit
def attend(query, key, value, tokens, positions, scale):
    """The part that a tile of tokens has in each row's softmax: the largest score, in powers of two, and the sum of
    2**(score - largest), `[BLOCK_Q]` each, and the values so weighted, `[BLOCK_Q, BLOCK_D]`.

    positions: `[BLOCK_Q]`, the last token that each row sees
    """
    scores = tl.dot(query, as_operand(tl.trans(key)), input_precision="ieee") * scale
    scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
    largest = tl.maximum(tl.max(scores, axis=1), _LOWEST)
    weights = tl.exp2(scores - largest[:, None])
    operand = as_operand(round_to(weights, value.dtype))
    return largest, tl.sum(weights, axis=1), tl.dot(operand, as_operand(value), input_precision="ieee")


@triton.jit
def nothing(BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr):
    """The part of no tokens: merging it changes no bit of the other."""
    zeros = tl.zeros((BLOCK_Q,), tl.float32)
    return zeros + _LOWEST, zeros, tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)


@triton.jit
def merge(part, other):
    """Two parts of each row's softmax in one."""
    largest = tl.maximum(part[0], other[0])
    scale = tl.exp2(part[0] - largest)
    other_scale = tl.exp2(other[0] - largest)
    total = part[1] * scale + other[1] * other_scale
    return largest, total, part[2] * scale[:, None] + other[2] * other_scale[:, None]


@triton.jit
def leave_part(part, part_ptr, counter_ptr, num_splits, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr):
    """Leaves a split's part behind; True for the last of a tile."""
    rows = tl.arange(0, BLOCK_Q)
    matrix = 2 * BLOCK_Q + rows[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    tl.store(part_ptr + rows, part[0])
    tl.store(part_ptr + BLOCK_Q + rows, part[1])
    tl.store(part_ptr + matrix, part[2])
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel") == num_splits - 1


@triton.jit
def merge_splits(parts_ptr, num_splits, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr):
    """The parts of all splits merged, those of PARTS_AT_ONCE asked for together."""
    rows = tl.arange(0, BLOCK_Q)
    matrix = 2 * BLOCK_Q + rows[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    part = nothing(BLOCK_Q, BLOCK_D)
    for first in tl.range(0, num_splits, PARTS_AT_ONCE):
        for split in tl.static_range(PARTS_AT_ONCE):
            is_there = tl.full((BLOCK_Q,), first + split, tl.int32) < num_splits
            part_ptr = parts_ptr + (first + split) * (BLOCK_Q * (2 + BLOCK_D))
            largest = tl.load(part_ptr + rows, is_there, other=_LOWEST, cache_modifier=".cg")
            total = tl.load(part_ptr + BLOCK_Q + rows, is_there, other=0.0, cache_modifier=".cg")
            value = tl.load(part_ptr + matrix, is_there[:, None], other=0.0, cache_modifier=".cg")
            part = merge(part, (largest, total, value))
    return part


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
    slot, q_start, q_len, context_len, first_row = find_sequence(
        q_start_ptr, context_len_ptr, slots_ptr, num_sequences, tl.program_id(0), BLOCK_Q
    )
    num_before = context_len - q_len
    num_visible = num_before + tl.minimum(first_row + BLOCK_Q, q_len)
    num_splits = (num_visible + SPLIT - 1) // SPLIT
    split = tl.program_id(2)
    if (first_row >= q_len) | (split >= num_splits):
        return
    blocks_ptr = table_ptr + slot.to(tl.int64) * table_stride
    tokens = split * SPLIT + tl.arange(0, BLOCK_KV)
    blocks = load_blocks(blocks_ptr, tokens, num_visible, BLOCK_SIZE)
    head = tl.program_id(1)
    rows = first_row + tl.arange(0, BLOCK_Q)
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < q_len)[:, None] & (columns < HEAD_DIM)[None, :]
    row = (q_start + rows).to(tl.int64)[:, None]
    column = head * HEAD_DIM + columns[None, :]
    query = tl.load(query_ptr + row * (GROUP * NUM_KV_HEADS * HEAD_DIM) + column, mask, other=0.0)
    query = as_operand(round_to(query, key_ptr.dtype.element_ty))

    is_split = tl.num_programs(2) > 1
    part = nothing(BLOCK_Q, BLOCK_D)
    for _ in tl.range(split, tl.where(is_split, split + 1, num_splits)):
        split_part = nothing(BLOCK_Q, BLOCK_D)
        for _ in tl.range(SPLIT // BLOCK_KV):
            key, value = load_tile(
                key_ptr,
                value_ptr,
                blocks,
                tokens,
                num_visible,
                head // GROUP,
                NUM_KV_HEADS,
                HEAD_DIM,
                BLOCK_SIZE,
                BLOCK_D,
            )
            blocks = load_blocks(blocks_ptr, tokens + BLOCK_KV, num_visible, BLOCK_SIZE)
            tile_part = attend(query, key, value, tokens, num_before + rows, scale)
            split_part = merge(split_part, tile_part) if BLOCK_KV < SPLIT else tile_part
            tokens += BLOCK_KV
        part = merge(part, split_part)
    out_ptr += row * out_stride + column
    if is_split & (num_splits > 1):
        tile = (tl.program_id(0) * tl.num_programs(1) + head).to(tl.int64)
        PART: tl.constexpr = BLOCK_Q * (2 + BLOCK_D)
        parts_ptr += tile * tl.num_programs(2) * PART
        if leave_part(part, parts_ptr + split * PART, counter_ptr + tile, num_splits, BLOCK_Q, BLOCK_D):
            tl.store(counter_ptr + tile, 0)
            whole = merge_splits(parts_ptr, num_splits, BLOCK_Q, BLOCK_D)
            tl.store(out_ptr, whole[2] * (1.0 / whole[1])[:, None], mask)
    else:
        tl.store(out_ptr, part[2] * (1.0 / part[1])[:, None], mask)


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
        num_stages=1,
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
