"""``igrpo-lite data``: the public sets of problems, listed, and what becomes of a source's rows."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import App, Parameter

from igrpo_lite.cli.flags import COMMAND, UNTRAINED, checked, settings_flags
from igrpo_lite.errors import DataError

_SETTINGS = ("data_config", "data_split", "question_column", "answer_column", "max_bad_rows")
_STREAMED = 200
"""Rows that ``show`` reads of a very large set."""


def app() -> App:
    """The two verbs of data."""
    group = App(
        name="data", help="List the public sets of problems, or show the problems of a source.", help_epilogue=""
    )
    group.command(ls, name="ls")
    group.command(settings_flags(show, _SETTINGS), name="show")
    return group


def ls() -> None:
    """List the public sets that --data and --eval-data know by a short name."""
    from igrpo_lite.problems.registry import PUBLIC_SETS

    rows = [("name", "hub id", "splits (rows)", "answers", "tokens", "licence")]
    for name, entry in PUBLIC_SETS.items():
        splits = ", ".join(
            f"{split}{'*' if split == entry.evaluate else ''} {'?' if count is None else f'{count:,}'}"
            for split, count in entry.splits.items()
        )
        form = entry.answers[0][1] if entry.answers else "?"
        rows.append((name, entry.hub_id, splits, form, f"{entry.max_completion_length:,}", entry.licence))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print("\n* evaluated on by default. tokens: a --max-completion-length that most solutions fit into.")
    print("NAME=path takes a local copy: --data gsm8k=gsm8k_train.jsonl. Any other hub id or file works as well.")


def show(
    source: Annotated[str, Parameter(help="What --data takes: a name, NAME=path, a file, a hub id, or a mixture.")],
    /,
    *,
    rows: Annotated[int, Parameter(help="Problems to show of each source.", group=COMMAND)] = 3,
    **settings: Any,
) -> None:
    """Show the problems of a source as they are understood: columns, counts, what is left out, and the first ones."""
    config = checked(None, settings | UNTRAINED | {"data": source})
    from igrpo_lite.problems.loading import load_source
    from igrpo_lite.problems.sources import train_sources

    findings: list[str] = []
    for part in train_sources(config):
        try:
            problems, report = load_source(part, config, streamed_rows=_STREAMED)
        except DataError as error:
            findings += error.problems
            continue
        report.examples = []
        print("\n".join(report.lines()))
        if part.entry is not None:
            print(f"  licence: {part.entry.licence}; {part.entry.note or part.entry.source}")
        for problem in problems[: max(rows, 0)]:
            print(f"\n{problem.id}\n{problem.question}\n-> {problem.answer}")
            if problem.columns:
                print(f"   further columns: {', '.join(problem.columns)}")
        print()
    if findings:
        raise DataError(findings)
