"""One run as its own files tell it: ``summary.json``, ``metrics.jsonl``, ``evaluations/``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from igrpo_lite.config import RunConfig
from igrpo_lite.config.resolve import RESUMABLE, differences, load_file, resolve
from igrpo_lite.errors import ConfigError, RunFolderError
from igrpo_lite.training.run_folder import RunFolder

MEASURES = ("single", "refined")
COLLAPSE = 0.10
"""Single-pass accuracy lost since a run's own best evaluation that counts as a collapse."""

_LEARNING_PHASES = ("rollout", "reward", "update")


@dataclass(frozen=True, slots=True)
class Point:
    """One held-out evaluation: accuracies, and what the run had sampled by then."""

    step: int
    rollouts: int
    sampled_tokens: int
    single: float
    refined: float


@dataclass(frozen=True, slots=True)
class Run:
    """What one run's own files say.

    Attributes:
        points: every held-out evaluation, in order; the first is before any step.
        stopped: why it ended before its last step, if it did.
        rollouts: completions sampled. Points take these as spread evenly over the steps, which dynamic sampling and
            replays do only nearly.
        seconds: by the clock, of rollouts, rewards and updates: neither loading nor evaluating nor saving.
        versions: of the packages that it was made with.
        right: by measure, which held-out problems (by id) were right after the last step; empty if not known.
    """

    method: str
    seed: int
    points: tuple[Point, ...]
    stopped: str | None
    rollouts: int
    sampled_tokens: int
    learning_tokens: int
    backbone_tokens: int
    seconds: float
    versions: Mapping[str, str] = field(default_factory=dict)
    right: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)

    def before(self, measure: str) -> float:
        """Accuracy before the first step."""
        return self.values(measure)[0]

    def after(self, measure: str) -> float:
        """Accuracy of the last evaluation."""
        return self.values(measure)[-1]

    def best(self, measure: str) -> float:
        """Highest accuracy of all evaluations; the choice flatters it."""
        return max(self.values(measure))

    def values(self, measure: str) -> list[float]:
        return [getattr(point, measure) for point in self.points]

    @property
    def collapsed(self) -> bool:
        """Ended well below its own best evaluation, below its start, or before its last step."""
        after = self.after("single")
        # Accuracies are shares of a few hundred: 0.4 - 0.3 must not count as more than 0.1.
        fell = self.best("single") - after > COLLAPSE + 1e-9
        return self.stopped is not None or fell or after < self.before("single")


def unfinished(folder: Path, config: RunConfig) -> str | None:
    """Why the run in ``folder`` cannot be taken as the finished run of ``config``; ``None`` if it can.

    A run that its diagnosis stopped is finished: that is its result.
    """
    summary = _summary(folder)
    if summary is None:
        return "not run yet"
    if changed := made_otherwise(folder, config):
        return changed
    steps, by = summary.get("steps", 0), summary.get("stopped_by")
    if by != "diagnosis" and (summary.get("stopped") is not None or steps < config.max_steps):
        return f"not finished: {steps} of {config.max_steps} steps"
    return None


def made_otherwise(folder: Path, config: RunConfig) -> str | None:
    """How the run in ``folder``, if one has got as far as a result there, was made differently from ``config``."""
    if not RunFolder(config.model_copy(update={"output_dir": str(folder)})).has_work():
        return None
    try:
        made_with = resolve(load_file(folder / "config.yaml"))
    except ConfigError as error:
        return f"its config.yaml cannot be used: {error.problems[0]}"
    changed = differences(made_with, config).keys() - RESUMABLE
    return f"made with other settings: {', '.join(sorted(changed))}" if changed else None


def read_run(folder: Path, method: str) -> Run:
    """The run in a folder.

    Raises:
        RunFolderError: its records are not there or not whole.
    """
    summary = _summary(folder)
    try:
        if summary is None:
            raise ValueError("no summary.json")
        run = run_from(method, summary, _lines(folder / "metrics.jsonl"), _right(folder))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RunFolderError(f"{folder}: its records cannot be read: {type(error).__name__}: {error}") from error
    made = summary.get("evaluations", len(run.points))
    if not run.points or len(run.points) != made:
        raise RunFolderError(f"{folder}: metrics.jsonl holds {len(run.points)} of {made} evaluations")
    return run


def run_from(
    method: str,
    summary: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    right: Mapping[str, Mapping[str, bool]] | None = None,
) -> Run:
    """A run from its summary and the records of its metrics."""
    steps = [record for record in records if record["kind"] == "step"]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    points = tuple(
        Point(
            found["step"],
            round(summary["rollouts"] * found["step"] / summary["steps"]) if summary["steps"] else 0,
            sum(step["tokens/sampled"] for step in steps if step["step"] <= found["step"]),
            *(found[measure]["accuracy"] for measure in MEASURES),
        )
        for found in evaluations
    )
    return Run(
        method,
        summary["seed"],
        points,
        summary["stopped"],
        summary["rollouts"],
        sum(step["tokens/sampled"] for step in steps),
        sum(step["tokens/learning"] for step in steps),
        sum(step["tokens/backbone"] for step in steps),
        sum(summary["time"].get(phase, 0.0) for phase in _LEARNING_PHASES),
        summary.get("versions", {}),
        right or {},
    )


def _summary(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _right(folder: Path) -> dict[str, dict[str, bool]]:
    files = sorted((folder / "evaluations").glob("step-*.jsonl"))
    answers = _lines(files[-1]) if files else []
    return {m: {answer["id"]: answer[m]["reason"] == "correct" for answer in answers} for m in MEASURES}


def _lines(file: Path) -> list[dict[str, Any]]:
    with file.open(encoding="utf-8") as stream:  # str.splitlines would also cut at what questions may hold, like U+2028
        return [json.loads(line) for line in stream]
