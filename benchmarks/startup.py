"""Seconds until the command line answers, with the bare interpreter and ``import torch`` beside them.

Every command is a process of its own; all take turns, and the first turns (which fill the disk cache) do not count.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring import provenance, shown, spread, write_json

PYTHON = {"python -c pass": ["-c", "pass"], 'python -c "import torch"': ["-c", "import torch"]}
OURS = {
    "igrpo-lite --help": ["--help"],
    "igrpo-lite train --help": ["train", "--help"],
    "igrpo-lite train --dump-config": ["train", "--dump-config"],
    "igrpo-lite plan": ["plan", "--model", "qwen3-4b", "--gpu", "t4"],
}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--warmup", type=int, default=2, help="turns that do not count")
    parser.add_argument("--repeats", type=int, default=7, help="turns that count")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args(arguments)
    found = measure(commands(), options.warmup, options.repeats)
    for name, clocks in found.items():
        print(f"{name:<32} {shown(clocks['wall'], ' s', 3):>24} wall {shown(clocks['cpu'], ' s', 3):>24} CPU")
    result = provenance("startup.py", arguments, threads=1) | {
        "settings": {"warmup": options.warmup, "repeats": options.repeats},
        "seconds": found,
    }
    write_json(options.json, result)
    return result


def commands() -> dict[str, list[str]]:
    """Every command under the name it is shown by."""
    script = Path(sys.executable).with_name("igrpo-lite")  # the installed script, as a user starts it
    ours = [str(script)] if script.exists() else [sys.executable, "-m", "igrpo_lite"]
    plain = {name: [sys.executable, *tail] for name, tail in PYTHON.items()}
    return plain | {name: [*ours, *tail] for name, tail in OURS.items()}


def measure(commands: dict[str, list[str]], warmup: int, repeats: int) -> dict[str, dict[str, dict[str, float]]]:
    """Wall and CPU seconds of every command."""
    seconds: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in commands}
    for turn in range(-warmup, repeats):
        for name, command in commands.items():
            wall, cpu = time.perf_counter(), _children()
            subprocess.run(command, check=True, capture_output=True)
            took = {"wall": time.perf_counter() - wall, "cpu": _children() - cpu}
            if turn >= 0:
                for clock, value in took.items():
                    seconds[name][clock].append(value)
    return {name: {clock: spread(values) for clock, values in clocks.items()} for name, clocks in seconds.items()}


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
