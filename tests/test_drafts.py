"""Choice of the draft: the paper's argmax and every option where the paper is silent."""

from __future__ import annotations

import random

import pytest

from igrpo_lite.algorithms.drafts import choose_draft
from igrpo_lite.config import RolloutOptions
from igrpo_lite.types import Completion, Score


def draft(cut=False):
    return Completion((0, 1, 2, 3), "text", (0.0,) * 4, "length" if cut else "stop")


def score(reward):
    return Score(reward, {"accuracy": reward}, "correct" if reward else "wrong", "1")


def choose(rewards, drafts=None, seed=0, **options):
    drafts = drafts or [draft() for _ in rewards]
    scores = [score(reward) for reward in rewards]
    return choose_draft(drafts, scores, RolloutOptions(**options), random.Random(seed))


def test_best_reward_wins_and_first_of_equals():
    assert choose([0.0, 1.1, 0.1, 1.1]).index == 1
    assert choose([0.0, 1.1, 0.1, 1.1]).tied
    assert not choose([0.0, 1.1, 0.1, 0.2]).tied


def test_all_wrong_still_chooses_one_as_the_paper_does():
    choice = choose([0.0, 0.0, 0.0])
    assert (choice.index, choice.tied) == (0, True)


@pytest.mark.parametrize(("rule", "expected"), [("last_resort", 1), ("allow", 0)])
def test_truncated_drafts(rule, expected):
    drafts = [draft(cut=True), draft(), draft()]
    assert choose([1.0, 0.5, 0.2], drafts, truncated_drafts=rule).index == expected


def test_only_truncated_drafts_are_better_than_none():
    assert choose([0.0, 1.0], [draft(cut=True), draft(cut=True)]).index == 1


def test_random_selection_covers_all():
    assert {choose([1.0, 0.0, 0.5], seed=s, draft_selection="random").index for s in range(50)} == {0, 1, 2}


def test_unscored_drafts_are_the_worst():
    scores = [Score(None, {"mine": None}, "wrong"), Score(-2.0, {"mine": -2.0}, "wrong")]
    assert choose_draft([draft(), draft()], scores, RolloutOptions(), random.Random(0)).index == 1
