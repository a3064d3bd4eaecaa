r"""Whether two final answers are the same: shape, then exact numbers, then one spelling of the text.

Nothing is evaluated here: ``3+4`` and ``7=7`` are not 7, ``9^{9^9}`` costs nothing. What is left open, two expressions
that are spelled differently, may be put to an *opinion* (:mod:`igrpo_lite.answers.opinion`). The choices made where
tools differ:

* numbers are exact: ``0.333`` is not ``1/3``, ``1.414`` not ``\sqrt2``; where the gold answer is a number, so must the
  answer be, and a sum that is left to the reader is not one;
* percent and units: see :class:`igrpo_lite.answers.quantities.Quantity`; words around a number are not compared;
* more than one value is never one answer: ``2 or 3`` is not ``2``. Lists without brackets and sets are compared without
  order, tuples with it; brackets may be left out (``3, 4`` is ``(3, 4)``), but not changed (``[3, 4]`` is not);
* an inequality in one variable is its interval;
* the symbol in ``x = 5`` may be left out, but not be another one; upper and lower case differ but in words;
* a choice answer is its letter, with or without the text of the choice, which must not contradict; ``(C) 12`` is 12.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeAlias

from igrpo_lite.answers.forms import Answer, Group, Value, parse
from igrpo_lite.answers.latex import ambiguous, clean
from igrpo_lite.answers.quantities import MAX_TEXT, parse_number, parse_quantity

__all__ = ["Opinion", "parse_number", "same_answer", "states_several"]

Opinion: TypeAlias = Callable[[str, str], bool | None]
"""Says of two spellings, the answer's and the gold answer's, whether they are the same; ``None`` if it cannot tell."""

MAX_ASKED = 300
"""Characters of an expression beyond which there is no fallback."""

MAX_UNORDERED = 12
"""Values of two lists that are left after equal spellings are taken away; more are not compared."""

_CHOICE = re.compile(
    r"(?:(?:option|choice|answer)\b\s*:?\s*)?(?:\(([A-Ja-j])\)\s*|([A-Ja-j])(?:$|[.):]\s*))(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)
_LONE_CAPITAL = re.compile(r"(?<![A-Za-z'])[A-Z](?![A-Za-z'])")
_WORDS = re.compile(r"[A-Za-z(][A-Za-z()'.,;:?!& -]*")
_CLOCK = re.compile(r"0?([0-9]{1,2}(?::[0-9]{2})+)(?:\s*([ap])\.?m\.?)?", re.IGNORECASE)

_SYMBOL = re.compile(r"(?:\\[A-Za-z]+|(?<![\\A-Za-z])[A-Za-z])(?: _ \{ [^{}]* \})?")
_FUNCTION = r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|\\log|\\ln|\\exp"
_NO_SYMBOL = re.compile(
    rf"{_FUNCTION}|e|\\(?:frac|sqrt|cdot|pi|infty|circ|leq|geq|neq|binom|lfloor|rfloor|lceil|rceil)"
)
_NOT_ASKED = re.compile(
    r"[':%,;\"?&#⦃⦄@]|\\(?:prime|d?dot|partial|nabla|l?dots|cdots|overline|begin|i{1,3}nt|oint|sum|prod|lim|det|max|min"
    r"|gcd|lcm|bmod|pmod|mod|equiv|approx|to|cup|cap|in|pm|mp|text|vec|hat|mathbf|boldsymbol)(?![A-Za-z])"
    r"|\\frac \{ d |[0-9] (?:_|e [0-9])|\b[A-Z] [A-Z]\b|(?:\b[A-Za-z] ){4}"
)
"""What a parser of LaTeX misreads or would work out: derivatives, sums, limits, bases, words."""
_RELATION = re.compile(r"\\leq|\\geq|\\neq|[=<>]")
_FUNCTIONS = (
    re.compile(r"\\(?:sin|cos|tan|cot|sec|csc) "),
    re.compile(r"\\arc"),
    re.compile(r"\\(?:log|ln) "),
    re.compile(r"\\(?:sin|cos|tan)h "),
    re.compile(r"!|\\binom"),
    re.compile(r"\\l(?:floor|ceil)|\|"),
)


def same_answer(found: str, gold: str, opinion: Opinion | None = None) -> bool | None:
    r"""Whether ``found`` states the answer ``gold``; ``None`` where that cannot be told.

    ``None`` stands for an expression that is spelled otherwise than the gold answer (``\sqrt{8}`` for ``2\sqrt2``),
    unless the ``opinion`` knows, and for what is left to be worked out (``3+4``).
    """
    if len(found) > MAX_TEXT or len(gold) > MAX_TEXT:
        return True if gold.strip() and found.strip() == gold.strip() else None
    left, right = parse_quantity(found), parse_quantity(gold)
    if left is not None and right is not None:
        return left.same(right) and not ("=" in found and "=" in gold and _other_name(parse(found), parse(gold)))
    if not found.strip() or not gold.strip():
        return None
    if (said := _same_choice(found, gold)) is not None:
        return said
    if right is not None and (choice := _choice(found)) and (left := parse_quantity(choice[1])) is not None:
        return left.same(right)  # ``(C) 12`` where the gold answer is the choice's number
    return _same(parse(found), parse(gold), opinion)


def states_several(found: str, gold: str) -> bool:
    """Whether ``found`` offers several different values where the gold answer is one."""
    answer = parse(found)
    if not isinstance(answer, Group) or answer.kind not in ("list", "set") or isinstance(parse(gold), Group):
        return False
    first, *others = answer.items
    return any(_same(other, first, None) is not True for other in others)


def _same(found: Answer, gold: Answer, opinion: Opinion | None) -> bool | None:
    if isinstance(found, Value) and isinstance(gold, Value):
        return _same_value(found, gold, opinion)
    if isinstance(found, Value) or isinstance(gold, Value):
        return False
    kinds = {found.kind, gold.kind}
    if kinds <= {"list", "set"}:
        return _same_unordered(found.items, gold.items, opinion, once="set" in kinds)
    if kinds == {"union"}:
        return _same_unordered(found.items, gold.items, opinion, once=True)
    if kinds == {"tuple"} and found.brackets != gold.brackets:
        return False
    if len(kinds) == 1:
        return _same_ordered(found.items, gold.items, opinion)
    if kinds == {"list", "tuple"} and {found.brackets, gold.brackets} == {"", "()"}:
        named = [item.name for item in (*found.items, *gold.items) if isinstance(item, Value) and item.name]
        return named == sorted(named) and _same_ordered(found.items, gold.items, opinion)  # x = 2, y = 3 for (2, 3)
    return False


def _same_ordered(found: Sequence[Answer], gold: Sequence[Answer], opinion: Opinion | None) -> bool | None:
    if len(found) != len(gold):
        return False
    said: bool | None = True
    for item, wanted in zip(found, gold, strict=True):
        same = _same(item, wanted, opinion)
        if same is False:
            return False
        said = said and same
    return said


def _same_unordered(
    found: Sequence[Answer], gold: Sequence[Answer], opinion: Opinion | None, once: bool
) -> bool | None:
    """Without regard to order; ``once``: nor to how often a value is named."""
    counts, wanted = Counter(map(_key, found)), Counter(map(_key, gold))
    if once:
        counts, wanted = Counter(counts.keys()), Counter(wanted.keys())
    if counts.total() != wanted.total():
        return False
    by_key = {_key(item): item for item in (*found, *gold)}
    left = [by_key[key] for key in (counts - wanted).elements()]
    right = [by_key[key] for key in (wanted - counts).elements()]
    if len(left) > MAX_UNORDERED:
        return None
    said: bool | None = True
    for item in right:
        answers = [_same(other, item, opinion) for other in left]
        if True in answers:
            left.pop(answers.index(True))
        elif None in answers:
            said = None
        else:
            return False
    return said


def _key(item: Answer) -> object:
    return item if isinstance(item, Group) else (item.name, item.quantity or item.spelling)


def _same_value(found: Value, gold: Value, opinion: Opinion | None) -> bool | None:
    if _other_name(found, gold):
        return False
    if found.quantity is not None and gold.quantity is not None:
        return found.quantity.same(gold.quantity)
    if found.unit is not None and gold.unit is not None and found.unit != gold.unit:
        return False
    if found.spelling == gold.spelling:
        return True if gold.spelling else None  # nothing but marks
    if "\\infty" in (found.spelling.lstrip("- "), gold.spelling.lstrip("- ")):
        return False
    if (left := _CLOCK.fullmatch(found.text)) and (right := _CLOCK.fullmatch(gold.text)):
        half, wanted = ((side[2] or "").lower() for side in (left, right))  # a.m. and p.m.: compared where both say it
        return left[1] == right[1] and (half == wanted or not half or not wanted)
    found_words, gold_words = _words(found), _words(gold)
    if found_words is not None and gold_words is not None:
        return found_words == gold_words
    if (gold_words and found.quantity) or (found_words and gold.quantity):
        return False
    if gold.quantity is not None or gold_words or found_words:
        return None
    return _asked(found.spelling, gold.spelling, opinion)


def _other_name(found: Answer, gold: Answer) -> bool:
    """``y = 5`` for ``x = 5``; a function's name may be replaced by a variable (``f(x)``, ``y``)."""
    if isinstance(found, Group) or isinstance(gold, Group) or found.name is None or gold.name is None:
        return False
    return found.name != gold.name and ("(" in found.name) == ("(" in gold.name)


def _words(value: Value) -> str | None:
    """A text answer in lower case without stops; ``None`` for what may be mathematics."""
    if value.quantity is not None or value.name is not None or not _WORDS.fullmatch(value.text):
        return None
    words = "".join(letter if letter.isalpha() else " " for letter in value.text).split()
    if max(map(len, words), default=0) < 3 and " ".join(words).lower() not in ("no", "a", "i"):
        return None
    return " ".join(word.lower() if len(word) > 3 else word[0].lower() + word[1:] for word in words)


def _same_choice(found: str, gold: str) -> bool | None:
    """Whether the answer is the letter of a multiple-choice gold answer; ``None`` where that is not the question."""
    wanted = _choice(gold)
    if wanted is None or (len(gold.strip()) == 1 and gold.strip().islower()):
        return None
    stated = _choice(found)
    if stated is None:
        return same_answer(found, wanted[1]) if wanted[1] and not _CHOICE.match(clean(found)) else False
    both = bool(stated[1]) and bool(wanted[1])
    return stated[0] == wanted[0] and not (both and same_answer(stated[1], wanted[1]) is False)


def _choice(text: str) -> tuple[str, str] | None:
    """The letter of a multiple-choice answer and its text: ``B``, ``(b)``, ``B. Paris``, but not ``A or B``."""
    match = _CHOICE.fullmatch(clean(text))
    if match is None or _LONE_CAPITAL.search(match["rest"]):
        return None
    return (match[1] or match[2]).upper(), match["rest"].strip()


def _asked(found: str, gold: str, opinion: Opinion | None) -> bool | None:
    """What the opinion says, where it can be trusted to know."""
    if max(len(found), len(gold)) > MAX_ASKED or _NOT_ASKED.search(f"{found} \n {gold} "):
        return None
    relations = [len(_RELATION.findall(spelling)) for spelling in (found, gold)]
    if relations not in ([0, 0], [1, 1]) or ambiguous(found) or ambiguous(gold):
        return None
    symbols, wanted = (_symbols(spelling) for spelling in (found, gold))
    if symbols != wanted:
        return False
    if not symbols and any(kind.search(found) and not kind.search(gold) for kind in _FUNCTIONS):
        return None  # \ln 1 for a constant without logarithm: left to be worked out
    return None if opinion is None else opinion(found, gold)


def _symbols(spelling: str) -> set[str]:
    return {symbol[0] for symbol in _SYMBOL.finditer(spelling) if not _NO_SYMBOL.fullmatch(symbol[0])}
