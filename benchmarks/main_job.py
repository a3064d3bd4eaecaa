"""The main job as a newcomer runs it: ``igrpo-lite train``, whole command, several seeds, one thread."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring import provenance, write_json


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args(arguments)
    runs = [run(seed) for seed in options.seeds]
    gains = [found["gain"] for found in runs]
    print(f"single-pass gain: mean {statistics.mean(gains):+.1f} points, smallest {min(gains):+.1f}")
    result = provenance("main_job.py", arguments, threads=1) | {"runs": runs}
    write_json(options.json, result)
    return result


def run(seed: int) -> dict[str, Any]:
    """One whole command, from start to exit."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "igrpo_lite", "train", "--seed", str(seed), "--output-dir", f"{folder}/run"]
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        seconds = time.perf_counter() - started
        summary = json.loads(Path(folder, "run", "summary.json").read_text(encoding="utf-8"))
    before, after = summary["before"], summary["after"]
    gain = 100 * (after["single"]["accuracy"] - before["single"]["accuracy"])
    for measure in ("single", "refined"):
        shown = " -> ".join(f"{100 * found[measure]['accuracy']:.1f} %" for found in (before, after))
        print(f"seed {seed}: {measure} {shown}, {seconds:.0f} s in all")
    return {"seed": seed, "seconds": seconds, "gain": gain, "before": before, "after": after, "time": summary["time"]}


if __name__ == "__main__":
    main()
