"""The protocol of a method, with what methods have in common: drafts, then a second stage, in one plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from igrpo_lite.algorithms.advantages import advantages, reward_tensor
from igrpo_lite.algorithms.drafts import DraftChoice
from igrpo_lite.algorithms.groups import Groups, Place
from igrpo_lite.algorithms.plans import All, Plan
from igrpo_lite.algorithms.replay import Replay
from igrpo_lite.algorithms.tokens import tokens_of
from igrpo_lite.config import RunConfig
from igrpo_lite.types import Completion, Group, Score


@dataclass(frozen=True, slots=True)
class Rollout:
    """All that was sampled for one problem. One-stage GRPO has no ``choice`` and no ``stage2``."""

    stage1: Group
    choice: DraftChoice | None = None
    stage2: Group | None = None
    replays: tuple[Replay, ...] = ()

    @property
    def groups(self) -> tuple[Group, ...]:
        """The stages' groups, without replays."""
        return (self.stage1,) if self.stage2 is None else (self.stage1, self.stage2)

    @property
    def sampled(self) -> int:
        """Completions sampled: the stages' and the replays' continuations."""
        return sum(len(g.completions) for g in self.groups) + sum(len(r.continuations) for r in self.replays)

    @property
    def draft(self) -> Completion | None:
        return None if self.choice is None else self.stage1.completions[self.choice.index]

    @property
    def draft_score(self) -> Score | None:
        return None if self.choice is None else self.stage1.scores[self.choice.index]


class LearningGroup(NamedTuple):
    """A group whose completions learn, from token ``start`` on: those before it were given, not sampled."""

    group: Group
    start: int = 0


Stage2 = tuple[DraftChoice | None, Group | None, tuple[Replay, ...]]
"""The draft that was chosen, the group of the second stage, and continuations from inside completions."""


class Method:
    """A method; it keeps no state. The plans of all problems of a step share one engine (algorithms/plans.py)."""

    def step(self, groups: Groups, places: Sequence[Place]) -> Plan[list[Rollout]]:
        """One rollout per problem, in order. Override it to divide rollouts among problems."""
        return (yield All([self.rollout(groups, p) for p in places]))

    def rollout(self, groups: Groups, p: Place) -> Plan[Rollout]:
        """Stage 1, then stage 2. Where the drafts learn too, T-SPMO's replays of them run beside stage 2."""
        drafts = yield from groups.drafts(p, joins=not p.single)
        if p.single:
            return Rollout(drafts, replays=(yield from self.replays(groups, p, drafts)))
        (choice, group, more), replays = yield All([self.stage2(groups, p, drafts), self.replays(groups, p, drafts)])
        return Rollout(drafts, choice, group, replays + more)

    def stage2(self, groups: Groups, p: Place, drafts: Group) -> Plan[Stage2]:
        """What is sampled once the drafts of a problem are scored. Not called for a problem of one stage."""
        yield from ()
        return None, None, ()

    def replays(self, groups: Groups, p: Place, group: Group) -> Plan[tuple[Replay, ...]]:
        """What the choice of tokens samples from inside a group, if the group learns."""
        if group.stage not in groups.config.learning_stages and not p.single:
            return ()
        return (yield from tokens_of(groups.config).replays(groups, p, group))

    def learning_groups(self, rollout: Rollout, config: RunConfig) -> tuple[LearningGroup, ...]:
        """The groups of a rollout that learn, replays last: of the stages in ``config.ALGORITHMS``, or of the only
        stage that there is."""
        stages = ("stage1",) if rollout.stage2 is None else config.learning_stages
        learning = [LearningGroup(group) for group in rollout.groups if group.stage in stages]
        return (*learning, *(LearningGroup(replay.group, replay.start) for replay in rollout.replays))

    def advantages(self, learning: Sequence[LearningGroup], config: RunConfig) -> list[Tensor]:
        """Advantages ``[G]`` of all groups of a step that learn: ``(R - mean R) / std R``, see ``scale_rewards``."""
        return advantages([reward_tensor(group.scores) for group, _ in learning], config.scale_rewards)
