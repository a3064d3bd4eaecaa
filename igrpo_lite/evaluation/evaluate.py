"""Held-out accuracy of a policy: one greedy pass from the plain prompt, and one refinement of that very draft.

``single`` is the headline, since self-conditioning is for training only (arXiv 2602.09000 section 3.2.1: at test time
the policy answers in one shot). ``refined`` is a diagnostic that is not in the paper.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from igrpo_lite.evaluation.intervals import wilson
from igrpo_lite.prompts import PromptBuilder
from igrpo_lite.rewards.answers import Verdict, verdict
from igrpo_lite.sampling.base import Request, Sampler
from igrpo_lite.types import Completion, Problem


@dataclass(frozen=True, slots=True)
class Answered:
    """One held-out problem with what the policy made of it."""

    problem: Problem
    single: Completion
    single_verdict: Verdict
    refined: Completion
    refined_verdict: Verdict

    def record(self) -> dict[str, Any]:
        return {
            "id": self.problem.id,
            "question": self.problem.question,
            "gold": self.problem.answer,
            "single": _record(self.single, self.single_verdict),
            "refined": _record(self.refined, self.refined_verdict),
        }


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All answers of one evaluation, in problem order."""

    answered: tuple[Answered, ...]
    seconds: float

    def right(self, refined: bool = False) -> list[bool]:
        """Which single-pass (or refined) answers are correct, in problem order."""
        verdicts = (a.refined_verdict if refined else a.single_verdict for a in self.answered)
        return [found.reason == "correct" for found in verdicts]

    def result(self) -> dict[str, Any]:
        """Accuracies with intervals, mean length and truncated share: the form that records and screens use."""
        n = len(self.answered)
        return {
            "single": asdict(wilson(sum(self.right()), n)),
            "refined": asdict(wilson(sum(self.right(refined=True)), n)),
            "single_length": sum(len(a.single.ids) for a in self.answered) / n,
            "single_truncated": sum(a.single.truncated for a in self.answered) / n,
        }


def evaluate(problems: Sequence[Problem], sampler: Sampler, prompts: PromptBuilder, max_tokens: int) -> Evaluation:
    """Answer every problem greedily, once from the plain prompt and once more with that answer as the draft."""
    started = time.perf_counter()
    firsts = [prompts.first(problem.question) for problem in problems]
    singles: dict[int, Completion] = {}
    refinements: dict[int, Completion] = {}

    def on_finished(request: Request, completion: Completion) -> Iterable[Request]:
        index = request.tag
        assert isinstance(index, int)
        if index in singles:
            refinements[index] = completion
            return ()
        singles[index] = completion
        second = prompts.second(problems[index].question, firsts[index], completion.ids)
        return (Request(second, 0, max_tokens, 0.0, index),)

    sampler.run([Request(prompt, 0, max_tokens, 0.0, index) for index, prompt in enumerate(firsts)], on_finished)
    answered = tuple(
        Answered(problem, singles[i], _judge(singles[i], problem), refinements[i], _judge(refinements[i], problem))
        for i, problem in enumerate(problems)
    )
    return Evaluation(answered, time.perf_counter() - started)


def _judge(completion: Completion, problem: Problem) -> Verdict:
    return verdict(completion.text, problem.answer, completion.truncated)


def _record(completion: Completion, found: Verdict) -> dict[str, Any]:
    return {
        "text": completion.text,
        "answer": found.answer,
        "reason": found.reason,
        "tokens": len(completion.ids),
        "finish": completion.finish,
    }
