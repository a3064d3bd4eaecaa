"""What the training loop tells a person: one protocol for the live view, plain lines and quiet runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

from igrpo_lite.config import RunConfig

Level = Literal["info", "warning"]
EvaluationName = Literal["before", "during", "after"]
_RECENT_STEPS = 20


@dataclass(frozen=True, slots=True)
class Sample:
    """A completion with what is needed to judge it by eye.

    Attributes:
        question: the problem.
        draft: the draft that the model was shown, in stage 2.
        completion: what the model wrote.
        answer: the gold answer.
        reason: verdict, as in :class:`igrpo_lite.types.Score`.
        reward: its weighted reward, if any part applied.
    """

    question: str
    draft: str | None
    completion: str
    answer: str
    reason: str
    reward: float | None


class Screen(Protocol):
    """What the training loop tells a person. Use it as a context manager: leaving restores the terminal."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...

    def start(self, config: RunConfig, lines: Sequence[str], done_steps: int) -> None:
        """Open with some lines about the run; `done_steps` are already behind a resumed one."""

    def message(self, text: str, level: Level = "info") -> None:
        """Say something that must not be lost."""

    def evaluation(self, name: EvaluationName, result: Mapping[str, Any]) -> None:
        """Show a held-out evaluation: the headline."""

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Show one optimizer step."""

    def sample(self, good: Sample | None, bad: Sample | None) -> None:
        """Show a good and a bad completion."""

    def heartbeat(self, text: str) -> None:
        """Say what is going on inside a step; cheap enough to call all the time."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Close with the summary of :mod:`igrpo_lite.report.summary`."""


class Pace:
    """How long the rest of a run will take: a mean over recent steps, since step times drift with lengths."""

    def __init__(self, max_steps: int, eval_steps: int, done_steps: int = 0) -> None:
        self.max_steps = max_steps
        self.done = done_steps
        self._eval_steps = eval_steps
        self._steps: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._evaluation = 0.0

    def step(self, step: int, seconds: float | None) -> None:
        """Count one finished step."""
        self.done = step
        if seconds is not None:
            self._steps.append(seconds)

    def evaluation(self, seconds: float | None) -> None:
        """Remember what the latest evaluation took: the remaining ones will take about as long."""
        self._evaluation = seconds or 0.0

    @property
    def seconds_per_step(self) -> float | None:
        return sum(self._steps) / len(self._steps) if self._steps else None

    def remaining(self) -> float | None:
        """Seconds still to go, or ``None`` before the first step."""
        if self.seconds_per_step is None:
            return None
        steps = max(self.max_steps - self.done, 0)
        evaluations = -(-steps // self._eval_steps)
        return steps * self.seconds_per_step + evaluations * self._evaluation
