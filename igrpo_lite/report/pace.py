"""How long the rest of a run will take, from its recent steps."""

from __future__ import annotations

from collections import deque

_RECENT = 20


class Pace:
    """Smooths over recent steps, because lengths and with them step times drift while a model learns."""

    def __init__(self, max_steps: int, eval_steps: int, done_steps: int = 0) -> None:
        self.max_steps = max_steps
        self.done = done_steps
        self._eval_steps = eval_steps
        self._steps: deque[float] = deque(maxlen=_RECENT)
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
