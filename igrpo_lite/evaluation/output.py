"""The files of an evaluation: its results, and one line per question and answer; and where those of a scan may lie."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from igrpo_lite.config import DataOptions
from igrpo_lite.errors import UserError
from igrpo_lite.problems.sources import data_findings, held_out_sources, train_sources

if TYPE_CHECKING:
    from igrpo_lite.evaluation.compare import Comparison


def output_findings(output: Path) -> list[str]:
    """Why results could not be written there; better known before the work than after it."""
    if not output.absolute().parent.is_dir():
        return [f"--output {output}: there is no folder {output.parent}"]
    if output.is_file() and output.suffix != ".json":
        return [f"--output {output}: a file of that name is there; name a folder, or a file that ends in .json"]
    return []


def rates_file(output: Path) -> Path:
    """Where a scan that writes ``output`` keeps the pass rates of all problems."""
    return output.with_name(f"{output.stem}.rates.jsonl")


def scan_findings(output: Path, options: DataOptions) -> list[str]:
    """Why a scan of these problems could not write there, or would destroy what is there."""
    if output.suffix != ".jsonl" or not output.absolute().parent.is_dir():
        return [f"--output {output}: must be a .jsonl file in a folder that exists"]
    if not output.exists():
        return []
    if not rates_file(output).is_file():
        return [f"--output {output}: a file of that name is there, and no scan has made it; choose another name"]
    if data_findings(options):
        return []  # which are told anyhow
    sources = [*train_sources(options), *held_out_sources(options)]
    read = {file.resolve() for source in sources if source.kind == "file" for file in source.files}
    return [f"--output {output}: is one of the files to scan; choose another name"] if output.resolve() in read else []


def write_results(output: Path, comparison: Comparison, about: Mapping[str, Any]) -> None:
    """Write ``results.json`` and, per evaluation, ``base.jsonl`` and ``adapted.jsonl`` into the folder ``output``; or
    the results alone, where ``output`` ends in ``.json``.

    Args:
        about: what was evaluated; stands before the results.

    Raises:
        UserError: a file cannot be written.
    """
    results = json.dumps({**about, **comparison.to_json()}, indent=2, ensure_ascii=False) + "\n"
    if output.suffix == ".json" and not output.is_dir():
        files = {output: results}
    else:
        files = {output / "results.json": results}
        for name, evaluation in comparison.evaluations.items():
            records = (json.dumps(answer.record(), ensure_ascii=False) for answer in evaluation.answered)
            files[output / f"{name}.jsonl"] = "".join(f"{record}\n" for record in records)
    try:
        for path, text in files.items():
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {output}: {error.filename or ''}: {error.strerror or error}") from error
