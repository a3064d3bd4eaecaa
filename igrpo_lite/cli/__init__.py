"""The command line: one thin file per verb. Nothing here imports torch before a verb's work begins."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(tokens: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for a user's mistake, 3 for a run stopped for a reason."""
    try:
        from igrpo_lite.cli.app import run
    except KeyboardInterrupt:
        return 130
    return run(tokens)
