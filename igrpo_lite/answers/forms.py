r"""What shape an answer has: one value, a list, a set, a tuple or interval, a union, a matrix.

Brackets, separators (``,`` ``;`` "and" "or"), ``\cup``, ``\pm`` and inequalities in one variable are read here; values
stay text. ``x > 3`` becomes ``(3, \infty)``, ``1 \pm \sqrt2`` a list of two.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias

from igrpo_lite.answers.latex import canonical, clean
from igrpo_lite.answers.quantities import MAX_TEXT, Quantity, Unit, parse_quantity, parse_unit

Kind = Literal["list", "set", "tuple", "union", "matrix"]

MAX_NESTING = 6
"""Brackets in one another that are looked into."""


@dataclass(frozen=True, slots=True)
class Value:
    """A single value.

    Attributes:
        text: the value without name and unit, cleaned.
        spelling: the same in one spelling, see :func:`igrpo_lite.answers.latex.canonical`.
        name: the symbol it was given to (``x = 5``), if any.
        quantity: the number that it states, if it states one.
        unit: a known unit behind an expression (``2\\pi`` cm); a number's is in its quantity.
    """

    text: str
    spelling: str
    name: str | None
    quantity: Quantity | None = None
    unit: Unit | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Several values.

    Attributes:
        kind: ``list``: separated by commas, without brackets; ``set``: in braces, or joined by "or", "and", ``\\pm``;
            ``tuple``: in other brackets, an interval too; ``union``: of intervals or sets; ``matrix``: of rows.
        brackets: those of a tuple or interval, two characters of ``()[]``.
    """

    kind: Kind
    items: tuple[Answer, ...]
    brackets: str = ""


Answer: TypeAlias = Value | Group

_OPEN, _CLOSE = "([{⦃⟨", ")]}⦄⟩"
_TO_SIGNS = {"\\{": "⦃", "\\}": "⦄", "\\lbrace": "⦃", "\\rbrace": "⦄", "\\langle": "⟨", "\\rangle": "⟩"}
_BRACKET = re.compile(r"\\(?:[{}]|[lr]brace(?![A-Za-z])|[lr]angle(?![A-Za-z]))")
_PART = re.compile(
    r"(?P<open>[(\[{⦃⟨])|(?P<close>[)\]}⦄⟩])|(?P<tight>(?<=[0-9]),(?=[0-9]{3}(?![0-9])))"
    r"|(?P<separator>,|;|(?<![A-Za-z\\])(?:and/or|or|and)(?![A-Za-z]))|(?P<cup>\\cup(?![A-Za-z])|(?<=[)\]⦄])\s*U\s*(?=[(\[⦃]))"
    r"|\\[A-Za-z]+",
)
_WORD_BETWEEN = re.compile(r"(?<![A-Za-z\\])(?:or|and)(?![A-Za-z])")
_MATRIX = re.compile(r"\\begin\s*\{[pb]?matrix\}(.*)\\end\s*\{[pb]?matrix\}", re.DOTALL)
_SYMBOL = r"(?:[A-Za-z]|\\(?!in\b|begin\b)[A-Za-z]+)(?:\s*_\s*(?:\{[A-Za-z0-9]+\}|[A-Za-z0-9]))?"
_NAMED = re.compile(
    rf"\s*(?P<name>{_SYMBOL}(?:\s*\([^()=]*\))?|\([A-Za-z,\s]+\))\s*(?:=|\\approx(?![A-Za-z])|:=)(?P<value>[^=]+)"
)
_MEMBER = re.compile(rf"\s*(?P<name>{_SYMBOL})\s*\\in(?![A-Za-z])(?P<value>.+)", re.DOTALL)
_POWER = r"(?:\s*\^\s*(?:\{[0-9]\}|[0-9]))?"
_UNIT_AT_END = re.compile(
    rf"(?<=[0-9}})a-z])\s+(?P<unit>[A-Za-z]{{2,}}+{_POWER}(?:[\s/.]++[A-Za-z]{{2,}}+{_POWER})*+)[\s.]*$"
)
_NO_UNIT = re.compile(r"(?:(?:square|cubic|sq)\s+)?units?")
_RELATION = re.compile(r" ?(\\leq|\\geq|<|>)(?: |$)")
_LESS, _MORE = ("<", "\\leq"), {">": "<", "\\geq": "\\leq"}


def parse(text: str) -> Answer:
    """The shape of an answer's text; texts over ``MAX_TEXT`` characters are one value."""
    return parse_cached(text, 0)


@lru_cache(maxsize=1024)
def parse_cached(text: str, depth: int) -> Answer:
    """:func:`parse` inside ``depth`` brackets; remembers what was read last."""
    if len(text) > MAX_TEXT:
        return Value(text.strip(), text.strip(), None)
    quantity = parse_quantity(text)
    if quantity is not None or depth >= MAX_NESTING:
        return _value(clean(text), quantity)
    cleaned = _BRACKET.sub(lambda match: _TO_SIGNS[match.group()], clean(text))
    for _ in range(MAX_NESTING):
        if cleaned[:1] == "{" and _closing(cleaned) == len(cleaned) - 1 and len(_split(cleaned[1:-1])) < 2:
            cleaned = cleaned[1:-1].strip()
    if matrix := _MATRIX.fullmatch(cleaned):
        rows = [row for row in matrix[1].split("\\\\") if row.strip()]
        return Group("matrix", tuple(_group("tuple", row.split("&"), depth, "()") for row in rows))
    named = _MEMBER.fullmatch(cleaned) or _NAMED.fullmatch(cleaned)
    if named and (named["value"].strip()[:1] or " ") in "([⦃":
        cleaned = named["value"].strip()
    return _union(cleaned, depth) or _bracketed(cleaned, depth) or _listed(cleaned, depth) or _single(cleaned, depth)


def _group(kind: Kind, parts: list[str], depth: int, brackets: str = "") -> Group:
    items: list[Answer] = []
    for part in parts:
        item = parse_cached(_as_written(part), depth + 1)
        both_signs = isinstance(item, Group) and "\\pm" in part and kind in ("list", "set")
        items.extend(item.items if isinstance(item, Group) and both_signs else [item])
    return Group(kind, tuple(items), brackets)


def _as_written(part: str) -> str:
    for sign, command in (("⦃", "\\{"), ("⦄", "\\}"), ("⟨", "\\langle "), ("⟩", "\\rangle ")):
        part = part.replace(sign, command)
    return part.strip()


def _union(cleaned: str, depth: int) -> Answer | None:
    parts = _split(cleaned, "cup")
    return _group("union", parts, depth) if len(parts) > 1 else None


def _bracketed(cleaned: str, depth: int) -> Answer | None:
    if cleaned[:1] not in _OPEN or not cleaned or _closing(cleaned) != len(cleaned) - 1:
        return None
    brackets, parts = cleaned[0] + cleaned[-1], _split(cleaned[1:-1])
    if brackets in ("⦃⦄", "{}"):
        if "|" in cleaned or ":" in cleaned:
            return None  # \{x : x > 3\}
        return _group("set", parts, depth) if len(parts) > 1 else parse_cached(_as_written(cleaned[1:-1]), depth + 1)
    if len(parts) < 2:
        return None
    # Only two ends make an interval; otherwise the kind of bracket is a matter of taste.
    brackets = "()" if len(parts) > 2 or brackets == "⟨⟩" else brackets
    return _group("tuple", parts, depth, brackets)


def _listed(cleaned: str, depth: int) -> Answer | None:
    parts = _split(cleaned)
    if len(parts) > 1:
        group = _group("set" if _WORD_BETWEEN.search(cleaned) else "list", parts, depth)
        ends = all(isinstance(item, Group) and item.kind == "tuple" for item in group.items)
        inequalities = all(_RELATION.search(canonical(part)) for part in parts)
        if ends and inequalities:
            return Group("union", group.items) if " or " in cleaned else None
        return group
    if cleaned.count("\\pm") == 1 and "\\mp" not in cleaned:
        name, equals, value = cleaned.rpartition("=")
        before, _, after = value.partition("\\pm")
        plus = before + ("+" if before.strip() else "") + after
        return _group("set", [name + equals + plus, f"{name}{equals}{before}-{after}"], depth)
    return None


def _single(cleaned: str, depth: int) -> Answer:
    spelling = canonical(_as_written(cleaned))
    parts = _RELATION.split(spelling)
    if len(parts) == 3 and _is_symbol(parts[0]) != _is_symbol(parts[2]):
        left, relation, right = parts
        if _is_symbol(left):
            return _interval(None, None, relation, right, depth)
        return _interval(left, relation, None, None, depth)
    if len(parts) == 5 and _is_symbol(parts[2]) and (parts[1] in _LESS) == (parts[3] in _LESS):
        return _interval(parts[0], parts[1], parts[3], parts[4], depth)
    return _value(_as_written(cleaned), None)


def _is_symbol(spelling: str) -> bool:
    return re.fullmatch(_SYMBOL, spelling.replace(" ", "")) is not None and spelling.strip() != "\\infty"


def _interval(left: str | None, first: str | None, second: str | None, right: str | None, depth: int) -> Answer:
    """The interval of ``left first x second right``, either half of which may be missing."""
    if first in _MORE or second in _MORE:
        left, first, second, right = right, _MORE.get(second or ""), _MORE.get(first or ""), left
    brackets = ("[" if first == "\\leq" else "(") + ("]" if second == "\\leq" else ")")
    return _group("tuple", [left or "-\\infty", right or "\\infty"], depth, brackets)


def _value(cleaned: str, quantity: Quantity | None) -> Value:
    name = None
    if named := _NAMED.fullmatch(cleaned) or _MEMBER.fullmatch(cleaned):
        name, cleaned = canonical(named["name"]), named["value"].strip()
    unit = None
    if quantity is None and (match := _UNIT_AT_END.search(cleaned)):
        unit = parse_unit(match["unit"])
        if unit is not None or _NO_UNIT.fullmatch(match["unit"]):
            cleaned = cleaned[: match.start()]
    return Value(cleaned, canonical(cleaned), name, quantity, unit)


def _split(text: str, kind: str = "separator") -> list[str]:
    """The parts between separators that stand in no bracket; the whole where brackets do not match.

    A comma in ``1,234`` separates only where all others are like it.
    """
    depth, places, tight = 0, [], []
    for match in _PART.finditer(text):
        if match["open"]:
            depth += 1
        elif match["close"]:
            depth -= 1
            if depth < 0:
                return [text]
        elif depth == 0 and match[kind]:
            places.append(match.span())
        elif depth == 0 and match["tight"] and kind == "separator":
            tight.append(match.span())
    if depth:
        return [text]
    edges = [0, *(edge for span in (places or tight) for edge in span), len(text)]
    parts = [text[start:end].strip() for start, end in zip(edges[::2], edges[1::2], strict=True)]
    return [part for part in parts if part]


def _closing(text: str) -> int:
    """Where the bracket that ``text`` starts with is closed, by any kind of bracket (``[0, 1)``); -1 if nowhere."""
    depth = 0
    for place, character in enumerate(text):
        if character in _OPEN:
            depth += 1
        elif character in _CLOSE:
            depth -= 1
            if depth == 0:
                return place
    return -1
