"""The clipped objective against equations 4, 5 and 21-29 of arXiv 2602.09000, written out token by token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from igrpo_lite.algorithms.objectives import clipped_token_loss, sequence_mean

small = st.floats(-0.75, 0.75, width=32)


def scalar_loss(logprob, old, advantage, low, high, reference=None, beta=0.0):
    ratio = math.exp(logprob - old)
    loss = -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    if reference is None:
        return loss
    rho = math.exp(reference - logprob)
    return loss + beta * (rho - math.log(rho) - 1)


@given(st.lists(st.tuples(small, small, small), min_size=1, max_size=6), st.floats(-2, 2, width=32))
def test_every_token_equals_the_formula(tokens, advantage):
    logprobs, old, reference = (torch.tensor([[t[i] for t in tokens]], dtype=torch.float64) for i in range(3))
    found = clipped_token_loss(
        logprobs, old, torch.tensor([advantage], dtype=torch.float64), 0.2, 0.28, reference, beta=0.05
    )
    for column, (lp, o, ref) in enumerate(tokens):
        expected = scalar_loss(lp, o, advantage, 0.2, 0.28, ref, 0.05)
        assert float(found.loss[0, column]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "clipped"),
    [
        (1.5, 0.5, -0.6, True),
        (1.5, -0.5, 0.75, False),
        (0.5, -1.0, 0.8, True),
        (0.5, 1.0, -0.5, False),
        (1.0, 2.0, -2.0, False),
    ],
)
def test_clipping_by_hand(ratio, advantage, expected, clipped):
    found = clipped_token_loss(torch.tensor([[math.log(ratio)]]), torch.zeros(1, 1), torch.tensor([advantage]), 0.2)
    assert float(found.loss) == pytest.approx(expected, rel=1e-6)
    assert bool(found.clipped) is clipped


@pytest.mark.parametrize(("log_rho", "kl"), [(-0.3, 0.040818), (0.0, 0.0), (0.3, 0.049859)])
def test_k3_by_hand(log_rho, kl):
    zero = torch.zeros(1, 1)
    found = clipped_token_loss(zero, zero, torch.zeros(1), reference_logprobs=torch.tensor([[log_rho]]), beta=1.0)
    assert float(found.kl) == pytest.approx(kl, abs=1e-6)


def test_gradient_is_the_papers():
    """Equation 29: per token ``(I_clip A r + beta (rho - 1)) grad log pi``."""
    torch.manual_seed(0)
    logprobs = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    old, reference = logprobs.detach() + 0.3 * torch.randn(3, 5), logprobs.detach() + 0.3 * torch.randn(3, 5)
    advantages = torch.tensor([1.0, -0.7, 0.4], dtype=torch.float64)
    found = clipped_token_loss(logprobs, old, advantages, 0.2, None, reference, 0.1)
    found.loss.sum().backward()
    ratio, rho = torch.exp(logprobs - old).detach(), torch.exp(reference - logprobs).detach()
    a = advantages[:, None]
    inside = torch.where(a >= 0, ratio <= 1.2, ratio >= 0.8)
    torch.testing.assert_close(-logprobs.grad, inside * a * ratio + 0.1 * (rho - 1))


def test_sequence_mean_is_the_mean_of_means():
    values = torch.arange(12.0).reshape(3, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    expected = (torch.tensor([0.0, 1, 2, 3]).mean() + torch.tensor([4.0, 5]).mean() + 8.0) / 7
    torch.testing.assert_close(sequence_mean(values, mask, num_sequences=7), expected)


def test_token_advantages_of_either_shape():
    logprobs, old = torch.randn(2, 3), torch.randn(2, 3)
    row = torch.tensor([0.5, -1.0])
    a = clipped_token_loss(logprobs, old, row)
    b = clipped_token_loss(logprobs, old, row[:, None].expand(2, 3))
    torch.testing.assert_close(a.loss, b.loss)
