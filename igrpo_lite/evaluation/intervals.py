"""How sure an accuracy, or a change of it, is: small held-out sets are noisy, so none is shown without an interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_Z95 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Estimate:
    """A share of ``n`` problems with its 95 % interval."""

    accuracy: float
    n: int
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class MeanEstimate(Estimate):
    """A mean over ``n`` problems; ``error`` is its standard error over problems (``None`` with one problem)."""

    error: float | None


@dataclass(frozen=True, slots=True)
class PairedChange:
    """Change of a measure on the same ``n`` problems.

    Attributes:
        difference: of the means.
        low, high: the 95 % interval to quote (see :func:`paired_change`).
        gained, lost: problems on which the measure rose, and fell; answers flipped right and wrong where it is 0 or 1.
        n: problems.
        p_value: exact McNemar test, where the measure is 0 or 1 on every problem.
        bootstrap: 95 % percentile interval of the paired bootstrap.
    """

    difference: float
    low: float
    high: float
    gained: int
    lost: int
    n: int
    p_value: float | None
    bootstrap: tuple[float, float]


def wilson(successes: int, n: int) -> Estimate:
    """95 % Wilson score interval of a proportion (E. B. Wilson, JASA 1927); ``n`` must be positive."""
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} of {n} is not a proportion")
    p, z2 = successes / n, _Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    margin = _Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # Rounding must not push a bound past the estimate at 0 or 1.
    return Estimate(p, n, max(0.0, min(p, centre - margin)), min(1.0, max(p, centre + margin)))


def mean_estimate(values: Sequence[float]) -> MeanEstimate:
    """Mean of one number in [0, 1] per problem, with 1.96 standard errors over problems to either side.

    The problems are what is drawn at random, so more samples of the same problems cannot make it arbitrarily sure.
    Where all numbers are 0, or all 1, their spread says nothing, and the interval is Wilson's.

    Raises:
        ValueError: there are no values.
    """
    n = len(values)
    if n == 0:
        raise ValueError("a mean of no values")
    mean = math.fsum(values) / n
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n) if n > 1 else None
    if mean in (0, 1):
        found = wilson(round(mean) * n, n)
        return MeanEstimate(mean, n, found.low, found.high, error)
    if error is None:
        return MeanEstimate(mean, n, 0.0, 1.0, error)
    return MeanEstimate(mean, n, max(0.0, mean - _Z95 * error), min(1.0, mean + _Z95 * error), error)


def bootstrap(values: Sequence[float], resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of ``values`` (B. Efron, Annals of Statistics 1979).

    Equal values are drawn together, as one multinomial count: the same distribution as drawing them one by one.
    """
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    n = len(values)
    means = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples) @ distinct / n
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p-value of the exact McNemar test: were flips to right and to wrong equally likely, how often would
    they be at least as uneven? (A. Agresti, Categorical Data Analysis, section 11.1: binomial with probability 1/2.)"""
    flips = gained + lost
    tail = sum(math.comb(flips, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**flips)


def paired_change(before: Sequence[float], after: Sequence[float]) -> PairedChange:
    """Difference of two measures on the same problems. Its interval is narrower than two separate ones, because most
    problems do not change.

    The interval to quote is the bootstrap's, but for answers that are right or wrong it is Wald's with half an
    observation added to each of the four cells (A. Agresti and Y. Min, Statistics in Medicine 2005): where few answers
    flip, the bootstrap is too narrow, and of no width where none does.

    Raises:
        ValueError: the two have different lengths or none.
    """
    n = len(before)
    if n == 0 or n != len(after):
        raise ValueError(f"{n} and {len(after)} outcomes are not pairs")
    changes = [float(a) - float(b) for b, a in zip(before, after, strict=True)]
    gained, lost = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    difference = math.fsum(changes) / n
    resampled = bootstrap(changes)
    if any(value not in (0, 1) for value in (*before, *after)):
        return PairedChange(difference, *resampled, gained, lost, n, None, resampled)
    centre = (gained - lost) / (n + 2)
    margin = _Z95 * math.sqrt(gained + lost + 1 - (gained - lost) ** 2 / (n + 2)) / (n + 2)
    low, high = max(-1.0, centre - margin), min(1.0, centre + margin)
    return PairedChange(difference, low, high, gained, lost, n, mcnemar(gained, lost), resampled)
