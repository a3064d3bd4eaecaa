"""Training problems that are also in a test set: the same question, or a long run of words in common."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from igrpo_lite.types import Problem

NGRAM = 13
"""Words in a row that count as contamination (Brown et al. 2020, arXiv 2005.14165, appendix C)."""

MAX_OVERLAP = 0.2
"""Share of the training problems above which the report asks whether something else is wrong."""

_WORD = re.compile(r"[^\W_]+")
# Signs that tell one calculation from another stay; a hyphen that is before no number is spelling, or a dash.
_TOKEN = re.compile(r"[^\W_]+|-(?=\s*[\d($\\])|[+*/^%=<>|~±×÷−·√≤≥]")
_EXCERPT = 90


@dataclass(slots=True)
class Overlap:
    """What was left out of the training problems because it is in one set.

    Attributes:
        name: the set.
        of: training problems before.
        ngrams: whether shared runs of words counted, or whole questions only.
        whole: problems left out for their whole question.
        runs: further problems left out for a shared run of words.
        example: ids of both problems and the shared words of one of them.
    """

    name: str
    of: int
    ngrams: bool
    whole: int = 0
    runs: int = 0
    example: tuple[str, str, str] = ("", "", "")

    @property
    def count(self) -> int:
        """Training problems left out."""
        return self.whole + self.runs

    def lines(self) -> list[str]:
        """The report for the screen; empty where nothing was left out."""
        if not self.count:
            return []
        problem, other, shared = self.example
        shown = shared if len(shared) <= _EXCERPT else f"{shared[: _EXCERPT - 3]}..."
        found = [
            f"left out {self.count:,} training problems that are also in {self.name}: {self.whole:,} whole questions, "
            f"{self.runs:,} by {NGRAM} words in a row, e.g. {problem}, {other}: `{shown}`"
        ]
        if self.count > MAX_OVERLAP * self.of:
            found.append(
                f"  that is {self.count / self.of:.0%} of the training problems: is one set made from the other, or do "
                "they share stock phrases?"
            )
        return found


def whole_key(question: str) -> str:
    """The question in lower case without punctuation, signs of calculation kept; equal keys are the same question."""
    plain = _plain(question)
    return " ".join(_TOKEN.findall(plain) or plain.split())


def runs(question: str) -> list[str]:
    """Every run of :data:`NGRAM` words of a question: lower case, no punctuation."""
    words = _WORD.findall(_plain(question))
    return [" ".join(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)]


def split_known(
    problems: Sequence[Problem], known: Iterable[tuple[str, str]], name: str, ngrams: bool = True
) -> tuple[list[Problem], Overlap]:
    """The problems that are not in a set, and the report on the others.

    A problem is in it when its question is, or (``ngrams``) when it shares a run of words with one of its questions.
    Time and memory grow with the number of words on each side, not with their product.

    Args:
        known: id and question of each problem of the set.
        name: the set, for the report.
    """
    whole: dict[str, str] = {}
    index: dict[str, str] = {}
    for other, question in known:
        whole.setdefault(whole_key(question), other)
        for run in runs(question) if ngrams else ():
            index.setdefault(run, other)
    overlap = Overlap(name, len(problems), ngrams)
    kept = []
    for problem in problems:
        key = whole_key(problem.question)
        shared = next((run for run in runs(problem.question) if run in index), None) if index else None
        if key in whole:
            overlap.whole += 1
            if overlap.count == 1:
                overlap.example = (problem.id, whole[key], problem.question.strip())
        elif shared is not None:
            overlap.runs += 1
            if overlap.runs == 1:
                overlap.example = (problem.id, index[shared], shared)
        else:
            kept.append(problem)
    return kept, overlap


def _plain(question: str) -> str:
    return unicodedata.normalize("NFKC", question).casefold()
