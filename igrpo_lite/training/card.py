"""What the planner decides at the start of a run on a GPU, and how its prediction compares with what was used."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from packaging.version import InvalidVersion, Version

from igrpo_lite.config import RunConfig
from igrpo_lite.errors import UserError
from igrpo_lite.planning.gpus import GIB, Gpu, gpu_of
from igrpo_lite.planning.memory import CONTEXT
from igrpo_lite.planning.models import find_model
from igrpo_lite.planning.plan import Plan, changes, plan
from igrpo_lite.planning.suggest import suggest
from igrpo_lite.policy.backends import enter, model_path
from igrpo_lite.sampling.choice import has_vllm

if TYPE_CHECKING:
    import torch

RELEASES_KV = "0.31"
"""The vLLM version from which on ``LLM.release_kv_cache_memory`` is there (``sampling.vllm_engine``)."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """A configuration made to fit a GPU; ``plan``: ``None`` where there is no GPU, or the model's shape is unknown."""

    config: RunConfig
    notes: tuple[str, ...] = ()
    plan: Plan | None = None

    def comparison(self, measured: int) -> dict[str, float] | None:
        """Planned and measured peak of what torch allocated, GiB, and their ratio; ``None`` without a plan."""
        if self.plan is None or not measured:
            return None
        planned = max(phase.allocated for phase in self.plan.phases)
        return {"planned_gib": planned / GIB, "measured_gib": measured / GIB, "ratio": planned / measured}


def gpu_in_use(config: RunConfig) -> Gpu | None:
    """The CUDA GPU of a run, with the memory that is free for it; ``None`` for other devices.
    :func:`measured_peak` counts from here on."""
    device = _cuda_device(config)
    if device is None:
        return None
    import torch

    found = torch.cuda.get_device_properties(device)  # first: it initialises CUDA
    torch.cuda.reset_peak_memory_stats(device)
    whole = gpu_of(found.name, found.total_memory, (found.major, found.minor))
    free, total = torch.cuda.mem_get_info(device)
    return without(whole, total - free - torch.cuda.memory_reserved(device) - CONTEXT)


def without(gpu: Gpu, taken: int) -> Gpu:
    """The GPU less ``taken`` bytes, which a desktop or another program holds. Less than 5 % is ignored: CUDA's own
    part depends on the driver."""
    return gpu if taken < gpu.memory_bytes / 20 else replace(gpu, memory_gib=gpu.memory_gib - taken / GIB)


def measured_peak(config: RunConfig) -> int:
    """The most bytes that torch has had allocated on the run's GPU; 0 without one."""
    device = _cuda_device(config)
    if device is None:
        return 0
    import torch

    return torch.cuda.max_memory_allocated(device)


def _cuda_device(config: RunConfig) -> torch.device | None:
    import torch

    if not (config.device == "auto" or config.device.startswith("cuda")) or not torch.cuda.is_available():
        return None
    return torch.device("cuda" if config.device == "auto" else config.device)


def fitted(config: RunConfig, gpu: Gpu | None) -> Fitted:
    """Choose the settings of memory that the user left open so that the run fits (:mod:`igrpo_lite.planning`).

    What is chosen changes the size of batches, not what is sampled or learned. A run that the plan says does not fit is
    tried all the same: the plan may be wrong, and the note says what would help.
    """
    if gpu is None:
        return Fitted(config)
    try:
        model = find_model(model_path(config.model), config.revision)
    except UserError as error:
        return Fitted(config, (f"memory is not planned: {error.problems[0]}",))
    unsloth = enter(config).name == "unsloth"
    releases_kv = releases_kv_cache(unsloth)
    # ``auto`` takes vLLM only where it is installed.
    known = config if has_vllm() else config.model_copy(update={"sampler": "transformers"})
    chosen = suggest(known, model, gpu, keep=config.model_fields_set, unsloth=unsloth, releases_kv=releases_kv)
    made = plan(known.model_copy(update=chosen), model, gpu, unsloth=unsloth, releases_kv=releases_kv)
    notes = [f"planned for {gpu.name}: {made.peak / GIB:.1f} of {gpu.memory_bytes / GIB:.1f} free GiB at most"]
    if chosen:
        notes[0] += f", with {', '.join(f'{name} {value}' for name, value in chosen.items())}"
    if made.verdict != "fits":
        best = next(iter(changes(made)), None)
        advice = f"; what helps most: {best.flags} ({best.peak / GIB:.1f} GiB)" if best is not None else ""
        word = "is tight" if made.verdict == "tight" else "may not fit"
        notes.append(f"the run {word} on this GPU{advice}")
    return Fitted(config.model_copy(update=chosen), tuple(notes), made)


def releases_kv_cache(unsloth: bool) -> bool:
    """Whether the installed vLLM releases its KV cache during updates: Unsloth's does unless told otherwise, vLLM
    itself where it can release it without the weights."""
    if unsloth:
        return os.environ.get("UNSLOTH_VLLM_STANDBY", "1") != "0"
    try:
        return Version(version("vllm")) >= Version(RELEASES_KV)
    except (PackageNotFoundError, InvalidVersion):
        return False
