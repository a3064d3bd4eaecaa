"""Runs put side by side: accuracies over seeds, paired differences from the first method, costs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from igrpo_lite.comparison.runs import MEASURES, Run
from igrpo_lite.evaluation.statistics import over_seeds, over_seeds_and_problems

COSTS = ("rollouts", "sampled_tokens", "learning_tokens", "backbone_tokens", "seconds")


def grouped(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs by method, in the order in which methods first appear, each by seed."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.method, []).append(run)
    return {method: sorted(mine, key=lambda run: run.seed) for method, mine in found.items()}


def table(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Per method: accuracies over seeds, collapses, costs per run, and accuracies over the steps."""
    return {method: _row(mine) for method, mine in grouped(runs).items()}


def paired(runs: Sequence[Run], baseline: str) -> dict[str, dict[str, Any]]:
    """Accuracy after training minus the baseline's with the same seed, per method and measure.

    ``problems`` is the interval over seeds and problems, where all runs answered the same ones.
    """
    found: dict[str, dict[str, Any]] = {}
    for method, pairs in _pairs(runs, baseline).items():
        found[method] = {"seeds": [run.seed for run, _ in pairs]}
        for measure in MEASURES:
            differences = [run.after(measure) - base.after(measure) for run, base in pairs]
            rows = _by_problem(pairs, measure)
            bounds = over_seeds_and_problems(rows) if rows else None
            wider = None if bounds is None else dict(zip(("low", "high"), bounds, strict=True))
            found[method][measure] = over_seeds(differences) | {"problems": wider}
    return found


def notes(runs: Sequence[Run]) -> list[str]:
    """What would make the comparison less than it seems."""
    found = []
    problems = {frozenset(run.right["single"]) for run in runs if run.right}
    if len(problems) > 1:
        found.append("The runs were measured on different held-out problems: their differences mean nothing.")
    for name, numbers in versions(runs).items():
        if len(numbers) > 1:
            found.append(f"The runs were made with different versions of {name}: {', '.join(numbers)}.")
    alike = [method for method, mine in grouped(runs).items() if _all_alike(mine)]
    if alike:
        found.append(
            f"All seeds of {', '.join(alike)} ended with the same accuracy: an interval without width is no certainty, "
            "more seeds would give it one."
        )
    return found


def _all_alike(mine: Sequence[Run]) -> bool:
    return len(mine) > 1 and any(len({run.after(measure) for run in mine}) == 1 for measure in MEASURES)


def versions(runs: Iterable[Run]) -> dict[str, list[str]]:
    """Per package, the versions that the runs were made with."""
    found: dict[str, set[str]] = {}
    for run in runs:
        for name, number in run.versions.items():
            found.setdefault(name, set()).add(number)
    return {name: sorted(numbers) for name, numbers in found.items()}


def _row(mine: Sequence[Run]) -> dict[str, Any]:
    row: dict[str, Any] = {"seeds": [run.seed for run in mine]}
    for measure in MEASURES:
        row[measure] = {
            "before": over_seeds([run.before(measure) for run in mine]),
            "after": over_seeds([run.after(measure) for run in mine]),
            "change": over_seeds([run.after(measure) - run.before(measure) for run in mine]),
            "best": over_seeds([run.best(measure) for run in mine]),
        }
    row["collapses"] = sum(run.collapsed for run in mine)
    for cost in COSTS:
        row[cost] = statistics.fmean(getattr(run, cost) for run in mine)
    row["curve"] = _curve(mine)
    return row


def _curve(mine: Sequence[Run]) -> list[dict[str, Any]]:
    """Mean accuracies at every evaluation; where some runs had been stopped before, of the others."""
    points = [point for run in mine for point in run.points]
    found = []
    for step in sorted({point.step for point in points}):
        here = [point for point in points if point.step == step]
        found.append(
            {
                "step": step,
                "rollouts": statistics.fmean(point.rollouts for point in here),
                "sampled_tokens": statistics.fmean(point.sampled_tokens for point in here),
            }
            | {measure: over_seeds([getattr(point, measure) for point in here]) for measure in MEASURES}
        )
    return found


def _pairs(runs: Sequence[Run], baseline: str) -> dict[str, list[tuple[Run, Run]]]:
    """Each other method's runs with the baseline's of the same seed."""
    base = {run.seed: run for run in runs if run.method == baseline}
    pairs = {
        method: [(run, base[run.seed]) for run in mine if run.seed in base]
        for method, mine in grouped(runs).items()
        if method != baseline
    }
    return {method: found for method, found in pairs.items() if found}


def _by_problem(pairs: Sequence[tuple[Run, Run]], measure: str) -> list[list[float]]:
    """Seeds x problems: +1 where only the method's run is right, -1 where only the baseline's, else 0."""
    answers = [(run.right.get(measure, {}), base.right.get(measure, {})) for run, base in pairs]
    ids = answers[0][0].keys()
    if not ids or any(own.keys() != ids or other.keys() != ids for own, other in answers):
        return []
    return [[float(own[key]) - float(other[key]) for key in ids] for own, other in answers]
