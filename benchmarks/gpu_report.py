"""The results of benchmarks/gpu.sh for people: a line as each stage ends, and a table of goals at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_WIDTH = 92
_SHOWN = 150


def line(name: str, result: Mapping[str, Any]) -> str:
    """One stage in one line."""
    seconds = f"{result['seconds']:.0f} s" if result.get("seconds") is not None else ""
    short = sum(found["met"] is False for found in result["found"])
    met = sum(found["met"] is True for found in result["found"])
    goals = f"{met} goals met" + (f", {short} NOT" if short else "") if met or short else ""
    reason = result["reason"]
    if len(reason) > 2 * _SHOWN:
        reason = f"{reason[:_SHOWN]} ... {reason[-_SHOWN:]}"  # what ended a process stands at the end
    tail = "; ".join(part for part in (goals, reason) if part)
    return f"{name:<26} {result['status']:<8} {seconds:>6}  {tail}"


def verdict(found: Mapping[str, Any]) -> str:
    """``ok`` or ``short``; empty where nothing was judged."""
    return {True: "ok", False: "short", None: ""}[found["met"]]


def table(
    results: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any], processes: Sequence[Mapping[str, Any]]
) -> str:
    """Every number with its goal, every stage that gave none with the reason, and what the processes took."""
    gpu = facts.get("gpu")
    where = (
        f"{gpu['name']}, driver {gpu.get('driver') or 'unknown'}" if gpu else "CPU, tiny sizes: costs are not judged"
    )
    lines = [where, f"{'what':<{_WIDTH}} {'goal':>10} {'measured':>26}"]
    for name, result in results.items():
        lines.append(name)
        lines += [_number(found) for found in result["found"]]
        if result["status"] != "done":
            said = "not run" if result["status"] == "skipped" else result["status"]
            lines.append(f"  {said}: {result['reason']}")
        elif not result["found"]:
            lines.append("  done")
    counts = [verdict(found) for result in results.values() for found in result["found"]]
    failed = sum(result["status"] == "failed" for result in results.values())
    missing = sum(result["status"] in ("skipped", "not run") for result in results.values())
    lines.append(
        f"{counts.count('ok')} goals met, {counts.count('short')} short, {failed} stages failed, {missing} not run"
    )
    took = (f"{p['name']} {p['seconds']:.0f} s (imports {p['imports']:.0f} s)" for p in processes)
    lines.append(f"{len(processes)} processes: {', '.join(took)}")
    return "\n".join(lines)


def _number(found: Mapping[str, Any]) -> str:
    unit = found["unit"] if found["unit"] in ("", "x", "/s") else f" {found['unit']}"
    value = _short(found["value"]) + unit
    if found["low"] is not None and found["low"] != found["high"]:
        value += f" ({_short(found['low'])}-{_short(found['high'])})"
    goal = "" if found["goal"] is None else f"{'>=' if found['at_least'] else '<='} {found['goal']:g}"
    return f"  {found['what'][: _WIDTH - 2]:<{_WIDTH - 2}} {goal:>10} {value:>26} {verdict(found)}".rstrip()


def _short(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
