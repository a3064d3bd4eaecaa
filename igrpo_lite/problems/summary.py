"""The report on loading, for the screen: nothing is dropped without being counted here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from igrpo_lite.problems.decontamination import Overlap

_QUESTION_SHOWN = 60


@dataclass(slots=True)
class SourceReport:
    """The rows of one source, counted.

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
        cut: whether only the first rows of a larger set were read.
        left_out_context: messages before the last of the user's, where they are the same in every row.
        with_context: problems whose question begins with the messages before.
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
    cut: bool = False
    left_out_context: str = ""
    with_context: int = 0

    def lines(self) -> list[str]:
        """The report in lines for the screen."""
        lines = [f"{self.name}: {self.problems:,} problems"]
        if self.question_column is not None:
            columns = f"question from column {self.question_column}, answer from column {self.answer_column}"
            lines = [f"{self.name}: {self.rows:,} rows, {self.problems:,} problems; {columns}"]
        if self.cut:
            lines.append(
                f"  only the first {self.rows:,} rows were read (--data-split 'train[:50000]' downloads all for more)"
            )
        if self.left_out_context:
            lines.append(
                "  every row begins with the same messages, which are left out; put what the model is to read into "
                f"--system-prompt: `{_short(self.left_out_context)}`"
            )
        if self.with_context:
            lines.append(f"  {self.with_context:,} questions begin with the messages before the user's last")
        if self.bad_rows:
            lines.append(
                f"  left out {len(self.bad_rows):,} unreadable rows: {_some(self.bad_rows[:3], len(self.bad_rows))}"
            )
        if self.unparsed:
            shown = _some(self.unparsed_examples, self.unparsed)
            lines.append(f"  left out {self.unparsed:,} rows without a readable gold answer: {shown}")
        if self.duplicates:
            other = f", {self.conflicting:,} of them with another answer" if self.conflicting else ""
            lines.append(f"  left out {self.duplicates:,} repeated questions{other} (the first of each is kept)")
        lines += [f"  e.g. {_short(question)} -> {answer}" for question, _, answer in self.examples]
        return lines


@dataclass(slots=True)
class LoadReport:
    """What :func:`igrpo_lite.problems.loading.load_problems` did.

    Attributes:
        parts: the training sources, more than one in a mixture.
        held_out_parts: the sources of the held-out problems; empty: rows of the training sources.
        overlaps: training problems left out because a set knows them, per set; the held-out problems first.
        used: training problems that each part gave in the end.
        held_out_used: held-out problems that each source, or each part, gave.
        notes: what one should know of the sets in use.
        train_size: training problems in the end (after ``max_problems``).
        held_out_size: held-out problems in the end.
    """

    parts: list[SourceReport]
    held_out_parts: list[SourceReport] = field(default_factory=list)
    overlaps: list[Overlap] = field(default_factory=list)
    used: list[int] = field(default_factory=list)
    held_out_used: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    train_size: int = 0
    held_out_size: int = 0

    def lines(self) -> list[str]:
        """The whole report in lines for the screen."""
        lines = [line for part in (*self.parts, *self.held_out_parts) for line in part.lines()]
        lines += [line for overlap in self.overlaps for line in overlap.lines()]
        clean = dict.fromkeys(overlap.name for overlap in self.overlaps if overlap.ngrams and not overlap.count)
        lines += [f"no training problem is in {' or '.join(clean)}"] if clean else []
        lines += self.notes
        if len(self.parts) > 1:
            lines.append(f"mixture: {_counts(self.parts, self.used)}")
        own = self.held_out_parts or self.parts
        if len(own) > 1:
            lines.append(f"held out: {_counts(own, self.held_out_used)}")
        names = " and ".join(part.name for part in own)
        origin = f"from {names}{'' if self.held_out_parts else ', not trained on'}"
        return [*lines, f"{self.train_size:,} training problems; {self.held_out_size:,} held out ({origin})"]


def _counts(parts: Sequence[SourceReport], used: Sequence[int]) -> str:
    total = sum(used) or 1
    shares = [f"{count:,} of {part.name} ({count / total:.0%})" for part, count in zip(parts, used, strict=True)]
    return ", ".join(shares)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _QUESTION_SHOWN else line[: _QUESTION_SHOWN - 3] + "..."


def _some(shown: Sequence[str], count: int) -> str:
    return "; ".join(shown) + (f" and {count - len(shown):,} more" if count > len(shown) else "")
