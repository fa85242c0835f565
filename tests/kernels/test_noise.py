"""Triton's noise: Random123's known answers, the uint32s of `specengine.rng`, Gumbel's tails, the order of races."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import DEVICE, random_seeds
from torch import Tensor

from specengine import rng
from specengine.kernels.device.launch import launch
from specengine.kernels.device.noise import (
    gumbel,
    key_score,
    key_token,
    philox_lanes,
    race_key,
    vocabulary_counter,
)
from specengine.kernels.device.race import first_lane, stack_lanes, stack_tokens

pytestmark = pytest.mark.triton

# Counter, key, result (Random123 1.14, kat_vectors, philox4x32-10).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@triton.jit
def write_philox(counter_ptr, position_ptr, base_ptr, seed_ptr, out_ptr, STREAM: tl.constexpr):
    counter = tl.load(counter_ptr) + tl.arange(0, 1)
    position, base, seed = tl.load(position_ptr), tl.load(base_ptr), tl.load(seed_ptr)
    lane_0, lane_1, lane_2, lane_3 = philox_lanes(counter, position, STREAM, base, seed)
    at = tl.arange(0, 1)
    tl.store(out_ptr + at, lane_0.to(tl.int64))
    tl.store(out_ptr + 1 + at, lane_1.to(tl.int64))
    tl.store(out_ptr + 2 + at, lane_2.to(tl.int64))
    tl.store(out_ptr + 3 + at, lane_3.to(tl.int64))


@triton.jit
def write_vocabulary_bits(
    position_ptr, base_ptr, seed_ptr, out_ptr, STREAM: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0)
    lane = first_lane(0, WIDTH)
    position, base, seed = tl.load(position_ptr + row), tl.load(base_ptr + row), tl.load(seed_ptr + row)
    bits_0, bits_1, bits_2, bits_3 = philox_lanes(vocabulary_counter(lane), position, STREAM, base, seed)
    bits = stack_lanes(bits_0, bits_1, bits_2, bits_3)
    tl.store(out_ptr + row * WIDTH + stack_tokens(lane), bits.to(tl.int64))


@triton.jit
def write_gumbel(bits_ptr, out_ptr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(out_ptr + at, gumbel(tl.load(bits_ptr + at).to(tl.uint32)))


@triton.jit
def write_keys(score_ptr, token_ptr, key_ptr, score_out_ptr, token_out_ptr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    key = race_key(tl.load(score_ptr + at), tl.load(token_ptr + at))
    tl.store(key_ptr + at, key)
    tl.store(score_out_ptr + at, key_score(key))
    tl.store(token_out_ptr + at, key_token(key))


def signed(word: int, bits: int = 32) -> int:
    """The signed integer with the bits of an unsigned one."""
    return word - (word >> (bits - 1) << bits)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple, key: tuple, expected: tuple) -> None:
    c0, position, stream, base = map(signed, counter)
    words = [torch.tensor([word], dtype=torch.int32, device=DEVICE) for word in (c0, position, base)]
    seed = torch.tensor([signed(key[0] | key[1] << 32, 64)], device=DEVICE)
    out = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    launch(write_philox, (1,), *words, seed, out, STREAM=stream, num_warps=1)
    assert tuple(out.tolist()) == expected


def check_vocabulary_bits(stream: int, fault: str = "") -> None:
    """The high bits of seeds, positions and bases are set in half of the rows."""
    generator = torch.Generator().manual_seed(stream)
    positions, bases = torch.randint(-(2**31), 2**31, (2, 12), generator=generator, dtype=torch.int64).int()
    seeds, width = random_seeds(12, stream), 512
    expected = rng.vocabulary_bits(seeds, positions, stream, bases, width)
    if fault == "position":
        positions = positions + 1
    if fault == "base":
        bases = torch.zeros_like(bases)
    if fault == "stream":
        stream += 1
    if fault == "seed":
        seeds = seeds & 0xFFFFFFFF
    out = torch.zeros(12, width, dtype=torch.int64, device=DEVICE)
    given = (positions.to(DEVICE), bases.to(DEVICE), seeds.to(DEVICE))
    launch(write_vocabulary_bits, (12,), *given, out, STREAM=stream, WIDTH=width, num_warps=1)
    assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("stream", [rng.STREAM_TARGET, rng.STREAM_DRAFT, rng.STREAM_ACCEPT])
def test_vocabulary_bits_are_those_of_rng(stream: int) -> None:
    check_vocabulary_bits(stream)


@pytest.mark.parametrize("fault", ["position", "base", "stream", "seed"])
def test_a_planted_fault_is_noticed(fault: str) -> None:
    with pytest.raises(AssertionError):
        check_vocabulary_bits(rng.STREAM_DRAFT, fault)


def gumbel_error(bits: Tensor, lost_bits: int = 0) -> float:
    """The largest error against float64, of noise that ignores the lowest `lost_bits`."""
    out = torch.zeros(bits.numel(), device=DEVICE)
    launch(
        write_gumbel, (1,), (bits >> lost_bits << lost_bits).to(DEVICE), out, COUNT=bits.numel(), num_warps=1
    )
    assert torch.isfinite(out).all()
    return float((out.cpu().double() - rng.gumbel(bits, torch.float64)).abs().max())


def test_gumbel_is_accurate_up_to_its_tails() -> None:
    """From 33 ln 2 at u = 2**-33 to -ln(33 ln 2) at 1 - 2**-33, across the end of the series at 1/32."""
    edges = torch.arange(-256, 256) + torch.tensor([2**27, 2**31])[:, None]
    tails = torch.arange(256), torch.arange(2**32 - 256, 2**32)
    evenly = torch.arange(512) * 2**23
    random = torch.randint(0, 2**32, (2048,), generator=torch.Generator().manual_seed(0))
    bits = torch.cat((*tails, edges.flatten(), evenly, random))
    assert gumbel_error(bits) < 1e-5
    assert gumbel_error(bits, lost_bits=8) > 1e-2, "24 bits must be noticed"


def test_race_keys_are_ordered_as_score_then_lower_id() -> None:
    infinity = float("inf")
    scores = [-infinity, -3e38, -60.00001, -60.0, -1e-42, -0.0, 0.0, 1e-42, 1.0, 1.0000001, 3e38]
    pairs = list(itertools.product(scores, [0, 1, 127, 50256, 2**31 - 2]))
    padded = pairs + [(1.0, 0)] * (64 - len(pairs))
    score = torch.tensor([pair[0] for pair in padded], device=DEVICE)
    token = torch.tensor([pair[1] for pair in padded], dtype=torch.int32, device=DEVICE)
    key = torch.zeros(64, dtype=torch.int64, device=DEVICE)
    score_out, token_out = torch.zeros_like(score), torch.zeros_like(token)
    launch(write_keys, (1,), score, token, key, score_out, token_out, COUNT=64, num_warps=1)
    assert torch.equal(score_out, score)
    assert torch.equal(token_out, token)
    keys = key.tolist()[: len(pairs)]
    assert min(keys) > 0
    for (a, key_a), (b, key_b) in itertools.combinations(zip(pairs, keys, strict=True), 2):
        assert (key_a < key_b) == ((a[0], -a[1]) < (b[0], -b[1])), (a, b)
