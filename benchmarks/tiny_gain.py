"""What the bundled model gains by training, from the held-out answers that runs store: form, operations, arithmetic.

Compares each run's answers before its first step with those after its last one, on the synthetic two-step problems.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import provenance, write_json

from igrpo_lite.problems import synthetic

_FORM = re.compile(r"\d+[+*-]\d+=\d+; \d+[+*-]\d+=\d+; \\boxed\{\d+\}")
_STEP = re.compile(r"(\d+)([+*-])(\d+)=(\d+)")
_APPLY: dict[str, Callable[[int, int], int]] = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


@dataclass(frozen=True, slots=True)
class Answer:
    """One held-out answer, taken apart."""

    kind: str
    right: bool
    tokens: int
    full_form: bool
    operations_right: bool
    calculations: tuple[bool, ...]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders over the two-step problems")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args(arguments)
    runs = {run.name: compare(*first_and_last(run)) for run in options.runs}
    print(markdown(runs))
    result = provenance("tiny_gain.py", ["RUN_FOLDERS"], threads=1) | {"runs": runs}
    write_json(options.json, result)
    return result


def first_and_last(run: Path) -> tuple[list[Answer], list[Answer]]:
    """Single-pass answers of a run's first and last evaluation."""
    files = sorted((run / "evaluations").glob("step-*.jsonl"))
    if len(files) < 2:
        raise SystemExit(f"{run} has fewer than two evaluations")
    return read(files[0]), read(files[-1])


def read(file: Path) -> list[Answer]:
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [take_apart(record, problem_of(record["id"])) for record in records]


_SETS: dict[str, list[synthetic.Problem]] = {}


def problem_of(name: str) -> synthetic.Problem:
    """The problem of an id ``two-step/SPLIT/INDEX``, drawn again."""
    source, split, index = name.split("/")
    if source != "two-step":
        raise SystemExit(f"{name} is no two-step problem")
    if name.rpartition("/")[0] not in _SETS:
        _SETS[f"{source}/{split}"] = synthetic.load(source, split, 5000)  # type: ignore[arg-type]
    return _SETS[f"{source}/{split}"][int(index)]


def take_apart(record: dict[str, Any], problem: synthetic.Problem) -> Answer:
    """Form, operations and arithmetic of one stored answer."""
    assert record["question"] == problem.question
    text = record["single"]["text"].strip()
    steps, wanted = _STEP.findall(text), _STEP.findall(problem.columns["solution"])
    return Answer(
        kind=problem.columns["kind"],
        right=record["single"]["reason"] == "correct",
        tokens=record["single"]["tokens"],
        full_form=bool(_FORM.fullmatch(text)),
        operations_right=[step[1] for step in steps] == [step[1] for step in wanted],
        calculations=tuple(_APPLY[o](int(a), int(b)) == int(c) for a, o, b, c in steps),
    )


def compare(before: Sequence[Answer], after: Sequence[Answer]) -> dict[str, Any]:
    newly_right = [b for b, a in zip(before, after, strict=True) if a.right and not b.right]
    newly_wrong = sum(b.right and not a.right for b, a in zip(before, after, strict=True))
    return {
        "before": describe(before),
        "after": describe(after),
        "newly_right": len(newly_right),
        "newly_right_in_full_form_before": sum(answer.full_form for answer in newly_right),
        "newly_wrong": newly_wrong,
    }


def describe(answers: Sequence[Answer]) -> dict[str, Any]:
    calculations = [right for answer in answers for right in answer.calculations]
    found: dict[str, Any] = {
        "n": len(answers),
        "accuracy": statistics.mean(answer.right for answer in answers),
        "full form": statistics.mean(answer.full_form for answer in answers),
        "mean length": statistics.mean(answer.tokens for answer in answers),
        "right operations": statistics.mean(answer.operations_right for answer in answers),
        "right calculations": statistics.mean(calculations) if calculations else None,
    }
    for kind in synthetic.TWO_STEP_KINDS:
        of_kind = [answer.right for answer in answers if answer.kind == kind]
        found[kind] = statistics.mean(of_kind) if of_kind else None
    return found


def markdown(runs: dict[str, dict[str, Any]]) -> str:
    names = list(runs)
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for key in next(iter(runs.values()))["before"]:
        if key != "n":
            cells = (f"{show(key, run['before'][key])} -> {show(key, run['after'][key])}" for run in runs.values())
            lines.append(f"| {key} | " + " | ".join(cells) + " |")
    cells = (
        f"{run['newly_right']} ({run['newly_right_in_full_form_before']}) / {run['newly_wrong']}"
        for run in runs.values()
    )
    lines.append("| newly right (in full form before) / newly wrong | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def show(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if key == "mean length" else f"{100 * value:.1f} %"


if __name__ == "__main__":
    main()
