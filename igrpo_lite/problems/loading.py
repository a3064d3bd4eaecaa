"""From data settings to training and held-out problems, with a report on every row that was left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from igrpo_lite.config import DataOptions, ModelOptions, RolloutOptions
from igrpo_lite.errors import DataError
from igrpo_lite.problems.decontamination import NGRAM, split_known
from igrpo_lite.problems.mixture import drawn, drawn_in_order, shares
from igrpo_lite.problems.reading import load_questions, load_source
from igrpo_lite.problems.sources import (
    Source,
    data_findings,
    decontamination_sources,
    held_out_sources,
    train_sources,
)
from igrpo_lite.problems.summary import LoadReport, SourceReport
from igrpo_lite.types import Problem

_IN_QWEN_MATH = ("math500", "math", "hendrycks-math")

Parts = list[list[Problem]]
"""Problems by source."""


@dataclass(frozen=True, slots=True)
class ProblemSets:
    """Problems to train on and problems to evaluate on, which share no question; and the report on loading them."""

    train: list[Problem]
    held_out: list[Problem]
    report: LoadReport


def load_problems(options: DataOptions, seed: int) -> ProblemSets:
    """Load the training and the held-out problems.

    In this order: read every source; hold problems out, where they have no source of their own; take what the held-out
    set or one of ``decontaminate`` contains out of training; cut a mixture to its shares and to ``max_problems``.

    Held-out problems are the same whatever the seed, the order of the rows and ``max_problems``: a hash of the question
    chooses them. The seed only draws which training problems are used where not all are (of a synthetic set alone:
    always the first).

    Args:
        options: the data settings.
        seed: the run's seed.

    Raises:
        DataError: a source cannot be found, read or understood, or nothing usable remains; all findings at once.
    """
    findings = data_findings(options)
    if findings:
        raise DataError(findings)
    trained, others = train_sources(options), held_out_sources(options)
    prefixes = _id_prefixes([*trained, *others])
    parts, reports = _load(trained, prefixes, options, findings)
    held_parts, held_reports = _load(others, prefixes[len(trained) :], options, findings)
    known = []
    for source in decontamination_sources(options):
        try:
            known.append(load_questions(source, options))
        except DataError as error:
            findings.extend(error.problems)
    findings += _unfound_columns(options, reports) if len(trained) > 1 and not findings else []
    if findings:
        raise DataError(findings)
    report = LoadReport(reports, held_reports, notes=_notes(options, trained, others))
    if others:
        name = " and ".join(part.name for part in held_reports)
        held_out, report.held_out_used = _mixed(others, held_parts, options.eval_size, "held out")
    else:
        name = "the problems held out"
        parts, held_parts = _hold_out(trained, parts, options.eval_size)
        held_out, report.held_out_used = _joined(held_parts), [len(part) for part in held_parts]
    # All questions of the held-out source, not only the eval_size used now: a later evaluation may use more of them.
    questions = [(problem.id, problem.question) for problem in _joined(held_parts)]
    # Rows of one file, and problems made by one rule, share phrases without being one another.
    related = not others or all(source.kind == "synthetic" for source in (*trained, *others))
    parts = _without_known(parts, questions, name, not related, report)
    for questions, name in known:
        parts = _without_known(parts, questions, name, True, report)
    train, report.used = _mixed(trained, parts, options.max_problems, f"train {seed}")
    report.train_size, report.held_out_size = len(train), len(held_out)
    return ProblemSets(train, drawn(held_out, len(held_out), "held out"), report)


def _load(
    sources: Sequence[Source], prefixes: Sequence[str | None], options: DataOptions, findings: list[str]
) -> tuple[Parts, list[SourceReport]]:
    """The problems of each source; a question of several sources belongs to the first."""
    seen: dict[str, Problem] = {}
    parts, reports = [], []
    for source, prefix in zip(sources, prefixes, strict=False):
        try:
            problems, report = load_source(source, options, prefix, seen)
        except DataError as error:
            findings.extend(error.problems)
            continue
        parts.append(problems)
        reports.append(report)
        if not problems:
            findings.append(f"{report.name}: every question of it is also in the sets before it")
    return parts, reports


def _unfound_columns(options: DataOptions, reports: Sequence[SourceReport]) -> list[str]:
    """Columns asked for that no part of a mixture has; a single part may do without."""
    asked = {
        "question_column": (options.question_column, [report.question_column for report in reports]),
        "answer_column": (options.answer_column, [report.answer_column for report in reports]),
    }
    return [
        f"{key}: no part of the mixture has a column {column}; found by name: {', '.join(filter(None, used))}"
        for key, (column, used) in asked.items()
        if column is not None and _bare(column) not in [_bare(name) for name in used if name]
    ]


def _bare(column: str) -> str:
    return "".join(column.lower().split())


def _hold_out(sources: Sequence[Source], parts: Parts, eval_size: int) -> tuple[Parts, Parts]:
    """Each part without its held-out problems, and these: at most a tenth of each part, in a mixture by weight."""
    wanted = shares([eval_size] * len(parts), _weights(sources) or [len(part) for part in parts], eval_size)
    most = [max(1, len(part) // 10) if len(part) > 1 else 0 for part in parts]
    held_out = [
        drawn(part, min(count, limit), "held out") for part, count, limit in zip(parts, wanted, most, strict=True)
    ]
    if not any(held_out):
        raise DataError(
            f"{sources[0].name}: one problem is too few to train on and to hold out; "
            "add rows, or name held-out problems with --eval-data"
        )
    taken = {problem.id for problem in _joined(held_out)}
    return [[problem for problem in part if problem.id not in taken] for part in parts], held_out


def _without_known(
    parts: Parts, questions: list[tuple[str, str]], name: str, ngrams: bool, report: LoadReport
) -> Parts:
    """The parts without what is also in a set; the report says what was left out."""
    problems, overlap = split_known(_joined(parts), questions, name, ngrams)
    report.overlaps.append(overlap)
    kept = {problem.id for problem in problems}
    left = [[problem for problem in part if problem.id in kept] for part in parts]
    how = f"or has {NGRAM} words in a row in common with it, " if overlap.runs else ""
    empty = [source.name for source, part in zip(report.parts, left, strict=True) if not part]
    if empty:
        raise DataError(
            [f"{part}: every question of it is also in {name}, {how}so nothing is left to train on" for part in empty]
        )
    return left


def _mixed(sources: Sequence[Source], parts: Parts, most: int | None, salt: str) -> tuple[list[Problem], list[int]]:
    counts = shares([len(part) for part in parts], _weights(sources), most)
    return _joined([drawn_in_order(part, count, salt) for part, count in zip(parts, counts, strict=True)]), counts


def _weights(sources: Sequence[Source]) -> list[float] | None:
    """The weights of a mixture, 1 where a part has none; ``None`` where no part has one."""
    if all(source.weight is None for source in sources):
        return None
    return [1.0 if source.weight is None else source.weight for source in sources]


def _joined(parts: Parts) -> list[Problem]:
    return [problem for part in parts for problem in part]


def _id_prefixes(sources: Sequence[Source]) -> list[str | None]:
    """What the ids of a file's problems begin with: its name, numbered where several files have the same one."""
    taken: list[str] = []
    prefixes: list[str | None] = []
    for source in sources:
        count = taken.count(source.label) + 1
        prefixes.append(None if source.kind != "file" else source.label if count == 1 else f"{source.label}-{count}")
        taken.append(source.label)
    return prefixes


def _notes(options: DataOptions, trained: Sequence[Source], others: Sequence[Source]) -> list[str]:
    """What to know about the public sets in use with this model and this completion length."""
    notes = [
        f"{source.entry.name} is a set to evaluate on: a model trained on it can no longer be measured by it"
        for source in trained
        if source.entry is not None and source.entry.train is None
    ]
    entries = [source.entry for source in (*trained, *others) if source.entry is not None]
    if isinstance(options, ModelOptions) and "qwen2.5-math" in options.model.lower():
        tested = {source.entry.name for source in others or trained if source.entry is not None}
        notes += [
            f"Qwen2.5-Math knows {name} by heart (arXiv 2507.10532: of more than half of MATH-500's problems it writes "
            "the last 40 % word for word): a gain there says little; see gsm8k-platinum, aime25, aime26"
            for name in _IN_QWEN_MATH
            if name in tested
        ]
    if isinstance(options, RolloutOptions) and entries:
        longest = max(entries, key=lambda entry: entry.max_completion_length)
        if options.max_completion_length < longest.max_completion_length:
            notes.append(
                f"solutions to {longest.name} often take up to {longest.max_completion_length:,} tokens, and "
                f"max_completion_length is {options.max_completion_length:,}: watch the share of truncated completions"
            )
    return notes
