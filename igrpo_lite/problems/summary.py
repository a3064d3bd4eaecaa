"""What loading did, for the screen: nothing is dropped without being counted here."""

from __future__ import annotations

from dataclasses import dataclass, field

_QUESTION_SHOWN = 60


@dataclass(slots=True)
class SourceReport:
    """What became of the rows of one source.

    Attributes:
        name: file, hub id with split, or synthetic set.
        rows: rows read, readable or not.
        problems: problems that came of them.
        question_column, answer_column: columns used; ``None`` for synthetic sets.
        bad_rows: place and reason of each row that could not be read.
        unparsed: rows left out because no gold answer was found in their answer column.
        unparsed_examples: place and answer text of up to three of these.
        duplicates: rows left out because their question had occurred before.
        conflicting: how many of these gave another answer than the first.
        examples: question, raw answer and gold answer of up to three problems.
    """

    name: str
    rows: int = 0
    problems: int = 0
    question_column: str | None = None
    answer_column: str | None = None
    bad_rows: list[str] = field(default_factory=list)
    unparsed: int = 0
    unparsed_examples: list[str] = field(default_factory=list)
    duplicates: int = 0
    conflicting: int = 0
    examples: list[tuple[str, str, str]] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report in lines for the screen."""
        lines = [f"{self.name}: {self.problems:,} problems"]
        if self.question_column is not None:
            columns = f"question from column {self.question_column}, answer from column {self.answer_column}"
            lines = [f"{self.name}: {self.rows:,} rows, {self.problems:,} problems; {columns}"]
        if self.bad_rows:
            shown = "; ".join(self.bad_rows[:3])
            lines.append(f"  left out {len(self.bad_rows):,} unreadable rows: {shown}{_more(len(self.bad_rows), 3)}")
        if self.unparsed:
            shown = "; ".join(self.unparsed_examples)
            more = _more(self.unparsed, len(self.unparsed_examples))
            lines.append(f"  left out {self.unparsed:,} rows without a readable gold answer: {shown}{more}")
        if self.duplicates:
            other = f", {self.conflicting:,} of them with another answer" if self.conflicting else ""
            lines.append(f"  left out {self.duplicates:,} repeated questions{other} (the first of each is kept)")
        lines += [f"  e.g. {_short(question)} -> {answer}" for question, _, answer in self.examples]
        return lines


@dataclass(slots=True)
class LoadReport:
    """What :func:`igrpo_lite.problems.loading.load_problems` did.

    Attributes:
        train: the training source.
        held_out: the source of the held-out problems; ``None``: rows of the training source.
        overlap: training problems left out because the held-out source has the same question.
        train_size: training problems in the end (after ``max_problems``).
        held_out_size: held-out problems in the end.
    """

    train: SourceReport
    held_out: SourceReport | None = None
    overlap: int = 0
    train_size: int = 0
    held_out_size: int = 0

    def lines(self) -> list[str]:
        """The whole report in lines for the screen."""
        lines = self.train.lines()
        if self.held_out is not None:
            lines += self.held_out.lines()
        if self.overlap:
            lines.append(f"left out {self.overlap:,} training problems whose question is in the held-out source")
        origin = f"from {self.train.name}, not trained on" if self.held_out is None else f"from {self.held_out.name}"
        lines.append(f"{self.train_size:,} training problems; {self.held_out_size:,} held out ({origin})")
        return lines


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _QUESTION_SHOWN else line[: _QUESTION_SHOWN - 3] + "..."


def _more(count: int, shown: int) -> str:
    return f" and {count - shown:,} more" if count > shown else ""
