"""Settings that are gone, so that old recipes and run folders get one clear sentence or simply go on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from igrpo_lite.config import RunConfig

RETIRED: dict[str, Any] = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.99,
    "decontaminate_ngram": 13,
    "draft_answer": "shown",
    "draft_fallback": "none",
    "draft_tie_break": "first",
    "joint_groups": "own",
    "judge_cache": None,
    "judge_concurrency": 8,
    "judge_retries": 3,
    "math_verify_timeout": 5.0,
    "min_lr_rate": 0.1,
    "min_p": 0.0,
    "num_refinements": None,
    "plain_refinements": 0.0,
    "repetition_ngram": 3,
    "sample_steps": 20,
    "save_minutes": 10.0,
    "sgrpo_cap": "in_order",
    "sgrpo_norm": "selected",
    "stage2_baseline": "mean",
    "stream_rows": None,
    "top_p": 1.0,
    "tspmo_baseline": "visits",
    "tspmo_weight": "unique",
    "weight_decay": 0.0,
}
"""The value of each that is what still happens; ``num_refinements`` is what ``num_drafts`` leaves of
``num_generations``."""

RESUMABLE = frozenset(
    {"judge_cache", "judge_concurrency", "judge_retries", "math_verify_timeout", "sample_steps", "save_minutes"}
)
"""Retired settings that changed no result, so a run folder is continued whatever they were."""

RETIRED_VALUES = {"draft_selection": ("worst", "worst_formatted", "mixed")}
"""Values that a setting no longer takes."""


_INSTEAD = {
    "judge_cache": "the environment variable XDG_CACHE_HOME moves the cache",
    "num_refinements": "set num_generations and num_drafts, and refinements are the rest",
    "stream_rows": "give a range of rows instead, like data_split: train[:50000]",
}


def gone(name: str) -> str:
    """What to do about a retired setting."""
    if name in _INSTEAD:
        return f"{name}: is no setting any more; {_INSTEAD[name]}"
    return f"{name}: is no setting any more, and only {RETIRED[name]} is left of it; leave it out"


def retired_findings(given: Mapping[str, Any], config: RunConfig) -> list[str]:
    """One sentence for each retired setting whose value would change what ``config`` does."""
    kept = RETIRED | {"num_refinements": config.n_refinements}
    same = {name: (None, "none", kept[name], str(kept[name])) for name in kept}
    return [gone(name) for name, value in given.items() if name in RETIRED and value not in same[name]]


def resumed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an old run that is continued."""
    return {name: value for name, value in settings.items() if name not in RESUMABLE}


def without_retired(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an old run for verbs that do not train: whatever it was trained with, retired settings do not
    matter to them."""
    return {
        name: value
        for name, value in settings.items()
        if name not in RETIRED and value not in RETIRED_VALUES.get(name, ())
    }
