"""Intervals of differences over seeds and problems, against other ways to get them."""

import math

import numpy as np
import pytest

from gspo.comparison.differences import mean_interval, paired_difference
from gspo.training.intervals import student_t


@pytest.mark.parametrize(
    "probability, degrees, quantile",  # of the tables in textbooks
    [(0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 3, 3.18245), (0.975, 10, 2.22814),
     (0.975, 120, 1.97993), (0.8, 1, 1.37638), (0.8, 4, 0.940965), (0.99, 5, 3.36493), (0.5, 7, 0.0)],
)  # fmt: skip
def test_quantiles_of_students_t(probability, degrees, quantile):
    assert student_t(probability, degrees) == pytest.approx(quantile, rel=1e-5, abs=1e-8)


def test_the_interval_over_seeds_by_hand():
    # mean 2, standard deviation 1, so that half the width is 4.30265 / sqrt(3)
    assert mean_interval([1, 2, 3]) == pytest.approx((2, 2 - 2.484138, 2 + 2.484138))
    assert mean_interval([0.5]) == (0.5, None, None)


def test_seeds_alone_make_the_interval_of_a_figure_per_seed():
    difference = paired_difference([[0.1], [0.2], [0.3]], [[1.1], [2.2], [3.3]])
    assert (difference.mean, difference.low, difference.high) == pytest.approx(mean_interval([1, 2, 3]))
    assert difference.num_problems == 1 and not difference.is_seen


def simulated(rng, seeds, problems, deviations, mean=0.0):
    """Differences with random effects of the seed, of the problem and of both."""
    of_seed, of_problem, rest = deviations
    values = rng.normal(0, of_seed, (seeds, 1)) + rng.normal(0, of_problem, (1, problems))
    return mean + values + rng.normal(0, rest, (seeds, problems))


@pytest.mark.parametrize(
    "deviations", [(0.02, 0, 0.3), (0, 0.1, 0.3), (0.05, 0.1, 0.3), (0.15, 0.1, 0.3), (0, 0, 0.3)]
)
@pytest.mark.parametrize("seeds, problems", [(2, 80), (3, 50), (5, 30)])
def test_the_interval_holds_the_true_difference_nineteen_times_in_twenty(deviations, seeds, problems):
    rng = np.random.default_rng(0)
    zeros = np.zeros((seeds, problems))
    found = [paired_difference(zeros, simulated(rng, seeds, problems, deviations)) for _ in range(400)]
    held = np.mean([difference.low <= 0 <= difference.high for difference in found])
    assert held >= 0.93
    if deviations[0] == 0.15 and seeds > 2:  # where seeds are known to differ, no interval is too wide
        assert held <= 0.98


def test_the_variance_is_that_of_both_seeds_and_problems():
    rng = np.random.default_rng(1)
    widths = []
    for _ in range(200):
        d = simulated(rng, 10, 40, (0.05, 0.3, 0.1))
        difference = paired_difference(np.zeros_like(d), d)
        widths.append((difference.high - difference.low) / 2 / student_t(0.975, 30))
    true = math.sqrt(0.05**2 / 10 + 0.3**2 / 40 + 0.1**2 / 400)
    assert np.median(widths) == pytest.approx(true, rel=0.1)


def test_seeds_that_agree_by_chance_make_no_narrow_interval():
    rng = np.random.default_rng(4)
    d = rng.normal(0, 1, (2, 50))
    d -= d.mean(1, keepdims=True)  # both seeds have the same mean, exactly
    difference = paired_difference(np.zeros_like(d), d)
    over_problems_alone = mean_interval(d.mean(0).tolist())
    assert difference.high - difference.low > 2 * (over_problems_alone[2] - over_problems_alone[1])


def test_a_setting_against_itself_has_no_difference():
    same = [[0.5, 0.25], [0.75, 1.0]]
    difference = paired_difference(same, same)
    assert (difference.mean, difference.low, difference.high) == (0, 0, 0) and not difference.is_seen


def test_the_predicted_number_of_seeds_sees_the_difference_four_times_in_five():
    rng = np.random.default_rng(2)
    size, problems, deviations = 0.05, 200, (0.05, 0.1, 0.2)
    # The variance is known well from many seeds; with few, the number is as uncertain as the variance.
    pilot = simulated(rng, 400, problems, deviations)
    needed = paired_difference(np.zeros_like(pilot), pilot).seeds_to_see(size)
    seen = []
    for _ in range(400):
        d = simulated(rng, needed, problems, deviations, mean=size)
        seen.append(paired_difference(np.zeros_like(d), d).is_seen)
    assert 0.7 <= np.mean(seen) <= 0.9


def test_where_problems_hide_a_difference_no_number_of_seeds_sees_it():
    rng = np.random.default_rng(3)
    d = simulated(rng, 5, 10, (0.001, 0.5, 0.001))
    difference = paired_difference(np.zeros_like(d), d)
    assert difference.seeds_to_see(0.05) is None and difference.seeds_to_see(2.0) == 2


def test_one_seed_has_an_interval_over_problems_and_sees_nothing():
    difference = paired_difference([[0.0] * 20], [[0.9 + i / 100 for i in range(20)]])
    assert difference.low > 0.9 and not difference.is_seen and difference.seeds_to_see(0.1) is None


@pytest.mark.parametrize("first, second", [([[1.0]], [[1.0], [2.0]]), ([[1.0, 2.0]], [[1.0]]), ([[]], [[]])])
def test_what_does_not_pair_is_refused(first, second):
    with pytest.raises(ValueError, match="do not pair"):
        paired_difference(first, second)
