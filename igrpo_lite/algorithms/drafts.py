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
        shown: whether stage 2 sees it (``draft_fallback``: ``plain`` hides a draft that earned nothing, ``agree``
            any where all drafts earned the same).
    """

    index: int
    tied: bool
    shown: bool


def choose_draft(
    drafts: Sequence[Completion], scores: Sequence[Score], options: RolloutOptions, rng: random.Random
) -> DraftChoice:
    """Pick one draft as ``options`` say.

    The paper takes the best by reward and is silent on ties and on truncated drafts. Drafts that no reward scored
    count as worst. ``rng`` is drawn from only where the options ask for chance.
    """
    eligible = list(range(len(drafts)))
    if options.truncated_drafts == "last_resort":
        eligible = [i for i in eligible if not drafts[i].truncated] or eligible
    selection = rng.choice(("best", "worst")) if options.draft_selection == "mixed" else options.draft_selection
    if selection == "random":
        index = rng.choice(eligible)
        return DraftChoice(index, False, _is_shown(index, scores, options))
    if selection == "worst_formatted":
        eligible = [i for i in eligible if _well_formed(scores[i])] or eligible
    rewards = {i: _reward(scores[i]) for i in eligible}
    target = (max if selection == "best" else min)(rewards.values())
    tied = [i for i in eligible if rewards[i] == target]
    if options.draft_tie_break == "random":
        index = rng.choice(tied)
    elif options.draft_tie_break == "shortest":
        index = min(tied, key=lambda i: len(drafts[i].ids))
    else:
        index = tied[0]
    return DraftChoice(index, len(tied) > 1, _is_shown(index, scores, options))


def _reward(score: Score) -> float:
    return float("-inf") if score.reward is None else score.reward


def _well_formed(score: Score) -> bool:
    """The format reward's word where there is one, else whether any answer was found."""
    form = score.parts.get("format")
    return form > 0 if form is not None else score.answer is not None


def _is_shown(index: int, scores: Sequence[Score], options: RolloutOptions) -> bool:
    if options.draft_fallback == "agree":
        return len({_reward(score) for score in scores}) > 1
    return options.draft_fallback == "none" or _reward(scores[index]) > 0
