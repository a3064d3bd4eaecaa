"""Rewards: built-in ones, a language model as judge, and users' own functions in a process that can be killed.

Names are loaded at first use: the worker process starts through this package and needs none of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from igrpo_lite.rewards.answers import Verdict, find_answer, gold_answer, verdict
    from igrpo_lite.rewards.equality import same_answer
    from igrpo_lite.rewards.findings import reward_findings
    from igrpo_lite.rewards.scorer import Scorer

__all__ = ["Scorer", "Verdict", "find_answer", "gold_answer", "reward_findings", "same_answer", "verdict"]

_HOMES = {
    "Scorer": "scorer",
    "Verdict": "answers",
    "find_answer": "answers",
    "gold_answer": "answers",
    "reward_findings": "findings",
    "same_answer": "equality",
    "verdict": "answers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
