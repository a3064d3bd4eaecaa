r"""The last number of a text in which nothing marks an answer, together with the expression that it is a part of.

The 3 in ``2\sqrt{3}``, ``x - 3``, ``(2, 3)``, ``x > 3``, ``2 or 3`` and ``12:03`` is no answer: who wrote them did not
state 3. Of ``40 + 2 = 42`` the result is read. Where nothing adjoins a number, it is taken alone.
"""

from __future__ import annotations

import re
from collections import deque

from igrpo_lite.answers.quantities import parse_quantity

MAX_LINE = 600
"""Characters before and after the number that are looked into."""

MAX_OPERANDS = 20
"""Operands before the number that are taken with it."""

MAX_OPERAND = 80
"""Characters of one of them with its operator."""

_UNSIGNED = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
_FRACTION = rf"\\[dt]?frac(?:\{{-?{_UNSIGNED}\}}\{{-?{_UNSIGNED}\}}|[0-9]{{2}}(?![0-9]))"
_VULGAR = "[½¼¾⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]"
_SPACE = "[ \u00a0\u2009\u202f]"
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_\u0370-\u03ff^.,])(?<!\^\{)(?:(?<![)\]}])[-−–](?:\\?\$)?)?"
    rf"(?:{_FRACTION}|{_VULGAR}|[0-9]+{_SPACE}?(?:{_FRACTION}|{_VULGAR}|(?<=\s)[0-9]+/[0-9]+(?![0-9/]))"
    rf"|[1-9][0-9]{{0,2}}(?:{_SPACE}[0-9]{{3}})+(?![0-9/])(?:\.[0-9]+)?"
    rf"|{_UNSIGNED}(?:/{_UNSIGNED}|(?::[0-9]{{1,2}}(?![0-9]))+(?:\s?[AaPp]\.?[Mm]\b)?)?(?:[eE][-+]?[0-9]+\b)?)"
    r"(?:\s?\\?%|\spercent\b)?"
)
_MATH = re.compile(r"\$\$?[^$\n]+\$\$?|\\\(.+?\\\)|\\\[.+?\\\]")
_OPENS, _CLOSES = ("$$", "\\["), ("$$", "\\]")
_ENDS = " .,;\\"
_PROSE = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,} [A-Za-z]{2,}")
_EQUALS = re.compile(r"(?<![<>!:=])=(?!=)|\\approx(?![A-Za-z])|≈")
_ASSIGNED = re.compile(r"[\s{}]*\\?[A-Za-z](?:_\{?\w+\}?)?\s*=")
_BETWEEN = re.compile(r"[,;]|(?<![A-Za-z])(?:and|or)(?![A-Za-z])")
_TUPLE = re.compile(r"[(\[][^()\[\]]*,[^()\[\]]*[)\]]")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_JOINED = re.compile(
    r"(?<![-+*/×÷$0-9.])(?<![-+*/×÷] )(?P<first>[-−]?[0-9][0-9.,/]*)\$?\s+(?:or|and)\s+\$?(?:[A-Za-z]\s*=\s*)?$"
)
_OPERATION = re.compile(
    r"(?P<operand>\S+?)(?P<before>\s*)(?:(?<![-=<>])(?P<sign>[<>]=?)|(?P<star>(?<!\*)[*])|(?P<operator>[-+−–/×·÷≤≥≠±]|!=)"
    r"|\\(?:times|cdot|div|pm|geq?|leq?|neq?|b?mod)(?![A-Za-z]))(?P<after>\s*)\\?\$?\(?$"
)
_SYMBOL_AFTER = re.compile(r"(\s*)(?:[-+−×·÷<>≤≥≠±]|\\(?:times|cdot|pm|geq?|leq?|neq?)(?![A-Za-z]))(\s*)[b-zB-HJ-Z]\b")
_FACTOR_AFTER = re.compile(r"\s?(?:π|√|\\pi(?![A-Za-z])|\\sqrt)|\^|[a-zKMB](?![A-Za-z])|\}|\\(?:overline|times|cdot)")
_FUNCTION_BEFORE = re.compile(r"(?:\\(?:sqrt|log|ln|sin|cos|tan)|√)\s*$|[{_√]$|[A-Za-z0-9}]\($")


def last_value(text: str) -> str | None:
    """The last number with its expression; ``None`` where there is no number."""
    numbers = deque(_NUMBER.finditer(text), maxlen=1)
    if not numbers:
        return None
    number = numbers[0]
    first = max(text.rfind("\n", 0, number.start()) + 1, number.start() - MAX_LINE)
    end = text.find("\n", number.end())
    last = min(len(text) if end < 0 else end, number.end() + MAX_LINE)
    line, start, stop = text[first:last], number.start() - first, number.end() - first
    displayed = text[max(0, first - 5) : first].rstrip().endswith(_OPENS)
    if displayed and text[last : last + 5].lstrip().startswith(_CLOSES):
        return _result(line, start) or number.group()
    for span in _MATH.finditer(line):
        if span.start() < start and stop < span.end():
            sign = 2 if span.group().startswith(("\\", "$$")) else 1
            formula = span.group()[sign:-sign].rstrip("$")
            return _result(formula, start - span.start() - sign) or number.group()
    return _in_prose(line, start, stop) or number.group()


def _result(formula: str, at: int) -> str | None:
    """What a formula comes to: what is after its last ``=``, if the number at ``at`` is; all of ``x = 2, y = 3``."""
    formula = formula.replace("&", " ")
    if not _balanced(formula) or _PROSE.search(formula):
        return None
    parts = _BETWEEN.split(formula)
    if len(parts) > 1 and all(_ASSIGNED.match(part) for part in parts):
        return formula.strip()
    result = _last_equals(formula)
    return formula[result:].strip().rstrip(_ENDS) if result <= at else None


def _in_prose(line: str, start: int, stop: int) -> str | None:
    """The expression around the number at ``line[start:stop]``; ``None`` where nothing adjoins it."""
    number = line[start:stop]
    if "." in number and line.startswith(("..", "…"), stop):
        return number + "..."
    for group in _TUPLE.finditer(line):
        if group.start() < start and stop < group.end():
            inner = group.group()
            return inner if inner[1:-1].strip() != number and not _WORD.search(inner) else None
    if (joined := _JOINED.search(line[:start])) and not _same_number(joined["first"], number):
        return f"{joined['first']} or {number}"
    left, right = start, stop
    if before := _FUNCTION_BEFORE.search(line[:start]):
        left = before.start() - len(re.search(r"[^\s$]*$", line[: before.start()]).group())  # type: ignore[union-attr]
    if before or _FACTOR_AFTER.match(line, stop):
        right = stop + len(re.match(r"\s?[^\s$]*", line[stop:]).group())  # type: ignore[union-attr]
    if (after := _SYMBOL_AFTER.match(line, right)) and bool(after[1]) == bool(after[2]):
        right = after.end()
    for _ in range(MAX_OPERANDS):
        operation = _OPERATION.search(line, max(0, left - MAX_OPERAND), left)
        if operation is None or not _operates(operation):
            break
        left = operation.start()
    found = line[left:right].strip(" $.,;:!?*")
    found = found[_last_equals(found) :]
    return found if (left, right) != (start, stop) and found and _balanced(found) else None


def _last_equals(formula: str) -> int:
    """Where the last ``=`` ends; 0 without one."""
    return max((sign.end() for sign in _EQUALS.finditer(formula)), default=0)


def _operates(operation: re.Match[str]) -> bool:
    """Whether what stands before a number is an operand and its operator, not a dash, a bullet, an arrow or a tag."""
    operand = operation["operand"]
    one_sign = operation["operator"] or operation["star"] or operation["sign"]
    if one_sign and bool(operation["before"]) != bool(operation["after"]):
        return False
    return not _WORD.search(operand) and "<" not in operand and operand[-1] not in ".,:;!?|*-"


def _same_number(first: str, second: str) -> bool:
    left, right = parse_quantity(first), parse_quantity(second)
    return left is not None and right is not None and left.same(right)


def _balanced(formula: str) -> bool:
    return all(formula.count(opened) == formula.count(closed) for opened, closed in ("{}", "()"))
