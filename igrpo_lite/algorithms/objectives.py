"""The clipped objective of GRPO and iGRPO, token by token (arXiv 2602.09000, equations 4, 5 and 21-29).

Plain functions of log-probabilities; in stage 2 everything is conditioned on the prompt that holds the draft, so the
one-stage and the two-stage algorithm share them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TokenLoss(NamedTuple):
    """Loss per token ``[B, T]``, whether the clip was active there, and the KL estimate (zeros without reference)."""

    loss: Tensor
    clipped: Tensor
    kl: Tensor


def clipped_token_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    reference_logprobs: Tensor | None = None,
    beta: float = 0.0,
) -> TokenLoss:
    """``-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta kl`` with ``r = exp(logprobs - old_logprobs)``.

    Args:
        logprobs: of the policy being trained, ``[B, T]``.
        old_logprobs: of the policy that sampled, ``[B, T]``, constant.
        advantages: ``[B]`` (one for all tokens of a completion) or ``[B, T]``.
        reference_logprobs: of the reference policy under the same prompt; the KL estimate is Schulman's k3,
            ``rho - log rho - 1`` with ``rho = exp(reference - logprobs)``.
    """
    advantages = advantages[:, None] if advantages.dim() == 1 else advantages
    ratio = torch.exp(logprobs - old_logprobs)
    low, high = 1.0 - epsilon, 1.0 + (epsilon if epsilon_high is None else epsilon_high)
    loss = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    clipped = ((ratio < low) & (advantages < 0)) | ((ratio > high) & (advantages > 0))
    kl = torch.zeros_like(loss)
    if reference_logprobs is not None:
        log_rho = reference_logprobs - logprobs
        kl = torch.exp(log_rho) - log_rho - 1.0
        loss = loss + beta * kl
    return TokenLoss(loss, clipped, kl)


def sequence_mean(values: Tensor, mask: Tensor, num_sequences: int) -> Tensor:
    """``1/num_sequences sum_j 1/T_j sum_t values[j, t]``: TRL's ``loss_type="grpo"``, the paper's normalisation.

    Args:
        values: ``[B, T]``.
        mask: bool ``[B, T]``, the tokens that learn; ``T_j`` counts them.
        num_sequences: all sequences of the step, also those not in this micro-batch or left out because their
            advantage is zero.
    """
    lengths = mask.sum(dim=1).clamp(min=1)
    return ((values * mask).sum(dim=1) / lengths).sum() / num_sequences
