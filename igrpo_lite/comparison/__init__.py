"""Methods compared at equal rollouts: whole runs over several seeds, and what their own files say, side by side."""

from __future__ import annotations

from igrpo_lite.comparison.run import compare

__all__ = ["compare"]
