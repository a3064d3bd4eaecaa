"""Accuracy as a judge gives it who is sometimes wrong: ``reward_funcs: [benchmarks/study/rewards.py:noisy_10]``.

The verdict on a completion is turned round for a fixed share of all texts. Which ones is decided by a hash of question
and completion: the same text gets the same verdict always, as from a judge at temperature 0, so that the noise can
neither be averaged away by sampling a text again nor depends on the order of calls.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from igrpo_lite.answers.answers import verdict

FLIPPED = {"noisy_05": 0.05, "noisy_10": 0.10, "noisy_20": 0.20, "noisy_30": 0.30}
"""Share of texts whose verdict is turned round, by the name of the reward."""


def noisy_05(completions: Sequence[str], question: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """Accuracy with 5 % of the verdicts turned round."""
    return noisy_accuracy(completions, question, answer, FLIPPED["noisy_05"])


def noisy_10(completions: Sequence[str], question: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """Accuracy with 10 % of the verdicts turned round."""
    return noisy_accuracy(completions, question, answer, FLIPPED["noisy_10"])


def noisy_20(completions: Sequence[str], question: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """Accuracy with 20 % of the verdicts turned round."""
    return noisy_accuracy(completions, question, answer, FLIPPED["noisy_20"])


def noisy_30(completions: Sequence[str], question: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """Accuracy with 30 % of the verdicts turned round."""
    return noisy_accuracy(completions, question, answer, FLIPPED["noisy_30"])


def noisy_accuracy(
    completions: Sequence[str], question: Sequence[str], answer: Sequence[str], share: float
) -> list[float]:
    """1.0 for right and 0.0 for wrong completions, turned round for this share of all texts."""
    rows = zip(completions, question, answer, strict=True)
    return [
        float((verdict(text, gold, truncated=False).reason == "correct") != (draw(asked, text) < share))
        for text, asked, gold in rows
    ]


def draw(question: str, completion: str) -> float:
    """A number in [0, 1) that depends on nothing but these texts."""
    digest = hashlib.sha256(f"{question}\0{completion}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
