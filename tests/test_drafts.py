"""Choice of the draft: the paper's argmax and every option where the paper is silent."""

from __future__ import annotations

import random

import pytest

from igrpo_lite.algorithms.drafts import choose_draft
from igrpo_lite.config import RolloutOptions
from igrpo_lite.types import Completion, Score


def draft(length=4, cut=False):
    return Completion(tuple(range(length)), "text", (0.0,) * length, "length" if cut else "stop")


def score(reward, form=1.0):
    return Score(reward, {"accuracy": reward, "format": form}, "correct" if reward else "wrong", "1")


def choose(rewards, drafts=None, forms=None, seed=0, **options):
    drafts = drafts or [draft() for _ in rewards]
    forms = forms or [1.0] * len(rewards)
    scores = [score(r, f) for r, f in zip(rewards, forms, strict=True)]
    return choose_draft(drafts, scores, RolloutOptions(**options), random.Random(seed))


def test_best_reward_wins_and_first_of_equals():
    assert choose([0.0, 1.1, 0.1, 1.1]).index == 1
    assert choose([0.0, 1.1, 0.1, 1.1]).tied
    assert not choose([0.0, 1.1, 0.1, 0.2]).tied


def test_all_wrong_still_chooses_one_as_the_paper_does():
    choice = choose([0.0, 0.0, 0.0])
    assert (choice.index, choice.shown) == (0, True)


def test_fallback_hides_a_draft_that_earned_nothing():
    assert not choose([0.0, 0.0], draft_fallback="plain").shown
    assert choose([0.0, 0.1], draft_fallback="plain").shown


def test_tie_break_shortest_and_random():
    lengths = [draft(9), draft(3), draft(5)]
    assert choose([1.0, 1.0, 1.0], lengths, draft_tie_break="shortest").index == 1
    drawn = {choose([1.0, 1.0, 0.0, 1.0], seed=seed, draft_tie_break="random").index for seed in range(50)}
    assert drawn == {0, 1, 3}


@pytest.mark.parametrize(("rule", "expected"), [("last_resort", 1), ("allow", 0)])
def test_truncated_drafts(rule, expected):
    drafts = [draft(cut=True), draft(), draft()]
    assert choose([1.0, 0.5, 0.2], drafts, truncated_drafts=rule).index == expected


def test_only_truncated_drafts_are_better_than_none():
    assert choose([0.0, 1.0], [draft(cut=True), draft(cut=True)]).index == 1


def test_worst_formatted_takes_the_worst_well_formed():
    assert choose([0.0, 0.1, 1.1], forms=[0.0, 1.0, 1.0], draft_selection="worst_formatted").index == 1
    assert choose([0.5, 0.1], forms=[0.0, 0.0], draft_selection="worst_formatted").index == 1


def test_random_selection_covers_all():
    assert {choose([1.0, 0.0, 0.5], seed=s, draft_selection="random").index for s in range(50)} == {0, 1, 2}


def test_unscored_drafts_are_the_worst():
    scores = [Score(None, {"mine": None}, "wrong"), Score(-2.0, {"mine": -2.0}, "wrong")]
    assert choose_draft([draft(), draft()], scores, RolloutOptions(), random.Random(0)).index == 1
