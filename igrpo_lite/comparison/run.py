"""The whole of a comparison: plan, runs, tables, files."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from igrpo_lite.comparison.figure import draw
from igrpo_lite.comparison.markdown import by_reason, markdown
from igrpo_lite.comparison.methods import Find, Method, existing, read_methods, read_seeds
from igrpo_lite.comparison.processes import Ended, Job, run_all
from igrpo_lite.comparison.runs import MEASURES, Run, made_otherwise, read_run, unfinished
from igrpo_lite.comparison.tables import notes, paired, table, versions
from igrpo_lite.errors import ConfigError, UserError
from igrpo_lite.report.text import duration, percent

_Pair = tuple[Method, int]


def compare(
    methods: Sequence[str],
    *,
    seeds: int | str | Sequence[int] = 5,
    config: str | None = None,
    output_dir: str | Path = "runs/compare",
    jobs: int = 1,
    allow_unequal: bool = False,
    run: bool = True,
    find_recipe: Find = existing,
    say: Callable[[str], None] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train with every method and seed, and put side by side what the runs measured.

    Every run is a process with a folder of its own under ``output_dir``: the same call goes on where it stopped, takes
    finished runs as they are, and may be extended by methods and seeds. Writes ``comparison.json``, ``comparison.md``
    and ``comparison.png`` there.

    Args:
        methods: ``grpo``, ``igrpo/s-grpo``, ``igrpo+draft_selection=random``, a recipe's file, ``NAME=`` any of them;
            the first one is what the others are compared with.
        seeds: how many (5: seeds 0 to 4), or which (``"0,3,7"`` or numbers).
        config: a recipe under all methods.
        jobs: runs at a time.
        allow_unequal: methods may differ in their number of rollouts.
        run: ``False``: only put together what is there.
        find_recipe: finds a recipe's file by what the user calls it.
        say: takes lines about progress; unset: standard error.
        settings: of all methods, see docs/config.md.

    Returns:
        What ``comparison.json`` holds. ``missing`` says by folder which runs failed or are not there, and why.

    Raises:
        ConfigError: mistakes in methods, seeds or settings, all at once, before anything runs.
        KeyboardInterrupt: Ctrl-C; the runs have been saved.
    """
    sides, findings = read_methods(methods, settings, config, allow_unequal, find_recipe)
    wanted, complaints = read_seeds(seeds)
    findings += complaints + ([] if jobs >= 1 else [f"jobs: must be at least 1, not {jobs}"])
    folder = Path(output_dir)
    pairs = [(method, seed) for seed in wanted for method in sides]  # seeds before breadth
    if findings := findings or (_foreign(pairs, folder) if run else []):
        raise ConfigError(findings)
    missing = _make(pairs, folder, jobs, say or _to_stderr) if run else {}
    runs: list[Run] = []
    for method, seed in pairs:
        found = _finished(method, seed, folder)
        if isinstance(found, Run):
            runs.append(found)
        else:
            missing.setdefault(method.folder(seed), found)
    given = ({} if config is None else {"config": config}) | ({"allow_unequal": True} if allow_unequal else {})
    result = _result(sides, wanted, given | settings, runs, missing)
    if runs:
        _write(folder, result)
    return result


def _foreign(pairs: Sequence[_Pair], folder: Path) -> list[str]:
    """Folders of the runs that hold other ones: their runs would be refused, one after the other."""
    names = {method.folder(seed): method.run_config(seed, folder) for method, seed in pairs}
    reasons = {name: reason for name, config in names.items() if (reason := made_otherwise(folder / name, config))}
    return [
        f"{folder} has runs of these names, {reason} ({', '.join(found)}); use the same settings to go on, or "
        "another --output-dir"
        for reason, found in by_reason(reasons).items()
    ]


def _make(pairs: Sequence[_Pair], folder: Path, at_once: int, say: Callable[[str], None]) -> dict[str, str]:
    """Make the runs that are not there yet; returns why some are still not."""
    todo = {method.folder(seed): (method, seed) for method, seed in pairs}
    todo = {name: pair for name, pair in todo.items() if not isinstance(_finished(*pair, folder), Run)}
    jobs = [
        Job(name, method.run_config(seed, folder), folder / "logs" / f"{name}.log")
        for name, (method, seed) in todo.items()
    ]
    say(f"{len(pairs)} runs: {len(pairs) - len(jobs)} are there, {len(jobs)} to make, {at_once} at a time")
    failed: dict[str, str] = {}
    started, over = time.monotonic(), 0

    def ended(end: Ended) -> None:
        nonlocal over
        over += 1
        found = end.failure or _finished(*todo[end.job.name], folder)
        if not isinstance(found, Run):
            failed[end.job.name] = found
        rest = (time.monotonic() - started) / over * (len(jobs) - over)
        left = f"; about {duration(rest)} left" if over < len(jobs) else ""
        what = _headline(found) if isinstance(found, Run) else f"FAILED: {found}"
        say(f"[{over}/{len(jobs)}] {end.job.name}: {what}, {duration(end.seconds)}{left}")

    try:
        run_all(jobs, at_once, ended, say)
    except OSError as error:
        raise UserError(f"{folder} cannot be used for the runs: {error.strerror or error}") from error
    return failed


def _finished(method: Method, seed: int, folder: Path) -> Run | str:
    """A finished run, or why there is none."""
    path = folder / method.folder(seed)
    reason = unfinished(path, method.run_config(seed, folder))
    if reason is not None:
        return reason
    try:
        return read_run(path, method.name)
    except UserError as error:
        return error.problems[0]


def _headline(run: Run) -> str:
    changes = [
        f"{measure} {percent(run.before(measure), 1)} -> {percent(run.after(measure), 1)}" for measure in MEASURES
    ]
    return ", ".join(changes) + (f", stopped: {run.stopped}" if run.stopped else "")


def _result(
    sides: Sequence[Method],
    seeds: Sequence[int],
    settings: Mapping[str, Any],
    runs: Sequence[Run],
    missing: Mapping[str, str],
) -> dict[str, Any]:
    baseline = sides[0].name
    order = {method.name: place for place, method in enumerate(sides)}
    runs = sorted(runs, key=lambda run: (order[run.method], run.seed))
    return {
        "command": _command(sides, seeds, settings),
        "baseline": baseline,
        "seeds": list(seeds),
        "settings": dict(settings),
        "methods": {method.name: {"spec": method.spec, "settings": method.config.model_dump()} for method in sides},
        "versions": versions(runs),
        "machine": {
            "system": platform.system(),
            "architecture": platform.machine(),
            "cpus": os.cpu_count(),
        },
        "notes": notes(runs),
        "missing": dict(missing),
        "table": table(runs),
        "paired": paired(runs, baseline),
        "runs": [_record(run) for run in runs],
    }


def _record(run: Run) -> dict[str, Any]:
    record = asdict(run) | {"collapsed": run.collapsed}
    del record["versions"], record["right"]  # both are in the run's own folder
    return record


def _command(sides: Sequence[Method], seeds: Sequence[int], settings: Mapping[str, Any]) -> str:
    """The command line that gives the same; without where its files lie."""
    which = ",".join(map(str, seeds)) + ("," if len(seeds) == 1 else "")
    words = ["igrpo-lite", "compare", *(method.spec for method in sides), "--seeds", which]
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)]
    return shlex.join(words)


def _write(folder: Path, result: Mapping[str, Any]) -> None:
    try:
        (folder / "comparison.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (folder / "comparison.md").write_text(markdown(result), encoding="utf-8")
        draw(result, folder / "comparison.png")
    except OSError as error:
        raise UserError(f"{folder}: the results could not be written: {error.strerror or error}") from error


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
