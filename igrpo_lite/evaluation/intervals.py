"""Intervals for accuracies: small held-out sets are noisy, so no accuracy is shown without one."""

from __future__ import annotations

import math
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
    return Estimate(p, n, max(0.0, centre - margin), min(1.0, centre + margin))
