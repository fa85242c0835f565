"""Finds the tile shape of every linear layer of the usual models on the GPU at hand, and writes it to the table that
the kernels use.

    python benchmarks/tune_tiles.py                          # all sizes and types: about half an hour
    python benchmarks/tune_tiles.py --widths 1024 --dtypes float16
    python benchmarks/tune_tiles.py --by-rule 80 90          # without a GPU: what the rule says, to start from

A layer gets one shape for every number of rows, so a candidate is judged by the geometric mean of one row and nine.
Entries that are not measured in a run stay as they were.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_timing import Cuda, Device

from specengine.kernels.device import tiles
from specengine.kernels.device.tiles import Tile
from specengine.kernels.types.packed import Norm, PackedLinear
from specengine.ops.backend import Backend
from specengine.ops.load import load_backend

WIDTHS = (
    768,
    1024,
    1280,
    1600,
    2048,
    2560,
)  # gpt2, -medium, -large, -xl; opt-1.3b and pythia-1.4b; their next sizes
VOCABULARIES = (50257, 50272, 50304)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}
ROWS = (1, 9)
REPLAYS, CALLS = 7, 32
HEAD_DIM = 64


@dataclass(frozen=True)
class Layer:
    """A line of the table."""

    op: str
    out_features: int
    in_features: int
    dtype: torch.dtype

    @property
    def key(self) -> str:
        return tiles.tile_key(self.op, self.out_features, self.in_features, self.dtype)


def layers_of(width: int, dtype: torch.dtype) -> Iterator[Layer]:
    """What a GPT-2 or OPT, and a GPT-NeoX of this width multiply with."""
    yield Layer("norm_qkv", 3 * width, width, dtype)
    yield Layer("norm_heads", 7 * width, width, dtype)  # the MLP beside it
    yield Layer("norm_linear", 4 * width, width, dtype)
    for in_features in (width, 4 * width, 5 * width):
        yield Layer("linear_residual", width, in_features, dtype)
    for vocab_size in VOCABULARIES:
        yield Layer("head", vocab_size, width, dtype)


def candidates(layer: Layer, capability: int) -> list[Tile]:
    """The rule's shape first, then its neighbours."""
    first = tiles.rule(layer.op, layer.out_features, layer.in_features, layer.dtype, capability)
    is_head = layer.op == "head"  # its noise and statistics come in groups of 128
    is_held = tiles.may_hold(layer.op, layer.in_features, layer.dtype)  # by the rule; others go through K
    widths = (128,) if is_head else (32, 64) if is_held else (16, 32, 64)
    depths = (tiles.INT8_BLOCK_K,) if layer.dtype == torch.int8 else (64, 128)
    splits = (1, 2, 4, 8) if layer.op == "linear_residual" else (1,)
    found = [
        Tile(block_n, block_k, split_k, num_warps, num_stages)
        for block_n in widths
        for block_k in depths
        for split_k in splits
        for num_warps in (4, 8)
        for num_stages in (3, 4, 6)
        if split_k * block_k <= layer.in_features and num_warps * 4 <= block_n * 2
    ]
    return [first, *(tile for tile in found if tile != first)]


def build_call(layer: Layer, num_rows: int, ops: Backend, device: Device) -> Callable[[int], Any]:
    """The op on copies of the layer that outgrow the cache."""
    num_bytes = layer.out_features * layer.in_features * layer.dtype.itemsize
    copies = [
        random_linear(layer, device.device) for _ in range(max(2, 2 * device.l2_bytes // num_bytes + 1))
    ]
    x = torch.randn(num_rows, layer.in_features, device=device.device)
    norm = Norm(torch.ones_like(x[0]), torch.zeros_like(x[0]), 1e-5)
    residual = torch.zeros(num_rows, layer.out_features, device=device.device)
    num_heads = layer.out_features // HEAD_DIM // 3
    cache = torch.zeros(2, 4, num_heads, 16, HEAD_DIM, device=device.device, dtype=torch.float16)
    positions = torch.zeros(num_rows, dtype=torch.int32, device=device.device)
    rotary = torch.zeros(1, 2, HEAD_DIM // 2, device=device.device) if layer.op == "norm_heads" else None

    def call(turn: int) -> Any:
        weight = copies[turn % len(copies)]
        if layer.op in ("norm_qkv", "norm_heads"):
            return ops.norm_qkv(x, norm, weight, positions, positions.long(), cache, rotary)
        if layer.op == "norm_linear":
            return ops.norm_linear(x, norm, weight, "gelu_tanh")
        if layer.op == "linear_residual":
            return ops.linear_residual(x, weight, residual)
        return ops.head(x, norm, weight, layer.out_features)

    return call


def random_linear(layer: Layer, device: torch.device) -> PackedLinear:
    shape = (layer.out_features, layer.in_features)
    if layer.dtype == torch.int8:
        weight = torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
        scale = torch.full((layer.out_features,), 1e-3, device=device)
        return PackedLinear(weight, None, layer.in_features, layer.out_features, scale)
    weight = torch.randn(shape, device=device).to(layer.dtype)
    return PackedLinear(weight, None, layer.in_features, layer.out_features)


def measure(call: Callable[[int], Any], device: Device) -> float:
    """Seconds of a call from a cold cache, or infinity where the shape does not fit the GPU."""
    try:
        device.cost(call)
        replay = device.capture(lambda: [call(turn) for turn in range(CALLS)])
    except Exception as error:  # Triton's out-of-resources errors have no common class
        print(f"    left out: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
        return math.inf
    return statistics.median(device.seconds(replay) for _ in range(REPLAYS)) / CALLS


def tune(layer: Layer, capability: int, ops: Backend, device: Device) -> Tile:
    """The fastest candidate; the rule's, unless another is 2 % faster."""
    calls = [build_call(layer, num_rows, ops, device) for num_rows in ROWS]
    best, best_seconds = None, math.inf
    for tile in candidates(layer, capability):
        tiles.table(capability)[layer.key] = tile
        seconds = math.prod(measure(call, device) for call in calls) ** (1 / len(calls))
        if best is None or seconds < 0.98 * best_seconds:
            best, best_seconds = tile, seconds
    assert best is not None, "there is always the rule's"
    tiles.table(capability)[layer.key] = best
    num_bytes = layer.out_features * layer.in_features * layer.dtype.itemsize
    print(f"{layer.key:48} {best_seconds * 1e6:8.1f} us {num_bytes / best_seconds / 1e9:7.0f} GB/s  {best}")
    return best


def write_table(capability: int, source: str) -> Path:
    path = tiles.table_path(capability)
    entries = {
        key: {name: value for name, value in asdict(tile).items() if value is not None}
        for key, tile in sorted(tiles.table(capability).items())
    }
    lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(values)}" for key, values in entries.items())
    text = f'{{\n  "source": {json.dumps(source)},\n  "tiles": {{\n{lines}\n  }}\n}}\n'
    path.write_text(text, encoding="utf-8")
    return path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--by-rule", type=int, nargs="+", choices=(80, 90), default=[], metavar="CAPABILITY")
    given = parser.parse_args(arguments)
    chosen = [
        layer for width in given.widths for name in given.dtypes for layer in layers_of(width, DTYPES[name])
    ]
    for capability in given.by_rule:
        entries = tiles.table(capability)
        for layer in chosen:
            entries[layer.key] = tiles.rule(
                layer.op, layer.out_features, layer.in_features, layer.dtype, capability
            )
        print("wrote", write_table(capability, "by rule, not measured"))
    if given.by_rule:
        return
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device; --by-rule writes the table that the rule gives")
    device = Cuda()
    ops = load_backend("triton", device.device)
    capability = tiles.capability_of(device.device)
    for layer in chosen:
        tune(layer, capability, ops, device)
        write_table(capability, f"measured on {device.name}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
