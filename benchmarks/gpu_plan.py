"""Steps of a real run, and what its plan said about their memory."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from gpu_common import Found, NotHere
from gpu_models import NAME

if TYPE_CHECKING:
    from gpu_worker import Context

    from igrpo_lite.training.card import Fitted

GIB = 2**30
_OFF = 0.10  # planned against measured


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


def train(context: Context) -> None:
    """The steps of ``igrpo-lite train`` on what the process has loaded as that does, at full length."""
    from igrpo_lite.algorithms.rollout import RolloutCollector
    from igrpo_lite.report.choice import make_screen
    from igrpo_lite.report.trackers import Trackers
    from igrpo_lite.training import loop
    from igrpo_lite.training.interrupt import Interrupt
    from igrpo_lite.training.run_folder import RunFolder
    from igrpo_lite.training.update import PolicyUpdate

    loaded, outcome = context.engine(), context.outcome
    loaded.sampler.wake()  # if a stage has failed while it slept
    config, phases = loaded.config, Phases()
    phases.take("")  # what other stages have used is none of the run's
    phases.peaks = {"load": loaded.peak}
    phases.watch(RolloutCollector, "collect", "rollout")
    phases.watch(loop, "evaluate", "rollout")
    phases.watch(PolicyUpdate, "step", "update")
    with RunFolder(config) as folder, make_screen(config.progress) as screen, Interrupt() as interrupt:
        trainer = loop.Trainer(config, loaded.prepared, folder, screen, Trackers([], folder.path, "", {}, print))
        stop = trainer.run(interrupt)
    phases.take("other")
    outcome.details |= {"stopped": stop and stop.text, "seconds": trainer.progress.seconds, "eager": context.eager}
    outcome.details["phases_gib"] = {name: size / GIB for name, size in phases.peaks.items()}
    outcome.found.append(Found("steps made", trainer.progress.step, "", config.max_steps, True, cost=False))
    if loaded.card.plan is None:
        raise NotHere("there is no plan without a GPU" if not context.on_gpu else "this model could not be planned for")
    outcome.details["plan"] = loaded.card.plan.to_json() | {"model": NAME}
    outcome.found += compared(loaded.card, phases.peaks)


def compared(card: Fitted, peaks: Mapping[str, int]) -> Iterator[Found]:
    """What was planned against the most bytes of each phase. The goal is the run's; a phase that is off says which part
    of the plan is to blame."""
    memory = card.comparison(max(peaks.values()))
    assert memory is not None
    assert card.plan is not None
    yield _off("whole run", memory["planned_gib"], memory["measured_gib"], goal=_OFF)
    for phase in card.plan.phases:
        if phase.name in peaks:
            yield _off(phase.name, phase.allocated / GIB, peaks[phase.name] / GIB)


def _off(what: str, planned: float, measured: float, goal: float | None = None) -> Found:
    return Found(
        f"{what}: planned {planned:.2f}, measured {measured:.2f} GiB; off", abs(planned / measured - 1), "", goal
    )
