"""Races over a row of logits: a program scores one tile, and an integer maximum over the tiles decides.

A tile's tokens share their Philox calls in fours. A tile is therefore held as `[TILE / 128, 32, 2, 2]`, group, place
and (lane % 2, lane // 2) of token 128 group + 32 lane + place: every lane is loaded in runs of 128 bytes, and joining
lanes moves no data.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specengine.kernels.device.launch import IS_INTERPRETED
from specengine.kernels.device.noise import (
    NEGATIVE_INFINITY,
    gumbel,
    philox_lanes,
    race_key,
    sanitise,
    vocabulary_counter,
)
from specengine.kernels.types.drafts import Drafts, Verdict
from specengine.kernels.types.rows import COLUMNS, SamplingRows

# Tokens of a program: a vector of 16 bytes a lane for each of its 128 threads. Any multiple of 128 gives the same bits.
TILE = 8192 if IS_INTERPRETED else 2048
RACE_WARPS = 4

# A row of `filter_rows`.
NUM_STATS = tl.constexpr(4)
THRESHOLD = tl.constexpr(1)
LOG_NORMALISER = tl.constexpr(2)
ERROR = tl.constexpr(3)

_NO_TOKEN = tl.constexpr(2**31 - 1)
TOTAL_UNITS = tl.constexpr(2.0**40)


def check_logits(name: str, logits: Tensor, shape: tuple[int, ...] | None = None) -> None:
    """Raises `ValueError` naming `name` unless logits are fp32 `[*shape, V]`, V >= 1, with contiguous rows; without a
    shape, `[R, V]` for any R."""
    leading = tuple(logits.shape[:-1])
    is_shaped = len(leading) == 1 if shape is None else leading == shape
    is_row = is_shaped and logits.shape[-1] >= 1 and (logits.stride(-1) == 1 or logits.shape[-1] == 1)
    if logits.dtype != torch.float32 or not is_row:
        expected = "R" if shape is None else ", ".join(map(str, shape))
        raise ValueError(
            f"{name}: expected [{expected}, V] torch.float32 with contiguous rows, got "
            f"{list(logits.shape)} {logits.dtype}"
        )


def check_small(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor, made contiguous. Raises `ValueError` naming `name` unless it has this shape and type."""
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(f"{name}: expected {list(shape)} {dtype}, got {list(tensor.shape)} {tensor.dtype}")
    return tensor.contiguous()


def check_columns(rows: SamplingRows, count: int, *names: str) -> tuple[Tensor, ...]:
    """Columns of `count` rows, those named or all of them, in the order of the declaration."""
    return tuple(
        check_small(name, values, (count,), column.dtype)
        for (name, column), values in zip(COLUMNS.items(), rows, strict=True)
        if not names or name in names
    )


def check_drafts(drafts: Drafts) -> tuple[Tensor, ...]:
    """Drafts without their law, in order."""
    count, k = drafts.row_start.numel(), drafts.tokens.shape[-1]
    return (
        check_small("row_start", drafts.row_start, (count,), torch.int32),
        check_small("seq_len", drafts.seq_len, (count,), torch.int32),
        check_small("num_draft", drafts.num_draft, (count,), torch.int32),
        check_small("draft_tokens", drafts.tokens, (count, k), torch.int32),
    )


def check_verdict(verdict: Verdict, count: int, k: int) -> tuple[Tensor, ...]:
    """A verdict on `count` sequences of up to k drafts, in order."""
    return (
        check_output("tokens", verdict.tokens, (count, k + 1), torch.int32),
        check_output("num_accepted", verdict.num_accepted, (count,), torch.int32),
        check_output("error", verdict.error, (count,), torch.int32),
    )


def check_output(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`check_small` of a tensor that is written where it lies."""
    if check_small(name, tensor, shape, dtype) is not tensor:
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    return tensor


def check_table(name: str, table: Tensor) -> Tensor:
    """A table with a row a slot, read and written where it lies."""
    if table.dim() != 2 or table.dtype != torch.int32 or table.stride(1) != 1:
        raise ValueError(
            f"{name}: expected [S, n] torch.int32 with contiguous rows, got {list(table.shape)} {table.dtype}"
        )
    return table


@triton.jit
def stack_lanes(lane_0, lane_1, lane_2, lane_3):
    """The lanes of a tile, `[...]` each, as `[..., 2, 2]`."""
    return tl.join(tl.join(lane_0, lane_1), tl.join(lane_2, lane_3))


@triton.jit
def first_lane(first, TILE: tl.constexpr):
    """Ids of lane 0 of the tile that starts at `first`, a multiple of 128: `[TILE / 128, 32]`."""
    return first + tl.arange(0, TILE // 128)[:, None] * 128 + tl.arange(0, 32)[None, :]


@triton.jit
def stack_tokens(lane):
    """Ids of a tile's tokens, from `first_lane`'s."""
    return stack_lanes(lane, lane + 32, lane + 64, lane + 96)


@triton.jit
def load_tile(row_ptr, lane, VOCAB: tl.constexpr):
    """A tile's logits; -inf beyond the vocabulary."""
    return stack_lanes(
        tl.load(row_ptr + lane, lane < VOCAB, NEGATIVE_INFINITY),
        tl.load(row_ptr + lane + 32, lane + 32 < VOCAB, NEGATIVE_INFINITY),
        tl.load(row_ptr + lane + 64, lane + 64 < VOCAB, NEGATIVE_INFINITY),
        tl.load(row_ptr + lane + 96, lane + 96 < VOCAB, NEGATIVE_INFINITY),
    )


@triton.jit
def tile_noise(lane, position, stream: tl.constexpr, base, seed):
    """A tile's Gumbel noise."""
    bits_0, bits_1, bits_2, bits_3 = philox_lanes(vocabulary_counter(lane), position, stream, base, seed)
    return gumbel(stack_lanes(bits_0, bits_1, bits_2, bits_3))


@triton.jit
def scale_row(logits, temperature):
    """`scale_logits` of one row, without a division by one."""
    if (temperature > 0.0) & (temperature != 1.0):
        logits = tl.div_rn(logits, temperature)
    return sanitise(logits)


@triton.jit
def keep(scaled, threshold):
    """Scaled logits, -inf where the filter drops the token."""
    return tl.where(scaled < threshold, NEGATIVE_INFINITY, scaled)


@triton.jit
def winner_key(score, tokens):
    """The `race_key` of a tile's best (score, lowest id); at least one of the tile's tokens is in the vocabulary."""
    best = tl.max(score)
    return race_key(best, tl.min(tl.where(score == best, tokens, _NO_TOKEN)))


@triton.jit
def tile_total(values):
    """The sum of a tile's numbers >= 0 as an integer in units of 2**-40: such sums are exact in any order."""
    return tl.sum((values * TOTAL_UNITS + 0.5).to(tl.int64))


@triton.jit
def draw_key(
    row_ptr,
    stats_ptr,
    first,
    temperature,
    seed,
    position,
    stream: tl.constexpr,
    base,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
):
    """The `race_key` of a tile's z / T + noise over the kept tokens; of z where greedy.

    row_ptr, stats_ptr: the row's logits and statistics
    first:              the tile's first token
    """
    lane = first_lane(first, TILE)
    score = scale_row(load_tile(row_ptr, lane, VOCAB), temperature)
    if temperature > 0.0:
        score = keep(score, tl.load(stats_ptr + THRESHOLD))
        if tl.max(score) > NEGATIVE_INFINITY:
            score += tile_noise(lane, position, stream, base, seed)
    return winner_key(score, stack_tokens(lane))


@triton.jit
def is_last_of(num_programs, counter_ptr):
    """Whether all others of `num_programs` were here before: what they wrote can be read. The counter is zero then."""
    is_last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == num_programs - 1
    if is_last:
        tl.store(counter_ptr, 0)
    return is_last


@triton.jit
def take_keys(key_ptr, mask):
    """The keys that all programs left; they are zero afterwards."""
    keys = tl.load(key_ptr, mask, 0, cache_modifier=".cg")
    tl.debug_barrier()  # no thread sets to zero what another has yet to read
    tl.store(key_ptr, 0, mask)
    return keys
