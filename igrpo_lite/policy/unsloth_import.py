"""The one place that imports Unsloth, with its environment set; it must come before transformers, PEFT and TRL.

Unsloth brings AGPL-3.0 and LGPL-3.0 code into the process. It is imported only; nothing here is taken from it.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

from igrpo_lite.config import ModelOptions
from igrpo_lite.environment.hardware import gpu_facts, has_gpu
from igrpo_lite.environment.pins import INSTALL
from igrpo_lite.errors import ModelError
from igrpo_lite.policy.quiet import quiet

_compiled: TemporaryDirectory[str] | None = None  # until the end of the process


def prepare(options: ModelOptions) -> Any:
    """The module ``unsloth``, imported with the environment that our way of using it needs; again, as it is.

    Raises:
        ModelError: it is not installed, or does not work here.
    """
    if "unsloth" in sys.modules:
        return sys.modules["unsloth"]
    if find_spec("unsloth") is None:
        raise ModelError(
            f"backend: unsloth is not installed: {INSTALL} (for a CUDA GPU); --backend transformers needs nothing"
        )
    for name, value in environment(options).items():
        os.environ[name] = value
    try:
        with quiet(stdout=True):
            return import_module("unsloth")
    except Exception as error:  # whatever it finds wrong with the packages around it
        said = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(
            f"backend: unsloth cannot be imported: {said[:300]}; igrpo-lite doctor tells which versions fit together, "
            "and --backend transformers does without it"
        ) from error


def environment(options: ModelOptions) -> dict[str, str]:
    """Variables that Unsloth and vLLM read while they are imported. The user's own come first, but for those that our
    sampler depends on."""
    global _compiled
    if _compiled is None:
        _compiled = TemporaryDirectory(prefix="igrpo-lite-unsloth-", ignore_cleanup_errors=True)
    needed = {
        # Adapters are sent to the engine, not folded into its weights, which are the policy's too.
        "UNSLOTH_VLLM_MERGED_ROLLOUT": "0",
        # Our share of the memory; its own, larger one runs out of it at the start of small cards.
        "UNSLOTH_VLLM_STANDBY_UTIL_OVERRIDE": "1",
    }
    wishes = {
        "UNSLOTH_COMPILE_LOCATION": _compiled.name,  # else in the current folder
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_VLLM_STANDBY": "1" if vllm_samples(options) else "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    if options.device == "cpu":
        needed["UNSLOTH_FORCE_CPU"] = "1"
    if any(gpu.capability is not None and gpu.capability < (8, 0) for gpu in gpu_facts()):
        wishes["UNSLOTH_VLLM_NO_FLASHINFER"] = "1"  # whose kernels need 8.0
    if find_spec("flashinfer") is None:
        wishes["VLLM_USE_FLASHINFER_SAMPLER"] = "0"  # which vLLM 0.26 imports unasked
    return needed | {name: os.environ.get(name, value) for name, value in wishes.items()}


def vllm_samples(options: ModelOptions) -> bool:
    """Whether vLLM shall be started with the model."""
    wanted = getattr(options, "sampler", "auto") != "transformers"
    return wanted and options.device != "cpu" and has_gpu() and find_spec("vllm") is not None
