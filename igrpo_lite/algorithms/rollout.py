"""The two-stage rollout of iGRPO (arXiv 2602.09000, algorithm 1), event by event; GRPO is its first stage alone.

    for each problem:  D = N drafts from pi(. | q)                      stage 1
                       d = the draft with the highest reward            algorithms/drafts.py
                       O = G refinements from pi(. | Concat(q, d))      stage 2

Both stages sample from the same policy; nothing here has a gradient. A problem's stage 2 needs only that problem's
stage 1, so with the ``overlap`` schedule its refinements join the batch that still decodes other problems' drafts.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from igrpo_lite.algorithms.drafts import DraftChoice, choose_draft
from igrpo_lite.config import RolloutOptions
from igrpo_lite.prompts import PromptBuilder
from igrpo_lite.rewards.scorer import Scorer
from igrpo_lite.sampling.base import Request, Sampler, request_seed
from igrpo_lite.types import Completion, Group, Problem, Prompt, Score, Stage


@dataclass(frozen=True, slots=True)
class Rollout:
    """All that was sampled for one problem: ``choice`` and ``stage2`` are absent in one-stage GRPO."""

    stage1: Group
    choice: DraftChoice | None = None
    stage2: Group | None = None

    @property
    def groups(self) -> tuple[Group, ...]:
        return (self.stage1,) if self.stage2 is None else (self.stage1, self.stage2)

    @property
    def draft(self) -> Completion | None:
        return None if self.choice is None else self.stage1.completions[self.choice.index]

    @property
    def draft_score(self) -> Score | None:
        return None if self.choice is None else self.stage1.scores[self.choice.index]


@dataclass(frozen=True, slots=True)
class _Tag:
    slot: int  # the problem's place in the batch
    stage: Stage
    index: int


@dataclass(slots=True)
class _Pending:
    """One problem under way: what has come back so far, in request order."""

    problem: Problem
    prompts: dict[Stage, Prompt]
    finished: dict[Stage, list[Completion | None]]
    groups: dict[Stage, Group] = field(default_factory=dict)
    choice: DraftChoice | None = None


class RolloutCollector:
    """Samples and scores the rollouts of one step.

    Args:
        options: counts, temperatures, draft choice and schedule.
        seed: the run's seed; each request's own seed hashes it with step, problem, stage and index.
        on_progress: called with (finished, expected) completions.
    """

    def __init__(
        self,
        sampler: Sampler,
        scorer: Scorer,
        prompts: PromptBuilder,
        options: RolloutOptions,
        seed: int,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.sampler = sampler
        self.scorer = scorer
        self.prompts = prompts
        self.options = options
        self.seed = seed
        self.on_progress = on_progress
        self.reward_seconds = 0.0

    @property
    def two_stage(self) -> bool:
        return self.options.algorithm != "grpo"

    def collect(self, problems: Sequence[Problem], step: int) -> list[Rollout]:
        """One rollout per problem, in order. ``step`` enters every seed."""
        count1 = stage1_size(self.options)
        pending = []
        for problem in problems:
            first = self.prompts.first(problem.question)
            pending.append(_Pending(problem, {"stage1": first}, {"stage1": [None] * count1}))
        total = len(problems) * self.options.num_generations
        done = 0
        deferred: list[Request] = []

        def on_finished(request: Request, completion: Completion) -> Iterable[Request]:
            nonlocal done
            done += 1
            self.on_progress(done, total)
            tag = request.tag
            assert isinstance(tag, _Tag)
            more = self._finish(pending[tag.slot], tag, completion, step)
            if self.options.schedule == "overlap":
                return more
            deferred.extend(more)
            return ()

        drafts = [r for slot, p in enumerate(pending) for r in self._requests(p, slot, "stage1", count1, step)]
        self.sampler.run(drafts, on_finished)
        if deferred:
            self.sampler.run(sorted(deferred, key=_slot_and_index), on_finished)
        return [Rollout(p.groups["stage1"], p.choice, p.groups.get("stage2")) for p in pending]

    def _finish(self, pending: _Pending, tag: _Tag, completion: Completion, step: int) -> list[Request]:
        finished = pending.finished[tag.stage]
        finished[tag.index] = completion
        completions = tuple(c for c in finished if c is not None)
        if len(completions) < len(finished):
            return []
        started = time.perf_counter()
        prompt = pending.prompts[tag.stage]
        scores = tuple(self.scorer.score(pending.problem, prompt, completions))
        self.reward_seconds += time.perf_counter() - started
        pending.groups[tag.stage] = Group(pending.problem, tag.stage, prompt, completions, scores)
        if tag.stage == "stage2" or not self.two_stage:
            return []
        rng = random.Random(request_seed(self.seed, step, tag.slot, pending.problem.id, "choice"))
        pending.choice = choice = choose_draft(completions, scores, self.options, rng)
        if choice.shown:
            draft = completions[choice.index]
            pending.prompts["stage2"] = self.prompts.second(pending.problem.question, prompt, draft.ids)
        else:
            pending.prompts["stage2"] = prompt
        count2 = stage2_size(self.options)
        pending.finished["stage2"] = [None] * count2
        return self._requests(pending, tag.slot, "stage2", count2, step)

    def _requests(self, pending: _Pending, slot: int, stage: Stage, count: int, step: int) -> list[Request]:
        options = self.options
        return [
            Request(
                prompt=pending.prompts[stage],
                seed=request_seed(self.seed, step, slot, pending.problem.id, stage, index),
                max_tokens=options.max_completion_length,
                temperature=stage_temperature(options, stage),
                tag=_Tag(slot, stage, index),
            )
            for index in range(count)
        ]


def stage1_size(options: RolloutOptions) -> int:
    """Completions per problem in stage 1: all of them for GRPO, N for iGRPO."""
    if options.algorithm == "grpo":
        return options.num_generations
    return options.num_drafts or max(1, options.num_generations // 2)


def stage2_size(options: RolloutOptions) -> int:
    """Completions per problem in stage 2: none for GRPO, G for iGRPO."""
    return options.num_generations - stage1_size(options)


def stage_temperature(options: RolloutOptions, stage: Stage) -> float:
    """Sampling temperature of a stage; the loss must use the same."""
    drafts = stage == "stage1" and options.algorithm != "grpo"
    return options.draft_temperature if drafts and options.draft_temperature is not None else options.temperature


def _slot_and_index(request: Request) -> tuple[int, int]:
    tag = request.tag
    assert isinstance(tag, _Tag)
    return tag.slot, tag.index
