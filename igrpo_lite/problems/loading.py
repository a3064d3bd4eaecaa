"""From data settings to training and held-out problems, with an account of every row that was left out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from igrpo_lite.config import DataOptions, ModelOptions, RolloutOptions
from igrpo_lite.errors import DataError
from igrpo_lite.problems.decontamination import split_known
from igrpo_lite.problems.mixture import drawn, drawn_in_order, question_key, shares
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

__all__ = ["ProblemSets", "data_findings", "load_problems", "load_source", "question_key"]

_IN_QWEN_MATH = ("math500", "math", "hendrycks-math")


@dataclass(frozen=True, slots=True)
class ProblemSets:
    """Problems to train on and problems never trained on, which share no question; and how they came about."""

    train: list[Problem]
    held_out: list[Problem]
    report: LoadReport


def load_problems(options: DataOptions, seed: int) -> ProblemSets:
    """Load the training and the held-out problems.

    In this order: every source is read; held-out problems are drawn, where they have no source of their own; what the
    held-out set or one of ``decontaminate`` knows is taken out of training; a mixture is cut to its shares and to
    ``max_problems``.

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
    prefixes = _id_prefixes(trained, others)
    parts, reports = _load(trained, prefixes, options, findings)
    held_parts, held_reports = _load(others, prefixes[len(trained) :], options, findings)
    known = _known(options, findings)
    findings += _unfound_columns(options, reports) if len(trained) > 1 and not findings else []
    if findings:
        raise DataError(findings)
    report = LoadReport(reports, held_reports, notes=_notes(options, trained, others))
    if others:
        everywhere = _named_questions(held_parts), " and ".join(part.name for part in held_reports)
        held_out, report.held_out_used = _mixed(others, held_parts, options.eval_size, "held out")
    else:
        parts, held_parts = _hold_out(trained, parts, options.eval_size)
        everywhere = _named_questions(held_parts), "the problems held out"
        held_out, report.held_out_used = _joined(held_parts), [len(part) for part in held_parts]
    # All questions of the held-out source, not only the eval_size used now: a later evaluation may use more of them.
    # Rows of one file, and problems made by one rule, share phrases without being one another.
    related = not others or all(source.kind == "synthetic" for source in (*trained, *others))
    parts = _without_known(parts, *everywhere, 0 if related else options.decontaminate_ngram, report)
    for questions, name in known:
        parts = _without_known(parts, questions, name, options.decontaminate_ngram, report)
    train, report.used = _mixed(trained, parts, options.max_problems, f"train {seed}")
    report.train_size, report.held_out_size = len(train), len(held_out)
    return ProblemSets(train, drawn(held_out, len(held_out), "held out"), report)


def _load(
    sources: Sequence[Source],
    prefixes: Sequence[str | None],
    options: DataOptions,
    findings: list[str],
) -> tuple[list[list[Problem]], list[SourceReport]]:
    """The problems of each source, a question that several have in the first of them only."""
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
        if column is not None and _bare(column) not in {_bare(name) for name in used if name is not None}
    ]


def _bare(column: str) -> str:
    return "".join(column.lower().split())


def _known(options: DataOptions, findings: list[str]) -> list[tuple[list[tuple[str, str]], str]]:
    found = []
    for source in decontamination_sources(options):
        try:
            found.append(load_questions(source, options))
        except DataError as error:
            findings.extend(error.problems)
    return found


def _hold_out(
    sources: Sequence[Source], parts: Sequence[Sequence[Problem]], eval_size: int
) -> tuple[list[list[Problem]], list[list[Problem]]]:
    """Each part without its held-out problems, and these: in a mixture by weight, of no part more than a tenth."""
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
    parts: list[list[Problem]], questions: list[tuple[str, str]], name: str, ngram: int, report: LoadReport
) -> list[list[Problem]]:
    """The parts without what a set knows; its account goes into the report."""
    problems, overlap = split_known(_joined(parts), questions, name, ngram)
    report.overlaps.append(overlap)
    kept = {problem.id for problem in problems}
    left = [[problem for problem in part if problem.id in kept] for part in parts]
    gone = [source.name for source, part in zip(report.parts, left, strict=True) if not part]
    if gone:
        how = f"or has {ngram} words in a row in common with it, " if overlap.runs else ""
        raise DataError(
            [f"{part}: every question of it is also in {name}, {how}so nothing is left to train on" for part in gone]
        )
    return left


def _mixed(
    sources: Sequence[Source], parts: Sequence[Sequence[Problem]], most: int | None, salt: str
) -> tuple[list[Problem], list[int]]:
    counts = shares([len(part) for part in parts], _weights(sources), most)
    chosen = [drawn_in_order(part, count, salt) for part, count in zip(parts, counts, strict=True)]
    return _joined(chosen), counts


def _weights(sources: Sequence[Source]) -> list[float] | None:
    """The weights of a mixture, 1 where none is given; ``None`` where none is given at all."""
    if all(source.weight is None for source in sources):
        return None
    return [1.0 if source.weight is None else source.weight for source in sources]


def _joined(parts: Sequence[Sequence[Problem]]) -> list[Problem]:
    return [problem for part in parts for problem in part]


def _named_questions(parts: Sequence[Sequence[Problem]]) -> list[tuple[str, str]]:
    return [(problem.id, problem.question) for problem in _joined(parts)]


def _id_prefixes(trained: Sequence[Source], others: Sequence[Source]) -> list[str | None]:
    """What ids begin with where two files share a name: ids must tell all problems apart. ``None``: as usual."""
    taken: set[str] = set()
    prefixes: list[str | None] = []
    for place, source in enumerate((*trained, *others)):
        if source.kind != "file":
            prefixes.append(None)
            continue
        stem = source.label
        if stem in taken and place >= len(trained):
            stem = f"{stem}-held-out"
        numbered = (f"{stem}-{number}" for number in itertools.count(2))
        label = next(name for name in itertools.chain([stem], numbered) if name not in taken)
        taken.add(label)
        prefixes.append(label)
    return prefixes


def _notes(options: DataOptions, trained: Sequence[Source], others: Sequence[Source]) -> list[str]:
    """What one should know of the public sets in use, with this model and this length of completions."""
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
