"""What ``igrpo-lite eval`` shows: every accuracy with its interval, the paired change, and how sure that is."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from igrpo_lite.report.text import clean, cut, duration

_COLUMNS = {"base": "base", "adapted": "with adapter"}
_SHARES = {"no_answer": "no answer", "truncated": "truncated", "length": "tokens", "ended_length": "  if ended"}
_WIDTH = 100


def print_evaluation(results: Mapping[str, Any], flips: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> None:
    """Print the results, and these answers that flipped, to standard output; without a terminal, as plain lines."""
    terminal = sys.stdout.isatty()
    console = Console() if terminal else Console(width=_WIDTH, color_system=None, force_jupyter=False)
    lines = [line for base, adapted in flips for line in flip_lines(base, adapted, console.width)]
    page = Group(evaluation_view(results), *(Text(line, no_wrap=True, overflow="ignore") for line in lines))
    if terminal:
        console.print(page, crop=False)
        return
    with console.capture() as captured:
        console.print(page, crop=False)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    for line in captured.get().splitlines():
        print(line.rstrip().encode(encoding, "replace").decode(encoding))


def evaluation_view(results: Mapping[str, Any]) -> RenderableType:
    """The results as ``evaluation.compare.Comparison.to_json`` gives them, with ``adapter``, as a table and what to
    know about it."""
    # A path is there to be copied: the terminal may wrap it, we must not put line ends into it.
    return Group(_table(results), *(Text(f"  {line}", no_wrap=True, overflow="ignore") for line in _notes(results)))


def flip_lines(base: Mapping[str, Any], adapted: Mapping[str, Any], width: int) -> list[str]:
    """One problem whose answer flipped, from the records of base and adapter, in lines of ``width`` (at least 20)."""
    lines = [
        cut(f"{base['id']}: {base['single']['reason']} -> {adapted['single']['reason']}, gold {base['gold']}", width),
        "  question  " + cut(base["question"], width - 12, keep_end=True),
    ]
    for label, record in (("  base      ", base["single"]), ("  adapter   ", adapted["single"])):
        lines.append(label + cut(record["text"], width - 12, keep_end=True))
    return lines


def _table(results: Mapping[str, Any]) -> Table:
    measured = [name for name in _COLUMNS if name in results]
    both = len(measured) == 2
    table = Table(box=None, padding=(0, 0, 0, 2), pad_edge=False, header_style="dim")
    table.add_column("held-out, %")
    for name in measured:
        table.add_column(_COLUMNS[name] if both or name == "adapted" else "model", justify="right")
    if both:
        table.add_column("change", justify="right")
        table.add_column("McNemar", justify="right")
    for key, label in _measures(results):
        estimates = [results[name][key] for name in measured]
        cells = [f"{_points(e['accuracy'])} ({_points(e['low'])}-{_points(e['high'])})" for e in estimates]
        table.add_row(label, *cells, *(_change(results["change"][key]) if both else ()), style=_style(key))
    for key, label in _SHARES.items():
        values = [results[name][f"single_{key}"] for name in measured]
        scale = 1 if key.endswith("length") else 100
        cells = ["-" if value is None else f"{scale * value:.1f}" for value in values]
        if both:
            cells.append("-" if None in values else _signed(scale * (values[1] - values[0])))
        table.add_row(label, *cells)
    return table


def _measures(results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys of the results that are accuracies, with their label: the paper's, of samples, and the rest."""
    keys = [key for key, value in _any(results).items() if isinstance(value, Mapping) and "accuracy" in value]
    names = {"single": "single pass", "single_strict": "  strict", "refined": "refined"}
    for key in sorted(keys, key=lambda key: key.startswith("refined")):
        if key.startswith("refined_best"):
            yield key, key.removeprefix("refined_").replace("_", " ")
        elif key in names or ("@" in key and key != "pass@1"):  # which is avg@k again
            yield key, names.get(key, "  strict" if key.endswith("_strict") else key)


def _notes(results: Mapping[str, Any]) -> list[str]:
    n, sampling = results["n"], results["sampling"]
    notes = [f"n = {n} held-out problems: +/- {98 / math.sqrt(n):.1f} points at most; 95 % intervals in brackets"]
    if change := results["change"].get("single"):
        notes.append(
            f"single pass: {change['gained']} flipped right, {change['lost']} flipped wrong; "
            f"exact McNemar test p = {_p_value(change['p_value'])}"
        )
    notes.append("quote the single pass (greedy); strict counts boxes, answer tags and #### only")
    if count := max(sampling["samples"], sampling["best_of"]):
        how = f"temperature {sampling['temperature']:g}, top_p {sampling['top_p']:g}"
        notes.append(f"of {count} samples at {how}: avg (estimates pass@1), maj (vote), pass")
    notes.append("not in the paper: refined, from its own greedy draft")
    if best_of := sampling["best_of"]:
        notes.append(f"nor best of {best_of}: refined from the best draft by the gold answer (an oracle)")
    if results["shots"]:
        notes.append(f"nor the worked examples in every prompt: {results['shots']}")
    if results.get("adapter"):
        notes.append(f"adapter: {clean(str(results['adapter']))}")
    times = [f"{_COLUMNS[name]} {duration(results[name]['seconds'])}" for name in _COLUMNS if name in results]
    return [*notes, f"time: {', '.join(times)}"]


def _any(results: Mapping[str, Any]) -> Mapping[str, Any]:
    return results["base"] if "base" in results else results["adapted"]


def _change(change: Mapping[str, Any]) -> tuple[str, str]:
    difference, low, high = (_signed(100 * change[name]) for name in ("difference", "low", "high"))
    p_value = change["p_value"]
    return f"{difference} ({low}, {high})", "" if p_value is None else _p_value(p_value)


def _style(key: str) -> str:
    return "bold" if key == "single" else "dim" if key.startswith("refined") else ""


def _p_value(p_value: float) -> str:
    return "<0.0001" if p_value < 0.0001 else f"{p_value:.4f}"


def _points(share: float) -> str:
    return f"{100 * share:.1f}"


def _signed(difference: float) -> str:
    return f"{round(difference, 1) + 0.0:+.1f}"  # the sum turns -0.0 into 0.0
