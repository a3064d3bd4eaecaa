"""Numbers and foreign text as short, safe, single-line strings."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from rich.cells import cell_len

from igrpo_lite.report.screen import Sample

# CSI and OSC sequences, so that no "[31m" is left behind once the escape character itself is dropped.
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b.")
_LONGEST = 20_000


def clean(text: str) -> str:
    """`text` on one line without control, direction and other invisible characters; white space collapsed."""
    text = _ESCAPES.sub("", text)
    return " ".join("".join(c if c.isprintable() else " " if c.isspace() else "" for c in text).split())


def _fitting(characters: Iterable[str], cells: int) -> list[str]:
    kept: list[str] = []
    for character in characters:
        cells -= cell_len(character)
        if cells < 0:
            break
        kept.append(character)
    return kept


def cut(text: str, width: int, keep_end: bool = False) -> str:
    """`text`, cleaned and at most `width` cells wide; `keep_end` cuts in the middle, since answers stand at the end."""
    if keep_end and len(text) > 2 * _LONGEST:
        text = text[:_LONGEST] + text[-_LONGEST:]
    text = clean(text if keep_end else text[:_LONGEST])
    if cell_len(text) <= width:
        return text
    room = max(width - 3, 0)
    tail = "".join(reversed(_fitting(reversed(text), room // 2))) if keep_end else ""
    head = "".join(_fitting(text, room - cell_len(tail)))
    return (head + "..." + tail)[:width]


def number(value: float | None, digits: int = 2) -> str:
    """A plain number, or `-` where there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def percent(share: float | None, digits: int = 0) -> str:
    """A share as `47 %`, or `-` where there is none."""
    return "-" if share is None or math.isnan(share) else f"{100 * share:.{digits}f} %"


def count(value: float | None) -> str:
    """A large number in three or four characters: `950`, `1.8k`, `23k`, `1.2M`."""
    if value is None or math.isnan(value):
        return "-"
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.{1 if value < 10 * size else 0}f}{unit}"
    return f"{value:.0f}"


def duration(seconds: float | None) -> str:
    """Seconds in at most six characters: `0:34`, `12:05`, `3h05m`, `2d04h`."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    whole = max(round(seconds), 0)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d}"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def accuracy(part: Mapping[str, Any] | None) -> str:
    """One measured accuracy with its 95 % interval: `47.5 % (40.7-54.4)`."""
    if not part or part.get("accuracy") is None:
        return "-"
    text = percent(part["accuracy"], 1)
    if part.get("low") is not None and part.get("high") is not None:
        text += f" ({100 * part['low']:.1f}-{100 * part['high']:.1f})"
    return text


def evaluation_line(name: str, result: Mapping[str, Any]) -> str:
    """One held-out evaluation in one line of at most 79 characters."""
    when = name if name in ("before", "after") else f"step {result.get('step', '-')}"
    line = f"held-out accuracy, {when}: {accuracy(result.get('single'))}"
    if refined := result.get("refined"):
        line += f", refined {accuracy(refined)}"
    return cut(line, 79)


def sample_lines(label: str, sample: Sample, width: int) -> list[str]:
    """A sample in three or four lines of `width` (at least 20): verdict, question, draft, completion."""
    verdict = f"{label}: {sample.reason}, reward {number(sample.reward)}, gold answer {sample.answer}"
    lines = [cut(verdict, width), "  question  " + cut(sample.question, width - 12, keep_end=True)]
    if sample.draft is not None:
        lines.append("  draft     " + cut(sample.draft, width - 12, keep_end=True))
    return [*lines, "  answer    " + cut(sample.completion, width - 12, keep_end=True)]
