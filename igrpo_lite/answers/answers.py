r"""Finds the final answer in a completion, and says whether it is the gold answer.

Places are tried in this order, and the first that holds something wins:

1. the last balanced, non-empty ``\boxed{}`` (``\fbox{}``, ``\framebox{}``; of nested ones the inner),
2. the last ``<answer>...</answer>``,
3. the line after the last ``####`` if it starts with a number (``#### Step 3`` is a heading),
4. the clause after the last "the answer is", "final answer:",
5. the last number, with the expression that it is a part of: ``2\sqrt{3}``, not 3
   (:mod:`igrpo_lite.answers.last_value`).

The rules for ties:

* Thinking counts only when nothing after ``</think>`` holds an answer.
* Of several boxes (or tags) the last one counts, so a model may correct itself. But boxes with nothing between them
  except a comma, "or", "and" or a space on one line are one answer of several values: ``\boxed{2} or \boxed{3}`` is
  "2 or 3".
* Several different values in the chosen place, where the gold answer is one value, are ``several_answers``, whether the
  right one is among them or not. Where the gold answer is a list or a set, they are compared with it.
* Once a box, a tag, a ``####`` or "the answer is" with a number was given, a turn that the model goes on to write for
  somebody else ends the answer (``<|im_start|>``, a line "user", "Question: ..."): what follows is another question's.
* A truncated completion states an answer only in the first three places.

Everything is linear in the length of the text.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from igrpo_lite.answers.equality import Opinion, same_answer, states_several
from igrpo_lite.answers.last_value import last_value
from igrpo_lite.answers.quantities import MAX_TEXT, parse_number

Source = Literal["box", "tag", "hash", "phrase", "number"]
Reason = Literal["correct", "wrong", "no_answer", "unparsed", "several_answers", "truncated", "timeout"]

EXPLICIT: frozenset[Source] = frozenset({"box", "tag", "hash"})
"""Places where an answer was put on purpose; the others may be a half-finished calculation's."""

MAX_SHOWN = 200
"""Characters of a found answer that a verdict keeps."""

MAX_JOINT = 60
"""Characters between two boxes that are looked into for a conjunction."""

MAX_PHRASES = 20
"""Phrases that are looked into for the end of the model's own turn."""

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*(?:\{|(?P<bare>[-+]?[0-9][0-9,.]*))")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_TAG = re.compile(r"</?answer>", re.IGNORECASE)
_DRESSING = re.compile(r"\\(?:[()\[\],; ]|q?quad|text|mbox|mathrm)|[${}*\s]")
_CONJUNCTION = re.compile(r"(?:[,;/&\s]|or|and)*")
_NEXT_TURN = re.compile(
    r"<\|(?:im_start|im_end|endoftext|eot_id|start_header_id|end_of_text|user|assistant)\|>|</s>|<(?:start|end)_of_turn>"
    r"|\n[ \t#*]*(?:(?:user|human|assistant)[ \t]*(?::|\n)|(?:question|problem|instruction|q)[ \t]*+[0-9]*+[ \t]*+:)",
    re.IGNORECASE,
)
_HASHES = re.compile(r"(?<!#)####(?!#)")
_HASH_NUMBER = re.compile(r"[\s$*\\]*[-+−]?\s*[\\$€£]*(?:[0-9.]|\\[dt]?frac)")
_NUMBERED_HEADING = re.compile(r"\s*[0-9]+[.):]\s+\S")
_PHRASE = re.compile(
    r"\b(?:answer|correct (?:option|choice))\b[^.\n:=]{0,60}?(?:\bis\b|\bbe\b|:|=)[\s:*]*", re.IGNORECASE
)
_CLAUSE_END = re.compile(
    r"\n|[.!?](?=[\s*_<]|$)|,\s+(?=[A-Za-z])|\s(?=because\b|since\b)|<\||</|<(?:start|end)_of_turn>"
    "|\\s:-?\\)|[\u2600-\u27bf\u2b00-\u2bff\U0001f000-\U0001faff]"
)
_NOTE = re.compile(
    r"\s\((?=[A-Za-z]{2}|i\.e|e\.g|[^()\n]*=)(?![^()\n]*\b(?:p?mod|base|or|and|remainder|negative|minus|in [a-z]+s)\b)"
)
"""A bracket after a number that explains it: ``18 (since 9 * 2 = 18)``, not ``5 (mod 7)``."""
Span = tuple[int, int, int, int]
"""Start of a box or a pair of tags, start and end of what is in it, and its own end; all 0 when it is never closed."""
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,} [A-Za-z]{2,} [A-Za-z]{2,}")
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
        reason: ``correct``; ``wrong``; ``no_answer``; ``unparsed`` (found, but in no form that can be compared:
            ``3+4`` where the gold answer is 7); ``several_answers`` (where the gold answer is one value);
            ``truncated`` (cut off before an answer was put in a box, in tags or after ``####``); ``timeout``
            (comparing took too long).
        answer: the found answer, shortened to :data:`MAX_SHOWN` characters.
        source: the kind of place it stood in; strict accuracy counts ``correct`` ones from :data:`EXPLICIT` places.
    """

    reason: Reason
    answer: str | None
    source: Source | None = None


def verdict(text: str, gold: str, truncated: bool) -> Verdict:
    """Judges a completion's text against the gold answer by exact comparison alone; cheap, and safe for any text."""
    found = stated(text, truncated)
    return found if isinstance(found, Verdict) else compared(found, gold)


def stated(text: str, truncated: bool) -> Found | Verdict:
    """The answer that a completion states, or the verdict that it states none."""
    found = find_answer(text)
    if truncated and (found is None or found.source not in EXPLICIT):
        return Verdict("truncated", None, None)
    return Verdict("no_answer", None, None) if found is None else found


def compared(found: Found, gold: str, opinion: Opinion | None = None) -> Verdict:
    """The verdict on an answer; see :func:`igrpo_lite.answers.equality.same_answer` for the ``opinion``."""
    same = same_answer(found.text, gold, opinion)
    reason: Reason = "unparsed" if same is None else "correct" if same else "wrong"
    if same is False and states_several(found.text, gold):
        reason = "several_answers"
    return Verdict(reason, found.text[:MAX_SHOWN], found.source)


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
    elif not answer and _is_short(text) and not _HASHES.search(text) and not boxes(text):
        answer = text
    elif not answer and (phrase := _phrase(text)) is not None:
        answer = phrase.text
    if not answer:
        return None
    whole = _WHOLE_FLOAT.fullmatch(answer)
    return whole[1] if whole else answer


def _is_short(text: str) -> bool:
    """Whether a text is an answer as it stands: one line, and if it is a long one, a formula without sentences."""
    return "\n" not in text and (0 < len(text) <= 80 or ("\\" in text and len(text) <= 400 and not _PROSE.search(text)))


def boxes(text: str, command: re.Pattern[str] = _BOX) -> list[str | None]:
    """The content of every box in order of its opening, cut to some thousand characters; ``None`` for one whose brace
    is never closed."""
    spans = _box_spans(text, command)
    return [text[start : min(end, start + 2 * MAX_TEXT)] if end else None for _, start, end, _ in spans]


def _box_spans(text: str, command: re.Pattern[str] = _BOX) -> list[Span]:
    found: list[Span] = []
    pending: dict[int, tuple[int, int]] = {}
    for match in command.finditer(text):
        if match.groupdict().get("bare"):
            found.append((match.start(), *match.span("bare"), match.end()))
        else:
            pending[match.end() - 1] = len(found), match.start()
            found.append((0, 0, 0, 0))
    if not pending:
        return found
    stack: list[int] = []
    for match in _BRACE.finditer(text, min(pending)):
        if match.group() == "{":
            stack.append(match.start())
        elif match.group() == "}" and stack:
            opened = stack.pop()
            if opened in pending:
                index, start = pending[opened]
                found[index] = (start, opened + 1, match.start(), match.end())
    return found


def _tag_spans(text: str) -> list[Span]:
    """Every closed pair of answer tags: of several opening ones the last before the closing one."""
    found: list[Span] = []
    opened: re.Match[str] | None = None
    for match in _TAG.finditer(text):
        if match.group()[1] != "/":
            opened = match
        elif opened is not None:
            found.append((opened.start(), opened.end(), match.start(), match.end()))
            opened = None
    return found


def _hash_spans(text: str) -> Iterator[Span]:
    for mark in _HASHES.finditer(text):
        if _hash_line(text, mark):
            yield (mark.start(), mark.start(), mark.end(), mark.end())


def _phrase_spans(text: str) -> Iterator[Span]:
    """The first phrases that are followed by a number."""
    for phrase in islice(_PHRASE.finditer(text), MAX_PHRASES):
        if parse_number(_clause(text, phrase.end())) is not None:
            yield (phrase.start(), phrase.start(), phrase.end(), phrase.end())


def _search(text: str) -> Found | None:
    text = _own_turn(text)
    return _box(text) or _tag(text) or _hash(text) or _phrase(text) or _number(text)


def _own_turn(text: str) -> str:
    """The text up to a turn of somebody else's, if an answer was given before it."""
    if not _NEXT_TURN.search(text):
        return text
    given = (_box_spans(text), _tag_spans(text), _hash_spans(text), _phrase_spans(text))
    ends = [next((end for _, start, stop, end in spans if text[start:stop].strip()), len(text)) for spans in given]
    turn = _NEXT_TURN.search(text, min(ends))
    return text if turn is None else text[: turn.start()]


def _box(text: str) -> Found | None:
    return _last(text, _box_spans(text), "box")


def _tag(text: str) -> Found | None:
    return _last(text, _tag_spans(text), "tag")


def _last(text: str, spans: Sequence[Span], source: Source) -> Found | None:
    """The last content that is not empty, together with those before it that are joined to it."""
    contents: list[str] = []
    after = len(text)
    for opened, start, stop, end in reversed(spans):
        content = text[start:stop].strip()
        if not content:
            continue
        if contents and not (end <= after <= end + MAX_JOINT and _joined(text[end:after])):
            break
        after = opened
        if content not in contents:
            contents.append(content)
    return Found(" or ".join(reversed(contents)), source) if contents else None


def _joined(between: str) -> bool:
    """Whether what stands between two boxes makes them one answer: a conjunction, or nothing on the same line."""
    words = _DRESSING.sub(" ", between)
    return _CONJUNCTION.fullmatch(words) is not None and ("\n" not in between or not words.isspace())


def _hash(text: str) -> Found | None:
    lines = deque(_HASHES.finditer(text), maxlen=1)
    line = _hash_line(text, lines[0]) if lines else ""
    return Found(line, "hash") if line else None


def _hash_line(text: str, mark: re.Match[str]) -> str:
    """The answer after ``####``; empty where it is a heading."""
    line = text[mark.end() : mark.end() + 300].strip(" \t").partition("\n")[0].strip()
    return line if _HASH_NUMBER.match(line) and not _NUMBERED_HEADING.match(line) else ""


def _phrase(text: str) -> Found | None:
    phrases = deque(_PHRASE.finditer(text), maxlen=1)
    if not phrases:
        return None
    clause = _clause(text, phrases[0].end())
    if parse_number(clause) is None and "=" in clause:
        # "the answer is 6 * 3 = 18": the result counts, in this loose place only
        clause = clause.rpartition("=")[2].strip()
    return Found(clause, "phrase") if clause else None


def _clause(text: str, start: int) -> str:
    """The rest of a sentence, without a bracket that only explains the number before it."""
    sentence = text[start : start + 300]
    clause = _CLAUSE_END.split(sentence, maxsplit=1)[0].strip()
    if (note := _NOTE.search(sentence)) and parse_number(sentence[: note.start()]) is not None:
        clause = sentence[: note.start()].strip()
    return clause.strip("*_") if "*" in clause[-1:] + clause[:1] or clause.startswith("__") else clause


def _number(text: str) -> Found | None:
    value = last_value(text)
    return None if value is None else Found(value, "number")
