"""Groups as plans: completions of one prompt, sampled, graded by the policy where it is the judge, and scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from igrpo_lite.algorithms.judging import PolicyJudge
from igrpo_lite.algorithms.plans import Compute, Plan, Sample
from igrpo_lite.config import RunConfig
from igrpo_lite.prompts import PromptBuilder
from igrpo_lite.rewards.judge_prompt import asks_policy
from igrpo_lite.rewards.scorer import Scorer
from igrpo_lite.sampling.base import Request, request_seed
from igrpo_lite.types import Completion, Group, Problem, Prompt, Score, Stage


@dataclass(frozen=True, slots=True)
class Place:
    """A problem and where in the run it is sampled.

    Attributes:
        slot: its index in the step.
        single: it gets one stage with all rollouts: always for GRPO, else by ``single_stage_share``.
    """

    problem: Problem
    step: int
    slot: int
    single: bool

    @property
    def key(self) -> tuple[int, int]:
        return self.step, self.slot

    def seed(self, seed: int, *path: object) -> int:
        """The seed of a request or a choice here, in a run with ``seed``."""
        return request_seed(seed, self.step, self.slot, self.problem.id, *path)


@dataclass(frozen=True, slots=True)
class SampleKey:
    """The tag of a request of a run.

    Attributes:
        replay: 0 for the stage's own completions, else the number of the replay (algorithms/replay.py).
        index: of the completion in its stage or replay.
        turn: 0 for the completion itself; else the policy is asked to judge it (algorithms/judging.py).
    """

    step: int
    slot: int
    stage: Stage
    replay: int
    index: int
    turn: int = 0


class Groups:
    """Makes plans of groups.

    Args:
        seed: the run's; a request's own seed hashes it with step, slot, problem, stage, replay and index.

    Attributes:
        expected: completions that the step will have sampled, as far as is known.
        drafted: by step and slot, drafts that were sampled before their step (the ``ahead`` schedule).
    """

    def __init__(self, scorer: Scorer, prompts: PromptBuilder, config: RunConfig, seed: int) -> None:
        self.scorer, self.prompts, self.config, self.seed = scorer, prompts, config, seed
        self.judge = PolicyJudge(config, prompts) if asks_policy(config) else None
        self.expected = 0
        self.drafted: dict[tuple[int, int], Group] = {}

    def drafts(self, p: Place, joins: bool = False) -> Plan[Group]:
        """The drafts of a problem: those that wait for their step, else :meth:`stage1`."""
        return self.drafted.pop(p.key, None) or (yield from self.stage1(p, joins))

    def stage1(self, p: Place, joins: bool = False) -> Plan[Group]:
        """N drafts from the plain prompt; all rollouts where they are the only stage."""
        return self.group(p, "stage1", self.prompts.first(p.problem.question), self.n_drafts(p), joins)

    def n_drafts(self, p: Place) -> int:
        return self.config.num_generations if p.single else self.config.n_drafts

    def group(self, p: Place, stage: Stage, prompt: Prompt, count: int, joins: bool = False) -> Plan[Group]:
        """``count`` completions of a prompt, with their scores. ``joins``: samples follow the scores; replays do
        anyhow."""
        joins = joins or self.config.is_replayed(stage, p.single)
        completions = yield self.sample(p, stage, prompt, count, self.config.max_completion_length)
        scores = yield from self.score(p, stage, prompt, completions, joins=joins)
        return Group(p.problem, stage, prompt, tuple(completions), tuple(scores))

    def sample(self, p: Place, stage: Stage, prompt: Prompt, count: int, max_tokens: int, replay: int = 0) -> Sample:
        """``count`` completions of a prompt."""
        temperature = self.config.temperature
        return Sample(
            [
                Request(
                    prompt,
                    p.seed(self.seed, *_path(stage, replay), index),
                    max_tokens,
                    temperature,
                    SampleKey(p.step, p.slot, stage, replay, index),
                )
                for index in range(count)
            ]
        )

    def score(
        self,
        p: Place,
        stage: Stage,
        prompt: Prompt,
        completions: Sequence[Completion],
        replay: int = 0,
        joins: bool = False,
    ) -> Plan[Sequence[Score]]:
        """Scores of whole completions of ``prompt``; where the policy is the judge, it grades them first."""
        score: Callable[..., list[Score]] = partial(self.scorer.score, p.problem, prompt, completions)
        if (judge := self.judge) is not None:

            def request(question: Prompt, index: int, turn: int) -> Request:
                seed = p.seed(self.seed, *_path(stage, replay), "judge", index, turn)
                return judge.request(question, seed, SampleKey(p.step, p.slot, stage, replay, index, turn))

            score = partial(score, (yield from judge.grade(p.problem, completions, request)))
        return (yield Compute(score, joins))


def _path(stage: Stage, replay: int) -> tuple[object, ...]:
    """The part of a seed that says what is sampled."""
    return (stage, "replay", replay) if replay else (stage,)
