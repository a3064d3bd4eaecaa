"""What a handful of seeds can say: intervals of means, of paired differences, and curves read between their points."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (ddof 1) and 95 % t-interval of the mean; these two are ``None`` for one value."""
    mean = statistics.fmean(values)
    found: dict[str, Any] = {"mean": mean, "sd": None, "low": None, "high": None, "values": list(values)}
    if len(values) > 1:
        sd = statistics.stdev(values)
        margin = t_quantile(len(values) - 1) * sd / math.sqrt(len(values))
        found |= {"sd": sd, "low": mean - margin, "high": mean + margin}
    return found


def over_seeds_and_problems(rows: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """95 % interval of the mean of values that depend on a seed (row) and on a problem (column), both drawn by chance.

    The interval over seeds alone holds for these very problems. Here seeds and problems are crossed random effects:
    what problems add to the variance of the mean is that of the columns' means without the residual's part, which the
    rows' means hold already; the squares of the two margins add up (W. G. Howe, JASA 69, 1974). So it is never narrower
    than that over seeds.

    Args:
        rows: S seeds x P problems, paired differences as a rule.

    Returns:
        The bounds, or ``None`` for fewer than two seeds or problems.
    """
    seeds, problems = len(rows), len(rows[0]) if rows else 0
    if seeds < 2 or problems < 2:
        return None
    by_seed = [statistics.fmean(row) for row in rows]
    by_problem = [statistics.fmean(column) for column in zip(*rows, strict=True)]
    mean = statistics.fmean(by_seed)
    residuals = sum(
        (value - of_seed - of_problem + mean) ** 2
        for row, of_seed in zip(rows, by_seed, strict=True)
        for value, of_problem in zip(row, by_problem, strict=True)
    )
    residual = residuals / ((seeds - 1) * (problems - 1))
    of_problems = max(0.0, statistics.variance(by_problem) - residual / seeds) / problems
    squares = t_quantile(seeds - 1) ** 2 * statistics.variance(by_seed) / seeds
    squares += t_quantile(min(problems - 1, _NORMAL)) ** 2 * of_problems
    return mean - math.sqrt(squares), mean + math.sqrt(squares)


_NORMAL = 1000
"""Degrees of freedom above which Student's t hardly changes: 1.9623 here, 1.9600 at infinity."""


def t_quantile(freedom: int, probability: float = 0.975) -> float:
    """Quantile (above the median) of Student's t for whole degrees of freedom, by bisection of its distribution."""
    low, high = 0.0, 1.0
    while t_distribution(high, freedom) < probability:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_distribution(middle, freedom) < probability else (low, middle)
    return high


def t_distribution(t: float, freedom: int) -> float:
    """P(T <= t) of Student's t (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine = math.cos(angle)
    term = cosine if freedom % 2 else 1.0
    total = 0.0
    for k in range(1 + freedom % 2, freedom, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if freedom % 2 else math.sin(angle) * total
    return (1 + inside) / 2


def interpolated(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """The value at ``x`` of the line through points in ascending order; ``None`` outside them, never extrapolated."""
    if not points or not points[0][0] <= x <= points[-1][0]:
        return None
    before = max((point for point in points if point[0] <= x), key=lambda point: point[0])
    after = next((point for point in points if point[0] > x), before)
    width = after[0] - before[0]
    return before[1] if not width else before[1] + (after[1] - before[1]) * (x - before[0]) / width
