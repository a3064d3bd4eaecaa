"""How often a model solves each problem from the plain prompt: what a check before training and a scan for problems
that are neither too easy nor too hard look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from igrpo_lite.config import RunConfig
from igrpo_lite.prompts import PromptBuilder
from igrpo_lite.sampling.base import Request, Sampler, request_seed
from igrpo_lite.types import Completion, Problem, Prompt, Score

JudgeGroup = Callable[[Problem, Prompt, Sequence[Completion]], Sequence[Score]]
"""One score per completion of a problem's prompt, like ``Scorer.score``."""


@dataclass(frozen=True, slots=True)
class PassRate:
    """Samples of one problem from its plain prompt, at least one, with their scores."""

    problem: Problem
    prompt: Prompt
    completions: tuple[Completion, ...]
    scores: tuple[Score, ...]

    @property
    def rate(self) -> float:
        """Share of correct answers."""
        return sum(score.reason == "correct" for score in self.scores) / len(self.scores)

    @property
    def informative(self) -> bool:
        """Whether the rewards differ: only then a group can teach."""
        return len({score.reward for score in self.scores if score.reward is not None}) > 1

    @property
    def truncated(self) -> float:
        """Share cut at the length limit."""
        return sum(completion.truncated for completion in self.completions) / len(self.completions)

    @property
    def length(self) -> float:
        """Mean length in tokens."""
        return sum(len(completion.ids) for completion in self.completions) / len(self.completions)


def pass_rates(
    problems: Sequence[Problem],
    sampler: Sampler,
    prompts: PromptBuilder,
    config: RunConfig,
    samples: int,
    judge: JudgeGroup,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[PassRate]:
    """Sample every problem ``samples`` times, in one run of the engine, and score what came, in problem order.

    A sample depends on the run's seed, the problem's id and its number alone, so problems may be scanned in parts.

    Args:
        config: temperature and length of the samples, and the seed.
        judge: ``Scorer.score``, or another; called once a problem, after sampling.
        on_progress: called with (finished, expected) completions.
    """
    firsts = [prompts.first(problem.question) for problem in problems]
    requests = [
        Request(
            prompt,
            request_seed(config.seed, "pass-rate", problem.id, number),
            config.max_completion_length,
            config.temperature,
        )
        for problem, prompt in zip(problems, firsts, strict=True)
        for number in range(samples)
    ]
    done = 0

    def on_finished(_: Request, __: Completion) -> Iterable[Request]:
        nonlocal done
        done += 1
        on_progress(done, len(requests))
        return ()

    completions = sampler.run(requests, on_finished)
    found = []
    for index, (problem, prompt) in enumerate(zip(problems, firsts, strict=True)):
        group = tuple(completions[index * samples : (index + 1) * samples])
        found.append(PassRate(problem, prompt, group, tuple(judge(problem, prompt, group))))
    return found
