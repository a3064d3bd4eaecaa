r"""Whether two final answers are the same: exact numbers first, then normalised text.

Nothing is ever evaluated: ``3+4`` and ``7=7`` are not numbers, ``9^{9^9}`` costs nothing. Notations of one number are
read: ``1,234``, ``18.50``, ``.5``, ``3/4``, ``\frac34``, ``1 1/2``, ``1e3``, ``3 \times 10^8``, with a sign, a currency
sign, a percent sign, ``x =`` before it and words or units around it. The choices made where tools differ:

* percent: ``50%`` equals ``50`` and ``50\%``, but not ``0.5`` (one sign more or less is a matter of writing);
* units and words are not compared (``18 cm`` equals ``18``), but words that change a number (``3 million``, ``not 5``)
  and letters that multiply it (``18x``) make it no number;
* more than one number is never one answer: ``2 or 3`` is not ``2``. Lists compare item by item with lists.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

MAX_TEXT = 2000
"""Characters of an answer that is looked into; longer ones are compared as they are."""

MAX_DIGITS = 1000
"""Digits, and size of an exponent, beyond which a text is not read as a number (``1e999999999`` would not fit)."""

_UNSIGNED = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
_POWER = r"\^\s*(?:\{\s*[-+]?[0-9]+\s*\}|[-+]?[0-9]+)"
_NUMBER = re.compile(
    rf"""(?:(?P<sign>[-+])\s*)?(?:
      (?:(?P<whole>[0-9]+)\s*)?\\frac\s*(?:\{{\s*(?P<top>-?{_UNSIGNED})\s*\}}|(?P<top1>[0-9]))
                             \s*(?:\{{\s*(?P<bottom>-?{_UNSIGNED})\s*\}}|(?P<bottom1>[0-9]))
    | (?:(?P<whole2>[0-9]+)\s+)?(?P<top2>{_UNSIGNED})\s*/\s*(?P<bottom2>{_UNSIGNED})(?!\s*/)
    | 10\s*(?P<ten>{_POWER})
    | (?P<plain>{_UNSIGNED})(?P<exponent>[eE][-+]?[0-9]+|\s*[×x*]\s*10\s*{_POWER})?
    )(?P<percent>\s*%)?""",
    re.VERBOSE,
)
_SIMPLE = re.compile(r"[-+]?[0-9]{1,300}")
_BEFORE = re.compile(r"[A-Za-z\s:,.;'\"-]*")
_AFTER = re.compile(r"(?:[A-Za-z\s:,.;?'\"/-]|(?<=[A-Za-z])(?:\^(?:\{-?[0-9]\}|-?[0-9])|[²³]))*")
_WORD = re.compile(r"[A-Za-z]+")

_OPERATIONS = frozenset(
    _WORD.findall(
        "pi sqrt log ln sin cos tan exp mod times plus minus or squared cubed factorial hundred thousand million "
        "billion trillion dozen half third quarter twice double triple"
    )
)
"""Words that make the number beside them another number, or offer a second one."""
_RELATIONS = frozenset(_WORD.findall("not no less more fewer greater than least most under over above below between"))
"""Words that, before a number, say that the answer is not that number."""
_UNIT_LETTERS = frozenset("mghslLNJWVCF")
_ATTACHED_UNITS = frozenset(
    _WORD.findall("mm cm dm km mg kg ml mL cl dl in ft yd mi oz lb lbs hr hrs min mins sec secs ms usd USD")
)

_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("−–‐‑‒﹣－", "-"),
        **dict.fromkeys("€£¥₹", ""),
        **{chr(0xFF10 + digit): str(digit) for digit in range(10)},
        **{"½": " 1/2", "¼": " 1/4", "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3", "⅕": " 1/5", "⅛": " 1/8"},
        **{"⁄": "/", "⋅": "×", "·": "×", "°": " degrees ", "％": "%", "’": "'", "“": '"', "”": '"'},
    }
)
_GROUP_SPACE = re.compile(r"(?<=[0-9])(?:\\,|[\u00a0\u2006\u2009\u200a\u202f])(?=[0-9]{3}(?![0-9]))")
_SPACE = re.compile(r"\\[,;: ]|\\q?quad(?![A-Za-z])|~|[\u00a0\u2006\u2009\u200a\u202f]")
_FRAC = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_TIMES = re.compile(r"\\(?:times|cdot)(?![A-Za-z])")
_DEGREES = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree(?![A-Za-z])")
_WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}")
_DELIMITER = re.compile(r"\\(?:left|right|displaystyle|textstyle)(?![A-Za-z])|\\[()\[\]]|\$|\*\*")
_NAME = re.compile(r"[^0-9<>=!+]*")
_SUBSCRIPT = re.compile(r"_(?:\{[0-9]+\}|[0-9])")
_CHOICE = re.compile(
    r"(?:(?:option|choice|answer)\b\s*:?\s*)?(?:\(([A-Za-z])\)\s*|([A-Za-z])(?:$|[.):]\s*))(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)
_LONE_CAPITAL = re.compile(r"(?<![A-Za-z'])[A-Z](?![A-Za-z'])")
_PLAIN_WORDS = re.compile(r"[a-z(][a-z()'.,;:?!&-]*")
_SEPARATOR = re.compile(r",|;|\bor\b|\band\b")


def same_answer(found: str, gold: str) -> bool | None:
    """Whether ``found`` states the answer ``gold``; ``None`` where that cannot be told.

    ``None`` stands for a text that is neither a number, a list of numbers, a choice letter nor plain words, and that
    is not written like the gold answer either (``3+4``, ``\\sqrt{2}``).
    """
    if len(found) > MAX_TEXT or len(gold) > MAX_TEXT:
        return True if gold.strip() and found.strip() == gold.strip() else None
    left, right = parse_number(found), parse_number(gold)
    if left is not None and right is not None:
        return left == right
    text, wanted = _plain(found), _plain(gold)
    if not wanted or not text:
        return None
    if text == wanted:
        return True
    if (letter := _choice(gold)) is not None:
        return _choice(found) == letter
    items, wanted_items = _items(found), _items(gold)
    if items and wanted_items:
        return items == wanted_items
    if (items and right is not None) or (wanted_items and left is not None):
        return False
    words = _PLAIN_WORDS.fullmatch(wanted) is not None
    return False if words and (left is not None or _PLAIN_WORDS.fullmatch(text)) else None


@lru_cache(maxsize=4096)
def parse_number(text: str) -> Fraction | None:
    """The one number that ``text`` states, exactly; ``None`` when it states none, several, or an expression."""
    if _SIMPLE.fullmatch(text):
        return Fraction(int(text))
    if len(text) > MAX_TEXT:
        return None
    cleaned = _without_name(_clean(text))
    if cleaned[:1] + cleaned[-1:] in ("()", "[]", "{}") and "," not in cleaned:
        cleaned = cleaned[1:-1].strip()
    match = _NUMBER.search(cleaned)
    if match is None:
        return None
    before, after = cleaned[: match.start()], cleaned[match.end() :]
    if not _may_precede(before, match["sign"], match.group()) or not _may_follow(after):
        return None
    return _value(match)


def _clean(text: str) -> str:
    """The text without what only dresses it: LaTeX fonts, spaces and delimiters, currency signs, bold stars."""
    text = text.translate(_CHARACTERS)
    if not text.isascii() or "\\" in text or "{" in text or "~" in text:
        text = text.replace("\\!", "").replace("{,}", ",").replace("\\%", "%").replace("\\$", "")
        text = _SPACE.sub(" ", _GROUP_SPACE.sub("", text))
        text = _DEGREES.sub(" degrees ", _TIMES.sub("×", _FRAC.sub(r"\\frac", text)))
        for _ in range(2):  # \text{\bf ...} inside one another: two levels, as more are not seen
            text = _WRAPPER.sub(r" \1", text)
    return " ".join(_DELIMITER.sub("", text).split()).lstrip(" :`\"'").rstrip(" .,;:`\"'")


def _without_name(cleaned: str) -> str:
    """``x = 5`` is 5; an equation between numbers (``3+4=7``) stays what it is."""
    name, sign, value = cleaned.rpartition("=")
    return value.strip() if sign and _NAME.fullmatch(_SUBSCRIPT.sub("", name)) else cleaned


def _may_precede(before: str, sign: str | None, number: str) -> bool:
    if not before.strip():
        return True
    if not _BEFORE.fullmatch(before) or before[-1].isalpha() or before[-1] in ".-'":
        return False
    if sign and (before[-1] not in " :" or number[1:2] == " "):
        return False  # ``x-5``, ``x - 5``: an operation, not a sign
    words = _WORD.findall(before)
    if any(len(word) == 1 and word not in "aAI" for word in words):
        return False
    return not any(word.lower() in _OPERATIONS or word.lower() in _RELATIONS for word in words)


def _may_follow(after: str) -> bool:
    if not after.strip():
        return True
    if not _AFTER.fullmatch(after):
        return False
    words = _WORD.findall(after)
    if after[0].isalpha():
        first = words[0]  # directly after the digits: a known unit or a real word, not variables (``18x``, ``2nd``)
        if first not in _UNIT_LETTERS and first not in _ATTACHED_UNITS and len(first) < 4:
            return False
    if any(len(word) == 1 and word not in _UNIT_LETTERS and word != "a" for word in words):
        return False
    return not any(word.lower() in _OPERATIONS for word in words)


def _value(match: re.Match[str]) -> Fraction | None:
    top, bottom = (
        match["top"] or match["top1"] or match["top2"],
        match["bottom"] or match["bottom1"] or match["bottom2"],
    )
    if top is not None and bottom is not None:
        value = _fraction(top, bottom, match["whole"] or match["whole2"])
    elif match["ten"] is not None:
        value = _scaled("1", match["ten"])
    else:
        value = _scaled(match["plain"], match["exponent"])
    return -value if value is not None and match["sign"] == "-" else value


def _fraction(top: str, bottom: str, whole: str | None) -> Fraction | None:
    over, under = _scaled(top, None), _scaled(bottom, None)
    if over is None or not under:
        return None
    if whole is None:
        return over / under
    if len(whole) > MAX_DIGITS or not 0 <= over < under:
        return None  # 2\frac{5}{3}: neither a mixed number nor surely a product
    return int(whole) + over / under


def _scaled(digits: str, exponent: str | None) -> Fraction | None:
    if len(digits) > MAX_DIGITS:
        return None
    power = 0
    if exponent:
        written = re.search(r"[-+]?[0-9]+(?=\s*\}?$)", exponent)
        if written is None or len(written.group()) > 6 or abs(int(written.group())) > MAX_DIGITS:
            return None
        power = int(written.group())
    return Fraction(digits.replace(",", "").rstrip(".")) * Fraction(10) ** power


def _plain(text: str) -> str:
    return "".join(_without_name(_clean(text)).lower().split())


def _choice(text: str) -> str | None:
    """The letter of a multiple-choice answer: ``B``, ``(b)``, ``B. Paris``, but not ``A or B``."""
    match = _CHOICE.fullmatch(_clean(text))
    if match is None or _LONE_CAPITAL.search(match["rest"]):
        return None
    return (match[1] or match[2]).upper()


def _items(text: str) -> tuple[str, tuple[Fraction, ...]] | None:
    """A list of at least two numbers, ordered, with its brackets: ``(3, 4)``, ``2 or 3``."""
    cleaned = _clean(text)
    brackets = cleaned[:1] + cleaned[-1:]
    if brackets in ("()", "[]", "(]", "[)"):
        cleaned = cleaned[1:-1]
    else:
        brackets = ""
    parts = _SEPARATOR.split(cleaned)
    if len(parts) < 2:
        return None
    numbers = [parse_number(part) for part in parts]
    values = tuple(number for number in numbers if number is not None)
    return (brackets, values) if len(values) == len(parts) else None
