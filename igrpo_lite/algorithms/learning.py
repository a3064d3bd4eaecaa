"""What each completion of a step contributes to the loss.

    for each group that learns (algorithms/methods):  A = the method's advantages, (R - mean R) / std R
                                                      T_j, w = the choice of tokens (algorithms/tokens)

What is random is drawn once for each completion, from the run's seed, so it is the same in every pass over the same
rollouts.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from igrpo_lite.algorithms.advantages import reward_tensor
from igrpo_lite.algorithms.methods import method_of
from igrpo_lite.algorithms.methods.base import LearningGroup, Rollout
from igrpo_lite.algorithms.objectives import Totals
from igrpo_lite.algorithms.tokens import tokens_of
from igrpo_lite.algorithms.tokens.base import NOTHING, LearningSequence
from igrpo_lite.config import RunConfig
from igrpo_lite.sampling.base import request_seed
from igrpo_lite.types import Group


def learning_sequences(rollouts: Sequence[Rollout], config: RunConfig, step: int) -> list[LearningSequence]:
    """Every completion of the learning groups of a step, also those that turn out to teach nothing.

    Where a choice of tokens asks the policy first (entropy), all its candidates learn here; the update then asks.
    """
    method, choice = method_of(config), tokens_of(config)
    groups = [(place, group) for place, r in enumerate(rollouts) for group in method.learning_groups(r, config)]
    learning, found = [group for _, group in groups], []
    for (place, (group, start)), row in zip(groups, _advantages(learning, config), strict=True):
        path = ("tokens", step, place, group.problem.id, group.stage, *((start,) if start else ()))

        def rng(index: int, path: tuple[object, ...] = path) -> random.Random:
            return random.Random(request_seed(config.seed, *path, index))

        learned = choice.learn(group, row, start, config, rng)
        for completion, part in zip(group.completions, learned, strict=True):
            masked = config.mask_truncated_completions and completion.truncated
            found.append(LearningSequence(group.prompt, completion, config.temperature, NOTHING if masked else part))
    return found


def totals(sequences: Sequence[LearningSequence]) -> Totals:
    """What the losses of a step are divided by: what was sampled to learn from."""
    return Totals(len(sequences), sum(sequence.learning.count for sequence in sequences))


def teaching(sequences: Sequence[LearningSequence], beta: float) -> list[LearningSequence]:
    """Those with a gradient: without KL penalty a zero advantage has none, so its tokens need not be run."""
    return [s for s in sequences if s.learning.indices and (beta or any(s.learning.advantages))]


def _advantages(learning: Sequence[LearningGroup], config: RunConfig) -> list[list[float]]:
    """Of each group, one per completion: the method's advantages, or raw rewards for a choice that takes them."""
    if tokens_of(config).raw_rewards:
        return [_rewards(group, config) for group, _ in learning]
    return [row.tolist() for row in method_of(config).advantages(learning, config)]


def _rewards(group: Group, config: RunConfig) -> list[float]:
    """``nan`` where no reward applied, and for masked completions: as if unscored, they enter no mean."""
    rewards: list[float] = reward_tensor(group.scores).tolist()
    masked = [config.mask_truncated_completions and completion.truncated for completion in group.completions]
    return [math.nan if mask else reward for mask, reward in zip(masked, rewards, strict=True)]
