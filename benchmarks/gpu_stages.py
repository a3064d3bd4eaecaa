"""What benchmarks/gpu.sh runs, in order of worth, and the setups that its stages share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from gpu_common import Setup, Stage

SMALL, LARGE = "qwen2-1.5b", "qwen3-4b"
MODELS = (SMALL, LARGE)

_VLLM, _BNB, _UNSLOTH, _TRL = ("vllm",), ("bitsandbytes",), ("unsloth",), ("trl",)


def _models(name: str) -> Stage:
    return Stage("models", "gpu_models:make", f"random weights in the shape of {name}", 120, suffix=name)


def _loaded(setup: Setup, *topics: str) -> list[Stage]:
    """The stages that one loaded model and its engine can show."""
    engine = "vLLM" if setup.backend == "unsloth" or setup.bits == 16 else "our own sampler"
    what = {
        "smoke": ("gpu_engine:smoke", f"loads, samples with {engine}; one copy of the weights", 300),
        "parity": ("gpu_engine:parity", f"{engine} samples from the policy, also after a step of the adapter", 120),
        "handover": ("gpu_engine:handover", "the adapter's way into the engine", 60),
        "sleep": ("gpu_engine:sleep", "memory given back around an update, and the time that takes", 60),
    }
    needs = _BNB if setup.bits == 4 else ()
    needs += (_UNSLOTH + _VLLM) if setup.backend == "unsloth" else _VLLM if setup.bits == 16 else ()
    return [Stage(topic, what[topic][0], what[topic][1], what[topic][2], setup, setup.model, needs) for topic in topics]


def _plan(setup: Setup) -> Stage:
    needs = _BNB if setup.bits == 4 else ()
    needs += (_UNSLOTH + _VLLM) if setup.backend == "unsloth" else ()
    what = "a real run of igrpo-lite train, two steps: planned against measured peak memory"
    return Stage("plan", "gpu_plan:train", what, 240, setup, setup.model, needs)


def _update(name: str, seconds: int) -> Stage:
    what = "update shapes a and b against TRL: time and peak memory"
    return Stage("update", "gpu_update:shapes", what, seconds, needs=_TRL, suffix=name)


def stages() -> list[Stage]:
    """All of them."""
    plain, packed = (Setup("transformers", bits, SMALL) for bits in (16, 4))
    fast, fast_packed = (Setup("unsloth", bits, SMALL) for bits in (16, 4))
    large = Setup("transformers", 16, LARGE)
    every = ("smoke", "parity", "handover", "sleep")
    no_flex = "FlexAttention has no backward pass on a CPU"
    return [
        Stage("smoke", "gpu_models:machine", "versions, GPU, a matrix product in 16 bits", 120, suffix="machine"),
        _models(SMALL),
        *_loaded(plain, *every),
        *_loaded(fast_packed, *every),
        *_loaded(fast, *every),
        *_loaded(packed, "smoke", "parity"),
        Stage(
            "schedules",
            "gpu_rollout:schedules",
            "barrier, overlap and ahead against each other and against GRPO",
            300,
            model=SMALL,
            needs=_VLLM,
        ),
        Stage(
            "step",
            "gpu_rollout:step",
            "whole GRPO steps against TRL with vLLM colocate, in a process each",
            420,
            model=SMALL,
            needs=_VLLM + _TRL,
        ),
        _update(SMALL, 300),
        Stage(
            "flex",
            "gpu_update:flex",
            "token trees: FlexAttention against SDPA, equal and how fast",
            180,
            model=SMALL,
            not_on_cpu=no_flex,
        ),
        Stage("fp16", "gpu_update:half", "one update in float16 with a scaled loss", 120, model=SMALL),
        *(_plan(setup) for setup in (plain, fast_packed, fast, packed)),
        _models(LARGE),
        *_loaded(large, *every),
        _update(LARGE, 300),
        _plan(Setup("unsloth", 4, LARGE)),
    ]


def chosen(every: Sequence[Stage], only: Sequence[str] | None) -> list[Stage]:
    """The stages of these topics or names, and the models that they need.

    Raises:
        ValueError: nothing is called so.
    """
    if not only:
        return list(every)
    unknown = sorted(set(only) - {stage.topic for stage in every} - {stage.name for stage in every})
    if unknown:
        raise ValueError(f"no stage is called {', '.join(unknown)}; see --list")
    wanted = [stage for stage in every if stage.topic in only or stage.name in only]
    models = {stage.model for stage in wanted}
    return [s for s in every if s in wanted or (s.topic == "models" and s.suffix in models)]


def processes(wanted: Sequence[Stage]) -> list[list[Stage]]:
    """Neighbours that share what they load, each list to be run in one process."""
    numbered = enumerate(wanted)

    def key(entry: tuple[int, Stage]) -> object:
        place, stage = entry
        # A run of igrpo-lite train loads for itself; so does whatever has no setup.
        return stage.setup if stage.setup and stage.topic != "plan" else place

    return [[stage for _, stage in group] for _, group in groupby(numbered, key=key)]
