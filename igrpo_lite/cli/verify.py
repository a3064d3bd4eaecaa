"""``igrpo-lite verify``: judges recorded completions, anybody's, against gold answers."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from igrpo_lite.cli.flags import COMMAND
from igrpo_lite.errors import DataError, UserError

if TYPE_CHECKING:
    from igrpo_lite.answers.answers import Verdict
    from igrpo_lite.problems.files import Row, Table

DISAGREEMENT = 3
MAX_LISTED = 50
"""Disagreements that are printed; ``--output`` has all."""

_TRUE, _FALSE = ("true", "yes", "1", "1.0", "correct"), ("false", "no", "0", "0.0", "wrong", "incorrect")


@dataclass(frozen=True, slots=True)
class _Judged:
    row: Row
    gold: str
    verdict: Verdict
    expected: bool | None

    @property
    def correct(self) -> bool:
        return self.verdict.reason == "correct"

    def to_json(self) -> dict[str, Any]:
        found = {"row": self.row.index, "where": self.row.where, "reason": self.verdict.reason}
        found |= {"answer": self.verdict.answer, "source": self.verdict.source, "gold": self.gold}
        return found | ({} if self.expected is None else {"expected": self.expected})


def verify(
    file: Annotated[Path, Parameter(help="JSONL, JSON, CSV, TSV or parquet.")],
    /,
    *,
    completion: Annotated[str, Parameter(help="Column with the completions.", group=COMMAND)],
    answer: Annotated[str, Parameter(help="Column with the gold answers, or solutions that hold them.", group=COMMAND)],
    expect: Annotated[
        str | None, Parameter(help="Column that says (true or false) whether it is right.", group=COMMAND)
    ] = None,
    output: Annotated[Path | None, Parameter(help="JSONL file for the verdict on every row.", group=COMMAND)] = None,
    math_verify: Annotated[
        bool, Parameter(help="Ask math-verify about what the exact comparison cannot judge.", group=COMMAND)
    ] = True,
    max_bad_rows: Annotated[int, Parameter(help="Rows that may be unreadable; they are left out.", group=COMMAND)] = 0,
) -> int:
    """Judge completions against gold answers and print a table of the verdicts, with strict and lenient accuracy. Exit
    code 3 if a verdict differs from what --expect says."""
    from igrpo_lite.problems.files import read_file

    if output is not None and not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}")
    table = read_file(file, max_bad_rows)
    _check_columns(table, {"--completion": completion, "--answer": answer, "--expect": expect})
    judged = _judge(table, completion, answer, expect, math_verify)
    _show(judged, expect)
    if output is not None:
        _write(output, judged)
    return DISAGREEMENT if any(item.expected is not None and item.expected != item.correct for item in judged) else 0


def _check_columns(table: Table, wanted: dict[str, str | None]) -> None:
    columns = list(dict.fromkeys(name for row in table.rows for name in row.values))
    findings = []
    for flag, name in wanted.items():
        if name is not None and name not in columns:
            close = difflib.get_close_matches(name, columns, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there is {', '.join(columns)}"
            findings.append(f"{flag} {name}: {table.name} has no such column; {hint}")
    if findings:
        raise DataError(findings)


def _judge(table: Table, completion: str, answer: str, expect: str | None, math_verify: bool) -> list[_Judged]:
    from igrpo_lite.answers.answers import gold_answer
    from igrpo_lite.answers.checker import AnswerChecker
    from igrpo_lite.problems.columns import answer_text

    findings: list[str] = []
    texts, golds, expected = [], [], []
    for row in table.rows:
        raw = answer_text(row.values.get(answer)) or ""
        texts.append(_text(row, completion, findings))
        golds.append(gold_answer(raw) or raw)
        expected.append(None if expect is None else _truth(row, expect, findings))
        if not golds[-1]:
            findings.append(f"{row.where}: no gold answer in column {answer}")
    if findings:
        more = [f"and {len(findings) - 5} more of this kind"] if len(findings) > 5 else []
        raise DataError([*findings[:5], *more])
    with AnswerChecker(math_verify) as checker:
        verdicts = checker.judge([(text, gold, False) for text, gold in zip(texts, golds, strict=True)])
    return [_Judged(*parts) for parts in zip(table.rows, golds, verdicts, expected, strict=True)]


def _text(row: Row, column: str, findings: list[str]) -> str:
    """A completion as text; of a conversation the last message."""
    value = row.values.get(column)
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    if isinstance(value, list | dict):
        findings.append(f"{row.where}: column {column} holds neither a text nor messages")
    return "" if value is None else str(value)


def _truth(row: Row, column: str, findings: list[str]) -> bool | None:
    value = str(row.values.get(column)).strip().lower()
    if value not in _TRUE + _FALSE:
        findings.append(f"{row.where}: column {column} holds {value[:40]!r}, which is neither true nor false")
        return None
    return value in _TRUE


def _show(judged: list[_Judged], expect: str | None) -> None:
    from rich.console import Console
    from rich.table import Table as Grid
    from rich.text import Text

    from igrpo_lite.answers.answers import EXPLICIT

    console, total = Console(), len(judged)
    grid = Grid("verdict", box=None, pad_edge=False)
    for name in ("rows", "%"):
        grid.add_column(name, justify="right")
    for reason, count in Counter(item.verdict.reason for item in judged).most_common():
        grid.add_row(reason, f"{count:,}", f"{100 * count / total:.1f}")
    console.print(grid)
    strict = sum(item.correct and item.verdict.source in EXPLICIT for item in judged)
    lenient = sum(item.correct for item in judged)
    print(
        f"accuracy of {total:,} rows: strict {100 * strict / total:.1f} % (in a box, in tags or after ####), "
        f"lenient {100 * lenient / total:.1f} %"
    )
    if expect is None:
        return
    counts = Counter((item.expected, item.correct) for item in judged)
    print(
        f"expected right: {counts[True, True]:,} judged right, {counts[True, False]:,} not\n"
        f"expected wrong: {counts[False, False]:,} judged wrong, {counts[False, True]:,} right"
    )
    apart = [item for item in judged if item.expected != item.correct]
    if apart:
        grid = Grid(box=None, pad_edge=False)
        for name in ("row", "expected", "verdict"):
            grid.add_column(name, no_wrap=True)
        for name in ("answer", "gold answer"):
            grid.add_column(name, overflow="fold")
        for item in apart[:MAX_LISTED]:
            told = "right" if item.expected else "wrong"
            cells = (item.row.where, told, item.verdict.reason, item.verdict.answer or "", item.gold)
            grid.add_row(*map(Text, cells))
        console.print(grid)
        if len(apart) > MAX_LISTED:
            print(f"and {len(apart) - MAX_LISTED:,} more; --output writes all")


def _write(path: Path, judged: list[_Judged]) -> None:
    try:
        with path.open("w", encoding="utf-8") as file:
            for item in judged:
                file.write(json.dumps(item.to_json(), ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror or error}") from error
