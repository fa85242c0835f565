"""hidden = token row + position row, in fp32: one program a token. See `specengine.kernels.reference.embed`.

An id or position outside its table reads the nearest row: only the host can refuse it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specengine.kernels.device.dependent import wait
from specengine.kernels.device.launch import launch
from specengine.kernels.device.linear import count_rows


@triton.jit(do_not_specialize=["num_rows"])
def spec_embed(
    token_ids_ptr,
    positions_ptr,
    token_table_ptr,
    position_table_ptr,
    out_ptr,
    num_rows,
    num_rows_ptr,
    NUM_TOKENS: tl.constexpr,
    NUM_POSITIONS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait(PDL)
    row = tl.program_id(0)
    if row >= count_rows(num_rows, num_rows_ptr):
        return
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    token = tl.minimum(tl.maximum(tl.load(token_ids_ptr + row), 0), NUM_TOKENS - 1).to(tl.int64)
    hidden = tl.load(token_table_ptr + token * WIDTH + columns, mask).to(tl.float32)
    if position_table_ptr is not None:
        position = tl.minimum(tl.maximum(tl.load(positions_ptr + row), 0), NUM_POSITIONS - 1).to(tl.int64)
        hidden += tl.load(position_table_ptr + position * WIDTH + columns, mask).to(tl.float32)
    tl.store(out_ptr + row.to(tl.int64) * WIDTH + columns, hidden, mask)


def check_tables(token_table: Tensor, position_table: Tensor | None) -> None:
    """Raises `ValueError` unless both are contiguous tables of one width."""
    for name, table in (("token_table", token_table), ("position_table", position_table)):
        if table is not None and (table.dim() != 2 or table.shape[1] != token_table.shape[1]):
            raise ValueError(f"{name}: expected [rows, {token_table.shape[-1]}], got {list(table.shape)}")
        if table is not None and not table.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous table")


def embed(
    token_ids: Tensor,
    positions: Tensor,
    token_table: Tensor,
    position_table: Tensor | None,
    *,
    num_rows: Tensor | None = None,
) -> Tensor:
    """See `specengine.kernels.reference.embed`.

    num_rows: `[1]` int32 on the device: rows from there on are padding and are left alone
    """
    for name, ids in (("token_ids", token_ids), ("positions", positions)):
        if (
            ids.shape != token_ids.shape
            or ids.dim() != 1
            or ids.dtype != torch.int32
            or not ids.is_contiguous()
        ):
            raise ValueError(
                f"{name}: expected contiguous [T] torch.int32, got {list(ids.shape)} {ids.dtype}"
            )
    check_tables(token_table, position_table)
    num_tokens, width = token_table.shape
    out = torch.empty(token_ids.numel(), width, device=token_ids.device)
    launch(
        spec_embed,
        (token_ids.numel(),),
        token_ids,
        positions,
        token_table,
        position_table,
        out,
        token_ids.numel(),
        num_rows,
        NUM_TOKENS=num_tokens,
        NUM_POSITIONS=1 if position_table is None else position_table.shape[0],
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        num_warps=4,
    )
    return out
