"""How many problems each part of a mixture gives, and which."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from fractions import Fraction

from igrpo_lite.types import Problem


def shares(sizes: Sequence[int], weights: Sequence[float] | None = None, most: int | None = None) -> list[int]:
    """How many of each part to take so that the counts are in proportion to ``weights`` and as large as can be.

    No part gives more than its size, all together not more than ``most``. Without weights parts count by their size:
    everything is taken, or of each the same share. What rounding leaves over goes to the parts that lost most by it, so
    no count is off its exact share by one or more.
    """
    exact = [Fraction(str(weight)) for weight in (weights or sizes)]
    filled = [(size, weight) for size, weight in zip(sizes, exact, strict=True) if weight]
    if not filled:
        return [0] * len(sizes)
    scale = min(Fraction(size) / weight for size, weight in filled)
    if most is not None:
        scale = min(scale, most / sum(exact, Fraction()))
    wanted = [scale * weight for weight in exact]
    counts = [int(share) for share in wanted]
    lost = sorted(range(len(sizes)), key=lambda part: counts[part] - wanted[part])
    for part in lost[: int(sum(wanted)) - sum(counts)]:
        counts[part] += 1
    return counts


def question_key(question: str) -> str:
    """The question without differences of case, white space and Unicode form: equal keys are the same question."""
    return " ".join(unicodedata.normalize("NFC", question).casefold().split())


def drawn(problems: Sequence[Problem], size: int, salt: str) -> list[Problem]:
    """``size`` of the problems, chosen and ordered by a hash of their question: the order of the rows is no matter."""
    return sorted(problems, key=lambda problem: _digest(problem, salt))[:size]


def drawn_in_order(problems: Sequence[Problem], size: int, salt: str) -> list[Problem]:
    """The same choice as :func:`drawn`, in the order in which the problems came."""
    if size >= len(problems):
        return list(problems)
    chosen = {problem.id for problem in drawn(problems, size, salt)}
    return [problem for problem in problems if problem.id in chosen]


def _digest(problem: Problem, salt: str) -> bytes:
    return hashlib.sha256(f"{salt}|{question_key(problem.question)}".encode("utf-8", "surrogatepass")).digest()
