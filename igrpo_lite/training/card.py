"""What the planner decides at the start of a run on a GPU, and how its prediction compares with what was used."""

from __future__ import annotations

from dataclasses import dataclass

from igrpo_lite.config import RunConfig
from igrpo_lite.errors import UserError
from igrpo_lite.planning.gpus import GIB, Gpu, gpu_of
from igrpo_lite.planning.models import find_model
from igrpo_lite.planning.plan import Plan, changes, plan
from igrpo_lite.planning.suggest import suggest


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
    """The CUDA GPU that a run would take; ``None`` for other devices."""
    import torch

    if not (config.device == "auto" or config.device.startswith("cuda")) or not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(torch.device("cuda" if config.device == "auto" else config.device))
    return gpu_of(found.name, found.total_memory, (found.major, found.minor))


def measured_peak(config: RunConfig) -> int:
    """The most bytes that torch has had allocated on the run's GPU; 0 without one."""
    import torch

    if gpu_in_use(config) is None:
        return 0
    return torch.cuda.max_memory_allocated(None if config.device == "auto" else config.device)


def fitted(config: RunConfig, gpu: Gpu | None) -> Fitted:
    """Choose the settings of memory that the user left open so that the run fits (:mod:`igrpo_lite.planning`).

    What is chosen changes the size of batches, not what is sampled or learned. A run that the plan says does not fit is
    tried all the same: the plan may be wrong, and the note says what would help.
    """
    if gpu is None:
        return Fitted(config)
    try:
        model = find_model(config.model, config.revision)
    except UserError as error:
        return Fitted(config, (f"memory is not planned: {error.problems[0]}",))
    chosen = suggest(config, model, gpu, keep=config.model_fields_set)
    settled = config.model_copy(update=chosen)
    made = plan(settled, model, gpu)
    notes = [f"planned for {gpu.name}: {made.peak / GIB:.1f} of {gpu.memory_bytes / GIB:.1f} GiB at most"]
    if chosen:
        notes[0] += f", with {', '.join(f'{name} {value}' for name, value in chosen.items())}"
    if made.verdict != "fits":
        best = next(iter(changes(made)), None)
        advice = f"; what helps most: {best.flags} ({best.peak / GIB:.1f} GiB)" if best is not None else ""
        word = "is tight" if made.verdict == "tight" else "may not fit"
        notes.append(f"the run {word} on this GPU{advice}")
    return Fitted(settled, tuple(notes), made)
