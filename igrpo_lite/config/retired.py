"""Settings that are gone, so that old recipes and run folders get one clear sentence or simply go on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from igrpo_lite.config.fields import default_text
from igrpo_lite.config.options import RunConfig

RETIRED: dict[str, Any] = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.99,
    "decontaminate_ngram": 13,
    "delta": None,
    "draft_answer": "shown",
    "draft_fallback": "none",
    "draft_temperature": None,
    "draft_tie_break": "first",
    "importance_sampling_clip_max": 3.0,
    "joint_groups": "own",
    "judge_api_key_env": "OPENAI_API_KEY",
    "judge_cache": None,
    "judge_concurrency": 8,
    "judge_retries": 3,
    "judge_timeout": 60.0,
    "math_verify": True,
    "math_verify_timeout": 5.0,
    "min_lr_rate": 0.1,
    "min_p": 0.0,
    "num_refinements": None,
    "overlong_buffer": None,
    "plain_refinements": 0.0,
    "rebuild_steps": 0,
    "repetition_ngram": 3,
    "sample_steps": 20,
    "save_minutes": 10.0,
    "save_total_limit": 2,
    "sgrpo_cap": "in_order",
    "sgrpo_norm": "selected",
    "sgrpo_preset": None,
    "share_weights": True,
    "stage2_baseline": "mean",
    "stream_rows": None,
    "top_entropy_quantile": 0.2,
    "top_p": 1.0,
    "torch_threads": None,
    "tspmo_baseline": "visits",
    "tspmo_min_visits": 2,
    "tspmo_weight": "unique",
    "weight_decay": 0.0,
}
"""The value of each that is what still happens; ``num_refinements`` is what ``num_drafts`` leaves of
``num_generations``."""

RESUMABLE = frozenset(
    {
        "judge_api_key_env",
        "judge_cache",
        "judge_concurrency",
        "judge_retries",
        "judge_timeout",
        "math_verify_timeout",
        "rebuild_steps",
        "sample_steps",
        "save_minutes",
        "save_total_limit",
        "sgrpo_preset",  # what it stood for is in the folder
        "share_weights",
        "torch_threads",
    }
)
"""Retired settings that changed no result, so a run folder is continued whatever they were."""

RETIRED_VALUES = {"draft_selection": ("worst", "worst_formatted", "mixed"), "loss_type": ("bnpo",)}
"""Values that a setting no longer takes."""

_INSTEAD = {
    "draft_temperature": "temperature is that of both stages; leave it out",
    "judge_api_key_env": "put the key into the environment variable OPENAI_API_KEY",
    "judge_cache": "the environment variable XDG_CACHE_HOME moves the cache",
    "judge_timeout": "set reward_timeout, which is the judge's too",
    "num_refinements": "set num_generations and num_drafts, and refinements are the rest",
    "rebuild_steps": "a run that is stopped and started again goes on with fresh memory; leave it out",
    "sgrpo_preset": "set sgrpo_alpha, sgrpo_p and sgrpo_k (short: 0, 0.4, 0; long: 100, 0.5, 300), or leave it out",
    "stream_rows": "give a range of rows instead, like data_split: train[:50000]",
    "torch_threads": "set the environment variable OMP_NUM_THREADS",
}
"""What to do instead of a setting that has another way."""


def gone(name: str) -> str:
    """What to do about a retired setting."""
    if name in _INSTEAD:
        return f"{name}: was removed; {_INSTEAD[name]}"
    left = default_text(RETIRED[name])
    always = "" if left == "unset" else f"; every run now has {name} {left}"
    return f"{name}: was removed{always}; leave it out"


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
