"""Intervals over seeds, of a figure and of the difference between two settings; how many seeds it takes.

A difference d[s, p] has a seed s and a held-out problem p. Another comparison would have other seeds and
other problems, and its mean would differ for both reasons. With the mean squares of a two-way layout without
replication, M_S of the seeds, M_P of the problems and M_E of the rest, the variance of the mean of S x P
differences is estimated by

    (M_S + M_P - M_E) / (S P)

in the random-effects model (Cornfield and Tukey, 1956, "Average values of mean squares in factorials"), and
its degrees of freedom by Satterthwaite's formula. M_S and M_P are expected to be at least M_E, and where
chance has made one of them smaller, M_E stands for it. So few seeds that happen to agree give no narrow
interval.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

from gspo.training.intervals import student_t

CONFIDENCE = 0.975  # the quantile on each side of a 95 % interval
POWER = 0.8  # a difference is to be seen in four of five comparisons
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences between two settings, and its 95 % interval.

    low, high: None with one seed and one problem, of which nothing follows.
    num_problems: 1 for a figure that each seed has once.
    m_seeds, m_rest: mean squares. problem_variance: of a problem's true difference. 0 where there is one
    problem, and None with one seed, where they are not known.
    """

    mean: float
    low: float | None
    high: float | None
    num_seeds: int
    num_problems: int
    m_seeds: float | None = None
    problem_variance: float = 0.0
    m_rest: float = 0.0

    @property
    def is_seen(self) -> bool:
        """True if the interval is of several seeds and lies on one side of 0."""
        if self.num_seeds < 2 or self.low is None or self.high is None:
            return False
        return self.low > 0 or self.high < 0

    def seeds_to_see(self, size: float) -> int | None:
        """How many seeds it takes to see a true difference of this size in four of five comparisons.

        None: no number does, because the choice of problems alone hides it; or the variance is not known.
        """
        if self.m_seeds is None or size <= 0:
            return None
        for seeds in range(2, MOST_SEEDS + 1):
            m_problems = seeds * self.problem_variance + self.m_rest
            mean_squares = self.m_seeds, m_problems, self.m_rest
            square, degrees = _of_the_mean(*mean_squares, seeds, self.num_problems)
            quantiles = student_t(CONFIDENCE, degrees) + student_t(POWER, degrees)
            if quantiles * math.sqrt(square / (seeds * self.num_problems)) <= size:
                return seeds
        return None


def mean_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """The mean over seeds and its 95 % Student-t interval (mean, low, high); no interval of one value."""
    mean = fmean(values)
    if len(values) < 2:
        return mean, None, None
    half = student_t(CONFIDENCE, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def paired_difference(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> Difference:
    """The mean of second - first, paired by seed and by problem.

    first, second: for each seed the same problems' figures, or one figure alone.

    Raises:
        ValueError: seeds or problems do not agree.
    """
    values = [np.asarray(each, dtype=np.float64) for each in (first, second)]
    if values[0].shape != values[1].shape or values[0].ndim != 2 or not values[0].size:
        raise ValueError(f"seeds and problems of shapes {values[0].shape} and {values[1].shape} do not pair")
    d = values[1] - values[0]  # (S, P)
    seeds, problems = d.shape
    mean = float(d.mean())
    if seeds == 1 or problems == 1:
        one_way = d.ravel()
        low = high = None
        if len(one_way) > 1:
            _, low, high = mean_interval(one_way.tolist())
        m_seeds = float(one_way.var(ddof=1)) if seeds > 1 else None
        return Difference(mean, low, high, seeds, problems, m_seeds)
    by_seed, by_problem = d.mean(1, keepdims=True), d.mean(0, keepdims=True)  # (S, 1), (1, P)
    rest = d - by_seed - by_problem + mean
    m_seeds = problems * float(by_seed.var(ddof=1))
    m_problems = seeds * float(by_problem.var(ddof=1))
    m_rest = float(np.square(rest).sum()) / ((seeds - 1) * (problems - 1))
    square, degrees = _of_the_mean(m_seeds, m_problems, m_rest, seeds, problems)
    half = student_t(CONFIDENCE, degrees) * math.sqrt(square / d.size)
    return Difference(
        mean, mean - half, mean + half, seeds, problems,
        m_seeds, problem_variance=max(0.0, m_problems - m_rest) / seeds, m_rest=m_rest,
    )  # fmt: skip


def _of_the_mean(
    m_seeds: float, m_problems: float, m_rest: float, seeds: int, problems: int
) -> tuple[float, int]:
    """The mean square of the mean, and its degrees of freedom, from those of seeds, problems and the rest."""
    seed_part, problem_part = max(m_seeds, m_rest), max(m_problems, m_rest)
    square = seed_part + problem_part - m_rest
    if square == 0:
        return 0.0, 1
    rest_degrees = (seeds - 1) * max(1, problems - 1)
    parts = ((seed_part, seeds - 1), (problem_part, max(1, problems - 1)), (m_rest, rest_degrees))
    return square, max(1, math.floor(square**2 / sum(m**2 / n for m, n in parts)))
