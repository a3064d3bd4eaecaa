"""The two-stage rollout of iGRPO (arXiv 2602.09000, algorithm 1); GRPO is its first stage alone.

    for each problem:  D = N drafts from pi(. | q)                      stage 1
                       d = the draft with the highest reward            algorithms/drafts.py
                       O = G refinements from pi(. | Concat(q, d))      stage 2

Both stages sample from the same policy; nothing here has a gradient. A problem's rollout is a plan
(algorithms/plans.py): it says from top to bottom what is sampled and scored (algorithms/groups.py). All problems of a
step share the engine, in one of three schedules with the same rollouts:

* ``overlap``: a problem's refinements join the batch that still decodes other problems' drafts;
* ``barrier``: all drafts, then all refinements, then T-SPMO's replays (algorithms/replay.py);
* ``ahead``: the next step's drafts beside this step's refinements. Drafts are context and never learn, so refinements
  stay exactly on-policy; a draft comes from the policy before the last update.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from igrpo_lite.algorithms.drafts import DraftChoice, choose_draft
from igrpo_lite.algorithms.groups import Groups, Place, SampleKey
from igrpo_lite.algorithms.plans import All, Barrier, Driver, Plan
from igrpo_lite.algorithms.replay import Replay, choose_restarts, replay
from igrpo_lite.config import LEARNING_STAGES, RunConfig
from igrpo_lite.prompts import PromptBuilder
from igrpo_lite.rewards.scorer import Scorer
from igrpo_lite.sampling.base import Request, Sampler
from igrpo_lite.types import Completion, Group, Problem, Score


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


def learning_groups(rollout: Rollout, algorithm: str) -> tuple[Group, ...]:
    """The groups of a rollout whose tokens learn, without its replays: refinements; for ``grpo`` and for a rollout of
    one stage the only group; for ``igrpo-joint`` both."""
    stages = LEARNING_STAGES[algorithm if rollout.stage2 is not None else "grpo"]
    return tuple(group for group in rollout.groups if group.stage in stages)


class RolloutCollector:
    """Samples and scores the rollouts of one step.

    Args:
        config: counts, temperatures, draft choice, schedule and replay.
        seed: the run's seed; each request's own seed hashes it with step, place, problem, stage and index.
        on_progress: called with (finished, expected) completions; replays are expected once they are known of.

    Attributes:
        judge_tokens: that the policy has written as a judge.
    """

    def __init__(
        self,
        sampler: Sampler,
        scorer: Scorer,
        prompts: PromptBuilder,
        config: RunConfig,
        seed: int,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.sampler, self.scorer, self.prompts, self.config, self.seed = sampler, scorer, prompts, config, seed
        self.groups = Groups(scorer, prompts, config, seed)
        self.driver = Driver(sampler, scorer.threads if scorer.in_worker else 0, self._on_sampled)
        self.on_progress = on_progress
        self.judge_tokens = self._done = self._total = 0
        self._drafted: dict[tuple[int, int], Group] = {}  # by step and slot: the drafts of ``ahead``

    def collect(
        self, problems: Sequence[Problem], step: int, first_slot: int = 0, upcoming: Sequence[Problem] = ()
    ) -> list[Rollout]:
        """One rollout per problem, in order.

        ``step`` and the problem's place, counted from ``first_slot``, enter every seed: further problems of a step go
        on counting where the earlier ones ended.

        Args:
            upcoming: problems of the next step; with the ``ahead`` schedule their drafts are sampled on the way.
        """
        run, ahead = self.driver.run, self.config.schedule == "ahead"
        mine, later = self._places(problems, step, first_slot), self._places(upcoming if ahead else (), step + 1)
        new = [p for p in mine if p.key not in self._drafted]
        refined = sum(not p.single for p in mine)
        self._done, self._total = 0, sum(map(self._n_drafts, new + later)) + refined * self.config.n_refinements
        if ahead:  # the first step has no drafts yet, nor have problems put in by dynamic sampling
            self._keep(new, run([self._stage1(p) for p in new]))
        plans: list[Plan[Any]] = [self._rollout(p) for p in mine]
        found = run(plans + [self._stage1(p) for p in later], barrier=self.config.schedule == "barrier")
        self._keep(later, found[len(mine) :])
        return found[: len(mine)]

    # The algorithm, for one problem.

    def _rollout(self, p: Place) -> Plan[Rollout]:
        """Stage 1, then stage 2. Where the drafts learn too, T-SPMO's replays of them run beside stage 2."""
        drafts = self._drafted.pop(p.key, None) or (yield from self._stage1(p, joins=not p.single))
        if p.single:
            return Rollout(drafts, replays=(yield from self._replays(p, drafts)))
        (choice, refinements, more), replays = yield All([self._stage2(p, drafts), self._replays(p, drafts)])
        return Rollout(drafts, choice, refinements, replays + more)

    def _stage1(self, p: Place, joins: bool = False) -> Plan[Group]:
        """N drafts from the plain prompt; for GRPO the only stage. ``joins``: refinements follow in the same batch."""
        return self.groups.group(p, "stage1", self.prompts.first(p.problem.question), self._n_drafts(p), joins)

    def _stage2(self, p: Place, drafts: Group) -> Plan[tuple[DraftChoice, Group, tuple[Replay, ...]]]:
        """G refinements from the prompt with the best draft in it, and T-SPMO's replays of them."""
        yield Barrier()
        rng = random.Random(p.seed(self.seed, "choice"))
        choice = choose_draft(drafts.completions, drafts.scores, self.config, rng)
        draft = drafts.completions[choice.index]
        prompt = self.prompts.second(p.problem.question, drafts.prompt, draft.ids)
        refinements = yield from self.groups.group(p, "stage2", prompt, self.config.n_refinements)
        return choice, refinements, (yield from self._replays(p, refinements))

    def _replays(self, p: Place, group: Group) -> Plan[tuple[Replay, ...]]:
        """T-SPMO's fresh continuations from inside a success and a failure of a group that learns."""
        if not self.config.is_replayed(group.stage, p.single):
            return ()
        restarts = choose_restarts(group, random.Random(p.seed(self.seed, group.stage, "replay")))
        self._total += len(restarts) * self.config.tspmo_replay
        yield Barrier()
        return (yield from replay(self.groups, p, group, restarts))

    # Places, progress, drafts that wait for their step.

    def _places(self, problems: Sequence[Problem], step: int, first_slot: int = 0) -> list[Place]:
        slots = enumerate(problems, start=first_slot)
        return [Place(problem, step, slot, self.config.is_single_stage(step, slot)) for slot, problem in slots]

    def _n_drafts(self, p: Place) -> int:
        return self.config.num_generations if p.single else self.config.n_drafts

    def _on_sampled(self, request: Request, completion: Completion) -> None:
        assert isinstance(request.tag, SampleKey)
        if request.tag.turn:
            self.judge_tokens += len(completion.ids)
        else:
            self._done += 1
            self.on_progress(self._done, self._total)

    def _keep(self, places: Sequence[Place], drafts: Sequence[Group]) -> None:
        self._drafted |= {p.key: group for p, group in zip(places, drafts, strict=True)}

    def drafted(self) -> list[dict[str, Any]]:
        """The drafts that ``ahead`` has sampled for the next step, as JSON types, in problem order."""
        groups = self._drafted.values()
        return [{name: [asdict(x) for x in getattr(g, name)] for name in ("completions", "scores")} for g in groups]

    def load_drafted(self, state: Sequence[Mapping[str, Any]], problems: Sequence[Problem], step: int) -> None:
        """Continue from :meth:`drafted`; ``problems`` are those of ``step``, the next one; none if there is none."""
        self._drafted.clear()
        for slot, (problem, saved) in enumerate(zip(problems, state, strict=False)):
            completions = tuple(Completion(**_tuples(entry)) for entry in saved["completions"])
            scores = tuple(Score(**entry) for entry in saved["scores"])
            prompt = self.prompts.first(problem.question)
            self._drafted[step, slot] = Group(problem, "stage1", prompt, completions, scores)

    def close(self) -> None:
        """End the threads that wait for rewards; a reward that is still being computed is given up."""
        self.driver.close(self.scorer.close)


def _tuples(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}
