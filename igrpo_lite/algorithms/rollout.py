"""The two-stage rollout of iGRPO (arXiv 2602.09000, algorithm 1), event by event; GRPO is its first stage alone.

    for each problem:  D = N drafts from pi(. | q)                      stage 1
                       d = the draft with the highest reward            algorithms/drafts.py
                       O = G refinements from pi(. | Concat(q, d))      stage 2

Both stages sample from the same policy; nothing here has a gradient. A problem's stage 2 needs only that problem's
stage 1, which gives three schedules with the same rollouts:

* ``barrier``: all drafts, then all refinements (and then T-SPMO's replays, algorithms/replay.py);
* ``overlap``: a problem's refinements join the batch that still decodes other problems' drafts; the same samples;
* ``ahead``: the drafts of the next step are sampled beside the refinements of this one. Drafts are context and never
  learn, so refinements stay exactly on-policy; a draft comes from the policy before the last update.

Where the policy is the judge, a complete group is first graded in the same batch (algorithms/judging.py).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from typing import Any

from igrpo_lite.algorithms.drafts import DraftChoice, choose_draft
from igrpo_lite.algorithms.judging import PolicyJudge, Question
from igrpo_lite.algorithms.pending import Part, Pending, Scoring, Tag, tag_of
from igrpo_lite.algorithms.replay import Replay, choose_restarts, restart_prompt, whole_completion
from igrpo_lite.config import RolloutOptions, RunConfig
from igrpo_lite.prompts import PromptBuilder
from igrpo_lite.rewards.judge import Judgement
from igrpo_lite.rewards.judge_prompt import asks_policy
from igrpo_lite.rewards.scorer import Scorer
from igrpo_lite.sampling.base import Request, Sampler
from igrpo_lite.types import Completion, Group, Problem, Prompt, Score, Stage

_REWARD_STEPS = 8
"""Decoding steps after which a reward is waited for, where what follows it joins the batch. Were it taken when it
comes, the batch's shape, and with it rounding, would depend on the clock, and no run could be repeated bit for bit."""


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


class RolloutCollector:
    """Samples and scores the rollouts of one step.

    Rewards that a worker process computes are waited for when nothing is left to decode, or, where what follows them
    joins the batch, after a fixed number of decoding steps.

    Args:
        config: counts, temperatures, draft choice, schedule and replay.
        seed: the run's seed; each request's own seed hashes it with step, place, problem, stage and index.
        on_progress: called with (finished, expected) completions; replays are expected once they are known of.

    Attributes:
        reward_seconds: in which nothing was decoded for want of a reward.
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
        self.sampler = sampler
        self.scorer = scorer
        self.prompts = prompts
        self.config = config
        self.seed = seed
        self.on_progress = on_progress
        self.reward_seconds = 0.0
        self.judge_tokens = 0
        self.judge = PolicyJudge(config, prompts) if asks_policy(config) else None
        self._pending: dict[tuple[int, int], Pending] = {}  # by step and slot; between steps, what ``ahead`` drafted
        self._deferred: list[Request] = []
        self._scoring: list[Scoring] = []
        self._polls = 0
        self._thread = ThreadPoolExecutor(scorer.threads, "rewards") if scorer.in_worker else None
        self._done = self._total = 0

    def collect(
        self, problems: Sequence[Problem], step: int, first_slot: int = 0, upcoming: Sequence[Problem] = ()
    ) -> list[Rollout]:
        """One rollout per problem, in order.

        ``step`` and the problem's place, counted from ``first_slot``, enter every seed: further problems of a step go
        on counting where the earlier ones ended.

        Args:
            upcoming: problems of the next step; with the ``ahead`` schedule their drafts are sampled on the way.
        """
        ahead = self.config.schedule == "ahead"
        mine = self._begin(problems, step, first_slot)
        undrafted = [p for p in mine if "stage1" not in p.groups]  # with ``ahead`` only in the first step
        later = self._begin(upcoming if ahead else (), step + 1, 0)
        self._done = 0
        refined = sum(not p.single for p in mine)
        self._total = sum(map(self._stage1_size, undrafted + later)) + refined * stage2_size(self.config)
        self._sample([request for p in undrafted for request in self._drafts(p)])
        if ahead:
            wave = [request for p in mine for request in self._refine(p)]
            self._sample(wave + [request for p in later for request in self._drafts(p)])
        for p in mine:
            del self._pending[p.step, p.slot]
        return [_rollout(p) for p in mine]

    def close(self) -> None:
        """End the threads that wait for rewards; one that is still being computed is given up, with its process."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
            for scoring in self._scoring:
                while not scoring.scores.done():  # again and again: between two calls there is nothing to end
                    self.scorer.close()
                    wait([scoring.scores], 0.05)
            self._thread.shutdown()

    def drafted(self) -> list[dict[str, Any]]:
        """The drafts that ``ahead`` has sampled for the next step, as JSON types, in problem order."""
        groups = [p.groups["stage1"] for p in self._pending.values()]
        return [{name: [asdict(x) for x in getattr(g, name)] for name in ("completions", "scores")} for g in groups]

    def load_drafted(self, state: Sequence[Mapping[str, Any]], problems: Sequence[Problem], step: int) -> None:
        """Continue from :meth:`drafted`; ``problems`` are those of ``step``, the next one; none if there is none."""
        self._pending.clear()
        for p, saved in zip(self._begin(problems[: len(state)], step, 0), state, strict=False):
            completions = tuple(Completion(**_tuples(entry)) for entry in saved["completions"])
            scores = tuple(Score(**entry) for entry in saved["scores"])
            p.groups["stage1"] = Group(p.problem, "stage1", p.prompts["stage1"], completions, scores)

    def _begin(self, problems: Sequence[Problem], step: int, first_slot: int) -> list[Pending]:
        """What is under way for ``problems``: drafted already, or new."""
        for slot, problem in enumerate(problems, start=first_slot):
            if (step, slot) not in self._pending:
                prompts: dict[Stage, Prompt] = {"stage1": self.prompts.first(problem.question)}
                single = is_single_stage(step, slot, self.config)
                self._pending[step, slot] = Pending(problem, step, slot, prompts, single)
        return [self._pending[step, slot] for slot in range(first_slot, first_slot + len(problems))]

    def _sample(self, wave: list[Request]) -> None:
        """Sample until nothing follows; what follows a finished group joins the batch or, with ``barrier``, waits."""
        while wave:
            self.sampler.run(wave, self._on_finished, self._poll if self._thread else None)
            wave, self._deferred = sorted(self._deferred, key=tag_of), []

    def _on_finished(self, request: Request, completion: Completion) -> Iterable[Request]:
        tag = tag_of(request)
        pending = self._pending[tag.step, tag.slot]
        if tag.turn:
            self.judge_tokens += len(completion.ids)
            return self._ask(pending, tag.part, pending.judging[tag.part].replied(tag.index, completion))
        finished = pending.finished[tag.part]
        finished[tag.index] = completion
        completions = tuple(c for c in finished if c is not None)
        more: Iterable[Request] = ()
        if len(completions) == len(finished):
            more = self._complete(pending, tag.part, completions)
        self._done += 1
        self.on_progress(self._done, self._total)
        return more

    def _poll(self, idle: bool) -> Iterable[Request]:
        """What follows the groups whose rewards are due; with nothing left to decode, that is the next of them."""
        self._polls += 1
        more: list[Request] = []
        while self._scoring and (min(s.due for s in self._scoring) <= self._polls or (idle and not more)):
            scoring = self._scoring[0]
            started = time.perf_counter()
            scores = scoring.scores.result()
            self.reward_seconds += time.perf_counter() - started
            del self._scoring[0]
            more += self._follow(scoring.pending, scoring.part, scoring.completions, scores)
        return more

    def _complete(self, pending: Pending, part: Part, completions: tuple[Completion, ...]) -> Iterable[Request]:
        """Have what is complete judged by the policy, where it is the judge, and scored; gives what follows at once."""
        if part[1]:  # as whole completions of the original prompt
            source, start = self._source(pending, part)
            completions = tuple(whole_completion(source, start, c, self.prompts.tokenizer) for c in completions)
        if self.judge is None:
            return self._score(pending, part, completions)
        pending.judging[part] = judging = self.judge.about(pending.problem, completions)
        return self._ask(pending, part, judging.questions)

    def _ask(self, pending: Pending, part: Part, questions: Sequence[Question]) -> Iterable[Request]:
        """The requests of what is to be asked of the judge; the group is scored once nothing is. They join the batch
        whatever the schedule: with ``barrier`` each stage is judged in its own wave."""
        judge, judging, path = self.judge, pending.judging[part], _path(part)
        assert judge is not None
        if judging.done:
            return self._score(pending, part, judging.completions, judging.judgements())
        return [
            q.request(
                pending.seed(self.seed, *path, "judge", q.index, q.turn),
                judge.max_tokens,
                Tag(pending.step, pending.slot, part, q.index, q.turn),
            )
            for q in questions
        ]

    def _score(
        self, pending: Pending, part: Part, completions: tuple[Completion, ...], *judgements: Sequence[Judgement]
    ) -> Iterable[Request]:
        """Score a part, at once or beside the decoding; gives what follows at once."""
        problem, prompt = pending.problem, pending.prompts[part[0]]
        if self._thread is not None:
            scores = self._thread.submit(self.scorer.score, problem, prompt, completions, *judgements)
            due = self._polls + _REWARD_STEPS if self._joins(pending, part) else math.inf
            self._scoring.append(Scoring(pending, part, completions, scores, due))
            return ()
        started = time.perf_counter()
        found = self.scorer.score(problem, prompt, completions, *judgements)
        self.reward_seconds += time.perf_counter() - started
        return self._follow(pending, part, completions, found)

    def _joins(self, pending: Pending, part: Part) -> bool:
        """Whether there is something that joins the batch once a part is scored."""
        (stage, number), config = part, self.config
        if number or config.schedule == "barrier":
            return False
        refined = stage == "stage1" and not pending.single and config.schedule == "overlap"
        return refined or self._replayed(pending, stage)

    def _replayed(self, pending: Pending, stage: Stage) -> bool:
        config = self.config
        learns = stage in learning_stages("grpo" if pending.single else config.algorithm)
        return learns and config.tokens == "t-spmo" and config.tspmo_replay > 0

    def _follow(
        self, pending: Pending, part: Part, completions: tuple[Completion, ...], scores: Sequence[Score]
    ) -> Iterable[Request]:
        """Take in a scored group; gives the requests that it was waited for."""
        stage, number = part
        problem, prompt = pending.problem, pending.prompts[stage]
        if number:
            source, start = self._source(pending, part)
            first = pending.groups[stage].scores[pending.restarts[part].source]  # the source has its score
            whole = Group(problem, stage, prompt, (source, *completions), (first, *scores))
            pending.replays[part] = Replay(whole, start)
            return ()
        pending.groups[stage] = Group(problem, stage, prompt, completions, tuple(scores))
        more = self._restart(pending, stage)
        self._total += len(more)
        if stage == "stage1" and not pending.single and self.config.schedule != "ahead":
            more = self._refine(pending) + more
        if self.config.schedule == "barrier":
            self._deferred += more
            return ()
        return more

    def _drafts(self, pending: Pending) -> list[Request]:
        return self._requests(pending, ("stage1", 0), self._stage1_size(pending))

    def _stage1_size(self, pending: Pending) -> int:
        return self.config.num_generations if pending.single else stage1_size(self.config)

    def _refine(self, pending: Pending) -> list[Request]:
        """Choose the draft and ask for the refinements."""
        drafts = pending.groups["stage1"]
        rng = random.Random(pending.seed(self.seed, "choice"))
        pending.choice = choice = choose_draft(drafts.completions, drafts.scores, self.config, rng)
        if choice.shown:
            draft = drafts.completions[choice.index]
            pending.prompts["stage2"] = self.prompts.second(pending.problem.question, drafts.prompt, draft.ids)
        else:
            pending.prompts["stage2"] = drafts.prompt
        return self._requests(pending, ("stage2", 0), stage2_size(self.config))

    def _restart(self, pending: Pending, stage: Stage) -> list[Request]:
        """Choose where a learning stage is replayed and ask for the continuations."""
        if not self._replayed(pending, stage):
            return []
        rng = random.Random(pending.seed(self.seed, stage, "replay"))
        requests = []
        for number, restart in enumerate(choose_restarts(pending.groups[stage], rng), start=1):
            pending.restarts[stage, number] = restart
            requests += self._requests(pending, (stage, number), self.config.tspmo_replay)
        return requests

    def _source(self, pending: Pending, part: Part) -> tuple[Completion, int]:
        """The completion that a replay restarts from, and the tokens of it that are kept."""
        restart = pending.restarts[part]
        return pending.groups[part[0]].completions[restart.source], restart.start

    def _requests(self, pending: Pending, part: Part, count: int) -> list[Request]:
        stage, number = part
        prompt, limit = pending.prompts[stage], self.config.max_completion_length
        if number:
            source, start = self._source(pending, part)
            prompt, limit = restart_prompt(prompt, source.ids[:start], self.prompts.tokenizer), limit - start
        pending.finished[part] = [None] * count
        return [
            Request(
                prompt=prompt,
                seed=pending.seed(self.seed, *_path(part), index),
                max_tokens=limit,
                temperature=stage_temperature(self.config, stage, pending.single),
                top_p=self.config.top_p,
                min_p=self.config.min_p,
                tag=Tag(pending.step, pending.slot, part, index),
            )
            for index in range(count)
        ]


def learning_stages(algorithm: str) -> tuple[Stage, ...]:
    """The stages whose tokens learn: GRPO's only one, iGRPO's refinements, or with ``igrpo-joint`` both."""
    stages: dict[str, tuple[Stage, ...]] = {
        "grpo": ("stage1",),
        "igrpo": ("stage2",),
        "igrpo-joint": ("stage1", "stage2"),
    }
    return stages[algorithm]


def compares_otherwise(config: RunConfig) -> bool:
    """Whether a variant can learn though rewards are equal within every group of the learning stages."""
    variants = config.single_stage_share or config.plain_refinements
    return bool(variants) or (config.stage2_baseline, config.joint_groups) != ("mean", "own")


def learning_groups(rollout: Rollout, algorithm: str) -> tuple[Group, ...]:
    """The groups of one rollout whose tokens learn (see :func:`learning_stages`), without its replays. A rollout of one
    stage learns from that, whatever the algorithm."""
    stages = learning_stages(algorithm if rollout.stage2 is not None else "grpo")
    return tuple(group for group in rollout.groups if group.stage in stages)


def is_single_stage(step: int, slot: int, config: RunConfig) -> bool:
    """Whether the problem in this place of a step gets one stage: always for GRPO, else ``single_stage_share`` of the
    places, evenly spread over the whole run, so that steps of few problems have their share too."""
    place, share = step * config.prompts_per_step + slot, config.single_stage_share
    return config.algorithm == "grpo" or math.floor((place + 1) * share) > math.floor(place * share)


def stage1_size(options: RolloutOptions) -> int:
    """Completions per problem in stage 1: all of them for GRPO, N for iGRPO."""
    if options.algorithm == "grpo":
        return options.num_generations
    return options.num_drafts or max(1, options.num_generations // 2)


def stage2_size(options: RolloutOptions) -> int:
    """Completions per problem in stage 2: none for GRPO, G for iGRPO."""
    return options.num_generations - stage1_size(options)


def stage_temperature(options: RolloutOptions, stage: Stage, single: bool = False) -> float:
    """Sampling temperature of a stage; the loss must use the same. ``single``: no second one follows, so stage 1 are no
    drafts."""
    drafts = stage == "stage1" and options.algorithm != "grpo" and not single
    return options.draft_temperature if drafts and options.draft_temperature is not None else options.temperature


def _path(part: Part) -> tuple[object, ...]:
    """Of the seeds of a part's requests."""
    stage, number = part
    return (stage, "replay", number) if number else (stage,)


def _rollout(pending: Pending) -> Rollout:
    replays = tuple(pending.replays[part] for part in sorted(pending.replays))
    return Rollout(pending.groups["stage1"], pending.choice, pending.groups.get("stage2"), replays)


def _tuples(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}
