"""From one source to its problems: rows, columns, gold answers; everything left out is counted."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, cast

from igrpo_lite.config import DataOptions
from igrpo_lite.errors import DataError
from igrpo_lite.problems import synthetic
from igrpo_lite.problems.columns import (
    Columns,
    answer_text,
    choose_columns,
    conversation_of,
    has_columns,
    jsonable,
    question_of,
    transcript,
)
from igrpo_lite.problems.files import Row, Table, refuse_bad_rows
from igrpo_lite.problems.gold import read_gold
from igrpo_lite.problems.hub import read_hub
from igrpo_lite.problems.mirrors import read_files
from igrpo_lite.problems.mixture import question_key
from igrpo_lite.problems.registry import STREAMED_ROWS, Form
from igrpo_lite.problems.sources import SYNTHETIC_MOST, SYNTHETIC_TRAIN, Source, train_sources
from igrpo_lite.problems.summary import SourceReport
from igrpo_lite.types import Problem

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of one source; its name on the screen and in problem ids; ``cut``: whether there may be more rows."""

    table: Table
    title: str
    prefix: str
    cut: bool = False


def load_source(
    source: Source,
    options: DataOptions,
    id_prefix: str | None = None,
    seen: MutableMapping[str, Problem] | None = None,
    streamed_rows: int = STREAMED_ROWS,
) -> tuple[list[Problem], SourceReport]:
    """All usable problems of one source, each question once, in the order of the rows.

    Columns named in the settings are used where the source has them; otherwise those of a public set are known, and
    others are found by name.

    Args:
        source: where from.
        options: the data settings.
        id_prefix: what the problems' ids begin with; ``None``: the source's name and split.
        seen: problems by :func:`question_key` of other parts of a mixture, which count as repeated here; those of this
            source are added.
        streamed_rows: rows to read of a very large public set.

    Raises:
        DataError: it cannot be read, too many rows are bad, the columns are not found, or no row has a gold answer.
    """
    seen = {} if seen is None else seen
    if source.kind == "synthetic":
        return _load_synthetic(source, options, seen)
    rows = _read(source, options, streamed_rows)
    columns, form = _columns(source, options, rows)
    report = SourceReport(rows.title, rows.table.total, 0, columns.question_text, columns.answer, cut=rows.cut)
    problems = _problems(rows, columns, form, id_prefix or rows.prefix, report, seen)
    refuse_bad_rows(rows.table, options.max_bad_rows)
    report.bad_rows, report.problems = rows.table.bad, len(problems)
    if not problems and not report.duplicates:
        example = f", for example {report.unparsed_examples[0]}" if report.unparsed_examples else ""
        raise DataError(
            f"{rows.title}: no row has a gold answer that can be read in column {columns.answer}{example}; "
            "choose another column with --answer-column"
        )
    return problems, report


def load_questions(source: Source, options: DataOptions) -> tuple[list[tuple[str, str]], str]:
    """Id and question of every row of one source, whether its answer can be read or not; and the source's name."""
    if source.kind == "synthetic":
        problems = synthetic.load(source.name, cast("synthetic.Split", source.split), SYNTHETIC_MOST["test"])
        return [(problem.id, problem.question) for problem in problems], f"{source.name}/{source.split}"
    rows = _read(source, options, STREAMED_ROWS)
    columns = _columns(source, options, rows, answer=False)[0]
    found = []
    for row in rows.table.rows:
        try:
            found.append((f"{rows.prefix}/{row.index}", question_of(row.values, columns)))
        except ValueError as error:
            rows.table.bad.append(f"{row.where}: {error}")
    refuse_bad_rows(rows.table, options.max_bad_rows)
    return found, f"the first {rows.table.total:,} rows of {rows.title}" if rows.cut else rows.title


def _load_synthetic(
    source: Source, options: DataOptions, seen: MutableMapping[str, Problem]
) -> tuple[list[Problem], SourceReport]:
    size = options.eval_size
    if source.split == "train":
        size = (options.max_problems if len(train_sources(options)) == 1 else None) or SYNTHETIC_TRAIN
    # Always seed 0: the content of a set does not depend on the run.
    drawn = synthetic.load(source.name, cast("synthetic.Split", source.split), size)
    fresh = {key: problem for problem in drawn if (key := question_key(problem.question)) not in seen}
    seen.update(fresh)
    problems = list(fresh.values())
    report = SourceReport(f"{source.name}/{source.split}", size, len(problems), duplicates=size - len(problems))
    report.examples = [(problem.question, problem.answer, problem.answer) for problem in problems[:_SHOWN]]
    return problems, report


def _read(source: Source, options: DataOptions, streamed_rows: int) -> _Rows:
    skipped = source.entry.skipped if source.entry is not None else ()
    if source.kind == "file":
        files = source.files
        title = source.path.name if files == [source.path] else f"{source.label} in {source.path.name}"
        return _Rows(read_files(files, options.max_bad_rows, skipped), title, source.label)
    large = source.known is not None and source.known.large and "[" not in (source.split or "")
    most = streamed_rows if large else None
    table, split = read_hub(source.name, source.config, source.split, most, skipped)
    name = f"{source.name}/{split}"
    return _Rows(table, name, name, table.total == most)


def _columns(source: Source, options: DataOptions, rows: _Rows, answer: bool = True) -> tuple[Columns, Form | None]:
    """The columns to use, and the form of the answer's where it is that of a public set."""
    trained = train_sources(options)
    asked = {"question": options.question_column, "answer": options.answer_column}
    table = rows.table.rows
    if len(trained) > 1 and not source.takes_columns:
        asked = dict.fromkeys(asked)
    elif [source] != trained:
        asked = {role: column if has_columns(table, column) else None for role, column in asked.items()}
    entry, form = source.entry, None
    if entry is not None and asked["question"] is None:
        asked["question"] = next((column for column in entry.questions if has_columns(table, column)), None)
    if entry is not None and asked["answer"] is None:
        known = ((column, its_form) for column, its_form in entry.answers if has_columns(table, column))
        asked["answer"], form = next(known, (None, None))
    return choose_columns(rows.title, table, asked["question"], asked["answer"], answer), form


def _problems(
    rows: _Rows,
    columns: Columns,
    form: Form | None,
    id_prefix: str,
    report: SourceReport,
    seen: MutableMapping[str, Problem],
) -> list[Problem]:
    problems = []
    for row, question, messages in _asked(rows.table, columns, report):
        value = row.values.get(columns.answer)
        answer = read_gold(value, form)
        if not answer:
            report.unparsed += 1
            if len(report.unparsed_examples) < _SHOWN:
                report.unparsed_examples.append(f"{row.where} {_excerpt(value)}")
            continue
        key = question_key(question)
        if key in seen:
            report.duplicates += 1
            report.conflicting += seen[key].answer != answer
            continue
        others = {name: jsonable(value) for name, value in row.values.items() if name not in columns.question}
        others = {"messages": messages, **others} if len(messages) > 1 else others
        seen[key] = Problem(f"{id_prefix}/{row.index}", question, answer, others)
        problems.append(seen[key])
        if len(report.examples) < _SHOWN:
            report.examples.append((question, answer_text(value) or "", answer))
    return problems


def _asked(table: Table, columns: Columns, report: SourceReport) -> list[tuple[Row, str, list[dict[str, str]]]]:
    """Every row with its question and, if its question is one, its conversation.

    What comes before the last user message belongs to the question where it differs between rows; where it is the same
    in all, it is an instruction or examples, and left out.
    """
    found = []
    for row in table.rows:
        try:
            found.append((row, question_of(row.values, columns), conversation_of(row.values, columns)))
        except ValueError as error:
            table.bad.append(f"{row.where}: {error}")
    contexts = [transcript(messages[:-1]) for _, _, messages in found]
    if len(set(contexts)) <= 1:
        report.left_out_context = contexts[0] if contexts else ""
        return found
    report.with_context = sum(map(bool, contexts))
    return [
        (row, f"{context}\n\n{question}" if context else question, messages)
        for (row, question, messages), context in zip(found, contexts, strict=True)
    ]


def _excerpt(value: Any) -> str:
    raw = answer_text(value)
    if raw is None and isinstance(value, list | tuple | dict) and value:
        raw = f"{value}"  # several answers, or an object without one
    if raw is None:
        return "(empty)"
    line = " ".join(raw.split())
    return f"`{line if len(line) <= 80 else '...' + line[-77:]}`"
