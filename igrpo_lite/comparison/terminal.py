"""A comparison in the terminal: one table, and a line chart of characters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from string import ascii_letters
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from igrpo_lite.comparison.markdown import INTERVALS, pipes, summary_rows
from igrpo_lite.comparison.runs import MEASURES

_STYLES = ("cyan", "yellow", "green", "magenta", "blue", "red", "white")
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""Bits of a braille character by column and row."""

_SHOWN = (0, 1, 2, 3, 4, -1)
"""Columns that 80 cells have room for."""

Curves = Sequence[Sequence[tuple[float, float]]]


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print table and chart: in a terminal with colours, elsewhere as a Markdown table and plain characters."""
    header, rows = summary_rows(result)
    if console.is_terminal:
        console.print(_table(header, rows), "", INTERVALS.replace("`", ""), "", sep="\n", highlight=False)
    else:
        console.file.write(f"{pipes(header, rows)}\n{INTERVALS}\n\n")
    console.print(chart(result, console.encoding == "utf-8"))


def chart(result: Mapping[str, Any], braille: bool) -> RenderableType:
    """Mean accuracies over rollouts, single pass and refined, with the letters that stand for the methods."""
    curves = {
        measure: [[(p["rollouts"], 100 * p[measure]["mean"]) for p in row["curve"]] for row in result["table"].values()]
        for measure in MEASURES
    }
    panels = [plot(f"{measure}, % over rollouts", curves[measure], braille=braille) for measure in MEASURES]
    names = [Text(f"{_letter(i)} {name}", _style(i)) for i, name in enumerate(result["table"])]
    return Group(Columns(panels, padding=(1, 3)), Text(), Columns([*names, Text("* several")], padding=(0, 3)))


def plot(title: str, curves: Curves, width: int = 48, height: int = 12, braille: bool = True) -> Text:
    """Lines through points (x, y) as ``height`` rows of ``width`` cells between axes; a letter marks each point."""
    everything = [point for curve in curves for point in curve]
    right = max(x for x, _ in everything) or 1.0
    bottom = 5 * math.floor(min(y for _, y in everything) / 5)
    top = max(bottom + 5, 5 * math.ceil(max(y for _, y in everything) / 5))

    def dot(x: float, y: float) -> tuple[float, float]:
        return x / right * (2 * width - 1), (top - y) / (top - bottom) * (4 * height - 1)

    lines: dict[tuple[int, int], tuple[int, str]] = {}
    marks: dict[tuple[int, int], tuple[str, str]] = {}
    for number, curve in enumerate(curves):
        dots = [dot(x, y) for x, y in curve]
        for (x, y), (to_x, to_y) in pairwise(dots):
            length = max(1, math.ceil(max(abs(to_x - x), abs(to_y - y))))
            for step in range(length + 1):
                column, row = round(x + (to_x - x) * step / length), round(y + (to_y - y) * step / length)
                cell, bit = (row // 4, column // 2), _DOTS[column % 2][row % 4]
                lines[cell] = (lines.get(cell, (0, ""))[0] | bit, _style(number))
        for x, y in dots:
            cell = (round(y) // 4, round(x) // 2)
            marks[cell] = ("*", "") if cell in marks else (_letter(number), _style(number))

    text = Text(f"{title}\n", no_wrap=True)
    for row in range(height):
        level = {0: f"{top}", height // 2: f"{(top + bottom) / 2:g}", height - 1: f"{bottom}"}.get(row, "")
        text.append(f"{level:>5} |")
        for column in range(width):
            bits, style = lines.get((row, column), (0, ""))
            drawn = (chr(0x2800 + bits) if braille else ".") if bits else " "
            text.append(*marks.get((row, column), (drawn, style)))
        text.append("\n")
    return text.append(f"      0{'-' * (width - len(f'{right:,.0f}'))}{right:,.0f}")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for place in _SHOWN:
        table.add_column(header[place], justify="right" if place else "left", overflow="fold", min_width=7)
    for row in rows:
        table.add_row(*(Text(row[place]) for place in _SHOWN))
    return table


def _letter(number: int) -> str:
    return ascii_letters[number % len(ascii_letters)]


def _style(number: int) -> str:
    return _STYLES[number % len(_STYLES)]
