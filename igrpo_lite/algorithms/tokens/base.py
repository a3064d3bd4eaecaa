"""The protocol of a choice of tokens, and what it says of each completion."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from igrpo_lite.algorithms.groups import Groups, Place
from igrpo_lite.algorithms.plans import Plan
from igrpo_lite.algorithms.replay import Replay
from igrpo_lite.config import RunConfig
from igrpo_lite.policy.tree import Branch
from igrpo_lite.types import Completion, Group, Prompt


@dataclass(frozen=True, slots=True)
class Learning:
    """What one completion contributes to the loss.

    Attributes:
        indices: token positions in the completion, ascending; may be empty.
        weights: factor of each token's loss, one per index.
        advantages: one per index.
        count: what the completion counts in the normalisers (``T_j``): ``|o_j|`` where all tokens are meant, the
            chosen tokens for S-GRPO, the transitions for T-SPMO. It may be 0.
    """

    indices: tuple[int, ...]
    weights: tuple[float, ...]
    advantages: tuple[float, ...]
    count: float


NOTHING = Learning((), (), (), 0.0)


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


class Measured(NamedTuple):
    """What the policy says of the learning tokens of a sequence, one value per index, without gradient."""

    logprobs: tuple[float, ...]
    entropies: tuple[float, ...]


Measure = Callable[[Sequence[LearningSequence]], list[Measured]]
"""Runs the policy over sequences: those of the step, or the same completions under other prompts."""


class Tokens:
    """A choice of tokens; it keeps no state.

    Attributes:
        raw_rewards: :meth:`learn` gets the rewards in place of the method's advantages. A completion that no reward
            scored has ``nan``, and so has a truncated one with ``mask_truncated_completions``.
        one_mean: the loss is divided by the sum of all counts of the step, whatever ``loss_type`` says.
        uncertain: tokens are chosen for being uncertain, so their entropy does not show the policy's.
    """

    raw_rewards: ClassVar[bool] = False
    one_mean: ClassVar[bool] = False
    uncertain: ClassVar[bool] = False

    def learn(
        self,
        group: Group,
        advantages: Sequence[float],
        start: int,
        config: RunConfig,
        rng: Callable[[int], random.Random],
    ) -> list[Learning]:
        """What each completion of a group contributes to the loss, one per completion.

        Args:
            advantages: one per completion; rewards with ``raw_rewards``.
            start: leading tokens that were given, not sampled; they must not learn.
            rng: randomness of the completion with this index; the same in every pass over the rollouts.
        """
        raise NotImplementedError

    def measured(
        self, sequences: Sequence[LearningSequence], measure: Measure, config: RunConfig
    ) -> list[LearningSequence]:
        """The choice again, for a method that must ask the policy first: all sequences of the step that have an
        advantage, in order, with what they contribute now. Each call of ``measure`` costs a forward pass."""
        return list(sequences)

    def replays(self, groups: Groups, p: Place, group: Group) -> Plan[tuple[Replay, ...]]:
        """What else is sampled from inside the completions of a group that learns, beside the rollouts."""
        yield from ()
        return ()


def equal(indices: Sequence[int], advantage: float, count: float) -> Learning:
    """These tokens, with weight 1 and the same advantage."""
    return Learning(tuple(indices), (1.0,) * len(indices), (advantage,) * len(indices), count)
