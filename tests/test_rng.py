"""rng: Random123's known answers in Python and C++, one table of counters, variates that never break."""

from __future__ import annotations

import math

import pytest
import torch

from specengine import _C, rng

# Random123's kat_vectors, philox 4x32 10: counter, key, answer.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEEDS = [0, 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1, 0x299F31D0A4093822]
POSITIONS = [0, 1, 127, 2**31 - 1]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...]) -> None:
    assert tuple(_C.philox4x32(*counter, *key)) == answer
    c0, c1, c2, c3 = (torch.tensor(word) for word in counter)
    k0, k1 = (torch.tensor(word) for word in key)
    assert tuple(int(word) for word in rng.philox4x32((c0, c1, c2, c3), (k0, k1))) == answer


@pytest.mark.parametrize("vocab_size", [1, 2, 127, 128, 129, 1000])
@pytest.mark.usefixtures("instruction_set")
def test_vocabulary_bits_agree(vocab_size: int) -> None:
    for seed in SEEDS:
        for position in POSITIONS:
            stream, base = (seed + position) % 3, (seed ^ position) & 0x7FFFFFFF
            key = torch.tensor([rng.signed_seed(seed)])
            counters = torch.tensor([position]), stream, torch.tensor([base])
            expected = rng.vocabulary_bits(key, *counters, vocab_size)[0].tolist()
            assert _C.vocabulary_bits(seed, position, stream, base, vocab_size) == expected


def test_vocabulary_bits_are_the_documented_counters() -> None:
    bits = _C.vocabulary_bits(5, 9, 1, 3, 400)
    for token in (0, 31, 32, 127, 128, 200, 399):
        c0, lane = token // 128 * 32 + token % 32, token % 128 // 32
        assert bits[token] == _C.philox4x32(c0, 9, 1, 3, 5, 0)[lane]


def test_accept_bits_agree() -> None:
    for seed in SEEDS:
        positions = torch.tensor(POSITIONS)
        for base in (0, 77, 2**31 - 1):
            for candidate in (0, 3):
                seeds = torch.tensor([rng.signed_seed(seed)] * len(POSITIONS))
                expected = rng.accept_bits(
                    seeds, positions, torch.full_like(positions, base), candidate
                ).tolist()
                assert [_C.accept_bits(seed, place, base, candidate) for place in POSITIONS] == expected


def test_streams_positions_seeds_and_rounds_never_share_noise() -> None:
    base = _C.vocabulary_bits(1, 2, 0, 0, 256)
    others = [(2, 2, 0, 0), (1 + 2**32, 2, 0, 0), (1, 3, 0, 0), (1, 2, 1, 0), (1, 2, 0, 1)]
    for other in others:
        same = sum(a == b for a, b in zip(base, _C.vocabulary_bits(*other, 256), strict=True))
        assert same == 0, other


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponential_and_gumbel_are_finite_and_positive_at_the_ends(dtype: torch.dtype) -> None:
    near = [0, 1, 2, 2**24, 2**27 - 1, 2**27, 2**27 + 1, 2**31, 2**32 - 2**24, 2**32 - 2, 2**32 - 1]
    bits = torch.tensor(near)
    exponential = rng.exponential(bits, dtype)
    assert (exponential > 0).all()
    assert torch.isfinite(exponential).all()
    assert (exponential.diff() > 0)[:3].all()
    assert torch.isfinite(rng.gumbel(bits, dtype)).all()
    assert float(exponential[0]) == pytest.approx(2.0**-33, rel=1e-6)
    assert float(exponential[-1]) == pytest.approx(33 * math.log(2), rel=1e-6)
    assert float(rng.uniform(bits, dtype).min()) > 0
    assert float(rng.uniform(bits, dtype).max()) <= 1


def test_exponential_joins_its_two_branches() -> None:
    """1 - u has 24 bits: near the join the logarithm is good to 2**-25 / 2**-5."""
    bits = torch.arange(2**27 - 1000, 2**27 + 1000)
    exact = -torch.log1p(-(bits.double() + 0.5) * 2.0**-32)
    assert torch.allclose(rng.exponential(bits).double(), exact, rtol=1.5e-6, atol=0)


def test_distributions() -> None:
    """Moments of 2**18 variates within 5 standard errors, and 64 equal cells of the uniform."""
    count = 2**18
    bits = torch.tensor(_C.vocabulary_bits(1234, 56, 0, 0, count))
    exponential = rng.exponential(bits, torch.float64)
    assert float(exponential.mean()) == pytest.approx(1.0, abs=5 / math.sqrt(count))
    assert float(exponential.var()) == pytest.approx(1.0, abs=5 * math.sqrt(8 / count))
    gumbel = rng.gumbel(bits, torch.float64)
    assert float(gumbel.mean()) == pytest.approx(0.5772156649, abs=5 * math.pi / math.sqrt(6 * count))
    cells = torch.bincount(bits >> 26, minlength=64).double()
    chi_square = float(((cells - count / 64) ** 2 / (count / 64)).sum())
    assert chi_square < 63 + 6 * math.sqrt(2 * 63)


def test_derived_seeds_differ_and_keep_the_first() -> None:
    seeds = {rng.derive_seed(2**64 - 1, index) for index in range(64)}
    assert len(seeds) == 64
    assert rng.derive_seed(7, 0) == 7
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert rng.signed_seed(2**64 - 1) == -1
