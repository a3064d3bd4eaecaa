"""The screen of a training run: one protocol, and the choice between a live view, plain lines and near silence."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, Self

from igrpo_lite.config import RunConfig
from igrpo_lite.report.sample import Sample

Level = Literal["info", "warning"]
EvaluationName = Literal["before", "during", "after"]

# A command started from a notebook's cell gets a pseudo-terminal: `isatty` alone would put cursor moves into the cell.
_NOTEBOOK_VARIABLES = ("JPY_PARENT_PID", "COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE")


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


def make_screen(progress: str) -> Screen:
    """The screen for `progress` (``auto``, ``live``, ``plain`` or ``off``) on the present standard output.

    ``live`` insists on the live view in any terminal; where there is none, it gets plain lines like ``auto``.
    """
    from igrpo_lite.report.plain import PlainScreen, QuietScreen

    if progress == "off":
        return QuietScreen()
    if progress == "plain" or not _is_terminal() or (progress == "auto" and not _is_capable()):
        return PlainScreen()
    from igrpo_lite.report.live import LiveScreen

    return LiveScreen()


def in_notebook() -> bool:
    """Whether this process is a notebook kernel, or was started from a notebook's cell."""
    return "ipykernel" in sys.modules or "google.colab" in sys.modules or any(map(os.environ.get, _NOTEBOOK_VARIABLES))


def _is_terminal() -> bool:
    # Replaced standard outputs (notebooks, test runners, services) may lack isatty or refuse it when closed.
    try:
        return bool(sys.stdout.isatty())
    except (AttributeError, ValueError, OSError):
        return False


def _is_capable() -> bool:
    encoding = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "")
    return not in_notebook() and os.environ.get("TERM") != "dumb" and encoding == "utf8"
