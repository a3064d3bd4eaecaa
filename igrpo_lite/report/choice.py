"""The choice between a live view, plain lines and a quiet run."""

from __future__ import annotations

import os
import sys

from igrpo_lite.report.live import LiveScreen
from igrpo_lite.report.plain import PlainScreen, QuietScreen
from igrpo_lite.report.screen import Screen

# A command started from a notebook's cell gets a pseudo-terminal: `isatty` alone would put cursor moves into the cell.
_NOTEBOOK_VARIABLES = ("JPY_PARENT_PID", "COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE")


def make_screen(progress: str) -> Screen:
    """The screen for `progress` (``auto``, ``live``, ``plain`` or ``off``) on the present standard output.

    ``live`` insists on the live view in any terminal; where there is none, it gets plain lines like ``auto``.
    """
    if progress == "off":
        return QuietScreen()
    if progress == "plain" or not _is_terminal() or (progress == "auto" and not _is_capable()):
        return PlainScreen()
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
