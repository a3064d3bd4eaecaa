"""Every objective against its paper's formula, written out token by token in plain floats, and its gradient by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from igrpo_lite.algorithms.objectives import TokenLoss, Totals, reduce_loss, sampler_weights, token_loss
from igrpo_lite.config import RunConfig

KINDS = ("grpo", "gspo", "cispo", "dapo", "dr_grpo")
MODES = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
small = st.floats(-0.75, 0.75, width=32)
small_rows = st.lists(st.lists(st.tuples(small, small, small, small), max_size=5), min_size=1, max_size=4)


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def padded(rows, index: int, filler: float = 0.0) -> torch.Tensor:
    """Component ``index`` of the tuples of ragged rows, padded on the right."""
    width = max(len(r) for r in rows)
    return torch.tensor([[t[index] for t in r] + [filler] * (width - len(r)) for r in rows], dtype=torch.float64)


def rows_mask(rows) -> torch.Tensor:
    lengths = torch.tensor([len(r) for r in rows])
    return torch.arange(max(len(r) for r in rows))[None] < lengths[:, None]


def scalar_loss(options: RunConfig, ratio, logprob, advantage, reference, weight) -> float:
    """One token's loss as the papers write it, given the ratio that counts for it."""
    if options.loss_type == "cispo":
        loss = -min(ratio, 5.0 if options.epsilon_high is None else options.epsilon_high) * advantage * logprob
    else:
        high = 1 + (options.epsilon if options.epsilon_high is None else options.epsilon_high)
        loss = -min(ratio * advantage, min(max(ratio, 1 - options.epsilon), high) * advantage)
    rho = math.exp(reference - logprob)
    return weight * loss + options.beta * (rho - math.log(rho) - 1)


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("bounds", [{}, {"epsilon_high": 0.28}])
@settings(max_examples=50, deadline=None)
@given(rows=small_rows, advantage=st.floats(-2, 2, width=32))
def test_every_token_equals_the_formula(kind, bounds, rows, advantage):
    options = RunConfig(loss_type=kind, beta=0.05, **bounds)
    logprobs, old, reference, weights = (padded(rows, i) for i in range(4))
    advantages = torch.full((len(rows),), advantage, dtype=torch.float64)
    found = token_loss(logprobs, old, advantages, rows_mask(rows), options, reference, weights)
    for j, tokens in enumerate(rows):
        mean = sum(lp - o for lp, o, _, _ in tokens) / max(1, len(tokens))
        for t, (lp, o, ref, weight) in enumerate(tokens):
            ratio = math.exp(mean if kind == "gspo" else lp - o)
            assert float(found.loss[j, t]) == pytest.approx(
                scalar_loss(options, ratio, lp, advantage, ref, weight), abs=1e-9
            )
            assert float(found.kl[j, t]) == pytest.approx(math.exp(ref - lp) - (ref - lp) - 1, abs=1e-9)


@pytest.mark.parametrize(
    ("overrides", "ratio", "advantage", "expected", "clipped"),
    [
        ({}, 1.5, 0.5, -0.6, True),
        ({}, 1.5, -0.5, 0.75, False),
        ({}, 0.5, -1.0, 0.8, True),
        ({}, 0.5, 1.0, -0.5, False),
        ({}, 1.0, 2.0, -2.0, False),
        ({"epsilon_high": 0.28}, 1.25, 1.0, -1.25, False),
        ({"epsilon_high": 0.28}, 1.5, 1.0, -1.28, True),
    ],
)
def test_clipping_by_hand(overrides, ratio, advantage, expected, clipped):
    options, advantages = RunConfig(**overrides), torch.tensor([advantage])
    found = token_loss(row(math.log(ratio)), row(0.0), advantages, row(1).bool(), options)
    assert float(found.loss) == pytest.approx(expected, rel=1e-6)
    assert bool(found.clipped) is clipped


@pytest.mark.parametrize(
    ("overrides", "ratio", "advantage", "weight", "capped"),
    [
        ({}, 6.0, 1.0, 5.0, True),
        ({}, 6.0, -1.0, 5.0, True),
        ({}, 4.0, 1.0, 4.0, False),
        ({}, 0.1, -1.0, 0.1, False),
        ({"epsilon_high": 2.0}, 3.0, 1.0, 2.0, True),
        ({}, 6.0, 0.0, 5.0, False),
    ],
)
def test_cispos_cap_by_hand(overrides, ratio, advantage, weight, capped):
    options, advantages = RunConfig(loss_type="cispo", **overrides), torch.tensor([advantage])
    found = token_loss(row(-0.5), row(-0.5 - math.log(ratio)), advantages, row(1).bool(), options)
    assert float(found.loss) == pytest.approx(weight * advantage * 0.5)
    assert bool(found.clipped) is capped


@pytest.mark.parametrize(("log_rho", "kl"), [(-0.3, 0.040818), (0.0, 0.0), (0.3, 0.049859)])
def test_k3_by_hand(log_rho, kl):
    zero = row(0.0)
    found = token_loss(zero, zero, torch.zeros(1), row(1).bool(), RunConfig(beta=1.0), row(log_rho))
    assert float(found.kl) == pytest.approx(kl, abs=1e-6)
    assert float(found.loss) == pytest.approx(kl, abs=1e-6)


def off_policy(**options):
    """Log-probabilities that moved since sampling: (loss summed and differentiated, ratio, rho, advantages, mask)."""
    logprobs = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    old = logprobs.detach() + 0.3 * torch.randn(3, 6, dtype=torch.float64)
    reference = logprobs.detach() + 0.3 * torch.randn(3, 6, dtype=torch.float64)
    advantages = torch.tensor([1.0, -0.7, 0.4], dtype=torch.float64)
    mask = torch.arange(6)[None] < torch.tensor([[6], [4], [1]])
    found = token_loss(logprobs, old, advantages, mask, RunConfig(**options), reference)
    found.loss.sum().backward()
    log_ratio = (logprobs - old).detach()
    return logprobs.grad, log_ratio, torch.exp(reference - logprobs).detach(), advantages[:, None], mask, found


def test_gradient_is_the_papers():
    """Equation 29: per token ``(I_clip A r + beta (rho - 1)) grad log pi``."""
    gradient, log_ratio, rho, a, mask, found = off_policy(beta=0.1)
    ratio = log_ratio.exp()
    inside = torch.where(a >= 0, ratio <= 1.2, ratio >= 0.8)
    torch.testing.assert_close(-gradient, (inside * a * ratio + 0.1 * (rho - 1)) * mask)
    assert (found.clipped == ~inside & mask).all()
    assert 0 < found.clipped.sum() < mask.sum()


def test_gradient_of_gspo():
    """2507.18071: each of a sequence's T tokens has the loss ``-s A``, and s, the geometric mean, moves by s / T."""
    gradient, log_ratio, _, a, mask, found = off_policy(loss_type="gspo", epsilon=0.03)
    length = mask.sum(dim=1, keepdim=True)
    s = torch.exp((log_ratio * mask).sum(dim=1, keepdim=True) / length)
    inside = torch.where(a >= 0, s <= 1.03, s >= 0.97)
    assert 0 < inside.sum() < 3
    torch.testing.assert_close(-gradient, inside * a * s * mask)
    assert (found.clipped == ~inside & mask).all()


def test_gradient_of_cispo():
    """2506.13585: a token above the cap still learns, with the cap as its weight."""
    gradient, log_ratio, _, a, mask, found = off_policy(loss_type="cispo", epsilon_high=1.1)
    ratio = log_ratio.exp()
    torch.testing.assert_close(-gradient, ratio.clamp(max=1.1) * a * mask)
    assert (found.clipped == (ratio > 1.1) & mask).all()
    assert 0 < found.clipped.sum() < mask.sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("filler", [0.0, -math.inf, math.nan])
def test_padding_has_no_effect(kind, filler):
    """Whatever stands in padded places; also a row in which nothing learns at all."""
    options = RunConfig(loss_type=kind, beta=0.1)
    rows = [[tuple(torch.randn(3).tolist()) for _ in range(n)] for n in (4, 0, 2)]
    mask, advantages = rows_mask(rows), torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)

    def run(filler: float, width: int) -> tuple[TokenLoss, torch.Tensor, torch.Tensor]:
        def fill(index: int) -> torch.Tensor:
            more = torch.full((3, width - 4), filler, dtype=torch.float64)
            return torch.cat([padded(rows, index, filler), more], dim=1)

        wide = torch.cat([mask, torch.zeros(3, width - 4, dtype=torch.bool)], dim=1)
        logprobs = fill(0).requires_grad_()
        found = token_loss(logprobs, fill(1), advantages, wide, options, fill(2))
        loss = reduce_loss(found.loss, wide.double(), wide.sum(dim=1), Totals(3, 6), options)
        loss.backward()
        assert not found.loss[~wide].any()
        assert not found.clipped[~wide].any()
        return found, loss, logprobs.grad

    _, loss, gradient = run(filler, width=7)
    _, expected_loss, expected = run(0.0, width=4)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(gradient[:, :4], expected)
    assert not gradient[:, 4:].any()
    assert not gradient[:, :4][~mask].any()


@pytest.mark.parametrize("kind", KINDS)
def test_token_advantages_of_either_shape(kind):
    logprobs, old, mask = torch.randn(2, 3), torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool)
    per_row = torch.tensor([0.5, -1.0])
    a = token_loss(logprobs, old, per_row, mask, RunConfig(loss_type=kind))
    b = token_loss(logprobs, old, per_row[:, None].expand(2, 3), mask, RunConfig(loss_type=kind))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=50, deadline=None)
@given(rows=small_rows, cap=st.sampled_from([0.8, 1.5, 3.0]))
def test_sampler_weights_equal_the_formula(mode, rows, cap):
    options = RunConfig(importance_sampling_mode=mode)
    policy, sampler = padded(rows, 0).requires_grad_(), padded(rows, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("igrpo_lite.algorithms.objectives.SAMPLER_CAP", cap)
        found = sampler_weights(policy, sampler, rows_mask(rows), options)
    assert found.shape == policy.shape
    assert not found.requires_grad
    for j, tokens in enumerate(rows):
        for t, (lp, reported, _, _) in enumerate(tokens):
            log_ratio = sum(a - b for a, b, _, _ in tokens) if mode.startswith("sequence") else lp - reported
            ratio = math.exp(log_ratio)
            if abs(ratio - cap) < 1e-6:
                continue  # either side of the cap is right
            kept = {"none": 1.0, "truncate": min(ratio, cap), "mask": 0.0 if ratio > cap else ratio}
            assert float(found[j, t]) == pytest.approx(kept[mode.split("_")[-1]], abs=1e-9)


@pytest.mark.parametrize("mode", MODES[1:])
def test_a_token_the_sampler_did_not_score_counts_with_ratio_one(mode):
    options = RunConfig(importance_sampling_mode=mode)
    found = sampler_weights(row(-1.0, -2.0, -3.0), row(-1.5, math.nan, -9.0), row(1, 1, 0).bool(), options)
    expected = row(math.exp(0.5), 1.0, 1.0) if mode.startswith("token") else row(*[math.exp(0.5)] * 3)
    torch.testing.assert_close(found, expected)


def test_kl_is_not_weighted_by_the_sampler():
    loss = token_loss(row(-1), row(-1), torch.ones(1), row(1).bool(), RunConfig(beta=0.1), row(-2), row(0.0)).loss
    assert float(loss) == pytest.approx(0.1 * (math.exp(-1) + 1 - 1))


@pytest.mark.parametrize("tokens", ["all", "t-spmo"])
@pytest.mark.parametrize("kind", [None, *KINDS])
@settings(max_examples=50, deadline=None)
@given(rows=small_rows, spare=st.integers(0, 5), factor=st.sampled_from([1.0, 2.5]))
def test_reduction_equals_the_formula(kind, tokens, rows, spare, factor):
    """``spare``: learning sequences, of one token each, that were left out; ``factor``: tokens beyond the weighted."""
    options = RunConfig(loss_type=kind, tokens=tokens, max_completion_length=7)
    values, weights = padded(rows, 0), padded(rows, 1)
    counts = [factor * len(r) for r in rows]
    totals = Totals(len(rows) + spare, sum(counts) + spare)
    found = reduce_loss(values, weights, torch.tensor(counts, dtype=torch.float64), totals, options)
    sums = [sum(v * w for v, w, _, _ in r) for r in rows]
    if tokens == "t-spmo" or kind in ("dapo", "cispo"):
        expected = sum(sums) / max(1.0, sum(counts) + spare)
    elif kind == "dr_grpo":
        expected = sum(sums) / (7 * (len(rows) + spare))
    else:
        expected = sum(s / c for s, c in zip(sums, counts, strict=True) if c) / (len(rows) + spare)
    assert float(found) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("tokens", ["all", "t-spmo"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_do_not_depend_on_how_a_step_is_cut(kind, tokens):
    """Whole, row by row, and without the sequences of zero advantage, whose gradient is zero."""
    options = RunConfig(loss_type=kind, tokens=tokens, max_completion_length=8)
    mask = torch.arange(6)[None] < torch.tensor([[6], [4], [1], [3], [0]])
    start, old = torch.randn(2, 5, 6, dtype=torch.float64)
    advantages = torch.tensor([1.0, -0.7, 0.0, 0.4, 0.9], dtype=torch.float64)
    totals = Totals(5, float(mask.sum()))

    def gradient(parts: list[list[int]]) -> tuple[float, torch.Tensor]:
        logprobs, loss = start.clone().requires_grad_(), 0.0
        for part in parts:
            width = int(mask[part].sum(dim=1).max())  # each part is trimmed
            cut = [t[part][:, :width] for t in (logprobs, old, mask)]
            values = token_loss(cut[0], cut[1], advantages[part], cut[2], options).loss
            share = reduce_loss(values, cut[2].double(), cut[2].sum(dim=1), totals, options)
            share.backward()
            loss += float(share.detach())
        return loss, logprobs.grad

    whole, expected = gradient([[0, 1, 2, 3, 4]])
    assert expected.abs().max() > 0
    for parts in ([[0], [1], [2], [3], [4]], [[4, 0], [3, 2, 1]], [[0, 1], [3]]):
        loss, found = gradient(parts)
        assert loss == pytest.approx(whole)
        torch.testing.assert_close(found, expected)
