"""One run from its configuration to its summary."""

from __future__ import annotations

import shlex
import time
from typing import Any

from igrpo_lite.config import RunConfig
from igrpo_lite.environment.torch_build import cuda_trouble
from igrpo_lite.report.choice import make_screen
from igrpo_lite.report.screen import Screen
from igrpo_lite.report.trackers import Trackers
from igrpo_lite.training.card import fitted, gpu_in_use, measured_peak
from igrpo_lite.training.interrupt import Interrupt
from igrpo_lite.training.loop import Trainer
from igrpo_lite.training.prepare import prepare
from igrpo_lite.training.run_folder import RunFolder
from igrpo_lite.training.state import Stop
from igrpo_lite.versions import installed_versions


def run(config: RunConfig) -> dict[str, Any]:
    """See :func:`igrpo_lite.training.train`."""
    with RunFolder(config) as folder, make_screen(config.progress) as screen:
        earlier = folder.summary()
        if earlier and earlier["stopped"] is None and earlier["steps"] >= config.max_steps:
            screen.finish(earlier)
            screen.message(f"{folder.path} is finished; raise --max-steps to go on or start over with --fresh")
            return earlier
        return _train(config, folder, screen)


def _train(config: RunConfig, folder: RunFolder, screen: Screen) -> dict[str, Any]:
    started = time.perf_counter()
    trouble = cuda_trouble(config.device)
    if trouble is not None:
        screen.message(f"the GPU cannot be used: {trouble}", "warning")
    screen.message(f"loading {config.data} and {config.model}")
    card = fitted(config, gpu_in_use(config))
    config = card.config
    for note in card.notes:
        screen.message(note)
    if card.plan is not None and card.plan.setup.vllm:
        screen.message("vLLM compiles for the GPU as it starts: a minute or more")
    parts = prepare(config)
    parts.notes = [note for note in parts.notes if note != str(trouble)]
    trackers = Trackers(
        config.report_to,
        folder.path,
        folder.path.name,
        config.model_dump(),
        lambda text: screen.message(text, "warning"),
    )
    loading = time.perf_counter() - started
    try:
        with Interrupt() as interrupt:
            trainer = Trainer(config, parts, folder, screen, trackers)
            stop = trainer.run(interrupt)
        summary = _summary(config, folder, trainer, stop, loading)
        memory = card.comparison(measured_peak(config))
        if memory is not None:
            summary["memory"] = memory
            screen.message(
                f"memory at most: {memory['measured_gib']:.2f} GiB allocated, planned were {memory['planned_gib']:.2f}"
            )
        folder.write_json("summary.json", summary)
        screen.finish(summary)
        return summary
    finally:
        parts.close()
        trackers.finish()


def _summary(
    config: RunConfig, folder: RunFolder, trainer: Trainer, stop: Stop | None, loading: float
) -> dict[str, Any]:
    progress = trainer.progress
    last = progress.evaluations[-1] if progress.evaluations else None
    finished = last is not None and last["step"] == progress.step >= config.max_steps
    best = progress.best
    return {
        "before": progress.evaluations[0] if progress.evaluations else None,
        "after": last if finished else None,
        "best": best,
        "evaluations": len(progress.evaluations),
        "algorithm": config.algorithm,
        "steps": progress.step,
        "max_steps": config.max_steps,
        "stopped": stop and stop.text,
        "stopped_by": stop and stop.by,
        "rollouts": progress.rollouts,
        "problems": {"train": len(trainer.parts.train), "held_out": len(trainer.parts.held_out)},
        "adapter": str(folder.adapter),
        "best_adapter": str(folder.best) if folder.best.is_dir() else None,
        "next": _next(folder, stop),
        "time": {"loading": loading} | progress.seconds,
        "seed": config.seed,
        "versions": installed_versions(),
    }


def _next(folder: RunFolder, stop: Stop | None) -> list[str]:
    if stop is not None:
        return ["run the same command again to go on"]
    return [f"igrpo-lite eval {shlex.quote(str(folder.path))}"]
