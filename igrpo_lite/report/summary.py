"""The end of a run on one page: what was measured, how sure that is, where the time went, how to go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from igrpo_lite.report.text import accuracy, clean, duration


class Summary(TypedDict, total=False):
    """What the summary view reads of `summary.json`; all of it may be absent."""

    before: Mapping[str, Any] | None
    """Evaluation of the model without adapter: {"step", "single": {"accuracy", "n", "low", "high"}, "refined": ...}."""
    after: Mapping[str, Any] | None
    """Evaluation of the kept adapter; its "step" says when it was taken."""
    steps: int
    max_steps: int
    stopped: str | None
    """Why the run ended before `max_steps`, if it did."""
    evaluations: int
    """Evaluations among which the kept adapter was the best; above 1 the choice flatters it a little."""
    time: Mapping[str, float]
    """Seconds per phase."""
    adapter: str | None
    """Folder of the kept adapter."""
    next: Sequence[str]
    """Commands or sentences on how to go on, one per line."""


def summary_view(summary: Mapping[str, Any]) -> RenderableType:
    """The closing page as a rich renderable, equally readable without colours."""
    parts: list[RenderableType] = [Text(_opening(summary), style="bold")]
    before, after = summary.get("before"), summary.get("after")
    if before or after:
        parts += [Text(), _accuracy_table(before or {}, after or {}), Text()]
        parts += [Text(f"  {note}") for note in _notes(summary, before or {}, after or {})]
    if times := summary.get("time"):
        phases = ", ".join(f"{clean(name)} {duration(seconds)}" for name, seconds in times.items())
        parts += [Text(), Text(f"  Time      {phases}")]
    if adapter := summary.get("adapter"):
        parts.append(_unbroken(f"  Adapter   {clean(str(adapter))}"))
    for index, line in enumerate(summary.get("next") or ()):
        parts.append(_unbroken(("  Go on     " if index == 0 else "            ") + clean(line)))
    return Group(*parts)


def _opening(summary: Mapping[str, Any]) -> str:
    steps, planned = summary.get("steps"), summary.get("max_steps")
    done = "Finished" if steps is None else f"{steps} of {planned} steps" if planned else f"{steps} steps"
    stopped = summary.get("stopped")
    return f"{done}. Stopped: {clean(stopped)}" if stopped else f"{done}."


def _unbroken(line: str) -> Text:
    # Paths and commands are there to be copied: the terminal may wrap them, we must not put line ends into them.
    return Text(line, no_wrap=True, overflow="ignore")


def _accuracy_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=True, header_style="dim")
    table.add_column("held-out accuracy")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    for label, key in (("single pass", "single"), ("refined (own draft)", "refined")):
        old, new = before.get(key), after.get(key)
        if old or new:
            style = "bold" if key == "single" else ""
            table.add_row(label, accuracy(old), accuracy(new), _change(old, new), style=style)
    return table


def _change(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> str:
    if not old or not new:
        return "-"
    return f"{100 * (new['accuracy'] - old['accuracy']):+.1f} points"


def _notes(summary: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    old, new = before.get("single"), after.get("single")
    if not old or not new:
        return ["In brackets: 95 % intervals. Without both evaluations no change can be stated."]
    notes = [f"n = {new['n']} problems; 95 % intervals in brackets."]
    if old["low"] <= new["high"] and new["low"] <= old["high"]:
        notes += ["The single-pass intervals overlap: the change can be noise.", "A larger --eval-size would tell more."]
    else:
        notes.append("The single-pass intervals do not overlap; it is still one run with one seed.")
    if summary.get("evaluations", 0) > 1:
        step = after.get("step", "?")
        notes.append(f"Step {step} was the best of {summary['evaluations']} evaluations on these problems: slightly flattering.")
    return notes
