"""What the benchmark scripts share: how a result is described, summarised and written."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
from collections.abc import Sequence
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
