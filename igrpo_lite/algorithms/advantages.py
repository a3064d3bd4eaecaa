"""Group-relative advantages (arXiv 2602.09000 sections 3.1 and 3.2.4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

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
    """``(R - mean) / (std + epsilon)`` within one group, ``[G]``: the paper's, see :func:`advantages`."""
    return advantages([rewards], "group", epsilon)[0]


def advantages(
    groups: Sequence[Tensor], scale: Literal["group", "batch", "none"] = "group", epsilon: float = STD_EPSILON
) -> list[Tensor]:
    """``(R - mean) / (std + epsilon)``, with the mean of the group and the sample standard deviation (ddof = 1).

    Args:
        groups: rewards, ``[G]`` each (sizes may differ); ``nan`` marks a completion that no reward scored, which is
            left out of mean and standard deviation.
        scale: TRL's ``scale_rewards``: standard deviation of the group (the paper), of all rewards of all ``groups``,
            or no division (Dr. GRPO, arXiv 2503.20783).

    Returns:
        ``[G]`` each; exactly zero for a group whose scored rewards are all equal and for unscored completions. Equality
        is tested on the rewards: neither mean nor standard deviation of equal floats need be exact.
    """
    found = []
    for rewards in groups:
        result = torch.zeros_like(rewards)
        if has_signal(rewards):
            values = _scored(rewards)
            deviations = values - values.mean()
            if scale != "none":
                everything = values if scale == "group" else torch.cat([_scored(group) for group in groups])
                deviations = deviations / (everything.std(unbiased=True) + epsilon)
            result[~torch.isnan(rewards)] = deviations
        found.append(result)
    return found


def has_signal(rewards: Tensor) -> bool:
    """Whether a group's scored rewards differ at all, so that it can teach something."""
    values = _scored(rewards)
    return values.numel() > 1 and bool(values.max() != values.min())


def _scored(rewards: Tensor) -> Tensor:
    return rewards[~torch.isnan(rewards)]
