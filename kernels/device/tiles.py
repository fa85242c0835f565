"""Which tile shape a linear layer uses: a table for each GPU generation, looked up by layer shape, never by row count.

Row invariance needs one shape for every number of rows (see docs/design.md), so the number of rows is no key. The
tables `tiles_sm80.json` and `tiles_sm90.json` are written by `benchmarks/tune_tiles.py` (docs/gpu.md); a layer that is
not in them gets a shape by rule.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from specengine.kernels.device.launch import IS_INTERPRETED, capability_of, ceil_div

BLOCK_M = 16  # rows of a tile: one mma.sync tile, so that one row costs what sixteen do
# Of so many rows and more, prompts, a tile has so many where it can, in so many stages at most: weights are read less
# often.
_PROMPT_TILES = ((65, 32, 3), (65, 64, 3), (512, 128, 2))
# A program of a normed layer with so many columns of these types, of up to so many elements, holds all its weights: at
# most 64 of a thread's registers (`specengine.kernels.device.linear.hold_weights`).
HELD_COLUMNS, HELD_WIDTH = 16, 1024
HELD_DTYPES = (torch.float16, torch.bfloat16, torch.int8, torch.uint8)
# In launches of so many rows and more, those that meet weights of these types are normed and rounded by a launch of
# their own, and where weights would be held, or are int8, other tiles multiply them: see `norm_first`, `round_rows`.
FEWEST_ALONE = _PROMPT_TILES[0][0]
DTYPES_ALONE = (torch.float16, torch.bfloat16, torch.int8)
INT8_BLOCK_K = 128  # rows enter an int8 product in chunks of this size, each with a scale of its own
_INT8_PARTS = 4 * INT8_BLOCK_K  # as many chunks as `multiply_parts` has parts

# Multiprocessors of an A100 and of an H200, and bytes of shared memory that each gives its programs.
_MULTIPROCESSORS = {80: 108, 90: 132}
_SHARED_BYTES = {80: 164 << 10, 90: 228 << 10}
_RESERVED_BYTES = 1 << 10  # of each program's, for the system
# Enough programs that every multiprocessor has one or two.
_WANTED_PROGRAMS = {80: 216, 90: 264}
# Of weights, in each program: what memory delivers in the time that it takes to answer, over the programs.
_BYTES_IN_FLIGHT = 24 << 10


@dataclass(frozen=True)
class Tile:
    """Columns and depth of a tile, into how many ranges of K a column tile is split, and how its kernel is compiled.

    max_registers: a thread's; None leaves it to the compiler
    """

    block_n: int
    block_k: int
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What `launch` takes of it."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "max_registers": self.max_registers,
        }


NORMED_TILE = Tile(32, 256, num_stages=2)
ROUNDED_TILE = Tile(32, INT8_BLOCK_K, num_stages=3)


def rows_of_tile(tile: Tile, num_rows: int, *, largest: int) -> tuple[int, dict[str, Any]]:
    """A tile's rows in a launch of so many, at most `largest`, and what `launch` takes of the tile.

    No bit of a row depends on it: products follow each other along K in the tile's order, and what a row is normed by
    is found in groups of rows of one size.
    """
    block_m, num_stages = BLOCK_M, tile.num_stages
    for least, size, most_stages in _PROMPT_TILES:
        if num_rows >= least and size <= largest:
            block_m, num_stages = size, min(num_stages, most_stages)
    return block_m, {**tile.options, "num_stages": num_stages}


@cache
def table(capability: int) -> dict[str, Tile]:
    """The tuned shapes of a GPU generation, by `tile_key`; whoever tunes may change it."""
    entries = json.loads(table_path(capability).read_text(encoding="utf-8"))["tiles"]
    return {key: Tile(**values) for key, values in entries.items()}


def table_path(capability: int) -> Path:
    """Where a generation's table is kept."""
    return Path(__file__).with_name(f"tiles_sm{capability}.json")


def tile_key(op: str, out_features: int, in_features: int, dtype: torch.dtype) -> str:
    """A layer's name in the tables."""
    return f"{op} {out_features}x{in_features} {str(dtype).removeprefix('torch.')}"


def choose_tile(
    op: str, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
) -> Tile:
    """The tile of a layer, `[out_features, in_features]` in `dtype`, for the family `op`: "norm_linear",
    "norm_qkv", "norm_heads" (the same where tiles hold whole heads, or with an MLP beside it), "linear_residual" (also
    two in one) or "head"."""
    if IS_INTERPRETED:
        is_held = op == "norm_qkv" and may_hold(op, in_features, dtype)
        block_n = HELD_COLUMNS if is_held else 32 if op in ("norm_qkv", "norm_heads") else 128
        return Tile(block_n, 128, split_k=2 if op == "linear_residual" else 1)
    capability = capability_of(device)
    found = table(capability).get(tile_key(op, out_features, in_features, dtype))
    return found or rule(op, out_features, in_features, dtype, capability)


def may_hold(op: str, in_features: int, dtype: torch.dtype) -> bool:
    """Whether programs of a layer with tiles of HELD_COLUMNS hold their weights."""
    return op in ("norm_qkv", "norm_linear") and dtype in HELD_DTYPES and in_features <= HELD_WIDTH


def rule(op: str, out_features: int, in_features: int, dtype: torch.dtype, capability: int) -> Tile:
    """The shape of a layer that was never tuned."""
    wanted = _WANTED_PROGRAMS[capability]
    is_exact, is_grouped = dtype == torch.float32, dtype == torch.uint8
    block_k = INT8_BLOCK_K if dtype == torch.int8 else 64 if is_exact else 128
    if op == "head":
        if is_grouped:
            block_k = 64
        if is_exact and capability == 80:
            block_k = 32  # deeper tiles spill there
        num_warps = 8 if is_grouped or (is_exact and capability == 90) else 4
        # Left to itself, ptxas keeps to 128 or 168 registers at the price of a spill. As many programs fit either way.
        max_registers = 255 if is_grouped else 200 if capability == 90 else None
        return Tile(128, block_k, num_warps=num_warps, num_stages=3, max_registers=max_registers)
    if may_hold(op, in_features, dtype):
        return Tile(HELD_COLUMNS, block_k, num_stages=1)  # there is no loop over K to be staged
    if op == "linear_residual" and dtype == torch.int8 and in_features >= _INT8_PARTS:
        # A block is a part for each warp; more than one block of rows at a time would not fit beside its likes.
        splits = min(8, ceil_div(in_features, _INT8_PARTS))
        return Tile(16, _INT8_PARTS, splits, num_stages=2)
    widths = (64, 32, 16)
    block_n = next((width for width in widths if ceil_div(out_features, width) >= wanted // 2), widths[-1])
    split_k = 1
    if op == "linear_residual":
        num_chunks = ceil_div(in_features, block_k)
        while split_k < 8 and 4 * split_k <= num_chunks:
            if ceil_div(out_features, block_n) * split_k >= wanted:
                break
            split_k *= 2
    num_stages = max(3, min(1 + _BYTES_IN_FLIGHT // (block_n * block_k * dtype.itemsize), 6))
    # As for the head: without spills, and with shared memory for as many programs as before.
    has_heads = op == "norm_heads"
    num_warps = 8 if has_heads and (is_grouped or (is_exact and capability == 80)) else 4
    max_registers = 255 if is_grouped or (is_exact and has_heads) else None
    tile = Tile(block_n, block_k, split_k, num_warps, num_stages, max_registers)
    # Fewer stages where all programs then run at once: the last of two waves leaves most of the GPU idle.
    resident = ceil_div(ceil_div(out_features, block_n) * split_k, _MULTIPROCESSORS[capability])
    shapes = [replace(tile, num_stages=stages) for stages in range(num_stages, 2, -1)]
    fit = [each for each in shapes if resident * _shared_bytes(op, each, dtype) <= _SHARED_BYTES[capability]]
    return fit[0] if fit else tile


def _shared_bytes(op: str, tile: Tile, dtype: torch.dtype) -> int:
    """Shared memory of a program: the weights and fp32 rows of the stages under way, what norms are made of, and the
    tile that is multiplied."""
    columns = tile.block_n * dtype.itemsize + BLOCK_M * 4
    if op != "linear_residual":
        columns += 2 * 4
    multiplied = 0 if op == "linear_residual" else BLOCK_M * tile.block_k * max(2, dtype.itemsize)
    return (tile.num_stages - 1) * tile.block_k * columns + multiplied + _RESERVED_BYTES
