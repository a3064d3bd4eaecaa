"""Defaults that depend on another setting: on the model, or on how long answers are."""

from __future__ import annotations

from typing import Any

MODEL_DEFAULTS: dict[str, dict[str, Any]] = {
    "tiny": {
        "lora_alpha": 32,
        "num_generations": 16,
        "max_completion_length": 48,
        "learning_rate": 1e-3,
        "max_grad_norm": 1.0,
        "max_steps": 60,
        "eval_steps": 20,
        "eval_size": 400,
        "save_steps": 20,
    },
}
"""Defaults that suit one model better than the general ones; whatever the user sets wins."""

SGRPO_PRESETS: dict[str, dict[str, Any]] = {
    "short": {"sgrpo_alpha": 0, "sgrpo_p": 0.4, "sgrpo_k": 0},
    "long": {"sgrpo_alpha": 100, "sgrpo_p": 0.5, "sgrpo_k": 300},
}
"""S-GRPO for answers of a few hundred tokens, and for longer ones: 40 % of the tokens, or those up to about the 500th,
after which nothing has to be computed. Ours; the paper's own values could not be found."""

ENTROPY_SHARE = 0.2
"""Share of the tokens that learn with ``tokens: entropy`` (arXiv 2506.01939)."""

LONG_COMPLETION = 600
"""Tokens of ``max_completion_length`` from which the preset ``long`` is the default."""

REWARD_SETTINGS: dict[str, str] = {"judge": "judge_"}
"""What the settings of a built-in reward begin with."""

ENDPOINT_SETTINGS: tuple[str, ...] = (
    *("judge_url", "judge_model"),
    "judge_token_budget",
)
"""The judge's settings that mean nothing where the policy is the judge."""
