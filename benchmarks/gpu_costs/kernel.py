"""What one launch costs by the model, from the machine code of its kernel, its grid and the bytes that it reads."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from aot import build, specialise

from gpu_costs import machine
from gpu_costs.sass import Block, Instruction, longest_way, loops_on, parse, unroll
from gpu_costs.schedule import load_levels, time_path
from specengine.kernels.device.launch import Launch, ceil_div
from specengine.kernels.device.linear import ROWS_AT_ONCE
from specengine.kernels.paged_attention import PARTS_AT_ONCE

CAPABILITY = 90
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_PRODUCTS = ("HMMA", "IMMA")
_COPY, _LOAD = "LDGSTS.E.BYPASS.128", "LDG.E.128"


@dataclass(frozen=True)
class Code:
    """A compiled kernel: its blocks, the way through them, and what a program takes."""

    blocks: list[Block]
    way: list[int]
    registers: int
    shared_bytes: int


@dataclass(frozen=True)
class KernelCost:
    """The model's account of one launch.

    to_first_copy:   instructions before a program asks for its first weights (attention: keys), None without such
    levels:          loads from global memory that must have come back, one after the other, before that; without
                     weights, before the last instruction
    barriers, shuffles: on the whole way
    a_block:         barriers and shuffles of one block of K, None where the loop was unrolled
    programs:        that do something
    resident, waves: programs of a multiprocessor at a time, and how often all multiprocessors are filled
    is_early:        they fit beside those of the kernel before: what they do before their wait costs nothing
    num_bytes:       of weights, or of keys and values, that the grid reads
    path_us:         of one program alone on its multiprocessor; floor_us: of the bytes
    us:              of the launch
    """

    name: str
    grid: tuple[int, ...]
    num_stages: int
    instructions: int
    to_first_copy: int | None
    levels: int
    barriers: int
    shuffles: int
    a_block: tuple[int, int] | None
    registers: int
    shared_bytes: int
    programs: int
    resident: int
    waves: int
    is_early: bool
    num_bytes: int
    first_copy_us: float
    path_us: float
    floor_us: float
    us: float

    @property
    def program_bytes(self) -> int:
        """Bytes that one program reads."""
        return self.num_bytes // max(1, self.programs)


@dataclass(frozen=True)
class Load:
    """What there is to do: rows of the forward, and tokens in the cache of the one sequence."""

    rows: int
    context: int = 512


def costs(launches: Iterable[Launch], load: Load) -> list[KernelCost]:
    """The model's account of launches that follow each other."""
    found: list[KernelCost] = []
    before = None
    for launch in launches:
        account, before = _cost(launch, load, before)
        found.append(account)
    return found


def _cost(launch: Launch, load: Load, before: machine.Share | None) -> tuple[KernelCost, machine.Share]:
    """The account of a launch, and what its programs take of a multiprocessor.

    before: what those of the kernel before take
    """
    key = _Key(launch)
    code = _code_of(key)
    programs = _programs(launch, load)
    fit = machine.programs_per_sm(launch.num_warps, code.registers, code.shared_bytes)
    resident = min(fit, ceil_div(programs, machine.NUM_SMS))
    waves = ceil_div(programs, machine.NUM_SMS * resident)
    share = machine.share_of(resident, launch.num_warps, code.registers, code.shared_bytes)
    is_early = before is None or (share + before).fits
    way = _way_of(key, load, is_early)
    num_bytes = _bytes_read(launch, load)
    floor_us = num_bytes / machine.BANDWIDTH * 1e6
    account = KernelCost(
        name=launch.name,
        grid=launch.grid,
        num_stages=launch.num_stages,
        instructions=way.instructions,
        to_first_copy=way.to_first_copy,
        levels=way.levels,
        barriers=way.barriers,
        shuffles=way.shuffles,
        a_block=_in_a_block(code),
        registers=code.registers,
        shared_bytes=code.shared_bytes,
        programs=programs,
        resident=resident,
        waves=waves,
        is_early=is_early,
        num_bytes=num_bytes,
        first_copy_us=way.first_copy_us,
        path_us=way.path_us,
        floor_us=floor_us,
        us=machine.LAUNCH_US + max(waves * max(way.path_us, resident * way.busy_us), floor_us),
    )
    return account, share


@dataclass(frozen=True)
class _Way:
    """What is counted on a program's way, and its times alone on a multiprocessor."""

    instructions: int
    to_first_copy: int | None
    levels: int
    barriers: int
    shuffles: int
    first_copy_us: float
    path_us: float
    busy_us: float


class _Key:
    """A launch by what it is compiled for: equal ones share their code."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        options = (launch.num_warps, launch.num_stages, launch.max_registers)
        self._text = repr((launch.name, *specialise(launch), options))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


@cache
def _code_of(key: _Key) -> Code:
    """Compiled once, and from Triton's cache where it was compiled before."""
    compiled = build(key.launch, CAPABILITY)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = _run("nvdisasm", "-c", file.name)
        usage = _run("cuobjdump", "-res-usage", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    blocks = parse(text)
    return Code(blocks, longest_way(blocks), int(registers[1]), compiled.metadata.shared)


@cache
def _way_of(key: _Key, load: Load, is_early: bool) -> _Way:
    code = _code_of(key)
    instructions = unroll(code.way, code.blocks, lambda body: _trips(body, key.launch, load))
    timed = time_path(instructions, key.launch.num_warps, is_early=is_early)
    levels = load_levels(instructions)
    first = _first_copy(instructions, levels)
    return _Way(
        instructions=len(instructions),
        to_first_copy=first,
        levels=max(levels) if first is None else levels[first],
        barriers=_count(instructions, "BAR"),
        shuffles=_count(instructions, "SHFL", "REDUX"),
        first_copy_us=0.0 if first is None else _us(timed.issued[first]),
        path_us=_us(timed.end),
        busy_us=_us(timed.busy),
    )


def _first_copy(instructions: list[Instruction], levels: list[int]) -> int | None:
    """Where the first weights are asked for; without copies, as in attention, the vectors that come after most loads
    before the first product: keys."""
    copy = next((at for at, each in enumerate(instructions) if each.opcode.startswith(_COPY)), None)
    product = next((at for at, each in enumerate(instructions) if each.opcode.startswith(_PRODUCTS)), 0)
    vectors = [at for at in range(product) if instructions[at].opcode.startswith(_LOAD)]
    return max(vectors, key=lambda at: levels[at], default=None) if copy is None else copy


def _run(tool: str, *arguments: str) -> str:
    command = [str(_TOOLS / tool), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _us(cycles: float) -> float:
    return cycles / machine.CLOCK_GHZ / 1e3


def _count(instructions: list[Instruction], *opcodes: str) -> int:
    return sum(each.opcode.startswith(opcodes) for each in instructions)


def _in_a_block(code: Code) -> tuple[int, int] | None:
    """Barriers and shuffles of the loop over K: the innermost one that multiplies."""
    for first, last in loops_on(code.way, code.blocks):
        body = [each for place in code.way[first : last + 1] for each in code.blocks[place].instructions]
        if _count(body, *_PRODUCTS):
            return _count(body, "BAR"), _count(body, "SHFL", "REDUX")
    return None


def _trips(body: list[Block], launch: Launch, load: Load) -> int:
    """How often a loop runs: over blocks of K, or over groups of rows whose moments are found or that held weights
    multiply, or over parts of a softmax; any other once."""
    constants = launch.arguments
    if constants.get("HELD") and constants["hidden_ptr"].dtype == torch.float32:
        return ceil_div(min(load.rows, constants["BLOCK_M"]), ROWS_AT_ONCE.value)
    if any(block.has(*_PRODUCTS) for block in body):
        if "BLOCK_K" not in constants:
            return 1  # attention: a tile of a split
        depth = constants.get("HELD") or constants["WIDTH"]
        return ceil_div(ceil_div(depth, constants["BLOCK_K"]), constants.get("SPLIT_K", 1))
    if "SPLIT" in constants and any(block.has("MUFU") for block in body):
        return ceil_div(ceil_div(load.context, constants["SPLIT"]), PARTS_AT_ONCE.value)
    if "CHUNK" in constants and any(block.has("SHFL") for block in body):
        return ceil_div(min(load.rows, constants["BLOCK_M"]), ROWS_AT_ONCE.value)
    return 1


def _programs(launch: Launch, load: Load) -> int:
    """Programs that do something: others are padding and return at once."""
    total = int(torch.Size(launch.grid).numel())
    if launch.name == "spec_paged_attention":
        return launch.grid[1] * ceil_div(load.context, launch.arguments["SPLIT"])
    return total


def _bytes_read(launch: Launch, load: Load) -> int:
    """Of weights; of keys and values in attention; of logits where a kernel reads those."""
    arguments = launch.arguments
    if launch.name == "spec_paged_attention":
        row = arguments["NUM_KV_HEADS"] * arguments["HEAD_DIM"] * arguments["key_ptr"].element_size()
        return int(2 * load.context * row)
    weights = (arguments.get(name) for name in ("weight_ptr", "mlp_weight_ptr", "logits_ptr"))
    return sum(_size(tensor) for tensor in weights if tensor is not None)


def _size(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())
