"""The rollouts of a step: the plans of the method (algorithms/methods), on one engine, in one of three schedules.

All stages sample from the same policy; nothing here has a gradient. A problem's rollout is a plan
(algorithms/plans.py): it says from top to bottom what is sampled and scored (algorithms/groups.py). The schedules have
the same rollouts:

* ``overlap``: a problem's refinements join the batch that still decodes other problems' drafts;
* ``barrier``: all drafts, then all refinements, then T-SPMO's replays;
* ``ahead``: the next step's drafts beside this step's refinements. Drafts are context and never learn, so refinements
  stay exactly on-policy; a draft comes from the policy before the last update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from igrpo_lite.algorithms.groups import Groups, Place, SampleKey
from igrpo_lite.algorithms.methods import method_of
from igrpo_lite.algorithms.methods.base import Rollout
from igrpo_lite.algorithms.plans import Driver, Plan
from igrpo_lite.config import RunConfig
from igrpo_lite.prompts import PromptBuilder
from igrpo_lite.rewards.scorer import Scorer
from igrpo_lite.sampling.base import Request, Sampler
from igrpo_lite.types import Completion, Group, Problem, Score


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
        self.groups, self.method = Groups(scorer, prompts, config, seed), method_of(config)
        self.driver = Driver(sampler, scorer.threads if scorer.in_worker else 0, self._on_sampled)
        self.on_progress = on_progress
        self.judge_tokens = self._done = 0

    def collect(
        self, problems: Sequence[Problem], step: int, first_slot: int = 0, upcoming: Sequence[Problem] = ()
    ) -> list[Rollout]:
        """One rollout per problem, in order.

        ``step`` and the problem's place, counted from ``first_slot``, enter every seed: further problems of a step go
        on counting where the earlier ones ended.

        Args:
            upcoming: problems of the next step; with the ``ahead`` schedule their drafts are sampled on the way.
        """
        groups, run, ahead = self.groups, self.driver.run, self.config.schedule == "ahead"
        mine, later = self._places(problems, step, first_slot), self._places(upcoming if ahead else (), step + 1)
        new = [p for p in mine if p.key not in groups.drafted]
        refined = sum(not p.single for p in mine)
        self._done, groups.expected = 0, sum(map(groups.n_drafts, new + later)) + refined * self.config.n_refinements
        if ahead:  # the first step has no drafts yet, nor have problems put in by dynamic sampling
            self._keep(new, run([groups.stage1(p) for p in new]))
        plans: list[Plan[Any]] = [self.method.step(groups, mine)]  # algorithms/methods: the algorithm
        rollouts, *drafts = run(plans + [groups.stage1(p) for p in later], barrier=self.config.schedule == "barrier")
        self._keep(later, drafts)
        return list(rollouts)

    # Places, progress, drafts that wait for their step.

    def _places(self, problems: Sequence[Problem], step: int, first_slot: int = 0) -> list[Place]:
        slots = enumerate(problems, start=first_slot)
        return [Place(problem, step, slot, self.config.is_single_stage(step, slot)) for slot, problem in slots]

    def _on_sampled(self, request: Request, completion: Completion) -> None:
        assert isinstance(request.tag, SampleKey)
        if request.tag.turn:
            self.judge_tokens += len(completion.ids)
        else:
            self._done += 1
            self.on_progress(self._done, self.groups.expected)

    def _keep(self, places: Sequence[Place], drafts: Sequence[Group]) -> None:
        self.groups.drafted |= {p.key: group for p, group in zip(places, drafts, strict=True)}

    def drafted(self) -> list[dict[str, Any]]:
        """The drafts that ``ahead`` has sampled for the next step, as JSON types, in problem order."""
        groups = self.groups.drafted.values()
        return [{name: [asdict(x) for x in getattr(g, name)] for name in ("completions", "scores")} for g in groups]

    def load_drafted(self, state: Sequence[Mapping[str, Any]], problems: Sequence[Problem], step: int) -> None:
        """Continue from :meth:`drafted`; ``problems`` are those of ``step``, the next one; none if there is none."""
        self.groups.drafted.clear()
        for slot, (problem, saved) in enumerate(zip(problems, state, strict=False)):
            completions = tuple(Completion(**_tuples(entry)) for entry in saved["completions"])
            scores = tuple(Score(**entry) for entry in saved["scores"])
            prompt = self.prompts.first(problem.question)
            self.groups.drafted[step, slot] = Group(problem, "stage1", prompt, completions, scores)

    def close(self) -> None:
        """End the threads that wait for rewards; a reward that is still being computed is given up."""
        self.driver.close(self.scorer.close)


def _tuples(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}
