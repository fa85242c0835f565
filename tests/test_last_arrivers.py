"""Kernels in which the last program to arrive does the rest: in whatever order programs arrive, the bits are the same.

Nothing else looks for races between programs: racecheck sees those within one. In the interpreter programs run one by
one, here in many orders; on a GPU (`-m gpu`) each kernel runs thousands of times, beside another stream's work.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE, random_rows
from test_dependent_launch import BLOCK_SIZE, EveryOp
from torch import Tensor
from triton.runtime.jit import KernelInterface

import specengine.kernels
from specengine.kernels import match_verify
from specengine.kernels.device import launch as launching

pytestmark = pytest.mark.triton

IS_INTERPRETED = launching.IS_INTERPRETED
NUM_ORDERS, NUM_REPEATS, CHECK_EVERY = 2, 4000, 200
LARGEST_BYTES = 16 << 20
CONTEXT = 300


@dataclass(frozen=True)
class Launched:
    """A launch that can be done again: what it reads nobody changes, and what it writes is written whole."""

    name: str
    num_programs: int
    again: Callable[[], Any]
    tensors: list[Tensor]

    def bits(self) -> list[Tensor]:
        """Everything it may have written, its counters included: which must be back at zero."""
        return [bits(tensor).clone() for tensor in self.tensors]


def bits(tensor: Tensor) -> Tensor:
    """NaN equals itself."""
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def last_arrivers() -> set[str]:
    """Kernels that count who has arrived: those with counters from the workspace, their own or `launch_judge`'s."""
    folder = Path(specengine.kernels.__file__).parent
    texts = {path.stem: path.read_text("utf-8") for path in folder.glob("*.py")}
    return {f"spec_{name}" for name, text in texts.items() if "zeroed(" in text or "launch_judge(" in text}


def run_ops() -> None:
    """Every op with such a kernel, at sizes with several programs to wait for."""
    width, num_heads, vocab_size = (32, 2, 8200) if IS_INTERPRETED else (1024, 16, 50257)
    dtype = torch.float32 if IS_INTERPRETED else torch.float16
    case = EveryOp(dtype, width=width, num_heads=num_heads, vocab_size=vocab_size, num_layers=1)
    ops, linear = case.ops, case.linear
    hidden, expanded = random_rows(19, width).to(DEVICE), random_rows(19, 4 * width).to(DEVICE)
    hidden = ops.linear_residual(expanded, linear.down, hidden)
    hidden = ops.parallel_linear_residual(hidden, linear.output, expanded, linear.down, hidden)
    positions = torch.arange(7, 13, dtype=torch.int32, device=DEVICE)
    case.judge(hidden[:6].contiguous(), positions, torch.zeros(2, 32, dtype=torch.int32, device=DEVICE))
    num_blocks = -(-CONTEXT // BLOCK_SIZE)
    shape = (2, num_blocks, num_heads, BLOCK_SIZE, width // num_heads)
    kv_cache = random_rows(1, torch.Size(shape).numel()).to(DEVICE, case.kv_dtype).view(shape)
    table = torch.arange(num_blocks, dtype=torch.int32, device=DEVICE)[None]
    lengths = [torch.tensor(each, dtype=torch.int32, device=DEVICE) for each in ([0], [0, 3], [CONTEXT])]
    query = random_rows(3, width, seed=9).to(DEVICE).view(3, num_heads, -1)
    ops.paged_attention(query, kv_cache, table, *lengths)


@pytest.fixture(scope="module")
def launched() -> dict[str, Launched]:
    """The first launch of each of these kernels, by name."""
    found: dict[str, Launched] = {}
    wanted, launcher = last_arrivers(), KernelInterface.__getitem__

    def note(self: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
        run = launcher(self, grid)
        name = self.fn.__name__

        def launch(*arguments: Any, **options: Any) -> Any:
            if name in wanted and name not in found:
                tensors = [each for each in arguments if isinstance(each, Tensor) and each.numel()]
                small = [each for each in tensors if each.numel() * each.element_size() <= LARGEST_BYTES]
                programs = torch.Size(grid).numel()
                found[name] = Launched(name, programs, lambda: run(*arguments, **options), small)
            return run(*arguments, **options)

        return launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KernelInterface, "__getitem__", note)
        run_ops()
    return found


def test_every_such_kernel_is_here(launched: dict[str, Launched]) -> None:
    assert launched.keys() == last_arrivers()
    assert len(launched) >= 8
    assert all(each.num_programs > 1 for each in launched.values())


class Orders:
    """Runs the programs of interpreted launches in an order of its own."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import InterpreterBuilder

        self.seed = 0
        set_dim, set_idx = InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx

        def begin(builder: Any, *grid: int) -> None:
            self.grid, self.place = grid, 0
            self.order = list(range(torch.Size(grid).numel()))
            if self.seed < 0:
                self.order.reverse()
            elif self.seed > 0:
                random.Random(self.seed).shuffle(self.order)
            set_dim(builder, *grid)

        def next_program(builder: Any, x: int, y: int, z: int) -> None:
            index = self.order[(x * self.grid[1] + y) * self.grid[2] + z]
            x, rest = divmod(index, self.grid[1] * self.grid[2])
            set_idx(builder, x, *divmod(rest, self.grid[2]))

        patch.setattr(InterpreterBuilder, "set_grid_dim", begin)
        patch.setattr(InterpreterBuilder, "set_grid_idx", next_program)


def check_orders(each: Launched, orders: Orders) -> None:
    each.again()
    first = each.bits()
    for seed in range(-1, NUM_ORDERS):
        orders.seed = seed
        each.again()
        for place, (now, then) in enumerate(zip(each.bits(), first, strict=True)):
            assert torch.equal(now, then), f"{each.name}: order {seed}, tensor {place}"


@pytest.mark.skipif(not IS_INTERPRETED, reason="a GPU has orders of its own")
@pytest.mark.parametrize("name", sorted(last_arrivers()))
def test_any_order_of_programs_gives_the_same_bits(
    launched: dict[str, Launched], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    check_orders(launched[name], Orders(monkeypatch))


@pytest.mark.skipif(not IS_INTERPRETED, reason="replaces a device function in the interpreter")
def test_a_first_arriver_that_does_the_rest_is_noticed(
    launched: dict[str, Launched], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first that finds all but one of them there: the last one's key is missing, or left for the next launch."""
    is_last_of = match_verify.is_last_of
    early = lambda num_programs, counter_ptr: is_last_of(num_programs - 1, counter_ptr)  # noqa: E731
    monkeypatch.setattr(match_verify, "is_last_of", early)
    with pytest.raises(AssertionError, match="order"):
        check_orders(launched["spec_match_verify"], Orders(monkeypatch))


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(last_arrivers()))
def test_thousands_of_launches_give_the_same_bits(launched: dict[str, Launched], name: str) -> None:
    each, beside = launched[name], torch.cuda.Stream()
    noise = torch.ones(1 << 22, device=DEVICE)
    each.again()
    first = each.bits()
    differs = torch.zeros((), dtype=torch.bool, device=DEVICE)
    beside.wait_stream(torch.cuda.current_stream())
    sizes = random.Random(name).choices(range(1, noise.numel()), k=NUM_REPEATS)
    for repeat, size in enumerate(sizes):
        if repeat % 3 == 0:
            with torch.cuda.stream(beside):
                noise[:size].mul_(1.0)
        each.again()
        for tensor, then in zip(each.tensors, first, strict=True):
            differs |= (bits(tensor) != then).any()
        if repeat % CHECK_EVERY == 0:
            assert not differs, f"{name}: one of the launches up to {repeat}"
    assert not differs
