"""Methods at equal rollouts: whole runs over several seeds, with held-out accuracy before and after.

A method is an algorithm, with tokens and further settings where they are not the defaults: ``grpo``, ``igrpo/s-grpo``,
``igrpo/t-spmo+tspmo_replay=2``, ``igrpo+schedule=ahead``.

Every run is a process of its own with a folder of its own, so that the same command goes on where it stopped and
finished runs are taken as they are. All numbers come from the runs' ``summary.json`` and ``metrics.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from measuring import provenance, write_json

ALGORITHMS = ("grpo", "igrpo", "igrpo-joint")
BASELINE = "grpo"
MEASURES = ("single", "refined")
COSTS = ("rollouts", "sampled_tokens", "learning_tokens", "backbone_tokens", "seconds")
COLLAPSE = 0.10
"""Single-pass accuracy lost since a run's own best evaluation that counts as a collapse."""

_CHILD = "import json, sys, igrpo_lite; igrpo_lite.train(**json.load(sys.stdin))"
_LEARNING_PHASES = ("rollout", "reward", "update")


@dataclass(frozen=True, slots=True)
class Run:
    """What one run's own files say."""

    method: str
    seed: int
    before: dict[str, float]
    after: dict[str, float]
    best_single: float
    stopped: str | None
    rollouts: int
    sampled_tokens: int
    learning_tokens: int
    backbone_tokens: int
    seconds: float

    @property
    def collapsed(self) -> bool:
        """Ended well below its own best evaluation, below its start, or before its last step."""
        after = self.after["single"]
        # Accuracies are shares of a few hundred: 0.4 - 0.3 must not count as more than 0.1.
        fell = self.best_single - after > COLLAPSE + 1e-9
        return self.stopped is not None or fell or after < self.before["single"]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    pairs = [(method, seed) for seed in options.seeds for method in options.methods]
    with ThreadPoolExecutor(options.workers) as pool:
        runs = list(pool.map(lambda pair: finished(*pair, options), pairs))
    result = provenance("learning.py", arguments, threads=1) | {
        "settings": {"steps": options.steps, "eval_size": options.eval_size, "seeds": options.seeds} | options.set,
        "workers": options.workers,
        "table": table(runs),
        "paired": paired(runs),
        "runs": [asdict(run) | {"collapsed": run.collapsed} for run in runs],
    }
    text = markdown(result)
    print(text)
    write_json(options.json, result)
    if options.markdown is not None:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(text, encoding="utf-8")
    return result


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(ALGORITHMS), metavar="ALGORITHM[/TOKENS][+KEY=VALUE...]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of every run")
    parser.add_argument("--eval-size", type=int, default=500, help="held-out problems of every evaluation")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any other setting, repeatable")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/learning"), help="folder of all run folders")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    options = parser.parse_args(arguments)
    wrong = [pair for pair in options.set if "=" not in pair]
    if wrong:
        parser.error(f"--set takes KEY=VALUE, not {', '.join(wrong)}")
    options.set = pairs(options.set)
    for method in options.methods:
        if settings_of(method)["algorithm"] not in ALGORITHMS:
            parser.error(f"--methods: {method} does not begin with one of {', '.join(ALGORITHMS)}")
    return options


def pairs(texts: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` texts as settings."""
    return {key.strip(): yaml.safe_load(value) for key, _, value in (text.partition("=") for text in texts)}


def settings_of(method: str) -> dict[str, Any]:
    """The settings that a method's name stands for."""
    name, *more = method.split("+")
    algorithm, _, tokens = name.partition("/")
    return {"algorithm": algorithm, "tokens": tokens or "all"} | pairs(more)


def finished(method: str, seed: int, options: argparse.Namespace) -> Run:
    """One run, made or continued if it is not there yet."""
    folder = options.output_dir / f"{re.sub('[^a-z0-9_.-]+', '-', method)}-{options.steps}-steps-seed-{seed}"
    settings = {
        "eval_steps": max(1, options.steps // 4),
        "patience_dead": 0,  # equal rollouts: a run without signal goes on all the same
        "progress": "off",
    }
    settings |= options.set | settings_of(method)
    settings |= {
        "seed": seed,
        "max_steps": options.steps,
        "eval_size": options.eval_size,
        "output_dir": str(folder),
    }
    # Also for runs that are over: training itself refuses a folder that was made with other settings.
    done = subprocess.run(
        [sys.executable, "-c", _CHILD],
        input=json.dumps(settings),
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise SystemExit(f"{folder.name} failed:\n{done.stderr}")
    run = read_run(folder, method)
    print(
        f"{folder.name}: single {run.before['single']:.1%} -> {run.after['single']:.1%}, refined "
        f"{run.before['refined']:.1%} -> {run.after['refined']:.1%}, {run.seconds:.0f} s",
        file=sys.stderr,
        flush=True,
    )
    return run


def read_run(folder: Path, method: str) -> Run:
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return run_from(method, summary, records)


def run_from(method: str, summary: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> Run:
    """A run from its summary and the records of its metrics."""
    steps = [record for record in records if record["kind"] == "step"]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    last = summary["after"] or evaluations[-1]
    return Run(
        method,
        summary["seed"],
        {measure: summary["before"][measure]["accuracy"] for measure in MEASURES},
        {measure: last[measure]["accuracy"] for measure in MEASURES},
        max(record["single"]["accuracy"] for record in evaluations),
        summary["stopped"],
        summary["rollouts"],
        sum(step["tokens/sampled"] for step in steps),
        sum(step["tokens/learning"] for step in steps),
        sum(step["tokens/backbone"] for step in steps),
        sum(summary["time"].get(phase, 0.0) for phase in _LEARNING_PHASES),
    )


def table(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Per method: accuracies over seeds, collapses, and what the runs cost."""
    found: dict[str, dict[str, Any]] = {}
    for method in dict.fromkeys(run.method for run in runs):
        mine = sorted((run for run in runs if run.method == method), key=lambda run: run.seed)
        row: dict[str, Any] = {"seeds": [run.seed for run in mine]}
        for measure in MEASURES:
            before, after = ([getattr(run, when)[measure] for run in mine] for when in ("before", "after"))
            row[measure] = {
                "before": over_seeds(before),
                "after": over_seeds(after),
                "change": over_seeds([b - a for a, b in zip(before, after, strict=True)]),
            }
        row["collapses"] = sum(run.collapsed for run in mine)
        for cost in COSTS:
            row[cost] = statistics.fmean(getattr(run, cost) for run in mine)
        found[method] = row
    return found


def paired(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Accuracy after training minus the baseline's with the same seed, per method and measure."""
    base = {run.seed: run for run in runs if run.method == BASELINE}
    found: dict[str, dict[str, Any]] = {}
    for method in dict.fromkeys(run.method for run in runs if run.method != BASELINE):
        mine = sorted((run for run in runs if run.method == method and run.seed in base), key=lambda r: r.seed)
        if mine:
            found[method] = {
                measure: over_seeds([run.after[measure] - base[run.seed].after[measure] for run in mine])
                for measure in MEASURES
            }
    return found


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (ddof 1) and 95 % t-interval of the mean; these two are ``None`` for one value."""
    mean = statistics.fmean(values)
    found: dict[str, Any] = {"mean": mean, "sd": None, "low": None, "high": None, "values": list(values)}
    if len(values) > 1:
        sd = statistics.stdev(values)
        margin = t_quantile(len(values) - 1) * sd / math.sqrt(len(values))
        found |= {"sd": sd, "low": mean - margin, "high": mean + margin}
    return found


def t_quantile(freedom: int, probability: float = 0.975) -> float:
    """Quantile (above the median) of Student's t for whole degrees of freedom, by bisection of its distribution."""
    low, high = 0.0, 1.0
    while t_distribution(high, freedom) < probability:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_distribution(middle, freedom) < probability else (low, middle)
    return high


def t_distribution(t: float, freedom: int) -> float:
    """P(T <= t) of Student's t (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine = math.cos(angle)
    term = cosine if freedom % 2 else 1.0
    total = 0.0
    for k in range(1 + freedom % 2, freedom, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if freedom % 2 else math.sin(angle) * total
    return (1 + inside) / 2


def markdown(result: Mapping[str, Any]) -> str:
    """The result as Markdown tables."""
    settings = ", ".join(f"{name} {value}" for name, value in result["settings"].items())
    lines = [
        f"`{result['command']}`",
        "",
        f"{settings}. Held-out accuracy in %; mean over seeds ± standard deviation [95 % t-interval of the mean]. The "
        "intervals cover chance in training; the held-out problems are the same for all.",
        "",
        "| method | measure | before | after | change in points | after, seed by seed |",
        "|---|---|---|---|---|---|",
    ]
    for method, row in result["table"].items():
        for measure in MEASURES:
            found = row[measure]
            cells = [percent(found[part]) for part in ("before", "after", "change")]
            each = ", ".join(f"{100 * value:.1f}" for value in found["after"]["values"])
            lines.append(f"| {method} | {measure} | {' | '.join(cells)} | {each} |")
    lines += [
        "",
        "| method | runs | collapses | rollouts | sampled tokens | learning tokens | tokens through the layers | "
        "seconds of training |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, row in result["table"].items():
        cost = " | ".join(f"{row[name]:,.0f}" for name in COSTS)
        lines.append(f"| {method} | {len(row['seeds'])} | {row['collapses']} | {cost} |")
    lines += [
        "",
        "Costs are means per run; seconds leave out loading, evaluating and saving. A collapse is a run that ends more "
        f"than {100 * COLLAPSE:.0f} points of single-pass accuracy below its own best evaluation, below its start, or "
        "before its last step.",
    ]
    if result["paired"]:
        lines += [
            "",
            f"| minus {BASELINE}, same seed | measure | difference in points | seed by seed |",
            "|---|---|---|---|",
        ]
    for method, measures in result["paired"].items():
        for measure, found in measures.items():
            each = ", ".join(f"{100 * value:+.1f}" for value in found["values"])
            lines.append(f"| {method} | {measure} | {percent(found)} | {each} |")
    machine = result["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines += ["", f"{machine['cpu']}, {machine['threads']} thread a run, {result['workers']} at a time; {packages}."]
    return "\n".join(lines) + "\n"


def percent(found: Mapping[str, Any]) -> str:
    """``mean ± sd [low, high]`` in percent."""
    # Adding zero makes -0.0 of rounding a plain 0.0.
    mean, sd, low, high = (
        None if found[key] is None else round(100 * found[key], 1) + 0.0 for key in ("mean", "sd", "low", "high")
    )
    return f"{mean:.1f}" if sd is None else f"{mean:.1f} ± {sd:.1f} [{low:.1f}, {high:.1f}]"


if __name__ == "__main__":
    main()
