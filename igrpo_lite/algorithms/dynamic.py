"""DAPO's dynamic sampling (arXiv 2503.14476, section 3.2): problems that teach nothing give their place to others.

A group whose rewards are all equal has no advantage, so a step of all-right and all-wrong groups learns from few.
Unlike DAPO's, the number of rounds is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from igrpo_lite.algorithms.advantages import has_signal, reward_tensor
from igrpo_lite.algorithms.methods import method_of
from igrpo_lite.algorithms.methods.base import Rollout
from igrpo_lite.algorithms.tokens import tokens_of
from igrpo_lite.config import RunConfig
from igrpo_lite.types import Group, Problem


@dataclass(frozen=True, slots=True)
class Batch:
    """The rollouts of one step.

    Attributes:
        sampled: all of them, in the order of their rounds: for metrics and records.
        kept: those that the update gets.
        rounds: how often problems were replaced; ``None`` without dynamic sampling.
        informative: how many of ``sampled`` can teach.
    """

    sampled: tuple[Rollout, ...]
    kept: tuple[Rollout, ...]
    rounds: int | None
    informative: int


def is_informative(rollout: Rollout, config: RunConfig) -> bool:
    """Whether rewards differ in any group that learns, a replay's included, among completions that the loss reads."""
    return any(_teaches(group, config) for group, _ in method_of(config).learning_groups(rollout, config))


def _teaches(group: Group, config: RunConfig) -> bool:
    rewards = reward_tensor(group.scores)
    if config.mask_truncated_completions:
        whole = torch.tensor([not completion.truncated for completion in group.completions])
        if tokens_of(config).raw_rewards:
            return has_signal(rewards[whole])
        return has_signal(rewards) and bool((whole & ~torch.isnan(rewards)).any())
    return has_signal(rewards)


def with_signal(
    first: Sequence[Rollout],
    others: Iterable[Problem],
    config: RunConfig,
    collect: Callable[[Sequence[Problem], int], list[Rollout]],
) -> Batch:
    """Sample other problems until as many rollouts can teach as ``first`` has.

    It ends early after ``config.dynamic_sampling`` rounds, or when there are no other problems. Then the update gets
    fewer rollouts; if none can teach, it gets ``first`` as it is.

    Args:
        first: the rollouts of the step's own problems.
        others: problems to put in, in this order; read only as far as needed.
        collect: samples rollouts of problems, given the place in the step that the first of them has.
    """
    wanted, left, rounds = len(first), iter(others), 0
    sampled = list(first)
    kept = [rollout for rollout in first if is_informative(rollout, config)]
    if not config.dynamic_sampling:
        return Batch(tuple(first), tuple(first), None, len(kept))
    while len(kept) < wanted and rounds < config.dynamic_sampling:
        problems = list(islice(left, wanted - len(kept)))
        if not problems:
            break
        fresh = collect(problems, len(sampled))
        sampled += fresh
        kept += [rollout for rollout in fresh if is_informative(rollout, config)]
        rounds += 1
    return Batch(tuple(sampled), tuple(kept or first), rounds, len(kept))
