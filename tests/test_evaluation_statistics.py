"""The statistics of evaluations against brute force, other ways of computing them, and published values."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction
from statistics import NormalDist, mean, stdev

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from igrpo_lite.answers.answers import MAX_SHOWN, Verdict
from igrpo_lite.answers.checker import AnswerChecker
from igrpo_lite.evaluation.statistics import (
    compared,
    majority,
    mcnemar,
    mean_estimate,
    paired_change,
    pass_at_k,
    powers_of_two,
    wilson,
)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (5, 10), (10, 10), (1, 7), (120, 200), (1319, 1319)])
def test_wilson_bounds_solve_their_defining_equation(successes, n):
    """Both bounds are proportions from which the observed one is 1.96 standard errors away."""
    found = wilson(successes, n)
    assert found.low <= found.accuracy <= found.high
    for bound in (found.low, found.high):
        distance = 1.959963984540054 * math.sqrt(bound * (1 - bound) / n)
        assert abs(found.accuracy - bound) == pytest.approx(distance, abs=1e-6)


def test_wilson_refuses_nonsense():
    for successes, n in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="not a proportion"):
            wilson(successes, n)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_published(successes, n, low, high):
    """R. G. Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3."""
    found = wilson(successes, n)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample():
    for n in range(1, 8):
        for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
            samples = [True] * correct + [False] * (n - correct)
            subsets = list(itertools.combinations(samples, k))
            assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


@pytest.mark.parametrize(("n", "correct", "k"), [(200, 1, 100), (200, 57, 10), (1000, 3, 500), (20_000, 2, 1)])
def test_pass_at_k_as_the_product_of_its_paper(n, correct, k):
    expected = 1 - np.prod(1 - k / np.arange(n - correct + 1, n + 1))  # arXiv 2107.03374, figure 3
    assert pass_at_k(n, correct, k) == pytest.approx(expected, rel=1e-12)


def test_pass_at_k_at_its_edges():
    assert [powers_of_two(most) for most in (0, 1, 3, 4, 7, 8)] == [[], [1], [1, 2], [1, 2, 4], [1, 2, 4], [1, 2, 4, 8]]
    assert pass_at_k(5000, 1, 5000) == pass_at_k(3, 2, 2) == 1.0
    assert pass_at_k(2**40, 1, 1) == 2**-40  # not lost beside 1
    for n, correct, k in ((4, 5, 1), (4, 1, 0), (4, 1, 5), (4, -1, 1)):
        with pytest.raises(ValueError, match="correct in"):
            pass_at_k(n, correct, k)


def vote(label: str | None) -> Verdict:
    if label is None:
        return Verdict("no_answer", None)
    return Verdict("correct" if label.lower() == "gold" else "wrong", label, "box")


def equal(answer: str, other: str) -> bool:
    return answer.lower() == other.lower()


@given(st.lists(st.sampled_from(["gold", "GOLD", "a", "A", "b", "c", None]), max_size=9))
def test_majority_is_the_share_of_right_winners(labels):
    votes = Counter(label.lower() for label in labels if label is not None)
    winners = [label for label, count in votes.items() if count == max(votes.values())]
    expected = sum(label == "gold" for label in winners) / len(winners) if winners else 0.0
    assert majority([vote(label) for label in labels], equal) == expected


def verdicts(gold: str, *answers: str | None) -> list[Verdict]:
    with AnswerChecker(second_opinion=False) as checker:
        return checker.judge([(f"\\boxed{{{a}}}" if a else "", gold, False) for a in answers])


def test_votes_are_counted_by_value_and_asked_about_only_where_they_decide():
    batches = []

    def judge(items):
        batches.append(len(items))
        with AnswerChecker(second_opinion=False) as checker:
            return checker.judge(items)

    split = verdicts("7", "7", "7.0", "1/2", "0.5", r"\frac12", "9")  # one half has three votes, in three spellings
    tied = verdicts("7", "7", "9", None, "9.0", "$7$")
    clear = verdicts("7", "7", "7", "7", "1", "2")
    hopeless = verdicts("7", "1", "2", "3")
    votes = [split, tied, clear, hopeless, []]
    same = compared(votes, judge)
    assert batches == [4 * 3 // 2 + 1]  # pairs of the four wrong texts of the first, and of the two of the second
    assert [majority(mine, same) for mine in votes] == [0.0, 0.5, 1.0, 0.0, 0.0]


def test_shortened_and_unbalanced_answers_are_not_confused():
    long = ["1" + "x" * (MAX_SHOWN - 1), "2" + "x" * (MAX_SHOWN - 1)]
    texts = ["{3", "3", "{{4 5", "5", *long]
    votes = [[Verdict("correct", "7", "box"), *(Verdict("wrong", text, "number") for text in texts)]]
    with AnswerChecker(second_opinion=False) as checker:
        same = compared(votes, checker.judge)
    assert not same("5", "{{4 5")
    assert not same(long[1], long[0])


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (0, 1), (3, 0), (5, 5), (9, 2), (2, 9), (40, 61), (300, 250)])
def test_mcnemar_sums_every_outcome_that_is_no_more_likely(gained, lost):
    n = gained + lost
    chances = [Fraction(math.comb(n, k), 2**n) for k in range(n + 1)]
    expected = sum(chance for chance in chances if chance <= chances[gained])
    assert mcnemar(gained, lost) == pytest.approx(float(expected), rel=1e-12)


def test_mcnemar_as_published():
    # P. Armitage and G. Berry, Statistical Methods in Medical Research, 3rd edition, p. 127, by StatsDirect
    assert mcnemar(12, 2) == pytest.approx(0.0129, abs=5e-5)
    # A. Agresti, Categorical Data Analysis, table 10.1 (approval ratings), by exact2x2 of R
    assert mcnemar(86, 150) == pytest.approx(3.716e-05, rel=1e-3)
    assert mcnemar(20_000, 0) == 0.0  # below the smallest float


def test_mean_estimate_against_the_standard_library():
    values = [0.0, 0.25, 1.0, 0.5, 0.75, 0.25]
    found = mean_estimate(values)
    assert found.accuracy == pytest.approx(mean(values))
    assert found.error == pytest.approx(stdev(values) / math.sqrt(6))
    margin = NormalDist().inv_cdf(0.975) * found.error
    assert (found.low, found.high) == pytest.approx((mean(values) - margin, mean(values) + margin))
    assert mean_estimate([0.9, 1.0, 0.7]).high == 1.0
    nothing, one = mean_estimate([0.0] * 20), mean_estimate([0.3])
    assert (nothing.error, nothing.low, nothing.high) == (0.0, 0.0, pytest.approx(0.1611, abs=5e-5))
    assert (one.error, one.low, one.high) == (None, 0.0, 1.0)
    with pytest.raises(ValueError, match="no values"):
        mean_estimate([])


def test_intervals_of_a_change_cover_the_truth():
    """400 experiments each, with many flips and with few."""
    rng = np.random.default_rng(0)

    def coverage(n: int, gain: float, loss: float) -> float:
        counts = rng.multinomial(n, [gain, loss, 1 - gain - loss], size=400)
        found = [changed(n, gained, lost) for gained, lost, _ in counts.tolist()]
        return mean(one.low <= gain - loss <= one.high for one in found)

    assert coverage(200, 0.2, 0.1) == pytest.approx(0.95, abs=0.03)
    assert coverage(30, 0.05, 0.02) > 0.94


def test_the_interval_of_a_change_of_shares_covers_the_truth():
    rng = np.random.default_rng(1)
    held = []
    for _ in range(400):
        chance = rng.uniform(size=60)
        after = np.clip(chance + rng.choice([-0.1, 0.2], size=60), 0, 1)
        samples = [rng.binomial(8, p) / 8 for p in (chance, after)]
        change = paired_change(*samples)
        truth = (0.405 + 0.68) / 2 - 0.5  # means of max(0, U - 0.1), of min(1, U + 0.2), and of U
        held.append(change.low <= truth <= change.high)
        assert change.p_value is None
    assert mean(held) == pytest.approx(0.95, abs=0.03)


def changed(n: int, gained: int, lost: int):
    before = [False] * gained + [True] * lost + [False] * (n - gained - lost)
    after = [True] * gained + [False] * lost + [False] * (n - gained - lost)
    return paired_change(before, after)


def test_paired_change_by_hand():
    before = [True] * 50 + [False] * 50
    after = [True] * 45 + [False] * 5 + [True] * 20 + [False] * 30
    change = paired_change(before, after)
    assert (change.gained, change.lost, change.n) == (20, 5, 100)
    assert change.difference == pytest.approx(0.15)
    # 15 / 102 and 1.96 * sqrt(26 - 15^2 / 102) / 102
    assert (change.low, change.high) == pytest.approx((0.14706 - 0.09373, 0.14706 + 0.09373), abs=1e-4)
    assert change.p_value == pytest.approx(0.00408, abs=1e-5)
    with pytest.raises(ValueError, match="not pairs"):
        paired_change([True], [])


def test_paired_change_as_published():
    """A. Agresti, Categorical Data Analysis, section 10.1: 794, 150, 86 and 570 of 1,600; -0.04 (-0.06, -0.02)."""
    change = changed(1600, 86, 150)
    assert (change.difference, change.low, change.high) == pytest.approx((-0.04, -0.06, -0.02), abs=0.002)


def test_a_change_of_nothing_is_not_certain_and_one_of_shares_has_no_mcnemar():
    still = changed(40, 0, 0)
    assert still.low < -0.03 < 0.03 < still.high
    assert still.p_value == 1.0
    shares = paired_change([0.25, 0.5, 1.0, 0.0], [0.5, 0.5, 0.75, 1.0])
    assert (shares.difference, shares.gained, shares.lost, shares.p_value) == (0.25, 2, 1, None)
    margin = 3.182446 * stdev([0.25, 0.0, -0.25, 1.0]) / 2  # Student's t with 3 degrees of freedom
    assert (shares.low, shares.high) == pytest.approx((0.25 - margin, 1.0))
    assert paired_change([0.5], [0.75]).low == -0.75
