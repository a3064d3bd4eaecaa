"""Statistics of evaluations: pass@k, votes, and intervals, without which no accuracy of a small held-out set is shown.

scipy has some of these, but is not among the dependencies; each is a few lines of an exact formula here.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from igrpo_lite.answers.answers import MAX_SHOWN, Verdict

Judge = Callable[[Sequence[tuple[str, str, bool]]], Sequence[Verdict]]
"""Verdicts on (text of a completion, gold answer, whether it was truncated), in order, like ``AnswerChecker.judge``."""

Same = Callable[[str, str], bool]
"""Whether two answers are the same."""

_Z95 = 1.959963984540054
_NORMAL = 1000
"""Degrees of freedom above which Student's t hardly changes: 1.9623 here, 1.9600 at infinity."""


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
        low, high: its 95 % interval (see :func:`paired_change`).
        gained, lost: problems on which the measure rose, and fell; answers flipped right and wrong where it is 0 or 1.
        n: problems.
        p_value: exact McNemar test, where the measure is 0 or 1 on every problem.
    """

    difference: float
    low: float
    high: float
    gained: int
    lost: int
    n: int
    p_value: float | None


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate, from ``n`` samples, of the chance that at least one of ``k`` is correct:
    1 - C(n - c, k) / C(n, k) (M. Chen et al., arXiv 2107.03374, equation 1). Exact until the last division.

    Raises:
        ValueError: not 0 <= ``correct`` <= ``n``, or not 1 <= ``k`` <= ``n``.
    """
    if not (0 <= correct <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {correct} correct in {n} samples")
    ways = math.comb(n, k)
    return (ways - math.comb(n - correct, k)) / ways


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4, ... up to ``most``: the k for which pass@k is reported."""
    return [2**exponent for exponent in range(most.bit_length())]


def majority(verdicts: Sequence[Verdict], same: Same) -> float:
    """Chance that the most frequent answer is right, where one of equally frequent answers is drawn.

    Right answers are one class, since all equal the gold answer; of the others each joins the first class whose first
    answer it is the same as. A completion without an answer has no vote; without votes the chance is 0.
    """
    right = sum(found.reason == "correct" for found in verdicts)
    classes: Counter[str] = Counter()
    for answer in _wrong(verdicts):
        classes[next((first for first in classes if first == answer or same(answer, first)), answer)] += 1
    if not right or right < max(classes.values(), default=0):
        return 0.0
    return 1 / (1 + list(classes.values()).count(right))


def compared(votes: Sequence[Sequence[Verdict]], judge: Judge) -> Same:
    """The comparison that :func:`majority` needs for these problems' samples, judged in one batch.

    Asked about are only wrong answers of problems where these could outvote the right one.
    """
    pairs: dict[tuple[str, str], None] = {}
    for verdicts in votes:
        wrong = _wrong(verdicts)
        if 0 < sum(found.reason == "correct" for found in verdicts) <= len(wrong):
            answers = list(dict.fromkeys(wrong))
            pairs.update({(a, b): None for place, a in enumerate(answers) for b in answers[:place] if _whole(a, b)})
    # In tags: their content need not be balanced, as that of a box.
    found = judge([(f"<answer>{answer}</answer>", other, False) for answer, other in pairs])
    equal = {pair for pair, verdict in zip(pairs, found, strict=True) if verdict.reason == "correct"}
    return lambda answer, other: (answer, other) in equal


def _wrong(verdicts: Sequence[Verdict]) -> list[str]:
    return [found.answer for found in verdicts if found.reason != "correct" and found.answer is not None]


def _whole(*answers: str) -> bool:
    """Whether the answers were not shortened: the beginnings of two expressions say little."""
    return all(len(answer) < MAX_SHOWN for answer in answers)


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


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p-value of the exact McNemar test: were flips to right and to wrong equally likely, how often would
    they be at least as uneven? (A. Agresti, Categorical Data Analysis, section 11.1: binomial with probability 1/2.)"""
    flips = gained + lost
    tail = sum(math.comb(flips, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**flips)


def paired_change(before: Sequence[float], after: Sequence[float]) -> PairedChange:
    """Difference of two measures on the same problems. Its interval is narrower than two separate ones, because most
    problems do not change.

    For answers that are right or wrong the interval is Wald's with half an observation added to each of the four cells
    (A. Agresti and Y. Min, Statistics in Medicine 2005), which also holds where few answers flip; for shares it is
    Student's t-interval of the differences.

    Raises:
        ValueError: the two have different lengths or none.
    """
    n = len(before)
    if n == 0 or n != len(after):
        raise ValueError(f"{n} and {len(after)} outcomes are not pairs")
    changes = [float(a) - float(b) for b, a in zip(before, after, strict=True)]
    gained, lost = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    difference = math.fsum(changes) / n
    if any(value not in (0, 1) for value in (*before, *after)):
        margin = t_margin(changes) if n > 1 else 1.0
        low, high = max(-1.0, difference - margin), min(1.0, difference + margin)
        return PairedChange(difference, low, high, gained, lost, n, None)
    centre = (gained - lost) / (n + 2)
    margin = _Z95 * math.sqrt(gained + lost + 1 - (gained - lost) ** 2 / (n + 2)) / (n + 2)
    low, high = max(-1.0, centre - margin), min(1.0, centre + margin)
    return PairedChange(difference, low, high, gained, lost, n, mcnemar(gained, lost))


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (ddof 1) and 95 % t-interval of the mean; these two are ``None`` for one value."""
    mean = statistics.fmean(values)
    found: dict[str, Any] = {"mean": mean, "sd": None, "low": None, "high": None, "values": list(values)}
    if len(values) > 1:
        margin = t_margin(values)
        found |= {"sd": statistics.stdev(values), "low": mean - margin, "high": mean + margin}
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
    squares += t_quantile(problems - 1) ** 2 * of_problems
    return mean - math.sqrt(squares), mean + math.sqrt(squares)


def t_margin(values: Sequence[float]) -> float:
    """Half the width of the 95 % t-interval of the mean of two or more values."""
    return t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def t_quantile(freedom: int, probability: float = 0.975) -> float:
    """Quantile (above the median) of Student's t for whole degrees of freedom, by bisection of its distribution."""
    freedom, low, high = min(freedom, _NORMAL), 0.0, 1.0
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
