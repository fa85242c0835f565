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
from specengine.kernels.device.race import check_small

# Pairs of a row and a sequence that a program compares, and the most rows of one.
MAX_PAIRS = 2048
MAX_BLOCK = 32


@triton.jit(do_not_specialize=["q_start_ptr", "num_sequences", "num_tokens", "num_rows"])
def spec_row_keys(
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    q_start_ptr,
    position_ptr,
    logit_row_ptr,
    row_temperature_ptr,
    row_top_k_ptr,
    row_top_p_ptr,
    row_min_p_ptr,
    row_seed_ptr,
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
    tl.store(row_temperature_ptr + row, tl.load(temperature_ptr + owner, is_row), is_row)
    tl.store(row_top_k_ptr + row, tl.load(top_k_ptr + owner, is_row), is_row)
    tl.store(row_top_p_ptr + row, tl.load(top_p_ptr + owner, is_row), is_row)
    tl.store(row_min_p_ptr + row, tl.load(min_p_ptr + owner, is_row), is_row)
    tl.store(row_seed_ptr + row, tl.load(seed_ptr + owner, is_row), is_row)
    tl.store(row_position_ptr + row, tl.load(position_ptr + token, is_row) + 1, is_row)


def row_keys(
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    q_start: Tensor,
    positions: Tensor,
    logit_rows: Tensor,
    *,
    num_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `specengine.kernels.reference.row_keys`.

    logit_rows outside the tokens are taken as the nearest that exist.
    num_rows: `[1]` int32 on the device: rows from there on are padding, and their keys are left alone
    """
    count, rows, tokens = temperature.numel(), logit_rows.numel(), positions.numel()
    if rows and not count:
        raise ValueError(f"temperature: no sequences for {rows} logit_rows")
    if rows and not tokens:
        raise ValueError(f"positions: no tokens for {rows} logit_rows")
    block_b = triton.next_power_of_2(max(count, 1))
    block = min(MAX_BLOCK, max(1, MAX_PAIRS // block_b), triton.next_power_of_2(max(rows, 1)))
    given = (
        check_small("temperature", temperature, (count,), torch.float32),
        check_small("top_k", top_k, (count,), torch.int32),
        check_small("top_p", top_p, (count,), torch.float32),
        check_small("min_p", min_p, (count,), torch.float32),
        check_small("seeds", seeds, (count,), torch.int64),
    )
    row_temperature, row_top_k, row_top_p, row_min_p, row_seeds = (each.new_empty(rows) for each in given)
    row_positions = positions.new_empty(rows)
    keys = row_temperature, row_top_k, row_top_p, row_min_p, row_seeds, row_positions
    launch(
        spec_row_keys,
        (ceil_div(rows, block),),
        *given,
        check_small("q_start", q_start, (count + 1,), torch.int32),
        check_small("positions", positions, (tokens,), torch.int32),
        check_small("logit_rows", logit_rows, (rows,), torch.int64),
        *keys,
        count,
        tokens,
        rows,
        num_rows,
        BLOCK_B=block_b,
        BLOCK=block,
        num_warps=4,
    )
    return keys
