"""The objectives: loss per token, then one number (arXiv 2602.09000, equations 4, 5 and 21-29, and its relatives).

    J = 1/G sum_j 1/T_j sum_t [ w min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) - beta kl ],    r = pi / pi_old

| `loss_type` | differs from this in | source |
|---|---|---|
| `grpo` (default) | nothing | 2602.09000, 2402.03300 |
| `gspo` | r: geometric mean over the sequence, one for all its tokens | 2507.18071 |
| `cispo` | min(...): r A log pi, r constant and at most `epsilon_high`; mean over all tokens of the step | 2506.13585 |
| `dapo` | mean over all tokens of the step | 2503.14476; TRL |
| `dr_grpo` | 1/T_j: one over `max_completion_length` | 2503.20783 |

Plain functions of log-probabilities of the tokens that learn. In stage 2 everything is conditioned on the prompt that
holds the draft, so one-stage and two-stage algorithms share them. Selected tokens (S-GRPO, T-SPMO, entropy) come as
shorter rows. Results and gradients are those of TRL 1.16 (``tests/test_trl_oracle.py``), except that with ``entropy``
TRL has the KL term and the products and means over a sequence over all tokens, and here over the chosen ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from igrpo_lite.algorithms.tokens import tokens_of
from igrpo_lite.config import RunConfig, UpdateOptions

CISPO_CAP = 5.0
"""Highest ratio of ``cispo`` unless ``epsilon_high`` is set (arXiv 2510.13786)."""

SAMPLER_CAP = 3.0
"""Cap of the weights that correct for the sampler's arithmetic: TRL's ``vllm_importance_sampling_clip_max``."""


class TokenLoss(NamedTuple):
    """``[B, T]`` each, 0 where nothing learns: the loss; whether a clip held the ratio there; the KL estimate."""

    loss: Tensor
    clipped: Tensor
    kl: Tensor


def token_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    options: UpdateOptions,
    reference_logprobs: Tensor | None = None,
    sampler_weights: Tensor | None = None,
) -> TokenLoss:
    """Minus the bracket above, token by token.

    Args:
        logprobs: of the policy being trained, ``[B, T]``.
        old_logprobs: of the policy that sampled, ``[B, T]``, constant.
        advantages: ``[B]`` (one for all tokens of a completion) or ``[B, T]``.
        mask: bool ``[B, T]``, the tokens that learn; what stands elsewhere has no effect.
        options: ``loss_type``, ``epsilon``, ``epsilon_high``, ``beta``.
        reference_logprobs: of the reference policy under the same prompt, ``[B, T]``; the KL estimate is Schulman's
            k3, ``rho - log rho - 1`` with ``rho = exp(reference - logprobs)``. Without them there is no KL term.
        sampler_weights: ``w``, ``[B, T]``, see :func:`sampler_weights`; the KL term is not weighted.
    """
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    # Padding is neutral before the exp: masking an inf or nan afterwards would leave a nan in the gradient.
    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0)
    if options.loss_type == "gspo":
        lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
        log_ratio = (log_ratio.sum(dim=1, keepdim=True) / lengths).expand_as(mask)
    ratio = torch.exp(log_ratio)
    if options.loss_type == "cispo":
        loss, clipped = _capped(ratio, advantages, logprobs, options)
    else:
        loss, clipped = _clipped(ratio, advantages, options)
    if sampler_weights is not None:
        loss = loss * sampler_weights
    kl = torch.zeros_like(loss)
    if reference_logprobs is not None:
        log_rho = (reference_logprobs - logprobs).masked_fill(~mask, 0.0)
        kl = torch.exp(log_rho) - log_rho - 1.0
        loss = loss + options.beta * kl
    return TokenLoss(loss.masked_fill(~mask, 0.0), clipped & mask, kl)


def _clipped(ratio: Tensor, advantages: Tensor, options: UpdateOptions) -> tuple[Tensor, Tensor]:
    """``-min(r A, clip(r) A)``."""
    low = 1.0 - options.epsilon
    high = 1.0 + (options.epsilon if options.epsilon_high is None else options.epsilon_high)
    loss = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    return loss, ((ratio > high) & (advantages > 0)) | ((ratio < low) & (advantages < 0))


def _capped(ratio: Tensor, advantages: Tensor, logprobs: Tensor, options: UpdateOptions) -> tuple[Tensor, Tensor]:
    """``-min(r, cap) A log pi`` with a constant ratio: a token above the cap still learns, with the weight ``cap``."""
    cap = CISPO_CAP if options.epsilon_high is None else options.epsilon_high
    loss = -ratio.detach().clamp(max=cap) * advantages * logprobs
    return loss, (ratio > cap) & (advantages != 0)


@torch.no_grad()
def sampler_weights(logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, options: UpdateOptions) -> Tensor:
    """Truncated importance sampling for a sampler whose arithmetic differs from the policy's (TRL's vLLM correction).

    The ratio ``exp(logprobs - sampler_logprobs)``, of each token or (``sequence_*``) of the product over the masked
    tokens of a row, is cut to ``SAMPLER_CAP`` (``*_truncate``) or, above it, set to 0 (``*_mask``).

    Args:
        logprobs: of the weights that sampled, computed by the policy, ``[B, T]``.
        sampler_logprobs: as the sampler reported them, ``[B, T]``; ``nan`` where it did not: that token's ratio is 1.
        mask: bool ``[B, T]``, the tokens that learn.
        options: ``importance_sampling_mode``.

    Returns:
        ``[B, T]`` without gradient; all 1 with mode ``none``.
    """
    mode = options.importance_sampling_mode
    if mode == "none":
        return torch.ones_like(logprobs)
    log_ratio = (logprobs - sampler_logprobs).nan_to_num(nan=0.0).masked_fill(~mask, 0.0)
    if mode.startswith("sequence"):
        log_ratio = log_ratio.sum(dim=1, keepdim=True).expand_as(mask)
    ratio = torch.exp(log_ratio)
    return ratio.clamp(max=SAMPLER_CAP) if mode.endswith("truncate") else ratio.masked_fill(ratio > SAMPLER_CAP, 0.0)


class Totals(NamedTuple):
    """Normalisers of a whole optimizer step, so that its loss does not depend on how memory cuts it into parts.

    Attributes:
        sequences: all learning sequences, also those left out because their gradient is zero.
        tokens: sum of their counts.
    """

    sequences: int
    tokens: float


def reduce_loss(values: Tensor, weights: Tensor, counts: Tensor, totals: Totals, options: RunConfig) -> Tensor:
    """One part's share of the step's loss, a scalar; the shares of all parts of a step add up to it.

    ``grpo``, ``gspo``: mean over each sequence, then over sequences. ``dr_grpo``: sum over sequences times
    ``max_completion_length``. The others: mean over the tokens of the step. T-SPMO has one normaliser of
    its own for every ``loss_type``: the sum of all pair weights, which is ``totals.tokens``.

    Args:
        values: loss per token, ``[B, T]``.
        weights: of the tokens, ``[B, T]``; 0 where nothing learns.
        counts: ``T_j``, what a sequence is divided by, ``[B]``: its learning tokens, or all of them where the weights
            make up for those left out (Horvitz-Thompson) or where TRL does (entropy).
        totals: of the whole step.
        options: ``loss_type``, ``tokens``, ``max_completion_length``.
    """
    sums = (weights * values).sum(dim=1)
    kind = "dapo" if tokens_of(options).one_mean else options.loss_type or "grpo"
    if kind in ("grpo", "gspo"):
        return (sums / counts.clamp(min=1)).sum() / totals.sequences
    if kind == "dr_grpo":
        return sums.sum() / (totals.sequences * options.max_completion_length)
    return sums.sum() / max(totals.tokens, 1.0)
