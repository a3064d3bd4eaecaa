"""The bundled model's parts for tests: real tokenizer, real policy, real scorer, real sampler."""

from __future__ import annotations

from typing import Any

import torch

from igrpo_lite.config import RunConfig
from igrpo_lite.config.resolve import resolve
from igrpo_lite.training.prepare import prepare
from igrpo_lite.workbench import Workbench

SMALL: dict[str, Any] = {
    "num_generations": 6,
    "prompts_per_step": 3,
    "max_problems": 40,
    "eval_size": 8,
    "max_steps": 4,
    "eval_steps": 2,
    "save_steps": 2,
    "progress": "off",
}


def small_config(**settings: Any) -> RunConfig:
    return resolve(SMALL | settings)


def tiny_parts(config: RunConfig) -> Workbench:
    """Parts of a run with an adapter that is not zero, so that nothing is right by accident."""
    parts = prepare(config)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in parts.policy.adapter_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    parts.sampler.load_adapter()
    return parts
