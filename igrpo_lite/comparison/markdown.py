"""A comparison as Markdown tables; the first one is also shown in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from igrpo_lite.comparison.runs import COLLAPSE, MEASURES
from igrpo_lite.comparison.tables import COSTS

INTERVALS = (
    "Held-out accuracy in %, mean over seeds [95 % t-interval of the mean]. The intervals cover chance in training, on "
    "these held-out problems. `single` is one greedy pass, `refined` a second pass with that answer as the draft (not "
    "in the paper)."
)


def summary_rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table that answers first: each method in one row."""
    base = result["baseline"]
    header = ["method", "single", "refined", f"minus {base}, single", f"minus {base}, refined"]
    header += ["learning tokens", "tokens through the layers", "collapses"]
    rows = []
    for method, row in result["table"].items():
        difference = result["paired"].get(method)
        cells = [method, *(brief(row[measure]["after"]) for measure in MEASURES)]
        cells += [brief(difference[measure], "+") if difference else "" for measure in MEASURES]
        cells += [f"{row['learning_tokens']:,.0f}", f"{row['backbone_tokens']:,.0f}"]
        rows.append([*cells, f"{row['collapses']} of {len(row['seeds'])}"])
    return header, rows


def markdown(result: Mapping[str, Any]) -> str:
    """All tables of a comparison."""
    header, rows = summary_rows(result)
    rows = [[f"`{row[0]}`", *row[1:]] for row in rows]
    parts = [
        f"`{result['command']}`\n",
        *(f"**{note}**\n" for note in result["notes"]),
        *(f"**Left out, {reason}:** {', '.join(names)}\n" for reason, names in by_reason(result["missing"]).items()),
        INTERVALS + "\n",
        pipes(header, rows),
        "## Before and after\n",
        "Mean ± standard deviation over seeds [95 % t-interval]; `best` is the best of a run's "
        "evaluations, which flatters it.\n",
        _before_after(result),
        "## Over the steps\n",
        _over_steps(result),
        *_paired(result),
        "## Costs\n",
        "Means per run; seconds by the clock leave out loading, evaluating and saving. A collapse is a run "
        f"that ends more than {100 * COLLAPSE:.0f} points of single-pass accuracy below its own best evaluation, below "
        "its start, or before its last step.\n",
        _costs(result),
        _provenance(result),
    ]
    return "\n".join(parts)


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print the first table: in a terminal what fits into 80 columns, elsewhere all of it as Markdown."""
    header, rows = summary_rows(result)
    if not console.is_terminal:
        console.file.write(f"{pipes(header, rows)}\n{INTERVALS}\n")
        return
    places = (0, 1, 2, 3, 4, -1)
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for place in places:
        table.add_column(header[place], justify="right" if place else "left", overflow="fold", min_width=7)
    for row in rows:
        table.add_row(*(Text(row[place]) for place in places))
    console.print(table, "", INTERVALS.replace("`", ""), sep="\n", highlight=False)


def by_reason(missing: Mapping[str, str]) -> dict[str, list[str]]:
    """Names of the runs that are missing, by the reason why."""
    found: dict[str, list[str]] = {}
    for name, reason in missing.items():
        found.setdefault(reason, []).append(name)
    return found


def pipes(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """One table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def brief(found: Mapping[str, Any], sign: str = "") -> str:
    """``mean [low, high]`` in percent."""
    mean, low, high = (None if found[key] is None else tenth(found[key]) for key in ("mean", "low", "high"))
    return f"{mean:{sign}.1f}" if low is None else f"{mean:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def percent(found: Mapping[str, Any]) -> str:
    """``mean ± sd [low, high]`` in percent."""
    mean, sd, low, high = (None if found[key] is None else tenth(found[key]) for key in ("mean", "sd", "low", "high"))
    return f"{mean:.1f}" if sd is None else f"{mean:.1f} ± {sd:.1f} [{low:.1f}, {high:.1f}]"


def tenth(share: float) -> float:
    """A share in percent, rounded; adding zero makes the -0.0 of rounding a plain 0.0."""
    return round(100 * share, 1) + 0.0


def _each(values: Sequence[float], sign: str = "") -> str:
    return ", ".join(f"{tenth(value):{sign}.1f}" for value in values)


def _before_after(result: Mapping[str, Any]) -> str:
    header = ["method", "measure", "before", "after", "change in points", "best", "after, seed by seed"]
    rows = []
    for method, row in result["table"].items():
        for measure in MEASURES:
            found = row[measure]
            cells = [percent(found[part]) for part in ("before", "after", "change")]
            best = f"{tenth(found['best']['mean']):.1f}"
            rows.append([f"`{method}`", measure, *cells, best, _each(found["after"]["values"])])
    return pipes(header, rows)


def _over_steps(result: Mapping[str, Any]) -> str:
    curves = {method: {point["step"]: point for point in row["curve"]} for method, row in result["table"].items()}
    steps = sorted({step for curve in curves.values() for step in curve})
    rows = [
        [f"`{method}`", measure, *(brief(curve[step][measure]) if step in curve else "" for step in steps)]
        for method, curve in curves.items()
        for measure in MEASURES
    ]
    return pipes(["method", "measure", *(f"step {step}" for step in steps)], rows)


def _paired(result: Mapping[str, Any]) -> list[str]:
    if not result["paired"]:
        return []
    rows = []
    for method, measures in result["paired"].items():
        for measure in MEASURES:
            found = measures[measure]
            wider = found["problems"]
            bounds = "" if wider is None else f"[{tenth(wider['low']):+.1f}, {tenth(wider['high']):+.1f}]"
            rows.append([f"`{method}`", measure, brief(found, "+"), bounds, _each(found["values"], "+")])
    header = [f"minus `{result['baseline']}`", "measure", "points, over seeds", "over seeds and problems"]
    return [
        f"## Against {result['baseline']}, same seed\n",
        "The first interval holds for these held-out problems; the second also covers the chance in which problems "
        "they are.\n",
        pipes([*header, "seed by seed"], rows),
    ]


def _costs(result: Mapping[str, Any]) -> str:
    header = ["method", "runs", "collapses", "rollouts", "sampled tokens", "learning tokens"]
    header += ["tokens through the layers", "seconds of training"]
    rows = [
        [f"`{method}`", f"{len(row['seeds'])}", f"{row['collapses']}", *(f"{row[cost]:,.0f}" for cost in COSTS)]
        for method, row in result["table"].items()
    ]
    return pipes(header, rows)


def _provenance(result: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in result["settings"].items())
    packages = ", ".join(f"{name} {' and '.join(numbers)}" for name, numbers in result["versions"].items())
    seeds = ", ".join(map(str, result["seeds"]))
    return f"Seeds {seeds}. {f'Settings: {settings}. ' if settings else ''}Versions: {packages}.\n"
