"""The end of a run on one page: what was measured, how sure that is, where the time went, how to go on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from igrpo_lite.report.text import accuracy, clean, duration


def summary_view(summary: Mapping[str, Any]) -> RenderableType:
    """The closing page as a rich renderable, equally readable without colours."""
    parts: list[RenderableType] = [Text(_opening(summary), style="bold")]
    before, after = summary.get("before"), summary.get("after")
    if before or after:
        parts += [Text(), _accuracy_table(before or {}, after or {}), Text()]
        parts += [Text(f"  {note}") for note in _notes(before or {}, after or {}) + _best_note(summary)]
    if times := summary.get("time"):
        phases = ", ".join(f"{clean(name)} {duration(seconds)}" for name, seconds in times.items())
        grid = Table.grid()
        grid.add_row(Text("  Time      "), Text(phases))
        parts += [Text(), grid]
    for label, key in (("Adapter ", "adapter"), ("Best    ", "best_adapter")):
        if folder := summary.get(key):
            parts.append(_unbroken(f"  {label}  {clean(str(folder))}"))
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


def _notes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    old, new = before.get("single"), after.get("single")
    if not old or not new:
        return ["95 % intervals in brackets. With one evaluation no change can be stated."]
    notes = [f"n = {new['n']} problems; 95 % intervals in brackets."]
    if old["low"] <= new["high"] and new["low"] <= old["high"]:
        notes.append("The single-pass intervals overlap: the change can be noise.")
        notes.append("A larger --eval-size would tell more.")
    else:
        notes.append("The single-pass intervals do not overlap; it is still one run with one seed.")
    return notes


def _best_note(summary: Mapping[str, Any]) -> list[str]:
    best, after = summary.get("best"), summary.get("after") or {}
    if not best or best.get("step") == after.get("step"):
        return []
    if best.get("step") == 0 and after:
        return ["No later evaluation was better than the one before training."]
    among = f" of {summary['evaluations']} evaluations" if summary.get("evaluations") else ""
    return [
        f"Best{among}: {accuracy(best.get('single'))} at step {best.get('step', '-')};",
        "chosen on these same problems, which flatters it a little.",
    ]
