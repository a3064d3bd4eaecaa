"""What the training loop tells a person: one protocol for the live view, plain lines and near silence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, Self

from igrpo_lite.config import RunConfig
from igrpo_lite.report.sample import Sample

Level = Literal["info", "warning"]
EvaluationName = Literal["before", "during", "after"]


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
