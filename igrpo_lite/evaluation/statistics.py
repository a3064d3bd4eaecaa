"""What several samples of one problem say: unbiased pass@k and the vote of the majority."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

from igrpo_lite.answers.answers import MAX_SHOWN, Verdict

Judge = Callable[[Sequence[tuple[str, str, bool]]], Sequence[Verdict]]
"""Verdicts on (text of a completion, gold answer, whether it was truncated), in order, like ``AnswerChecker.judge``."""

Same = Callable[[str, str], bool]
"""Whether two answers are the same."""


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
