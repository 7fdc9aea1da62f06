"""95 % confidence intervals of the two figures a run is judged by: a pass rate, and its change."""

import math
from collections.abc import Sequence
from functools import cache
from statistics import NormalDist, fmean, stdev

Z = NormalDist().inv_cdf(0.975)


def wilson_interval(rate: float, trials: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion; unlike the normal one it has a width at rates 0 and 1.

    With several samples a problem, let trials be the number of problems: samples of one problem are not
    independent, and the interval is then on the wide side.
    """
    centre = (rate + Z * Z / (2 * trials)) / (1 + Z * Z / trials)
    half = Z * math.sqrt(rate * (1 - rate) / trials + (Z / (2 * trials)) ** 2) / (1 + Z * Z / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """Mean of after - before over the same problems, and its Student-t interval: (mean, low, high).

    Where every problem changed by the same amount, low and high are that amount. This is no certainty: the
    differences have no spread to tell how far another sample of problems could lie. See interval_text().

    Raises:
        ValueError: under two pairs, or lengths that differ.
    """
    differences = [b - a for a, b in zip(before, after, strict=True)]
    if len(differences) < 2:
        raise ValueError(f"an interval needs at least two pairs, got {len(differences)}")
    mean = fmean(differences)
    if math.isclose(min(differences), max(differences), rel_tol=1e-9, abs_tol=1e-12):  # but for rounding
        return mean, mean, mean
    half = student_t(0.975, len(differences) - 1) * stdev(differences) / math.sqrt(len(differences))
    return mean, mean - half, mean + half


def interval_text(low: float, high: float, form: str = "+.3f") -> str:
    """The interval of a paired gain in words, which say so where there is none; form: a format of numbers."""
    if low == high:
        return "no interval: every problem changed by the same amount"
    return f"95 % interval {low:{form}} to {high:{form}}"


def describe_gain(before: Sequence[float], after: Sequence[float], form: str = "+.3f") -> str:
    """The mean of after - before over the same problems, with its 95 % interval if there is one."""
    if len(before) == len(after) == 1:
        return f"{after[0] - before[0]:{form}}  (no interval: only one problem)"
    mean, low, high = paired_interval(before, after)
    return f"{mean:{form}}  ({interval_text(low, high, form)})"


@cache
def student_t(probability: float, degrees: int) -> float:
    """The quantile of Student's t distribution, for a probability of at least 1/2."""
    assert 0.5 <= probability < 1 and degrees >= 1
    low, high = 0.0, 1.0
    while _t_within(high, degrees) < 2 * probability - 1:
        high *= 2
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        inside = _t_within(middle, degrees) < 2 * probability - 1
        low, high = (middle, high) if inside else (low, middle)
    return high


def _t_within(t: float, degrees: int) -> float:
    """P(|T| < t) for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine, is_odd = math.cos(angle), degrees % 2
    term = total = cosine if is_odd else 1.0
    for i in range(3 if is_odd else 2, degrees - 1, 2):
        term *= (i - 1) / i * cosine * cosine
        total += term
    if not is_odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if degrees > 1 else 0.0))
