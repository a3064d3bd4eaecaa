"""Training: the loop, the update, checkpoints, the run folder and the diagnosis."""

from __future__ import annotations

from typing import Any

from igrpo_lite.config import RunConfig


def train(config: RunConfig) -> dict[str, Any]:
    """Train as ``config`` says, or go on with the run its folder holds; returns the contents of ``summary.json``.

    Raises:
        UserError: the settings, data, model, rewards or folder cannot work; whatever was already made is kept.
    """
    from igrpo_lite.policy.backends import enter

    enter(config)  # first: Unsloth, where it is chosen, patches what the rest imports
    from igrpo_lite.training.run import run

    return run(config)
