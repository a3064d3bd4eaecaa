"""From data settings to training and held-out problems, with an account of every row that was left out."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from igrpo_lite.config import DataOptions
from igrpo_lite.errors import DataError
from igrpo_lite.problems import synthetic
from igrpo_lite.problems.columns import Columns, answer_text, choose_columns, has_columns, jsonable, question_of
from igrpo_lite.problems.files import Row, Table, read_file, refuse_bad_rows
from igrpo_lite.problems.hub import read_hub
from igrpo_lite.problems.sources import SYNTHETIC_TRAIN, Source, data_findings, held_out_source, train_source
from igrpo_lite.problems.summary import LoadReport, SourceReport
from igrpo_lite.types import Problem

ReadAnswer = Callable[[str], str | None]
"""Cuts the gold answer out of an answer column's text; ``None`` or empty when there is none."""

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class ProblemSets:
    """Problems to train on and problems never trained on, which share no question; and how they came about."""

    train: list[Problem]
    held_out: list[Problem]
    report: LoadReport


def load_problems(options: DataOptions, seed: int, read_answer: ReadAnswer) -> ProblemSets:
    """Load the training and the held-out problems.

    Held-out problems are the same whatever the seed, the order of the rows and ``max_problems``: a hash of the question
    chooses them. The seed only draws the ``max_problems`` training problems (of a synthetic set: always the first).

    Args:
        options: the data settings.
        seed: the run's seed.
        read_answer: :func:`igrpo_lite.rewards.answers.gold_answer`, or another cutter of answers.

    Raises:
        DataError: a source cannot be found, read or understood, or nothing usable remains; all findings at once.
    """
    findings = data_findings(options)
    if findings:
        raise DataError(findings)
    source, other = train_source(options), held_out_source(options)
    train, train_report = _load_or_findings(source, options, read_answer, findings)
    held_out: list[Problem] = []
    held_out_report = None
    if other is not None:
        prefix = _held_out_ids(source, other)
        held_out, held_out_report = _load_or_findings(other, options, read_answer, findings, prefix)
    if findings or train_report is None:
        raise DataError(findings)
    report = LoadReport(train_report, held_out_report)
    if other is None:
        train, held_out = _hold_out(source, train, options.eval_size)
    else:
        train, report.overlap = _without(train, held_out)
        if not train:
            raise DataError(f"{source.name}: every question of it is also in the held-out set {other.name}")
        held_out = _drawn(held_out, options.eval_size, "held out")
    if source.kind != "synthetic" and options.max_problems is not None and options.max_problems < len(train):
        chosen = {problem.id for problem in _drawn(train, options.max_problems, f"train {seed}")}
        train = [problem for problem in train if problem.id in chosen]
    report.train_size, report.held_out_size = len(train), len(held_out)
    return ProblemSets(train, held_out, report)


def load_source(
    source: Source, options: DataOptions, read_answer: ReadAnswer, id_prefix: str | None = None
) -> tuple[list[Problem], SourceReport]:
    """All usable problems of one source, each question once, in the order of the rows.

    A column asked for in the settings is used where the source has it; a held-out source with other columns falls back
    to finding them by name.

    Raises:
        DataError: it cannot be read, too many rows are bad, the columns are not found, or no row has a gold answer.
    """
    if source.kind == "synthetic":
        return _load_synthetic(source, options)
    if source.kind == "file":
        table, prefix, title = read_file(source.path, options.max_bad_rows), source.label, source.path.name
    else:
        table, split = read_hub(source.name, source.config, source.split)
        prefix = title = f"{source.name}/{split}"
    question, answer = options.question_column, options.answer_column
    if source != train_source(options):
        question = question if has_columns(table.rows, question) else None
        answer = answer if has_columns(table.rows, answer) else None
    columns = choose_columns(title, table.rows, question, answer)
    report = SourceReport(title, table.total, 0, columns.question_text, columns.answer)
    problems = _problems(table, columns, id_prefix or prefix, read_answer, report)
    refuse_bad_rows(table, options.max_bad_rows)
    report.bad_rows, report.problems = table.bad, len(problems)
    if not problems:
        example = f", for example {report.unparsed_examples[0]}" if report.unparsed_examples else ""
        raise DataError(
            f"{title}: no row has a gold answer that can be read in column {columns.answer}{example}; "
            "choose another column with --answer-column"
        )
    return problems, report


def _load_or_findings(
    source: Source, options: DataOptions, read_answer: ReadAnswer, findings: list[str], id_prefix: str | None = None
) -> tuple[list[Problem], SourceReport | None]:
    try:
        return load_source(source, options, read_answer, id_prefix)
    except DataError as error:
        findings.extend(error.problems)
        return [], None


def _load_synthetic(source: Source, options: DataOptions) -> tuple[list[Problem], SourceReport]:
    train = source.split == "train"
    size = (options.max_problems or SYNTHETIC_TRAIN) if train else options.eval_size
    # Always seed 0: the content of a set does not depend on the run.
    problems = synthetic.load(source.name, cast("synthetic.Split", source.split), size, seed=0)
    report = SourceReport(f"{source.name}/{source.split}", size, size)
    report.examples = [(problem.question, problem.answer, problem.answer) for problem in problems[:_SHOWN]]
    return problems, report


def _problems(
    table: Table, columns: Columns, id_prefix: str, read_answer: ReadAnswer, report: SourceReport
) -> list[Problem]:
    kept: dict[str, Problem] = {}
    for row in table.rows:
        try:
            question = question_of(row.values, columns)
        except ValueError as error:
            table.bad.append(f"{row.where}: {error}")
            continue
        raw = answer_text(row.values.get(columns.answer))
        answer = read_answer(raw) if raw else None
        if not answer:
            report.unparsed += 1
            if len(report.unparsed_examples) < _SHOWN:
                report.unparsed_examples.append(f"{row.where} {_excerpt(raw)}")
            continue
        key = question_key(question)
        if key in kept:
            report.duplicates += 1
            report.conflicting += kept[key].answer != answer
            continue
        kept[key] = Problem(f"{id_prefix}/{row.index}", question, answer, _further(row, columns))
        if len(report.examples) < _SHOWN:
            report.examples.append((question, raw or "", answer))
    return list(kept.values())


def _further(row: Row, columns: Columns) -> dict[str, Any]:
    return {name: jsonable(value) for name, value in row.values.items() if name not in columns.question}


def question_key(question: str) -> str:
    """The question without differences of case, white space and Unicode form: equal keys are the same question."""
    return " ".join(unicodedata.normalize("NFC", question).casefold().split())


def _drawn(problems: list[Problem], size: int, salt: str) -> list[Problem]:
    """``size`` of the problems, chosen and ordered by a hash of their question: the order of the rows is no matter."""
    return sorted(problems, key=lambda problem: _digest(problem, salt))[:size]


def _digest(problem: Problem, salt: str) -> bytes:
    return hashlib.sha256(f"{salt}|{question_key(problem.question)}".encode("utf-8", "surrogatepass")).digest()


def _hold_out(source: Source, problems: list[Problem], eval_size: int) -> tuple[list[Problem], list[Problem]]:
    if len(problems) < 2:
        raise DataError(
            f"{source.name}: one problem is too few to train on and to hold out; "
            "add rows, or name held-out problems with --eval-data"
        )
    held_out = _drawn(problems, min(eval_size, max(1, len(problems) // 10)), "held out")
    taken = {problem.id for problem in held_out}
    return [problem for problem in problems if problem.id not in taken], held_out


def _without(train: list[Problem], held_out: list[Problem]) -> tuple[list[Problem], int]:
    # All questions of the held-out source, not only the eval_size used now: a later evaluation may use more of them.
    taken = {question_key(problem.question) for problem in held_out}
    kept = [problem for problem in train if question_key(problem.question) not in taken]
    return kept, len(train) - len(kept)


def _held_out_ids(train: Source, held_out: Source) -> str | None:
    """A prefix of its own for the held-out ids where two files share a stem; ids must tell all problems apart."""
    if train.kind == held_out.kind == "file" and train.label == held_out.label:
        return f"{held_out.label}-held-out"
    return None


def _excerpt(raw: str | None) -> str:
    if raw is None:
        return "(empty)"
    line = " ".join(raw.split())
    return f"`{line if len(line) <= 80 else '...' + line[-77:]}`"
