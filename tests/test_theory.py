"""What speculation should gain, by formula: against enumeration, the engine's own counters, and limits."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from specengine.measure.theory import (
    Costs,
    best_num_drafts,
    break_even_acceptance,
    conditional_acceptances,
    equal_acceptance,
    expected_tokens,
    popular_formula,
    speed_up,
)
from specengine.metrics import record_rounds
from specengine.outputs import SpeculativeDecodingMetrics


@pytest.mark.parametrize("acceptances", [[], [0.3], [0.9, 0.2, 0.7], [0.5, 0.0, 1.0, 0.4]])
def test_expected_tokens_are_those_of_all_outcomes(acceptances: list[float]) -> None:
    """Every draft is called right or wrong, by itself; what is right up to the first wrong one counts, and one more."""
    enumerated = 0.0
    for outcome in itertools.product((True, False), repeat=len(acceptances)):
        chance = math.prod(a if right else 1 - a for a, right in zip(acceptances, outcome, strict=True))
        enumerated += chance * (1 + len(list(itertools.takewhile(bool, outcome))))
    assert expected_tokens(acceptances) == pytest.approx(enumerated, abs=1e-12)


def test_equal_acceptances_are_the_closed_form() -> None:
    for alpha, k in itertools.product((0.1, 0.5, 0.95), (1, 4, 16)):
        assert expected_tokens([alpha] * k) == pytest.approx((1 - alpha ** (k + 1)) / (1 - alpha))
        assert equal_acceptance(expected_tokens([alpha] * k), k) == pytest.approx(alpha, abs=1e-9)
    assert (equal_acceptance(1, 5), equal_acceptance(6, 5)) == (0.0, 1.0)


def test_a_runs_counters_give_its_own_mean() -> None:
    """With one k, theory at the measured conditional acceptances is the engine's mean acceptance length, exactly."""
    generator = random.Random(1)
    metrics = SpeculativeDecodingMetrics()
    for _ in range(200):
        accepted = next((j for j in range(6) if generator.random() > 0.9 - 0.1 * j), 6)
        record_rounds(metrics, num_draft=6, num_accepted=accepted, num_kept=accepted + 1)
    acceptances = conditional_acceptances(metrics.num_accepted_by_position, metrics.rejection_positions)
    assert expected_tokens(acceptances) == pytest.approx(metrics.mean_acceptance_length, abs=1e-12)
    unconditional = metrics.acceptance_by_position
    assert acceptances[0] == unconditional[0]
    assert all(given > share for given, share in zip(acceptances[1:], unconditional[1:], strict=True))


def test_rounds_that_drafted_less_do_not_count_as_rejected() -> None:
    metrics = SpeculativeDecodingMetrics()
    record_rounds(metrics, num_draft=1, num_accepted=1, num_kept=2, count=9)
    record_rounds(metrics, num_draft=3, num_accepted=2, num_kept=3)
    acceptances = conditional_acceptances(metrics.num_accepted_by_position, metrics.rejection_positions)
    assert acceptances == [1.0, 1.0, 0.0]


def test_speed_up_counts_what_a_round_costs() -> None:
    costs = Costs(draft=0.1, verify=1.2)
    assert speed_up([0.8] * 4, costs) == pytest.approx(3.3616 / 1.6)
    assert speed_up([], costs) == 1.0  # plain decoding, whatever verifying several rows costs


def test_best_num_drafts_is_that_of_a_search() -> None:
    acceptances = [0.8] * 20
    best, speed = best_num_drafts(acceptances, Costs(0.1))
    assert speed == max(speed_up([0.8] * k, Costs(0.1)) for k in range(21))
    assert speed == speed_up([0.8] * best, Costs(0.1))
    assert 1 < best < 20
    assert best_num_drafts([0.3] * 20, Costs(0.5)) == (0, 1.0)
    assert best_num_drafts([1.0] * 20, Costs(0.5))[0] == 20


def test_break_even_is_where_it_stops_paying() -> None:
    for k, costs in itertools.product((1, 5), (Costs(0.1), Costs(0.3, 1.2))):
        alpha = break_even_acceptance(k, costs)
        assert alpha is not None
        assert speed_up([alpha] * k, costs) == pytest.approx(1, abs=1e-9)
        assert speed_up([alpha - 1e-3] * k, costs) < 1
    assert break_even_acceptance(4, Costs(draft=1.1)) is None
    assert break_even_acceptance(4, Costs(draft=0.0)) == 0.0


def test_the_popular_formula_is_another_one() -> None:
    """Where it must be wrong: nothing accepted, everything accepted, and a draft that costs something."""
    assert popular_formula(1.0, 4) == 4.0 != speed_up([1.0] * 4, Costs(0.0))
    assert popular_formula(0.0, 4) == 0.8 != speed_up([0.0] * 4, Costs(0.0))
    assert popular_formula(0.8, 60) > popular_formula(0.8, 5)
    assert speed_up([0.8] * 60, Costs(0.1)) < 1 < speed_up([0.8] * 5, Costs(0.1))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"from 0 to 1, not 1\.2"):
        expected_tokens([0.5, 1.2])
    with pytest.raises(ValueError, match=r"draft must be .* not -0\.1"):
        Costs(draft=-0.1)
    with pytest.raises(ValueError, match=r"verify must be .* not 0"):
        Costs(draft=0.1, verify=0)
    with pytest.raises(ValueError, match=r"1 to 5 tokens a round, not 5\.5"):
        equal_acceptance(5.5, 4)
    with pytest.raises(ValueError, match="num_drafts must be at least 1, not 0"):
        break_even_acceptance(0, Costs(0.1))
