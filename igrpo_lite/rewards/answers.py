r"""Finds the final answer in a completion, and says whether it is the gold answer.

Places are tried in this order, and the first that holds something wins:

1. the last balanced, non-empty ``\boxed{}`` (``\fbox{}``, ``\framebox{}``; of nested ones the inner),
2. the last ``<answer>...</answer>``,
3. the line after the last ``####`` if it starts with a number (``#### Step 3`` is a heading),
4. the clause after the last "the answer is", "final answer:",
5. the last number.

Thinking counts only when nothing after ``</think>`` holds an answer. Several boxes: the last one. Several numbers in
the chosen place: not one answer, hence wrong. Everything is linear in the length of the text.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from typing import Literal

from igrpo_lite.rewards.equality import parse_number, same_answer

Source = Literal["box", "tag", "hash", "phrase", "number"]
Reason = Literal["correct", "wrong", "no_answer", "unparsed", "truncated"]

EXPLICIT: frozenset[Source] = frozenset({"box", "tag", "hash"})
"""Places where an answer was put on purpose; the others may be a half-finished calculation's."""

MAX_SHOWN = 200
"""Characters of a found answer that a verdict keeps."""

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*(?:\{|(?P<bare>[-+]?[0-9][0-9,.]*))")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_OPEN_TAG = re.compile(r"<answer>", re.IGNORECASE)
_CLOSE_TAG = re.compile(r"</answer>", re.IGNORECASE)
_HASHES = re.compile(r"(?<!#)####(?!#)")
_HASH_NUMBER = re.compile(r"[\s$*\\]*[-+−]?\s*[\\$€£]*(?:[0-9.]|\\[dt]?frac)")
_NUMBERED_HEADING = re.compile(r"\s*[0-9]+[.):]\s+\S")
_PHRASE = re.compile(r"\banswer\b[^.\n:=]{0,60}?(?:\bis\b|\bbe\b|:|=)[\s:*]*", re.IGNORECASE)
_CLAUSE_END = re.compile(r"\n|[.!?](?=\s|\*|$)|,\s+(?=[A-Za-z])|\s(?=because\b|since\b)")
_UNSIGNED = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
_NUMBER = re.compile(
    r"(?<![\w^.,])(?<!\^\{)(?:(?<![)\]}])[-−])?"
    rf"(?:\\[dt]?frac\{{{_UNSIGNED}\}}\{{{_UNSIGNED}\}}|{_UNSIGNED}(?:/{_UNSIGNED})?(?:[eE][-+]?[0-9]+\b)?(?:\\?%)?)"
)
_WHOLE_FLOAT = re.compile(r"([-+]?[0-9]+)\.0+")


@dataclass(frozen=True, slots=True)
class Found:
    """An answer's text as written, and the kind of place it stood in."""

    text: str
    source: Source


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a completion's answer.

    Attributes:
        reason: ``correct``, ``wrong``, ``no_answer``, ``unparsed`` (found, but comparable with nothing), or
            ``truncated`` (cut off before an answer was put in a box, in tags or after ``####``).
        answer: the found answer, shortened to :data:`MAX_SHOWN` characters.
    """

    reason: Reason
    answer: str | None


def verdict(text: str, gold: str, truncated: bool) -> Verdict:
    """Judges a completion's text against the gold answer."""
    found = find_answer(text)
    if truncated and (found is None or found.source not in EXPLICIT):
        return Verdict("truncated", None)
    if found is None:
        return Verdict("no_answer", None)
    same = same_answer(found.text, gold)
    reason: Reason = "unparsed" if same is None else "correct" if same else "wrong"
    return Verdict(reason, found.text[:MAX_SHOWN])


def find_answer(text: str) -> Found | None:
    """The final answer that ``text`` states, or ``None``."""
    shown = visible(text)
    found = _search(shown)
    return found if found is not None or len(shown) == len(text) else _search(text)


def visible(text: str) -> str:
    """The part outside the thinking: after the last ``</think>``, up to a ``<think>`` that is never closed.

    The opening tag may be missing, because some chat templates put it into the prompt.
    """
    shown = text[text.rfind("</think>") + len("</think>") :] if "</think>" in text else text
    return shown.partition("<think>")[0]


def gold_answer(text: str) -> str | None:
    """Cuts the gold answer out of a data set's answer or solution; ``None`` when it holds none.

    Read are the text after the last ``####``, the last ``\\boxed{}``, ``<answer>`` tags, a short line as it stands, and
    "the answer is ..." in a longer one. ``145.0`` becomes ``145``.
    """
    text = text.strip()
    *_, last = ["", *_HASHES.split(text)[1:]]
    answer = next(iter(last.strip().splitlines()), "").strip()
    found = None if answer else _box(text) or _tag(text)
    if found is not None:
        answer = found.text
    elif not answer and 0 < len(text) <= 80 and "\n" not in text and not _HASHES.search(text) and not boxes(text):
        answer = text
    elif not answer and (phrase := _phrase(text)) is not None:
        answer = phrase.text
    if not answer:
        return None
    whole = _WHOLE_FLOAT.fullmatch(answer)
    return whole[1] if whole else answer


def boxes(text: str, command: re.Pattern[str] = _BOX) -> list[str | None]:
    """The content of every box in order of its opening; ``None`` for one whose brace is never closed."""
    found: list[str | None] = []
    pending: dict[int, int] = {}
    first = -1
    for match in command.finditer(text):
        if match.groupdict().get("bare"):
            found.append(match["bare"])
            continue
        first = match.end() - 1 if first < 0 else first
        pending[match.end() - 1] = len(found)
        found.append(None)
    if not pending:
        return found
    stack: list[int] = []
    for match in _BRACE.finditer(text, first):
        if match.group() == "{":
            stack.append(match.start())
        elif match.group() == "}" and stack:
            opened = stack.pop()
            if (index := pending.get(opened)) is not None:
                found[index] = _slice(text, opened + 1, match.start())
    return found


def _slice(text: str, start: int, end: int) -> str:
    # Boxes nested by the thousand would otherwise copy the text as often; such a content is no answer anyhow.
    return text[start:end] if end - start <= 10_000 else text[start : start + 10_000]


def _search(text: str) -> Found | None:
    return _box(text) or _tag(text) or _hash(text) or _phrase(text) or _number(text)


def _box(text: str) -> Found | None:
    for content in reversed(boxes(text)):
        if content is not None and (stripped := content.strip()):
            return Found(stripped, "box")
    return None


def _tag(text: str) -> Found | None:
    closes = deque(_CLOSE_TAG.finditer(text), maxlen=1)
    if not closes:
        return None
    end = closes[0].start()
    opens = deque(_OPEN_TAG.finditer(text, 0, end), maxlen=1)
    content = text[opens[0].end() : end].strip() if opens else ""
    return Found(content, "tag") if content else None


def _hash(text: str) -> Found | None:
    marks = deque(_HASHES.finditer(text), maxlen=1)
    if not marks:
        return None
    line = text[marks[0].end() : marks[0].end() + 300].strip(" \t").partition("\n")[0].strip()
    if not _HASH_NUMBER.match(line) or _NUMBERED_HEADING.match(line):
        return None
    return Found(line, "hash")


def _phrase(text: str) -> Found | None:
    phrases = deque(_PHRASE.finditer(text), maxlen=1)
    if not phrases:
        return None
    clause = _CLAUSE_END.split(text[phrases[0].end() : phrases[0].end() + 300], maxsplit=1)[0].strip()
    if parse_number(clause) is None and "=" in clause:
        # "the answer is 6 * 3 = 18": the result counts, in this loose place only
        clause = clause.rpartition("=")[2].strip()
    return Found(clause, "phrase") if clause else None


def _number(text: str) -> Found | None:
    numbers = deque(_NUMBER.finditer(text), maxlen=1)
    return Found(numbers[0].group(), "number") if numbers else None
