"""Intervals for accuracies: small held-out sets are noisy, so no accuracy is shown without one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_Z95 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Estimate:
    """A share of ``n`` with its 95 % Wilson score interval."""

    accuracy: float
    n: int
    low: float
    high: float


def wilson(successes: int, n: int) -> Estimate:
    """95 % Wilson score interval of a proportion (E. B. Wilson, JASA 1927); ``n`` must be positive."""
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} of {n} is not a proportion")
    p, z2 = successes / n, _Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    margin = _Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # Rounding must not push a bound past the estimate at 0 or 1.
    return Estimate(p, n, max(0.0, min(p, centre - margin)), min(1.0, max(p, centre + margin)))


@dataclass(frozen=True, slots=True)
class PairedChange:
    """Change of accuracy on the same ``n`` problems, with its 95 % interval.

    ``gained`` problems went from wrong to right, ``lost`` ones from right to wrong.
    """

    difference: float
    low: float
    high: float
    gained: int
    lost: int
    n: int


def paired_change(before: Sequence[bool], after: Sequence[bool]) -> PairedChange:
    """Difference of two paired proportions with Wald's interval on the discordant pairs (A. Agresti, Categorical Data
    Analysis, section 11.1). Narrower than two separate intervals, because most problems do not change.

    Raises:
        ValueError: the two have different lengths or none.
    """
    n = len(before)
    if n == 0 or n != len(after):
        raise ValueError(f"{n} and {len(after)} outcomes are not pairs")
    gained = sum(b < a for b, a in zip(before, after, strict=True))
    lost = sum(b > a for b, a in zip(before, after, strict=True))
    difference = (gained - lost) / n
    margin = _Z95 * math.sqrt(max(0.0, (gained + lost) - (gained - lost) ** 2 / n)) / n
    return PairedChange(difference, max(-1.0, difference - margin), min(1.0, difference + margin), gained, lost, n)
