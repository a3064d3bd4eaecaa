"""What benchmarks/gpu.sh runs, in order of worth: the stages of both calls, and the processes that they share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from gpu_common import Stage

PLAIN, FAST = "transformers-16", "unsloth-4"
"""Processes that load a model, by back end and bits of its frozen weights."""

WEIGHTS = {PLAIN: 2, FAST: 2, "kernels": 1, "trl": 2, "ours": 3}
"""How the time is divided among processes; each gets its share of what those before it have left."""

_VLLM, _TRL = ("vllm",), ("trl",)
_NO_FLEX = "FlexAttention has no backward pass on a CPU"

MACHINE = Stage("machine", PLAIN, "gpu_models:machine", "a matrix product in 16 bits; random weights to work with", 150)


def stages(second: bool) -> list[Stage]:
    """Those of one call."""
    if second:
        return [
            Stage(MACHINE.name, "trl", MACHINE.run, MACHINE.what, MACHINE.seconds),
            Stage("step-trl", "trl", "gpu_steps:trl", "whole steps of TRL's GRPO, vLLM colocate", 240, _VLLM + _TRL),
            Stage("step-grpo", "ours", "gpu_steps:grpo", "whole steps of our GRPO against them", 240, _VLLM),
            Stage("step-igrpo", "ours", "gpu_steps:igrpo", "whole steps of iGRPO, as many rollouts", 90, _VLLM),
            Stage("schedules", "ours", "gpu_steps:schedules", "barrier, overlap, ahead, GRPO on one engine", 90, _VLLM),
            Stage("update-a", "ours", "gpu_update:shape_a", "short groups against TRL: time, peak memory", 120, _TRL),
            Stage("update-b", "ours", "gpu_update:shape_b", "long groups against TRL: time, peak memory", 150, _TRL),
        ]
    return [
        MACHINE,
        *_loaded(PLAIN, "vLLM", _VLLM),
        *_loaded(FAST, "Unsloth's vLLM", ("bitsandbytes", "unsloth", *_VLLM)),
        Stage("flex", "kernels", "gpu_update:flex", "token trees: FlexAttention against SDPA", 120, (), _NO_FLEX),
        Stage("fp16", "kernels", "gpu_update:half", "one update in float16 with a scaled loss", 60),
    ]


def _loaded(process: str, engine: str, needs: tuple[str, ...]) -> list[Stage]:
    """What one loaded model and its engine can show; the first stage loads them."""
    every = {
        "smoke": ("gpu_engine:smoke", f"loads, samples with {engine}; one copy of the weights", 200),
        "parity": ("gpu_engine:parity", f"{engine} samples from the policy, also after a step of the adapter", 60),
        "handover": ("gpu_engine:handover", "the adapter's way into the engine", 45),
        "sleep": ("gpu_engine:sleep", "memory given back around an update, and the time that takes", 45),
        "plan": ("gpu_plan:train", "two steps of training at full length: planned against measured peak memory", 120),
    }
    return [
        Stage(f"{topic}-{process}", process, run, what, seconds, needs) for topic, (run, what, seconds) in every.items()
    ]


def chosen(only: Sequence[str] | None, second: bool) -> list[Stage]:
    """The stages of a call; with ``only`` those of these topics or names, of either call, behind the one that makes the
    model that all need.

    Raises:
        ValueError: nothing is called so.
    """
    if not only:
        return stages(second)
    every = {stage.name: stage for second in (True, False) for stage in stages(second)}
    unknown = sorted(set(only) - every.keys() - {stage.topic for stage in every.values()})
    if unknown:
        raise ValueError(f"no stage is called {', '.join(unknown)}; see --list")
    wanted = {MACHINE.name, *only}
    return [s for s in [*stages(False), *stages(True)[1:]] if s.name in wanted or s.topic in wanted]


def processes(wanted: Sequence[Stage]) -> list[list[Stage]]:
    """Neighbours that share a process."""
    return [list(group) for _, group in groupby(wanted, key=lambda stage: stage.process)]
