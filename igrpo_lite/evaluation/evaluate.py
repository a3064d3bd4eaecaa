"""Held-out accuracy of a policy: one greedy pass from the plain prompt, and one refinement of that very draft.

``single`` is the headline, since self-conditioning is for training only (arXiv 2602.09000 section 3.2.1: at test time
the policy answers in one shot). What is refined is a diagnostic that is not in the paper. Several samples per problem
can be asked for beside it; all is sampled in one run of the engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from igrpo_lite.answers.answers import EXPLICIT, Verdict, verdict
from igrpo_lite.answers.checker import AnswerChecker
from igrpo_lite.evaluation.statistics import Judge, compared, majority, mean_estimate, pass_at_k, powers_of_two, wilson
from igrpo_lite.prompts import PromptBuilder
from igrpo_lite.sampling.base import Request, Sampler, request_seed
from igrpo_lite.types import Completion, Problem


@dataclass(frozen=True, slots=True)
class Sampling:
    """What is sampled beside the greedy pass.

    Attributes:
        samples: completions per problem from the plain prompt; there are at least ``best_of``.
        temperature, top_p: of these; the defaults are the paper's (section 4.1).
        best_of: drafts, the first of the samples, of which the best is refined; it is chosen by the gold answer, so
            this is an oracle. 0: none.
        seed: fixes every sample, whatever the policy: base and adapter are drawn with the same random numbers.
    """

    samples: int = 0
    temperature: float = 0.6
    top_p: float = 0.95
    best_of: int = 0
    seed: int = 0

    @property
    def count(self) -> int:
        """Samples per problem."""
        return max(self.samples, self.best_of)


class Judged(NamedTuple):
    """A completion and what became of its answer."""

    completion: Completion
    verdict: Verdict

    @property
    def right(self) -> bool:
        return self.verdict.reason == "correct"

    @property
    def strict(self) -> bool:
        """Right, and the answer stood where answers are put on purpose."""
        return self.right and self.verdict.source in EXPLICIT

    def record(self) -> dict[str, Any]:
        return {
            "text": self.completion.text,
            "answer": self.verdict.answer,
            "reason": self.verdict.reason,
            "source": self.verdict.source,
            "tokens": len(self.completion.ids),
            "finish": self.completion.finish,
        }


@dataclass(frozen=True, slots=True)
class Answered:
    """One held-out problem with what the policy made of it.

    Attributes:
        single, refined: the greedy pass, and the greedy refinement with that as the draft.
        samples: as :class:`Sampling` asks.
        majority: chance that the most frequent answer of the samples is right.
        from_best: the greedy refinement of the best draft.
    """

    problem: Problem
    single: Judged
    refined: Judged
    samples: tuple[Judged, ...] = ()
    majority: float = 0.0
    from_best: Judged | None = None

    def record(self) -> dict[str, Any]:
        record: dict[str, Any] = {
            "id": self.problem.id,
            "question": self.problem.question,
            "gold": self.problem.answer,
            "single": self.single.record(),
            "refined": self.refined.record(),
        }
        if self.samples:
            record["samples"] = [sample.record() for sample in self.samples]
        if self.from_best is not None:
            record["refined_best"] = self.from_best.record()
        return record


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All answers of one evaluation, in problem order."""

    answered: tuple[Answered, ...]
    seconds: float
    sampling: Sampling = Sampling()

    def right(self, refined: bool = False) -> list[bool]:
        """Which single-pass (or refined) answers are correct, in problem order."""
        return [(a.refined if refined else a.single).right for a in self.answered]

    def greedy(self) -> dict[str, list[bool]]:
        """Right or wrong on each problem, by measure, the headline first."""
        found = {"single": self.right(), "single_strict": [a.single.strict for a in self.answered]}
        found |= {"refined": self.right(refined=True), "refined_strict": [a.refined.strict for a in self.answered]}
        best = [a.from_best.right for a in self.answered if a.from_best is not None]
        return found | ({f"refined_best_of_{self.sampling.best_of}": best} if best else {})

    def sampled(self) -> dict[str, list[float]]:
        """A number in [0, 1] for each problem, by measure of the samples; nothing where there are none."""
        k = self.sampling.count
        if not k:
            return {}
        correct = [sum(sample.right for sample in a.samples) for a in self.answered]
        found = {
            f"avg@{k}": [c / k for c in correct],
            f"avg@{k}_strict": [sum(sample.strict for sample in a.samples) / k for a in self.answered],
            f"maj@{k}": [a.majority for a in self.answered],
        }
        return found | {f"pass@{m}": [pass_at_k(k, c, m) for c in correct] for m in powers_of_two(k)}

    def result(self) -> dict[str, Any]:
        """Every measure with its interval, and for what they were measured on: share without an answer, share cut at
        the length limit, mean length of all and of those that ended, in tokens. Records and screens use this form."""
        n = len(self.answered)
        found: dict[str, Any] = {name: asdict(wilson(sum(right), n)) for name, right in self.greedy().items()}
        found |= {name: asdict(mean_estimate(values)) for name, values in self.sampled().items()}
        found |= _shares("single", [a.single for a in self.answered])
        found |= _shares("refined", [a.refined for a in self.answered])
        if self.sampling.count:
            found |= _shares("samples", [sample for a in self.answered for sample in a.samples])
        return found


def _shares(name: str, judged: Sequence[Judged]) -> dict[str, float | None]:
    lengths = [len(one.completion.ids) for one in judged]
    ended = [len(one.completion.ids) for one in judged if not one.completion.truncated]
    return {
        f"{name}_no_answer": sum(one.verdict.reason == "no_answer" for one in judged) / len(judged),
        f"{name}_truncated": (len(judged) - len(ended)) / len(judged),
        f"{name}_length": sum(lengths) / len(judged),
        f"{name}_ended_length": sum(ended) / len(ended) if ended else None,
    }


_Kind = Literal["single", "refined", "sample", "refined_best"]


class _Place(NamedTuple):
    """What a request is for: the problem's place, and the number of a sample."""

    problem: int
    kind: _Kind
    number: int = 0


def evaluate(
    problems: Sequence[Problem],
    sampler: Sampler,
    prompts: PromptBuilder,
    max_tokens: int,
    checker: AnswerChecker | None = None,
    sampling: Sampling | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Answer every problem greedily, once from the plain prompt and once more with that answer as the draft.

    Args:
        checker: judges the answers, all in one batch after sampling (those that choose a draft: at once); unset: the
            exact comparison alone.
        sampling: what is sampled beside that; unset: nothing.
        on_progress: called with (finished, expected) completions.
    """
    started = time.perf_counter()
    sampling = sampling or Sampling()
    run = _Run(problems, prompts, max_tokens, sampling, _exact if checker is None else checker.judge, on_progress)
    sampler.run(run.requests(), run.on_finished)
    return Evaluation(run.answered(), time.perf_counter() - started, sampling)


class _Run:
    """One evaluation under way: what has been sampled so far."""

    def __init__(
        self,
        problems: Sequence[Problem],
        prompts: PromptBuilder,
        max_tokens: int,
        sampling: Sampling,
        judge: Judge,
        on_progress: Callable[[int, int], None],
    ) -> None:
        self.problems = problems
        self.prompts = prompts
        self.max_tokens = max_tokens
        self.sampling = sampling
        self.judge = judge
        self.on_progress = on_progress
        self.firsts = [prompts.first(problem.question) for problem in problems]
        self.completions: dict[_Place, Completion] = {}
        self.verdicts: dict[_Place, Verdict] = {}
        self.expected = len(problems) * (2 + sampling.count + (sampling.best_of > 0))

    def requests(self) -> list[Request]:
        """The first wave; those of one prompt stand together, so that it is computed once."""
        requests = []
        for index, (problem, prompt) in enumerate(zip(self.problems, self.firsts, strict=True)):
            requests.append(Request(prompt, 0, self.max_tokens, 0.0, _Place(index, "single")))
            for number in range(self.sampling.count):
                seed = request_seed(self.sampling.seed, "evaluation", problem.id, number)
                place = _Place(index, "sample", number)
                temperature, top_p = self.sampling.temperature, self.sampling.top_p
                requests.append(Request(prompt, seed, self.max_tokens, temperature, place, top_p))
        return requests

    def on_finished(self, request: Request, completion: Completion) -> Iterable[Request]:
        place = request.tag
        assert isinstance(place, _Place)
        self.completions[place] = completion
        self.on_progress(len(self.completions), self.expected)
        if place.kind == "single":
            return (self._refine(place, "refined"),)
        drafts = [_Place(place.problem, "sample", number) for number in range(self.sampling.best_of)]
        if place in drafts and all(draft in self.completions for draft in drafts):
            return (self._refine(self._best(drafts), "refined_best"),)
        return ()

    def _refine(self, draft: _Place, kind: _Kind) -> Request:
        first, question = self.firsts[draft.problem], self.problems[draft.problem].question
        second = self.prompts.second(question, first, self.completions[draft].ids)
        return Request(second, 0, self.max_tokens, 0.0, _Place(draft.problem, kind))

    def _best(self, drafts: Sequence[_Place]) -> _Place:
        """The draft that training would show by default: right before wrong, cut ones last, the first of equals."""
        self._judge(drafts)

        def merit(draft: _Place) -> tuple[bool, bool]:
            return not self.completions[draft].truncated, self.verdicts[draft].reason == "correct"

        return max(drafts, key=merit)

    def _judge(self, places: Iterable[_Place]) -> None:
        asked = [place for place in places if place not in self.verdicts]
        answers = [self.completions[place] for place in asked]
        golds = [self.problems[place.problem].answer for place in asked]
        items = [(answer.text, gold, answer.truncated) for answer, gold in zip(answers, golds, strict=True)]
        self.verdicts.update(zip(asked, self.judge(items), strict=True))

    def answered(self) -> tuple[Answered, ...]:
        self._judge(self.completions)
        samples = [
            tuple(self._judged(_Place(index, "sample", number)) for number in range(self.sampling.count))
            for index in range(len(self.problems))
        ]
        votes = [[sample.verdict for sample in mine] for mine in samples]
        same = compared(votes, self.judge)
        return tuple(
            Answered(
                problem,
                self._judged(_Place(index, "single")),
                self._judged(_Place(index, "refined")),
                samples[index],
                majority(votes[index], same),
                self._judged(_Place(index, "refined_best")) if self.sampling.best_of else None,
            )
            for index, problem in enumerate(self.problems)
        )

    def _judged(self, place: _Place) -> Judged:
        return Judged(self.completions[place], self.verdicts[place])


def _exact(items: Sequence[tuple[str, str, bool]]) -> list[Verdict]:
    return [verdict(*item) for item in items]
