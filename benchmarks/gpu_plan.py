"""A real run of igrpo-lite train, and what its plan said about its memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gpu_common import Found, NotHere

if TYPE_CHECKING:
    from gpu_worker import Context

GIB = 2**30
_OFF = 0.10  # planned against measured
_STEPS = 2


class Phases:
    """Most bytes that torch had allocated in each phase of a run on a GPU."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}

    def watch(self, owner: Any, function: str, phase: str) -> None:
        """Count what is allocated inside ``owner.function`` for a phase."""
        call = getattr(owner, function)

        @functools.wraps(call)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.take("other")
            try:
                return call(*args, **kwargs)
            finally:
                self.take(phase)

        setattr(owner, function, watched)

    def take(self, phase: str) -> None:
        import torch

        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            self.peaks[phase] = max(self.peaks.get(phase, 0), torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()

    def highest(self, config: Any) -> int:
        """What ``measured_peak`` would give, had the counters not been set back between phases."""
        self.take("other")
        return max(self.peaks.values(), default=0)


def train(context: Context) -> None:
    """Two steps with the settings that the planner chooses, everything at full length."""
    import igrpo_lite.training.loop as loop
    import igrpo_lite.training.run as run
    from igrpo_lite.algorithms.rollout import RolloutCollector
    from igrpo_lite.training.update import PolicyUpdate

    phases, plans = Phases(), []
    phases.watch(run, "prepare", "load")
    phases.watch(RolloutCollector, "collect", "rollout")
    phases.watch(loop, "evaluate", "rollout")
    phases.watch(PolicyUpdate, "step", "update")
    run.fitted = _kept(run.fitted, plans)
    run.measured_peak = phases.highest

    import igrpo_lite

    summary = igrpo_lite.train(**_settings(context))
    outcome = context.outcome
    kept = {key: summary[key] for key in ("steps", "stopped", "rollouts", "time") if key in summary}
    outcome.details |= {"summary": kept, "phases_gib": {name: size / GIB for name, size in phases.peaks.items()}}
    outcome.found.append(Found("steps made", summary["steps"], "", _STEPS, True, cost=False))
    made = plans[0].plan if plans else None
    if made is None:
        raise NotHere("there is no plan without a GPU" if not context.on_gpu else "this model could not be planned for")
    outcome.details["plan"] = made.to_json() | {"model": context.setup.model if context.setup else ""}
    memory = summary["memory"]
    outcome.found.append(_off("whole run", memory["planned_gib"], memory["measured_gib"], goal=_OFF))
    for phase in made.phases:
        if phase.name in phases.peaks:
            # The goal is the run's; a phase that is off says which part of the plan is to blame.
            outcome.found.append(_off(phase.name, phase.allocated / GIB, phases.peaks[phase.name] / GIB))


def _kept(call: Callable[..., Any], results: list[Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def kept(*args: Any, **kwargs: Any) -> Any:
        results.append(call(*args, **kwargs))
        return results[-1]

    return kept


def _off(what: str, planned: float, measured: float, goal: float | None = None) -> Found:
    return Found(
        f"{what}: planned {planned:.2f}, measured {measured:.2f} GiB; off", abs(planned / measured - 1), "", goal
    )


def _settings(context: Context) -> dict[str, Any]:
    setup = context.setup
    assert setup is not None
    slow = setup.backend == "transformers" and setup.bits == 4  # sampled by our own engine
    length = 8 if context.tiny else 128 if slow else 512
    return {
        "model": context.model(setup.model),
        "backend": setup.backend,
        "load_in_4bit": setup.bits == 4,
        "device": context.device,
        "output_dir": str(context.scratch / f"run-{setup.name}"),
        "data": "two-step",
        "max_problems": 64,
        "prompts_per_step": 2 if context.tiny else 8,
        "num_generations": 4 if context.tiny else 8,
        "max_completion_length": length,
        "max_draft_length": length,
        "reward_funcs": ["random"],  # random weights earn nothing else, and without a signal there is no update
        "max_steps": _STEPS,
        "eval_size": 2,
        "eval_steps": _STEPS,
        "save_steps": _STEPS,
        "progress": "plain",
    }
