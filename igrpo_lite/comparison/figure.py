"""A comparison as a picture: accuracy over rollouts, single pass on the left, refined on the right."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from igrpo_lite.comparison.runs import MEASURES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which colour-blind readers can tell apart (https://jfly.uni-koeln.de/color/), without the yellow."""

_MARKERS = "os^Dv*X"
_DASHES = ("-", "--", ":", "-.")
_LINE = 120
"""Characters that fit below both panels; each entry of the legend takes eight beside its name."""

_TITLES = {"single": "Single pass", "refined": "Refined with an own draft"}


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write the picture as PNG. Lines are means over seeds, bands 95 % t-intervals (none for a single seed)."""
    # A Figure without pyplot draws with Agg and leaves a notebook's back end alone.
    from matplotlib.figure import Figure

    methods = result["table"]
    columns = max(1, min(len(methods), 4 if len(methods) <= 4 else 3, _LINE // (max(map(len, methods), default=0) + 8)))
    height = 4.2 + 0.25 * -(-len(methods) // columns)
    figure = Figure(figsize=(11, height), layout="constrained")
    for axes, measure in zip(figure.subplots(1, 2, sharey=True), MEASURES, strict=True):
        _panel(axes, methods, measure)
    figure.axes[0].set_ylabel("held-out accuracy, %")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=150)


def _panel(axes: Axes, methods: Mapping[str, Any], measure: str) -> None:
    for number, (method, row) in enumerate(methods.items()):
        x = [point["rollouts"] for point in row["curve"]]
        found = [point[measure] for point in row["curve"]]
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(
            x,
            [100 * point["mean"] for point in found],
            label=method,
            color=colour,
            marker=_MARKERS[number % len(_MARKERS)],
            linestyle=_DASHES[number // len(COLOURS) % len(_DASHES)],
        )
        bounds = [
            (point["mean"], point["mean"]) if point["low"] is None else (point["low"], point["high"]) for point in found
        ]
        low, high = ([100 * min(1.0, max(0.0, bound)) for bound in side] for side in zip(*bounds, strict=True))
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_title(_TITLES[measure])
    axes.set_xlabel("rollouts")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
