"""What the benchmark scripts share: how a result is described, summarised and written."""

from __future__ import annotations

import gc
import json
import os
import platform
import shlex
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from igrpo_lite.versions import installed_versions

_PLACES = ("--json", "--markdown", "--output-dir")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest value."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def shown(found: dict[str, float], unit: str = "", digits: int = 2) -> str:
    """A spread as ``median (min-max)``."""
    middle, low, high = (f"{found[name]:.{digits}f}" for name in ("median", "min", "max"))
    return f"{middle}{unit} ({low}-{high})"


def take_turns(
    contenders: Mapping[str, Callable[[], object]], repeats: int, finish: Callable[[], object] = lambda: None
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each contender in each turn, by the clock (``wall``) and of this process's processors (``cpu``).

    Every turn runs all of them once, in an order that rotates, so that a machine that is busy at times hurts all alike.

    Args:
        finish: waits for what a contender may have left running on an accelerator.
    """
    names = list(contenders)
    seconds: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in names}
    for turn in range(repeats):
        gc.collect()
        for position in range(len(names)):
            name = names[(turn + position) % len(names)]
            wall, cpu = time.perf_counter(), time.process_time()
            contenders[name]()
            finish()
            seconds[name]["wall"].append(time.perf_counter() - wall)
            seconds[name]["cpu"].append(time.process_time() - cpu)
    return seconds


def paired(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Spread of the ratios within each turn."""
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])


def provenance(script: str, arguments: Sequence[str], threads: int) -> dict[str, Any]:
    """Command, versions and machine of a result; ``load`` over the number of processors means a busy machine."""
    return {
        "command": command(script, arguments),
        "versions": installed_versions(),
        "machine": {
            "cpu": cpu_model(),
            "cpus": os.cpu_count(),
            "threads": threads,
            "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
            "system": platform.system(),
            "architecture": platform.machine(),
        },
    }


def command(script: str, arguments: Sequence[str]) -> str:
    """The command that gave a result; where its files go is nobody else's concern."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument.split("=")[0] in _PLACES:
            skip = "=" not in argument
        else:
            kept.append(argument)
    return shlex.join(["python", f"benchmarks/{script}", *kept])


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
