"""Training problems that a test set knows too: the same question, or a long run of words in common."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from igrpo_lite.types import Problem

ALARMING = 0.2
"""Share of the training problems above which the report asks whether something else is wrong."""

_WORD = re.compile(r"[^\W_]+")
# Signs that tell one calculation from another stay; a hyphen that is before no number is spelling, or a dash.
_TOKEN = re.compile(r"[^\W_]+|-(?=\s*[\d($\\])|[+*/^%=<>|~±×÷−·√≤≥]")
_EXCERPT = 90


@dataclass(frozen=True, slots=True)
class Match:
    """One training problem that a set knows: ids of both, and the shared words (``whole``: the question itself)."""

    problem: str
    other: str
    shared: str
    whole: bool


@dataclass(slots=True)
class Overlap:
    """What was left out of the training problems because one set knows it.

    Attributes:
        name: the set.
        checked: its questions.
        of: training problems before.
        ngram: words in a row that counted as shared; 0: only whole questions did.
        whole: problems left out for their whole question.
        runs: further problems left out for a shared run of words.
        example: one of them, of a run if there is one.
    """

    name: str
    checked: int
    of: int
    ngram: int
    whole: int = 0
    runs: int = 0
    example: Match | None = None

    @property
    def count(self) -> int:
        """Training problems left out."""
        return self.whole + self.runs

    def lines(self) -> list[str]:
        """What to say of it on the screen; nothing where nothing was left out."""
        if not self.count or self.example is None:
            return []
        kinds = [f"{self.whole:,} whole questions"] if self.whole else []
        kinds += [f"{self.runs:,} by {self.ngram} words in a row"] if self.runs else []
        shared = self.example.shared
        shown = shared if len(shared) <= _EXCERPT else f"{shared[: _EXCERPT - 3]}..."
        found = [
            f"left out {self.count:,} training problems that are in {self.name} too: {' and '.join(kinds)}, e.g. "
            f"{self.example.problem}, {self.example.other}: `{shown}`"
        ]
        if self.count > ALARMING * self.of:
            found.append(
                f"  that is {self.count / self.of:.0%} of the training problems: is one set made from the other, or do "
                "they share stock phrases? With a higher --decontaminate-ngram fewer are left out"
            )
        return found


def whole_key(question: str) -> str:
    """The question in lower case without punctuation, its signs of calculation kept: equal keys, the same question."""
    plain = _plain(question)
    return " ".join(_TOKEN.findall(plain) or plain.split())


def words(question: str) -> list[str]:
    """The words and numbers of a question, in lower case; punctuation parts them and is dropped."""
    return _WORD.findall(_plain(question))


def runs(question: str, ngram: int) -> Iterator[str]:
    """Every run of ``ngram`` words of a question; none where it has fewer."""
    found = words(question)
    return (" ".join(found[start : start + ngram]) for start in range(len(found) - ngram + 1)) if ngram else iter(())


def split_known(
    problems: Sequence[Problem], known: Iterable[tuple[str, str]], name: str, ngram: int
) -> tuple[list[Problem], Overlap]:
    """The problems that a set does not know, and the account of the others.

    A problem is known when its question equals one of the set's, or shares a run of ``ngram`` words with one (Brown et
    al. 2020, arXiv 2005.14165, appendix C, took 13; open-r1 takes 8). A question of fewer words is compared as a whole.
    Time and memory grow with the number of words on each side, not with their product.

    Args:
        problems: training problems.
        known: id and question of each problem of the set.
        name: the set, for the report.
        ngram: words in a row that count as shared; 0: only whole questions do.
    """
    whole: dict[str, str] = {}
    index: dict[str, str] = {}
    for other, question in known:
        whole.setdefault(whole_key(question), other)
        for run in runs(question, ngram):
            index.setdefault(run, other)
    overlap = Overlap(name, len(whole), len(problems), ngram)
    kept = []
    for problem in problems:
        match = _match(problem, whole, index, ngram)
        if match is None:
            kept.append(problem)
            continue
        overlap.whole += match.whole
        overlap.runs += not match.whole
        if overlap.example is None or (overlap.example.whole and not match.whole):
            overlap.example = match
    return kept, overlap


def _match(problem: Problem, whole: Mapping[str, str], index: Mapping[str, str], ngram: int) -> Match | None:
    if (other := whole.get(whole_key(problem.question))) is not None:
        return Match(problem.id, other, " ".join(problem.question.split()), True)
    for run in runs(problem.question, ngram) if index else ():
        if (other := index.get(run)) is not None:
            return Match(problem.id, other, run, False)
    return None


def _plain(question: str) -> str:
    return unicodedata.normalize("NFKC", question).casefold()
