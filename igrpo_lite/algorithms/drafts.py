"""Which draft stage 2 sees (arXiv 2602.09000 section 3.2.2, equation 2: the argmax of the training reward)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from igrpo_lite.config import RolloutOptions
from igrpo_lite.types import Completion, Score


@dataclass(frozen=True, slots=True)
class DraftChoice:
    """The chosen draft.

    Attributes:
        index: its place among the drafts.
        tied: whether another eligible draft had the same reward.
    """

    index: int
    tied: bool


def choose_draft(
    drafts: Sequence[Completion], scores: Sequence[Score], options: RolloutOptions, rng: random.Random
) -> DraftChoice:
    """The best draft by reward, or with ``draft_selection: random`` any.

    The paper is silent on ties: the first wins, which is a fair draw, since drafts are independent. Unless
    ``truncated_drafts`` is ``allow``, truncated ones are chosen only if all are. Drafts that no reward scored count as
    worst. ``rng`` is drawn from only for ``random``.
    """
    eligible = list(range(len(drafts)))
    if options.truncated_drafts == "last_resort":
        eligible = [i for i in eligible if not drafts[i].truncated] or eligible
    if options.draft_selection == "random":
        return DraftChoice(rng.choice(eligible), tied=False)
    rewards = {i: float("-inf") if (reward := scores[i].reward) is None else reward for i in eligible}
    best = [i for i in eligible if rewards[i] == max(rewards.values())]
    return DraftChoice(best[0], tied=len(best) > 1)
