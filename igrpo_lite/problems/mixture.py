"""How many problems each part of a mixture gives, and which."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence

from igrpo_lite.types import Problem


def shares(sizes: Sequence[int], weights: Sequence[float] | None = None, most: int | None = None) -> list[int]:
    """How many problems to take of each part: in proportion to ``weights``, rounded down, and as many as there are.

    No part gives more than its size, and all together not more than ``most``. Without weights parts count by their
    size: everything is taken, or the same share of each.
    """
    weights = list(weights or sizes)
    scale = min((size / weight for size, weight in zip(sizes, weights, strict=True) if weight), default=0.0)
    if most is not None and any(weights):
        scale = min(scale, most / sum(weights))
    # The small addend: 3 * (1000 / 3) must not become 999.
    return [min(size, int(scale * weight + 1e-9)) for size, weight in zip(sizes, weights, strict=True)]


def question_key(question: str) -> str:
    """The question without differences of case, white space and Unicode form: equal keys are the same question."""
    return " ".join(unicodedata.normalize("NFC", question).casefold().split())


def drawn(problems: Sequence[Problem], size: int, salt: str) -> list[Problem]:
    """``size`` of the problems, chosen and ordered by a hash of their question: the order of rows does not matter."""
    return sorted(problems, key=lambda problem: _digest(problem, salt))[:size]


def drawn_in_order(problems: Sequence[Problem], size: int, salt: str) -> list[Problem]:
    """The same choice as :func:`drawn`, in the order of the rows."""
    if size >= len(problems):
        return list(problems)
    chosen = {problem.id for problem in drawn(problems, size, salt)}
    return [problem for problem in problems if problem.id in chosen]


def _digest(problem: Problem, salt: str) -> bytes:
    return hashlib.sha256(f"{salt}|{question_key(problem.question)}".encode("utf-8", "surrogatepass")).digest()
