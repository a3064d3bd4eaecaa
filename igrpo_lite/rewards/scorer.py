"""Turns completions into scores: every reward of the configuration, weighted and summed.

Only a completion's own text is judged. The prompt, with the draft it may show, is handed to users' functions because
TRL's signature has it; the built-in rewards never read an answer from it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from igrpo_lite.answers.answers import Verdict
from igrpo_lite.answers.checker import AnswerChecker
from igrpo_lite.config import RunConfig
from igrpo_lite.errors import RewardError
from igrpo_lite.prompts import AnswerStyle
from igrpo_lite.rewards.builtin import (
    BUILTIN,
    DEFAULT_WEIGHTS,
    accuracy,
    cosine_scaled,
    format_reward,
    opens_thinking,
    random_reward,
    repetition_penalty,
    soft_overlong,
)
from igrpo_lite.rewards.calls import Calls
from igrpo_lite.rewards.endpoint import CONCURRENCY
from igrpo_lite.rewards.findings import reward_findings
from igrpo_lite.rewards.judge import Judge, Judgement
from igrpo_lite.rewards.judge_prompt import asks_policy
from igrpo_lite.types import Completion, Problem, Prompt, Score
from igrpo_lite.worker.functions import in_short, split_spec
from igrpo_lite.worker.process import Worker

MIN_CALLS = 20
MAX_FAILED_SHARE = 0.05
"""More than this share of failing calls, after :data:`MIN_CALLS` of them, stops the run."""

_SHOWN = 1000
"""Characters of a judge's reply, from its end, that are logged."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """Completions that are scored together. ``extras``: what rewards log of each; ``strict``: in the check before the
    run no call may fail; ``judgements``: the policy's own, where it is the judge."""

    problem: Problem
    prompt: Prompt
    completions: Sequence[Completion]
    judged: Sequence[Verdict]
    extras: Sequence[dict[str, Any]]
    strict: bool = False
    judgements: Sequence[Judgement] | None = None


class Scorer:
    """Scores completions with the configured rewards. Users' functions run in a worker process; close it at the end.

    Attributes:
        names: one name per reward, as in ``Score.parts``: a user's function goes by its own name where that is unique.
        weights: one weight per reward.
        failures: how the calls went, by name, of users' functions and the judge. A resumed run may put earlier counts
            in.
        asks_policy: whether the policy is the judge: whoever has scores made then asks it first.

    Raises:
        RewardError: with all of :func:`reward_findings`.
    """

    def __init__(self, config: RunConfig, answer_style: AnswerStyle) -> None:
        if findings := reward_findings(config):
            raise RewardError(findings)
        self._config = config
        self._specs = tuple(config.reward_funcs)
        self._style: AnswerStyle = answer_style
        self.names = _names(self._specs)
        self.weights = (
            tuple(DEFAULT_WEIGHTS.get(spec, 1.0) for spec in self._specs)
            if config.reward_weights is None
            else tuple(config.reward_weights)
        )
        self.failures: dict[str, Calls] = {
            name: Calls()
            for name, spec in zip(self.names, self._specs, strict=True)
            if spec == "judge" or spec not in BUILTIN
        }
        self.asks_policy = asks_policy(config)
        self.checker = AnswerChecker()
        self._worker = Worker()
        self._judge = Judge(config)
        self._metrics: dict[str, list[float]] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def in_worker(self) -> bool:
        """Whether a subprocess or an endpoint computes some of the rewards, so that scoring is mostly waiting."""
        return any(spec not in BUILTIN for spec in self._specs) or self._asks_endpoint

    @property
    def _asks_endpoint(self) -> bool:
        return "judge" in self._specs and not self.asks_policy

    @property
    def threads(self) -> int:
        """Groups worth scoring at the same time: an endpoint answers several calls, the subprocess one by one."""
        return CONCURRENCY if self._asks_endpoint else 1

    def close(self) -> None:
        """End the subprocesses and connections; calls under way are cancelled."""
        self._judge.close()
        self._worker.close()
        self.checker.close()

    def check(self, problem: Problem) -> None:
        """Score one row, with one correct and one empty completion, with every reward before a model loads (except the
        policy as the judge, which is that model).

        Raises:
            RewardError: with every finding: a gold answer that does not verify against itself, a function that cannot
                be imported, fails, hangs, or returns something else than one finite number (or ``None``) for each, a
                judge that does not answer.
        """
        texts = (right_text(problem.answer, self._style), "I do not know.")
        completions = [Completion(tuple(range(1, 9)), text, (0.0,) * 8, "stop") for text in texts]
        judged = self._verdicts(problem, completions)
        findings: list[str] = []
        if {"accuracy", "cosine"} & set(self._specs) and judged[0].reason != "correct":
            findings.append(
                f"reward accuracy: the gold answer {problem.answer[:80]!r} of problem {problem.id} cannot be verified, "
                "not even against itself; choose the column that holds the final answer (answer_column)"
            )
        batch = _Batch(problem, Prompt(problem.question, ()), completions, judged, [{}, {}], strict=True)
        for name, spec in zip(self.names, self._specs, strict=True):
            if spec == "judge" and self.asks_policy:
                continue
            try:
                self._parts(name, spec, batch)
            except RewardError as error:
                findings.extend(error.problems)
        self._metrics.clear()
        if findings:
            raise RewardError(findings)

    def score(
        self,
        problem: Problem,
        prompt: Prompt,
        completions: Sequence[Completion],
        judgements: Sequence[Judgement] | None = None,
    ) -> list[Score]:
        """One score per completion, in order.

        Args:
            judgements: one per completion; needed where the policy is the judge, and only there.

        Raises:
            RewardError: a user's function returned something that is no reward, a reward fails too often, or the judge
                cannot be used any longer. A single failing call only leaves its completions without that part, and is
                counted in ``failures``.
        """
        judged = self._verdicts(problem, completions)
        batch = _Batch(problem, prompt, completions, judged, [{} for _ in completions], judgements=judgements)
        columns = [self._parts(name, spec, batch) for name, spec in zip(self.names, self._specs, strict=True)]
        scores = []
        for index, found in enumerate(judged):
            parts = {name: column[index] for name, column in zip(self.names, columns, strict=True)}
            scores.append(Score(self._sum(parts), parts, found.reason, found.answer, batch.extras[index]))
        return scores

    def take_logged(self) -> dict[str, float]:
        """Means of what rewards have logged since the last call, by ``reward/NAME/METRIC``."""
        with self._lock:
            metrics, self._metrics = self._metrics, {}
        # fsum: groups may have been scored in any order.
        return {name: math.fsum(values) / len(values) for name, values in sorted(metrics.items())}

    def _verdicts(self, problem: Problem, completions: Sequence[Completion]) -> list[Verdict]:
        return self.checker.judge([(item.text, problem.answer, item.truncated) for item in completions])

    def _sum(self, parts: Mapping[str, float | None]) -> float | None:
        weighted = [
            weight * value
            for weight, value in zip(self.weights, parts.values(), strict=True)
            if value is not None and weight  # a part of weight 0 is only recorded, and is no opinion
        ]
        return sum(weighted) if weighted else None

    def _parts(self, name: str, spec: str, batch: _Batch) -> Sequence[float | None]:
        completions, config = batch.completions, self._config
        if spec == "accuracy":
            return [accuracy(found) for found in batch.judged]
        if spec == "format":
            opened = opens_thinking(batch.prompt.text)
            return [format_reward(item.text, item.truncated, self._style, opened) for item in completions]
        if spec == "soft_overlong":
            return [soft_overlong(len(item.ids), config.max_completion_length) for item in completions]
        if spec == "cosine":
            limit = config.max_completion_length
            return [
                cosine_scaled(len(item.ids), limit, found.reason == "correct")
                for item, found in zip(completions, batch.judged, strict=True)
            ]
        if spec == "repetition":
            return [repetition_penalty(item.text) for item in completions]
        if spec == "random":
            return [random_reward(config.seed, batch.problem.id, item.ids) for item in completions]
        if spec == "judge":
            return self._judge_parts(name, batch)
        return self._user_parts(name, spec, batch)

    def _judge_parts(self, name: str, batch: _Batch) -> list[float | None]:
        if self.asks_policy:
            judgements = batch.judgements
            assert judgements is not None, "the policy is the judge but was not asked"
        else:
            texts = [completion.text for completion in batch.completions]
            judgements = self._judge.grade(batch.problem, texts, self.failures[name], fresh=batch.strict)
        for judgement, extras in zip(judgements, batch.extras, strict=True):
            self._log(name, [("cached", float(not judgement.asked)), ("tokens", float(judgement.tokens))])
            extras[f"{name}/reply"] = judgement.reply[-_SHOWN:]
            if judgement.asked:
                self._count(name, name, judgement.error, judgement.timed_out, batch.strict)
        return [judgement.score for judgement in judgements]

    def _user_parts(self, name: str, spec: str, batch: _Batch) -> list[float | None]:
        size = 1 if self._worker.splits(spec) else max(1, len(batch.completions))
        values: list[float | None] = []
        for start in range(0, len(batch.completions), size):
            some = batch.completions[start : start + size]
            columns = _columns(batch.problem, batch.prompt, some)
            outcome = self._worker.call(spec, columns, len(some), self._config.reward_timeout)
            self._count(name, spec, outcome.error, outcome.timed_out, batch.strict)
            if outcome.returned is None:
                values.extend([None] * len(some))
                continue
            values.extend(outcome.returned.values)
            self._log(name, outcome.returned.metrics)
            for extras, row in zip(batch.extras[start:], outcome.returned.extras, strict=False):
                extras.update({f"{name}/{column}": value for column, value in row.items()})
        return values

    def _log(self, name: str, metrics: Sequence[tuple[str, float]]) -> None:
        with self._lock:
            for metric, value in metrics:
                self._metrics.setdefault(f"reward/{name}/{metric}", []).append(value)

    def _count(self, name: str, spec: str, error: str | None, timed_out: bool, strict: bool) -> None:
        calls = self.failures[name]
        with self._lock:
            calls.made += 1
            calls.timed_out += error is not None and timed_out
            calls.raised += error is not None and not timed_out
            calls.first = calls.first or error or ""
        if error is None:
            return
        users = spec not in BUILTIN
        if strict:
            raise RewardError(
                f"reward {spec} failed on the first row: {_described(error)}{'; fix it' if users else ''}"
            )
        if calls.made >= MIN_CALLS and calls.failed > MAX_FAILED_SHARE * calls.made:
            limit = self._config.reward_timeout
            slow = f" ({calls.timed_out} of them took longer than {limit:g} s)" if calls.timed_out else ""
            advice = "fix it, or return None where it has no opinion" if users else "check its endpoint"
            if self.asks_policy and not users:
                advice = "the policy's replies have no score: give another --judge-prompt, or --judge-by endpoint"
            raise RewardError(
                f"reward {spec} failed in {calls.failed} of {calls.made} calls{slow}; {advice}. The first failure: "
                f"{_described(calls.first)}"
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


def right_text(answer: str, style: AnswerStyle) -> str:
    """A completion that gives ``answer`` in the form that a style asks for."""
    if style == "tags":
        return f"<think>\nThis is how it goes.\n</think>\n<answer>{answer}</answer>"
    return f"This is how it goes.\n\nThe answer is \\boxed{{{answer}}}."


def _described(error: str) -> str:
    hint = ""
    if "string indices must be integers" in error:
        hint = " (completions are plain strings here, not messages: completion instead of completion[0]['content'])"
    return in_short(error) + hint
