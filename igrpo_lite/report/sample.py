"""One completion worth showing to a person."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sample:
    """A completion with what is needed to judge it by eye.

    Attributes:
        question: the problem.
        draft: the draft that the model was shown, in stage 2.
        completion: what the model wrote.
        answer: the gold answer.
        reason: verdict, as in :class:`igrpo_lite.types.Score`.
        reward: its weighted reward, if any part applied.
    """

    question: str
    draft: str | None
    completion: str
    answer: str
    reason: str
    reward: float | None
