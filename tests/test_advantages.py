"""Advantages against the paper's definition, with numbers worked out by hand."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from igrpo_lite.algorithms.advantages import group_advantages, has_signal

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


@given(st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=16))
def test_mean_zero_and_unit_spread(rewards):
    found = group_advantages(torch.tensor(rewards, dtype=torch.float64), epsilon=0.0)
    if max(rewards) == min(rewards):
        assert found.abs().max() == 0
    else:
        assert abs(float(found.mean())) < 1e-6
        assert statistics.stdev(found.tolist()) == pytest.approx(1.0, rel=1e-6)
