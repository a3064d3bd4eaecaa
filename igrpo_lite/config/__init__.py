"""The settings of a run: what they are (``options``), how they are read and checked (``resolve``, ``recipe_file``,
``retired``), and what they are called in words (``fields``). Nothing here opens a file of the user's but recipes."""

from __future__ import annotations

from igrpo_lite.config.options import (
    ALGORITHMS,
    SECTIONS,
    TOKENS,
    DataOptions,
    ModelOptions,
    NameIn,
    PromptOptions,
    RewardOptions,
    RolloutOptions,
    RunConfig,
    RunOptions,
    Section,
    UpdateOptions,
)

__all__ = [
    "ALGORITHMS",
    "SECTIONS",
    "TOKENS",
    "DataOptions",
    "ModelOptions",
    "NameIn",
    "PromptOptions",
    "RewardOptions",
    "RolloutOptions",
    "RunConfig",
    "RunOptions",
    "Section",
    "UpdateOptions",
]
