"""What measurements are judged by: medians with intervals, and counts against the law that they should follow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def median_interval(
    values: Sequence[float], *, num_draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """(median, low, high): the median, and the interval that holds 95 % of the medians of samples drawn from `values`
    with replacement (the percentile bootstrap, Efron 1979). The same values give the same interval.

    Raises `ValueError` where there is no value.
    """
    if not len(values):
        raise ValueError("there is no median of no values")
    array = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(len(array), size=(num_draws, len(array)))
    low, high = np.percentile(np.median(array[draws], axis=1), (2.5, 97.5))
    return float(np.median(array)), float(low), float(high)


def ratio_interval(
    ours: Sequence[float], theirs: Sequence[float], *, num_draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """The same of the ratios ours[i] / theirs[i]: pairs were measured one right after the other, so what slows the
    machine for a while slows both."""
    ratios = [our / their for our, their in zip(ours, theirs, strict=True)]
    return median_interval(ratios, num_draws=num_draws, seed=seed)


def chi_square(
    counts: Sequence[int], probs: Sequence[float], *, min_expected: float = 5
) -> tuple[float, int, float]:
    """(statistic, degrees of freedom, p-value): Pearson's test of counts against a law (Pearson 1900).

    The p-value is the chance that samples of the law lie at least as far from it. Cells that expect fewer than
    `min_expected` count as one, so that the chi-square distribution describes the statistic well; where even their sum
    expects fewer, the smallest of the others joins them. A count where the law has nothing gives (inf, 1, 0.0). With
    one cell left there is nothing to be seen: (0.0, 0, 1.0).

    counts, probs: of the same cells; probs add up to 1
    """
    observed, law = np.asarray(counts, dtype=np.float64), np.asarray(probs, dtype=np.float64)
    _check_law(observed, law)
    if observed[law == 0].any():
        return float("inf"), 1, 0.0
    order = np.argsort(law)
    observed, expected = observed[order], law[order] * observed.sum()
    pooled = int(np.count_nonzero(expected < min_expected))
    if pooled and expected[:pooled].sum() < min_expected:
        pooled = min(pooled + 1, len(expected))
    if pooled > 1:
        observed = np.concatenate(([observed[:pooled].sum()], observed[pooled:]))
        expected = np.concatenate(([expected[:pooled].sum()], expected[pooled:]))
    degrees = len(expected) - 1
    if degrees <= 0:
        return 0.0, 0, 1.0
    statistic = float(((observed - expected) ** 2 / expected).sum())
    halves = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
    return statistic, degrees, float(torch.special.gammaincc(halves[0], halves[1]))


def total_variation(counts: Sequence[int], probs: Sequence[float]) -> float:
    """Half the sum of |share of the counts − probability|: 0 where they are the same, 1 where nothing is in common.

    Of samples of the very law it is above 0, too: see `total_variation_by_chance`.
    """
    observed, law = np.asarray(counts, dtype=np.float64), np.asarray(probs, dtype=np.float64)
    _check_law(observed, law)
    return float(np.abs(observed / observed.sum() - law).sum() / 2)


def total_variation_by_chance(
    probs: Sequence[float], num_samples: int, *, num_draws: int = 200, seed: int = 0
) -> float:
    """What the total variation of `num_samples` samples of the law itself stays below in 95 of 100 cases, by
    simulation."""
    law = np.asarray(probs, dtype=np.float64)
    shares = (
        np.random.default_rng(seed).multinomial(num_samples, law / law.sum(), size=num_draws) / num_samples
    )
    return float(np.percentile(np.abs(shares - law).sum(axis=1) / 2, 95))


def _check_law(observed: np.ndarray, law: np.ndarray) -> None:
    if observed.shape != law.shape or not observed.sum() > 0:
        raise ValueError(
            f"there must be counts, one for each probability; got {observed.shape} and {law.shape}"
        )
    if (law < 0).any() or abs(law.sum() - 1) > 1e-6:
        raise ValueError(f"probabilities must not be negative and add up to 1, not {law.sum():g}")
