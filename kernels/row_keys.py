"""What the draws of each row depend on, in one launch: a row's owner is the number of sequences that end before it.

Each program serves some rows and looks at the ends of all sequences; see `specengine.kernels.reference.row_keys`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specengine.kernels.device.dependent import wait
from specengine.kernels.device.launch import ceil_div, launch
from specengine.kernels.device.linear import count_rows
from specengine.kernels.device.race import check_columns, check_small
from specengine.kernels.types.rows import SamplingRows

# Pairs of a row and a sequence that a program compares, and the most rows of one.
MAX_PAIRS = 1024
MAX_BLOCK = 32


@triton.jit
def load_each(ptrs, at, mask):
    """Elements of several vectors, as a tuple: all are asked for before one is stored, which a load would wait for."""
    values = ()
    for i in tl.static_range(len(ptrs)):
        values += (tl.load(ptrs[i] + at, mask),)  # type: ignore[assignment]
    return values


@triton.jit
def store_each(ptrs, values, at, mask):
    """What `load_each` gave, to several vectors."""
    for i in tl.static_range(len(ptrs)):
        tl.store(ptrs[i] + at, values[i], mask)


@triton.jit(do_not_specialize=["q_start_ptr", "num_sequences", "num_tokens", "num_rows"])
def spec_row_keys(
    sequence_ptrs,
    q_start_ptr,
    position_ptr,
    logit_row_ptr,
    row_ptrs,
    row_position_ptr,
    num_sequences,
    num_tokens,
    num_rows,
    num_rows_ptr,
    BLOCK_B: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    first, end = tl.program_id(0) * BLOCK, count_rows(num_rows, num_rows_ptr)
    if first >= end:
        return
    row = first + tl.arange(0, BLOCK)
    is_row = row < end
    token = tl.load(logit_row_ptr + row, is_row, 0)
    sequences = tl.arange(0, BLOCK_B)
    ends = tl.load(q_start_ptr + 1 + sequences, sequences < num_sequences, 2**31 - 1)
    owner = tl.sum((ends[None, :] <= token[:, None]).to(tl.int32), axis=1)
    # Of a batch without tokens, rows that nobody uses may be of nobody.
    owner = tl.minimum(owner, num_sequences - 1)
    token = tl.minimum(tl.maximum(token, 0), num_tokens - 1)
    position = tl.load(position_ptr + token, is_row)
    keys = load_each(sequence_ptrs, owner, is_row)
    store_each(row_ptrs, keys, row, is_row)
    tl.store(row_position_ptr + row, position + 1, is_row)


def row_keys(
    rows: SamplingRows,
    q_start: Tensor,
    positions: Tensor,
    logit_rows: Tensor,
    *,
    num_rows: Tensor | None = None,
) -> tuple[SamplingRows, Tensor]:
    """See `specengine.kernels.reference.row_keys`.

    logit_rows outside the tokens are taken as the nearest that exist.
    num_rows: `[1]` int32 on the device: rows from there on are padding, and their keys are left alone
    """
    count, num_logit_rows, tokens = q_start.numel() - 1, logit_rows.numel(), positions.numel()
    if num_logit_rows and not count:
        raise ValueError(f"rows: no sequences for {num_logit_rows} logit_rows")
    if num_logit_rows and not tokens:
        raise ValueError(f"positions: no tokens for {num_logit_rows} logit_rows")
    block_b = triton.next_power_of_2(max(count, 1))
    block = min(MAX_BLOCK, max(1, MAX_PAIRS // block_b), triton.next_power_of_2(max(num_logit_rows, 1)))
    given = check_columns(rows, count)
    keys = SamplingRows(*(each.new_empty(num_logit_rows) for each in given))
    decided = positions.new_empty(num_logit_rows)
    launch(
        spec_row_keys,
        (ceil_div(num_logit_rows, block),),
        given,
        check_small("q_start", q_start, (count + 1,), torch.int32),
        check_small("positions", positions, (tokens,), torch.int32),
        check_small("logit_rows", logit_rows, (num_logit_rows,), torch.int64),
        tuple(keys),
        decided,
        count,
        tokens,
        num_logit_rows,
        num_rows,
        BLOCK_B=block_b,
        BLOCK=block,
        num_warps=4,
    )
    return keys, decided
