"""Group-relative advantages (arXiv 2602.09000 sections 3.1 and 3.2.4)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from igrpo_lite.types import Score

STD_EPSILON = 1e-4
"""Added to the standard deviation, as TRL does; the paper calls it equivalent. It keeps rewards that differ by noise
(a judge's 0.700 and 0.701) from being blown up to full advantages."""


def reward_tensor(scores: Sequence[Score]) -> Tensor:
    """Rewards of a group, ``[G]``, with ``nan`` where no reward applied."""
    return torch.tensor([math.nan if score.reward is None else score.reward for score in scores])


def group_advantages(rewards: Tensor, epsilon: float = STD_EPSILON) -> Tensor:
    """``(R - mean) / (std + epsilon)`` within one group, with the sample standard deviation (ddof = 1).

    Args:
        rewards: ``[G]``; ``nan`` marks a completion that no reward scored.

    Returns:
        ``[G]``; all zero for a group whose scored rewards are all equal, zero for unscored completions. Equality is
        tested on the rewards: a standard deviation of equal floats need not come out as 0.
    """
    scored = ~torch.isnan(rewards)
    values = rewards[scored]
    advantages = torch.zeros_like(rewards)
    if values.numel() > 1 and values.max() != values.min():
        advantages[scored] = (values - values.mean()) / (values.std(unbiased=True) + epsilon)
    return advantages


def has_signal(rewards: Tensor) -> bool:
    """Whether a group's scored rewards differ at all, so that it can teach something."""
    values = rewards[~torch.isnan(rewards)]
    return values.numel() > 1 and bool(values.max() != values.min())
