"""Medians and their intervals, and counts against laws."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from specengine.measure.statistics import (
    chi_square,
    median_interval,
    ratio_interval,
    total_variation,
    total_variation_by_chance,
)


def test_a_median_lies_in_its_interval_and_one_value_is_all_three() -> None:
    assert median_interval([3.0]) == (3.0, 3.0, 3.0)
    median, low, high = median_interval([5.0, 1.0, 2.0, 4.0, 3.0])
    assert median == 3.0
    assert 1.0 <= low < 3.0 < high <= 5.0
    with pytest.raises(ValueError, match="no values"):
        median_interval([])


def test_the_interval_holds_the_true_median_about_as_often_as_it_says() -> None:
    """95 % of 400 samples, give or take: the bootstrap of a median of 25 holds it a little less or more often."""
    samples = np.random.default_rng(0).exponential(size=(400, 25))
    intervals = [median_interval(sample, num_draws=400) for sample in samples]  # type: ignore[arg-type]
    held = np.mean([low <= np.log(2) <= high for _, low, high in intervals])
    assert 0.91 <= held <= 0.98


def test_a_ratio_is_of_pairs() -> None:
    """A machine that is ten times slower for a while says nothing: the ratio of medians would be 1.1, not 2."""
    theirs = [1.0, 10.0, 1.1, 11.0, 1.0]
    assert ratio_interval([2 * each for each in theirs], theirs) == (2.0, 2.0, 2.0)
    with pytest.raises(ValueError):
        ratio_interval([1.0], [1.0, 2.0])


def test_chi_square_is_that_of_scipy_on_the_pooled_cells() -> None:
    counts, probs = [50, 38, 5, 4, 3], [0.45, 0.45, 0.04, 0.03, 0.03]
    statistic, degrees, p_value = chi_square(counts, probs)
    expected = stats.chisquare([12, 50, 38], [10, 45, 45])
    assert degrees == 2
    assert (statistic, p_value) == pytest.approx((expected.statistic, expected.pvalue))


def test_a_pool_that_is_too_small_takes_the_smallest_cell_besides() -> None:
    statistic, degrees, _ = chi_square([60, 38, 2], [0.6, 0.38, 0.02])
    assert (statistic, degrees) == (pytest.approx(0), 1)
    assert chi_square([3, 1], [0.75, 0.25]) == (0.0, 0, 1.0)  # everything is one cell


def test_chi_square_of_the_law_itself_is_uniform_and_of_another_is_not() -> None:
    law = np.array([0.4, 0.3, 0.2, 0.1])
    chance = np.random.default_rng(0)
    values = [chi_square(list(chance.multinomial(1000, law)), list(law))[2] for _ in range(500)]
    assert stats.kstest(values, "uniform").pvalue > 1e-4
    assert chi_square([430, 300, 180, 90], list(law))[2] > 1e-3
    assert chi_square([500, 250, 170, 80], list(law))[2] < 1e-6
    assert chi_square([400, 300, 299, 1], [0.4, 0.3, 0.3, 0.0])[2] == 0.0


def test_total_variation_and_what_chance_makes_of_it() -> None:
    assert total_variation([50, 50], [0.5, 0.5]) == 0
    assert total_variation([0, 7], [1.0, 0.0]) == 1
    assert total_variation([3, 1], [0.5, 0.5]) == 0.25
    law = [0.05] * 20
    counts = np.random.default_rng(1).multinomial(1000, law, size=200)
    below = np.mean(
        [total_variation(list(each), law) < total_variation_by_chance(law, 1000) for each in counts]
    )
    assert 0.88 <= below <= 0.99
    with pytest.raises(ValueError, match="add up to 1"):
        total_variation([1, 1], [0.5, 0.6])
    with pytest.raises(ValueError, match="one for each"):
        chi_square([0, 0], [0.5, 0.5])
