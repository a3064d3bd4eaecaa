"""Scan training problems by difficulty: those that the model always or never solves teach nothing.

What was sampled is kept beside the output as it comes, so a scan that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from igrpo_lite.config import RunConfig
from igrpo_lite.errors import DataError
from igrpo_lite.evaluation.output import rates_file
from igrpo_lite.evaluation.passrate import PassRate, pass_rates
from igrpo_lite.sampling.base import request_seed
from igrpo_lite.types import Problem
from igrpo_lite.workbench import Workbench

_DECIDING = (
    *("model", "revision", "load_in_4bit", "seed", "temperature", "max_completion_length"),
    *("answer_style", "system_prompt"),
)
_BATCHES = 4  # batches of the engine between two writes


@dataclass(frozen=True, slots=True)
class Scan:
    """What a scan found; ``kept``, ``too_hard`` and ``too_easy`` count problems."""

    output: Path
    rates: Path
    problems: int
    kept: int
    too_hard: int
    too_easy: int
    too_long: int


def scan(
    config: RunConfig,
    output: Path,
    samples: int = 8,
    keep: tuple[float, float] = (0.2, 0.8),
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scan:
    """Sample every training problem and write those whose pass rate lies within ``keep``, ends included, as JSONL.

    Args:
        output: gets ``id``, ``question``, ``answer``, ``pass_rate`` and the source's other columns of each kept one.
        samples: completions for each problem, from the plain prompt at the run's temperature.
        on_progress: called with (scanned, all) problems.

    Raises:
        UserError: data or model cannot be used, or ``output`` has the beginning of a scan with other settings.
    """
    rates = rates_file(output)
    settings = {name: getattr(config, name) for name in _DECIDING} | {"samples": samples}
    with Workbench(config) as bench:
        bench.fit("training")
        bench.check_lengths()
        fit = bench.fits["training"]
        done = _earlier(rates, settings)
        left = [problem for problem in fit.kept if _key(problem) not in done]
        scanned = len(fit.kept) - len(left)
        if left:
            bench.open_scorer()
            bench.load()
            with rates.open("a", encoding="utf-8") as file:
                for found in _sampled(left, bench, samples):
                    file.writelines(json.dumps(_record(rate)) + "\n" for rate in found)
                    file.flush()
                    done |= {_key(rate.problem): rate.rate for rate in found}
                    scanned += len(found)
                    on_progress(scanned, len(fit.kept))
    low, high = keep
    found_rates = [(problem, done[_key(problem)]) for problem in fit.kept]
    kept = [_row(problem, rate) for problem, rate in found_rates if low <= rate <= high]
    output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
    hard, easy = sum(rate < low for _, rate in found_rates), sum(rate > high for _, rate in found_rates)
    return Scan(output, rates, len(fit.kept), len(kept), hard, easy, fit.dropped)


def _sampled(problems: list[Problem], bench: Workbench, samples: int) -> Iterator[list[PassRate]]:
    config = bench.config
    size = max(1, _BATCHES * config.max_num_seqs // samples)
    for start in range(0, len(problems), size):
        part = problems[start : start + size]
        yield pass_rates(part, bench.sampler, bench.prompts, config, samples, bench.scorer.score)


def _earlier(rates: Path, settings: Mapping[str, Any]) -> dict[int, float]:
    """Pass rates by :func:`_key` that an interrupted scan left; starts the file where there is none."""
    if not rates.exists():
        rates.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")
        return {}
    text = rates.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]  # a line that was being written when the scan was killed is sampled again
    if whole != text:
        rates.write_text(whole, encoding="utf-8")
    try:
        head, *records = [json.loads(line) for line in whole.splitlines()]
        same = head["settings"] == dict(settings)
        found = {int(record["key"]): float(record["pass_rate"]) for record in records}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{rates} is not a scan's record ({error}); move it away, or choose another --output") from None
    if not same:
        raise DataError(f"{rates} is of a scan with other settings; delete it, or choose another --output")
    return found


def _key(problem: Problem) -> int:
    """What a pass rate belongs to. An id alone is a file's name and a row: another question may come to stand there, or
    another column be read as its answer."""
    return request_seed(problem.id, problem.question, problem.answer)


def _record(rate: PassRate) -> dict[str, Any]:
    reasons = [score.reason for score in rate.scores]
    record = {"id": rate.problem.id, "key": _key(rate.problem), "pass_rate": rate.rate}
    return record | {"length": rate.length, "reasons": reasons}


def _row(problem: Problem, rate: float) -> dict[str, Any]:
    own = {"id": problem.id, "question": problem.question, "answer": problem.answer, "pass_rate": rate}
    return own | {name: value for name, value in problem.columns.items() if name not in own}
