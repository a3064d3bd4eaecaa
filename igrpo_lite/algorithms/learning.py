"""What each completion of a step contributes to the loss: its advantage, and which of its tokens learn.

    for each learning group:  A = (R - mean R) / std R          algorithms/advantages.py
                              T_j = all tokens, or a selection  algorithms/selection.py, algorithms/tspmo.py

T-SPMO makes advantages and selection of the rewards in one; its replays are groups of their own. Selections are drawn
once for each completion, from the run's seed, so they are the same in every pass over the same rollouts.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from igrpo_lite.algorithms.advantages import advantages, reward_tensor
from igrpo_lite.algorithms.objectives import Totals
from igrpo_lite.algorithms.rollout import Rollout, learning_groups
from igrpo_lite.algorithms.selection import Learning, all_tokens, stochastic_tokens
from igrpo_lite.algorithms.tspmo import prefix_matching
from igrpo_lite.config import RunConfig
from igrpo_lite.policy.tree import Branch
from igrpo_lite.sampling.base import request_seed
from igrpo_lite.types import Completion, Group, Prompt

_NOTHING = Learning((), (), (), 0.0)


@dataclass(frozen=True, slots=True)
class LearningSequence:
    """A completion, its prompt, and its share of the loss."""

    prompt: Prompt
    completion: Completion
    temperature: float
    learning: Learning

    @property
    def branch(self) -> Branch:
        """What the model must score."""
        return Branch(self.prompt.ids, self.completion.ids, self.learning.indices, self.temperature)

    def with_learning(self, learning: Learning) -> LearningSequence:
        return replace(self, learning=learning)


def learning_sequences(rollouts: Sequence[Rollout], config: RunConfig, step: int) -> list[LearningSequence]:
    """Every completion of the learning groups of a step, also those that turn out to teach nothing.

    With ``tokens: entropy`` all tokens are candidates here; the update, which can measure entropies, chooses.
    """
    if config.tokens == "t-spmo":
        return [sequence for rollout in rollouts for sequence in _prefix_matched(rollout, config)]
    found = []
    for place, (rollout, rows) in enumerate(zip(rollouts, _advantages(rollouts, config), strict=True)):
        for group, row in zip(learning_groups(rollout, config.algorithm), rows, strict=True):
            for index, (completion, advantage) in enumerate(zip(group.completions, row.tolist(), strict=True)):
                seed = request_seed(config.seed, "tokens", step, place, group.problem.id, group.stage, index)
                learning = _selected(completion, advantage, config, random.Random(seed))
                found.append(_sequence(rollout, group, completion, learning, config))
    return found


def _advantages(rollouts: Sequence[Rollout], config: RunConfig) -> list[list[Tensor]]:
    """Advantages of each learning group of each rollout, ``[G]``."""
    rewards = [[reward_tensor(g.scores) for g in learning_groups(r, config.algorithm)] for r in rollouts]
    scaled = iter(advantages([group for groups in rewards for group in groups], config.scale_rewards))
    return [[next(scaled) for _ in groups] for groups in rewards]


def totals(sequences: Sequence[LearningSequence]) -> Totals:
    """What the losses of a step are divided by: what was sampled to learn from."""
    return Totals(len(sequences), sum(sequence.learning.count for sequence in sequences))


def teaching(sequences: Sequence[LearningSequence], beta: float) -> list[LearningSequence]:
    """Those with a gradient: without KL penalty a zero advantage has none, so its tokens need not be run."""
    return [s for s in sequences if s.learning.indices and (beta or any(s.learning.advantages))]


def _selected(completion: Completion, advantage: float, config: RunConfig, rng: random.Random) -> Learning:
    if config.mask_truncated_completions and completion.truncated:
        return _NOTHING
    if config.tokens == "s-grpo":
        return stochastic_tokens(len(completion.ids), advantage, config, rng)
    return all_tokens(len(completion.ids), advantage)


def _prefix_matched(rollout: Rollout, config: RunConfig) -> list[LearningSequence]:
    trees = [(group, 0) for group in learning_groups(rollout, config.algorithm)]
    trees += [(replay.group, replay.start) for replay in rollout.replays]
    found = []
    for group, start in trees:
        rewards = reward_tensor(group.scores).tolist()
        if config.mask_truncated_completions:  # as if unscored: they enter no mean and learn nothing
            rewards = [math.nan if c.truncated else r for c, r in zip(group.completions, rewards, strict=True)]
        learned = prefix_matching([completion.ids for completion in group.completions], rewards, config, start)
        pairs = zip(group.completions, learned, strict=True)
        found += [_sequence(rollout, group, completion, learning, config) for completion, learning in pairs]
    return found


def _sequence(
    rollout: Rollout, group: Group, completion: Completion, learning: Learning, config: RunConfig
) -> LearningSequence:
    temperature = config.stage_temperature(group.stage, rollout.stage2 is None)
    return LearningSequence(group.prompt, completion, temperature, learning)
