"""Advantages against the paper's definition, with numbers worked out by hand."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from igrpo_lite.algorithms.advantages import advantages, group_advantages, has_signal

A = math.sqrt(0.75)


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1, 0, 0, 1], [A, -A, -A, A]),
        ([1, 0, 0, 0], [1.5, -0.5, -0.5, -0.5]),
        ([2, 1, 0, 1], [1.5**0.5, 0.0, -(1.5**0.5), 0.0]),
        ([1, 1, 1, 1], [0, 0, 0, 0]),
        ([0.1, 0.1, 0.1], [0, 0, 0]),
        ([3], [0]),
    ],
)
def test_hand_computed(rewards, expected):
    found = group_advantages(torch.tensor(rewards, dtype=torch.float32), epsilon=0.0)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))


def test_epsilon_is_trls():
    found = group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]))
    torch.testing.assert_close(found, torch.tensor([1, -1, -1, 1]) * 0.865875, atol=1e-6, rtol=0)


def test_unscored_completions_are_left_out():
    found = group_advantages(torch.tensor([1.0, math.nan, 0.0, math.nan]), epsilon=0.0)
    torch.testing.assert_close(found, torch.tensor([2**-0.5, 0.0, -(2**-0.5), 0.0]))
    assert not has_signal(torch.tensor([1.0, math.nan, 1.0]))
    assert not has_signal(torch.tensor([math.nan, math.nan]))
    assert has_signal(torch.tensor([1.0, math.nan, 0.0]))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=16))
def test_mean_zero_and_unit_spread(rewards):
    found = group_advantages(torch.tensor(rewards, dtype=torch.float64), epsilon=0.0)
    if max(rewards) == min(rewards):
        assert found.abs().max() == 0
    else:
        assert abs(float(found.mean())) < 1e-6
        assert statistics.stdev(found.tolist()) == pytest.approx(1.0, rel=1e-6)


GROUPS = [[1.0, 0.0, 0.0, 1.0], [0.0, 2.0], [3.0, math.nan, 3.0]]


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ("group", [[A, -A, -A, A], [-(2**-0.5), 2**-0.5], [0, 0, 0]]),
        # 1 0 0 1 0 2 3 3: mean 1.25, squares about it 11.5, of 7 degrees of freedom
        ("batch", [[x / (11.5 / 7) ** 0.5 for x in row] for row in ([0.5, -0.5, -0.5, 0.5], [-1, 1], [0, 0, 0])]),
        ("none", [[0.5, -0.5, -0.5, 0.5], [-1, 1], [0, 0, 0]]),
    ],
)
def test_scales_by_hand(scale, expected):
    found = advantages([torch.tensor(row, dtype=torch.float64) for row in GROUPS], scale, epsilon=0.0)
    assert [row.tolist() for row in found] == [pytest.approx(row) for row in expected]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.floats(-5, 5, width=32) | st.just(math.nan), max_size=6), max_size=4))
def test_every_scale_equals_the_formula(scale, groups):
    found = advantages([torch.tensor(row, dtype=torch.float64) for row in groups], scale, epsilon=0.01)
    assert [row.shape for row in found] == [(len(row),) for row in groups]
    everything = [r for row in groups for r in row if not math.isnan(r)]
    for rewards, result in zip(groups, found, strict=True):
        scored = [r for r in rewards if not math.isnan(r)]
        for reward, advantage in zip(rewards, result.tolist(), strict=True):
            if math.isnan(reward) or len(set(scored)) < 2:
                assert advantage == 0
                continue
            spread = {"group": scored, "batch": everything}.get(scale)
            divisor = 1.0 if spread is None else statistics.stdev(spread) + 0.01
            assert advantage == pytest.approx((reward - statistics.mean(scored)) / divisor, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.1, 0.7, 1.1, 1e-8, -0.3])
@pytest.mark.parametrize("size", [3, 7, 11])
def test_equal_rewards_give_exactly_zero(scale, value, size):
    """The mean of equal floats need not be that float; what is left would be learnt from and not pruned."""
    equal, other = advantages([torch.full((size,), value), torch.tensor([0.0, 1.0])], scale)
    assert not equal.any()
    assert other.any()


def test_the_paper_is_scale_group():
    rewards = torch.tensor([0.1, 1.0, math.nan, 0.0])
    torch.testing.assert_close(group_advantages(rewards), advantages([rewards, torch.rand(3)], "group")[0])


def test_rewards_are_left_as_they_were():
    rewards = torch.tensor([0.1, 1.0, math.nan, 0.0])
    kept = rewards.clone()
    advantages([rewards], "none")
    torch.testing.assert_close(rewards, kept, equal_nan=True)
