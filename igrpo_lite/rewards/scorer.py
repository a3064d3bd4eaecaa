"""Turns completions into scores: every reward of the configuration, weighted and summed.

Only a completion's own text is judged. The prompt, with the draft it may show, is handed to users' functions because
TRL's signature has it; the built-in rewards never read an answer from it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from igrpo_lite.config import RewardOptions
from igrpo_lite.errors import RewardError
from igrpo_lite.prompts import AnswerStyle
from igrpo_lite.rewards.answers import Verdict, verdict
from igrpo_lite.rewards.builtin import BUILTIN, DEFAULT_WEIGHTS, accuracy, format_reward, opens_thinking
from igrpo_lite.rewards.custom import find_function_error, in_short, split_spec
from igrpo_lite.rewards.worker import Outcome, Worker
from igrpo_lite.types import Completion, Problem, Prompt, Score

MIN_CALLS = 20
MAX_FAILED_SHARE = 0.05
"""More than this share of failing calls, after :data:`MIN_CALLS` of them, stops the run."""


@dataclass(slots=True)
class Calls:
    """How the calls of one user's function went."""

    made: int = 0
    raised: int = 0
    timed_out: int = 0
    first: str = ""
    """The first failure: a traceback, or where the function hung."""

    @property
    def failed(self) -> int:
        return self.raised + self.timed_out


def reward_findings(options: RewardOptions) -> list[str]:
    """Everything that can be seen to be wrong with the reward settings without importing a user's file."""
    findings: list[str] = []
    for spec in options.reward_funcs:
        if ":" in spec:
            if error := find_function_error(spec):
                findings.append(error)
        elif spec not in BUILTIN:
            findings.append(_unknown(spec))
    if len(set(options.reward_funcs)) < len(options.reward_funcs):
        findings.append("reward_funcs: a reward is named twice; name it once and give it more weight in reward_weights")
    weights = options.reward_weights
    if weights is not None and len(weights) != len(options.reward_funcs):
        findings.append(
            f"reward_weights: {len(weights)} weights for {len(options.reward_funcs)} rewards "
            f"({', '.join(options.reward_funcs)}); give one for each, in that order"
        )
    if weights is not None and not any(weights):
        findings.append("reward_weights: all are 0, so every completion earns the same; give at least one a weight")
    return findings


def _unknown(name: str) -> str:
    if name.endswith(".py"):
        return f"reward_funcs: {name} names no function; write it as {name}:function"
    close = difflib.get_close_matches(name, BUILTIN, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    return (
        f"reward_funcs: no reward {name!r}; {hint}There are {', '.join(BUILTIN)}, and your own as path/file.py:function"
    )


class Scorer:
    """Scores completions with the configured rewards. Users' functions run in a worker process; close it at the end.

    Attributes:
        names: one name per reward, as in ``Score.parts``: a user's function goes by its own name where that is unique.
        weights: one weight per reward.
        failures: how the calls went, by name, for users' functions. A resumed run may put earlier counts in.

    Raises:
        RewardError: with all of :func:`reward_findings`.
    """

    def __init__(self, options: RewardOptions, answer_style: AnswerStyle) -> None:
        if findings := reward_findings(options):
            raise RewardError(findings)
        self._specs = tuple(options.reward_funcs)
        self._style: AnswerStyle = answer_style
        self._timeout = options.reward_timeout
        self.names = _names(self._specs)
        self.weights = (
            tuple(DEFAULT_WEIGHTS.get(name, 1.0) for name in self.names)
            if options.reward_weights is None
            else tuple(options.reward_weights)
        )
        self.failures: dict[str, Calls] = {
            name: Calls() for name, spec in zip(self.names, self._specs, strict=True) if spec not in BUILTIN
        }
        self._worker = Worker()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def in_worker(self) -> bool:
        """Whether a worker process computes some of the rewards, so that scoring is mostly waiting."""
        return bool(self.failures)

    def close(self) -> None:
        """Ends the worker process, if one was started."""
        self._worker.close()

    def check(self, problem: Problem) -> None:
        """Sends one row, with a right and a helpless completion, through every reward, before a model loads.

        Raises:
            RewardError: with every finding: a gold answer that does not verify against itself, a function that cannot
                be imported, fails, hangs, or returns something else than one finite number (or ``None``) for each.
        """
        texts = (_right_text(problem.answer, self._style), "I do not know.")
        completions = [Completion(tuple(range(1, 9)), text, (0.0,) * 8, "stop") for text in texts]
        findings: list[str] = []
        if "accuracy" in self._specs and verdict(texts[0], problem.answer, False).reason != "correct":
            findings.append(
                f"reward accuracy: the gold answer {problem.answer[:80]!r} of problem {problem.id} cannot be verified, "
                "not even against itself; choose the column that holds the final answer (answer_column)"
            )
        for name, spec in zip(self.names, self._specs, strict=True):
            if spec in BUILTIN:
                continue
            try:
                self._user_parts(name, spec, problem, Prompt(problem.question, ()), completions, strict=True)
            except RewardError as error:
                findings.extend(error.problems)
        if findings:
            raise RewardError(findings)

    def score(self, problem: Problem, prompt: Prompt, completions: Sequence[Completion]) -> list[Score]:
        """One score per completion, in order.

        Raises:
            RewardError: a user's function returned something that is no reward, or fails too often. A single failing
                call only leaves its completions without that part, and is counted in ``failures``.
        """
        judged = [verdict(completion.text, problem.answer, completion.truncated) for completion in completions]
        columns = [
            self._parts(name, spec, problem, prompt, completions, judged)
            for name, spec in zip(self.names, self._specs, strict=True)
        ]
        scores = []
        for index, found in enumerate(judged):
            parts = {name: column[index] for name, column in zip(self.names, columns, strict=True)}
            scores.append(Score(self._sum(parts), parts, found.reason, found.answer))
        return scores

    def _sum(self, parts: Mapping[str, float | None]) -> float | None:
        weighted = [
            weight * value for weight, value in zip(self.weights, parts.values(), strict=True) if value is not None
        ]
        return sum(weighted) if weighted else None

    def _parts(
        self,
        name: str,
        spec: str,
        problem: Problem,
        prompt: Prompt,
        completions: Sequence[Completion],
        judged: Sequence[Verdict],
    ) -> Sequence[float | None]:
        if spec == "accuracy":
            return [accuracy(found) for found in judged]
        if spec == "format":
            opened = opens_thinking(prompt.text)
            return [format_reward(item.text, item.truncated, self._style, opened) for item in completions]
        return self._user_parts(name, spec, problem, prompt, completions)

    def _user_parts(
        self,
        name: str,
        spec: str,
        problem: Problem,
        prompt: Prompt,
        completions: Sequence[Completion],
        strict: bool = False,
    ) -> list[float | None]:
        size = 1 if self._worker.splits(spec) else max(1, len(completions))
        values: list[float | None] = []
        for start in range(0, len(completions), size):
            batch = completions[start : start + size]
            outcome = self._worker.call(spec, _columns(problem, prompt, batch), len(batch), self._timeout)
            self._count(name, spec, outcome, strict)
            values.extend(outcome.values if outcome.values is not None else [None] * len(batch))
        return values

    def _count(self, name: str, spec: str, outcome: Outcome, strict: bool) -> None:
        calls = self.failures[name]
        calls.made += 1
        if outcome.error is None:
            return
        calls.timed_out += outcome.timed_out
        calls.raised += not outcome.timed_out
        calls.first = calls.first or outcome.error
        if strict:
            raise RewardError(f"reward {spec} failed on the first row: {_told(outcome.error)}; mend it")
        if calls.made >= MIN_CALLS and calls.failed > MAX_FAILED_SHARE * calls.made:
            slow = f" ({calls.timed_out} of them took longer than {self._timeout:g} s)" if calls.timed_out else ""
            raise RewardError(
                f"reward {spec} failed in {calls.failed} of {calls.made} calls{slow}; mend it, or return None where it "
                f"has no opinion. The first failure: {_told(calls.first)}"
            )


def _names(specs: Sequence[str]) -> tuple[str, ...]:
    short = [split_spec(spec)[1] if ":" in spec else spec for spec in specs]
    return tuple(name if short.count(name) == 1 else spec for name, spec in zip(short, specs, strict=True))


def _columns(problem: Problem, prompt: Prompt, completions: Sequence[Completion]) -> dict[str, list[Any]]:
    """What a user's function is offered, one entry per completion. Our own names win over the row's."""
    row = {**problem.columns, "question": problem.question, "answer": problem.answer, "prompts": prompt.text}
    return {
        **{str(column): [value] * len(completions) for column, value in row.items()},
        "completions": [completion.text for completion in completions],
        "completion_ids": [list(completion.ids) for completion in completions],
    }


def _right_text(answer: str, style: AnswerStyle) -> str:
    if style == "tags":
        return f"<think>\nThis is how it goes.\n</think>\n<answer>{answer}</answer>"
    return f"This is how it goes.\n\nThe answer is \\boxed{{{answer}}}."


def _told(error: str) -> str:
    hint = ""
    if "string indices must be integers" in error:
        hint = " (completions are plain strings here, not messages: completion instead of completion[0]['content'])"
    return in_short(error) + hint
