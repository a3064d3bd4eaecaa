r"""The one number that an answer states, exactly, with its unit.

Notations of one number are read: ``1,234``, ``18.50``, ``.5``, ``0.\overline{3}``, ``3/4``, ``\frac34``, ``1 1/2``,
``1e3``, ``3 \times 10^8``, with a sign, a currency sign, a percent sign, ``x =`` before it and words or units around
it. Nothing is evaluated: ``3+4`` and ``9^{9^9}`` are not numbers. Words that change a number (``3 million``, ``not 5``,
``square root of 16``) and letters that multiply it (``18x``) make it no number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from igrpo_lite.answers.latex import clean, units_as_words

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
    | (?P<head>[0-9]*\.[0-9]*)\\(?:overline|bar|dot)\s*\{{\s*(?P<period>[0-9]+)\s*\}}
    | (?P<plain>{_UNSIGNED})(?P<exponent>[eE][-+]?[0-9]+|\s*[×x*]\s*10\s*{_POWER})?
    )(?P<percent>\s*(?:%|[Pp]ercent(?![a-z])))?""",
    re.VERBOSE,
)
_SIMPLE = re.compile(r"[-+]?[0-9]{1,300}")
_BEFORE = re.compile(r"[A-Za-z\s:,.;'\"-]*")
_AFTER = re.compile(r"(?:[A-Za-z\s:,.;?'\"/-]|(?<=[A-Za-z])\s*\^\s*(?:\{-?[0-9]\}|-?[0-9]))*")
_MINUS = re.compile(r"\s-|-(?![A-Za-z]{3})|^\s*/\s*[A-Za-z](?![A-Za-z])")  # but ``18-year-old``, ``5 dollars/day``
_WORD = re.compile(r"[A-Za-z]+")
_EQUALS = re.compile(r"=|\\approx(?![A-Za-z])")
_NAME = re.compile(r"[^0-9<>=!+]*")
_SUBSCRIPT = re.compile(r"_(?:\{[0-9]+\}|[0-9])")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_NUMBER_WORDS = _words(
    "zero two three four five six seven eight nine ten eleven twelve thirteen fifteen twenty thirty forty fifty "
    "hundred hundreds thousand thousands million millions billion billions trillion dozen half halves third quarter"
)
_CHANGING = _NUMBER_WORDS | _words(
    "pi sqrt log ln sin cos tan exp mod plus minus negative or squared cubed factorial twice double triple infinity"
)
"""Words that make the number beside them another number, or offer a second one."""
_CHANGING_BEFORE = _CHANGING | _words(
    "not no never less more fewer greater larger smaller than least most under over above below between times root "
    "square cube multiple multiples divisor divisors factor factors power powers reciprocal inverse opposite divisible "
    "divided multiplied except without almost nearly base modulo up"
)
"""Words that, before a number, say that the answer is not that number."""
_CHANGING_AFTER = _CHANGING | _words("below underground least most short remainder")
_TELLING = _words(
    "january february march april may june july august september october november december monday tuesday wednesday "
    "thursday friday saturday sunday north south east west left right up down increase decrease increases decreases "
    "increased decreased gain gains loss losses profit profits rise fall early late before after am pm bc ad bce ce"
)
_UNIT_LETTERS = frozenset("mghslLNJWVCF")


@dataclass(frozen=True, slots=True)
class Unit:
    """A known unit: exponents of its dimensions, and its size in base units (``km/h``: length 1, time -1)."""

    dimensions: tuple[tuple[str, int], ...]
    size: Fraction


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number.

    Attributes:
        percent: whether a percent sign stood behind it.
        unit: its unit, where that is a known one.
        told: words beside it that say which one it is: a month, a direction, "increase", "am".
    """

    value: Fraction
    percent: bool = False
    unit: Unit | None = None
    told: frozenset[str] = frozenset()

    def same(self, other: Quantity) -> bool:
        """Exact equality.

        A percent sign on one side only: a number above 1 beside it is the percentage itself (``50`` = ``50%``), one up
        to 1 the share (``0.5`` = ``50%``); so each pair has one reading. Units: two known ones are converted (``5 m`` =
        ``500 cm``, not ``5 cm``); one that is missing or unknown is not compared. Nor are words, but for :attr:`told`.
        """
        if self.told and other.told and not self.told & other.told:
            return False
        if self.percent != other.percent:
            marked, bare = (self, other) if self.percent else (other, self)
            return bare.unit is None and bare.value == marked.value / (1 if abs(bare.value) > 1 else 100)
        if self.unit is None or other.unit is None:
            return self.value == other.value
        return (
            self.unit.dimensions == other.unit.dimensions
            and self.value * self.unit.size == other.value * other.unit.size
        )


_TABLE = {
    "length": "mm 1/1000 millimeter 1/1000 cm 1/100 centimeter 1/100 dm 1/10 m 1 meter 1 metre 1 km 1000 "
    "kilometer 1000 in 0.0254 inch 0.0254 ft 0.3048 foot 0.3048 feet 0.3048 yd 0.9144 yard 0.9144 mi 1609.344 "
    "mile 1609.344",
    "mass": "mg 1/1000 milligram 1/1000 g 1 gram 1 kg 1000 kilogram 1000 lb 453.59237 pound 453.59237 "
    "oz 28.349523125 ounce 28.349523125",
    "volume": "ml 1/1000 mL 1/1000 milliliter 1/1000 cl 1/100 dl 1/10 l 1 L 1 liter 1 litre 1 "
    "gallon 3.785411784 quart 0.946352946 pint 0.473176473",
    "time": "ms 1/1000 s 1 sec 1 second 1 min 60 minute 60 h 3600 hr 3600 hour 3600 day 86400 week 604800",
    "data": "bit 1 byte 8 KB 8000 MB 8000000 GB 8000000000",
    "months": "month 1 year 12",
    "dollar": "cent 1/100 dollar 1 usd 1 USD 1",
    "euro": "euro 1 EUR 1",
    "sterling": "£ 1 pence 1/100",
    "yen": "¥ 1 yen 1",
    "rupee": "₹ 1 rupee 1",
    "degree": "degree 1",
    "celsius": "celsius 1",
    "fahrenheit": "fahrenheit 1",
    "radian": "radian 1 rad 1",
    "frequency": "Hz 1 kHz 1000",
    "force": "N 1 kN 1000 newton 1",
    "energy": "J 1 kJ 1000 joule 1",
    "power": "W 1 kW 1000 watt 1",
}
_UNITS = {
    name: (dimension, Fraction(size))
    for dimension, row in _TABLE.items()
    for name, size in zip(row.split()[::2], row.split()[1::2], strict=True)
}
_CURRENCIES = {"\\$": "dollar", "€": "euro", "£": "£", "¥": "¥", "₹": "₹"}
_UNIT_TOKEN = re.compile(r"[A-Za-z£¥₹]+|/|\^\s*\{?-?[0-9]\}?")
_TEMPERATURE = re.compile(r"\bdegrees?\s+(C|F|[Cc]elsius|[Ff]ahrenheit)\b")
_SHORT_FOR = {"mph": "mile/hour", "kmh": "km/h", "kph": "km/h", "C": "celsius", "F": "fahrenheit"}
_POWERS = {"square": 2, "sq": 2, "cubic": 3}
_SHORT = re.compile(r"\b(mph|kmh|kph)\b")


def parse_number(text: str) -> Fraction | None:
    """The one number that ``text`` states, exactly; ``None`` when it states none, several, or an expression."""
    found = parse_quantity(text)
    return None if found is None else found.value


@lru_cache(maxsize=4096)
def parse_quantity(text: str) -> Quantity | None:
    """The one number that ``text`` states, with its unit; ``None`` when it states none, several, or an expression."""
    if _SIMPLE.fullmatch(text):
        return Quantity(Fraction(int(text)))
    if len(text) > MAX_TEXT:
        return None
    cleaned = units_as_words(_without_name(clean(text)))
    if cleaned[:1] + cleaned[-1:] in ("()", "[]", "{}") and "," not in cleaned:
        cleaned = cleaned[1:-1].strip()
    match = _NUMBER.search(cleaned)
    if match is None:
        return None
    before, after = cleaned[: match.start()], cleaned[match.end() :]
    if not _may_precede(before, match["sign"], match.group()) or not _may_follow(after):
        return None
    value = _value(match)
    if value is None:
        return None
    told = _TELLING & frozenset(word.lower() for word in _WORD.findall(before + after))
    return Quantity(value, match["percent"] is not None, parse_unit(_currency(text) + after), told)


def _without_name(cleaned: str) -> str:
    """``x = 5`` is 5; an equation between numbers (``3+4=7``) stays what it is."""
    *_, last = [None, *_EQUALS.finditer(cleaned)]
    if last is None or cleaned[0] == "-" or not _NAME.fullmatch(_SUBSCRIPT.sub("", cleaned[: last.start()])):
        return cleaned
    return cleaned[last.end() :].strip()


def _may_precede(before: str, sign: str | None, number: str) -> bool:
    if not before.strip():
        return True
    if not _BEFORE.fullmatch(before) or before[-1].isalpha() or before[-1] in ".-'":
        return False
    if sign and (before[-1] not in " :" or number[1:2] == " "):
        return False  # ``x-5``, ``x - 5``: an operation, not a sign
    words = _WORD.findall(before)
    if any(len(word) == 1 and (word not in "aAI" or len(words) == 1) for word in words):
        return False
    return not any(word.lower() in _CHANGING_BEFORE for word in words)


def _may_follow(after: str) -> bool:
    if not after.strip():
        return True
    if not _AFTER.fullmatch(after) or _MINUS.search(after):
        return False
    words = _WORD.findall(after)
    if after[0].isalpha():
        first = words[0]  # directly after the digits: a known unit or a real word, not variables (``18x``, ``2nd``)
        if first not in _UNIT_LETTERS and _known(first) is None and len(first) < 4:
            return False
    for place, word in enumerate(words):
        article = word == "a" and 0 < place < len(words) - 1
        if len(word) == 1 and word not in _UNIT_LETTERS and not article:
            return False
    return not any(word.lower() in _CHANGING_AFTER for word in words)


def _value(match: re.Match[str]) -> Fraction | None:
    top, bottom = (
        match["top"] or match["top1"] or match["top2"],
        match["bottom"] or match["bottom1"] or match["bottom2"],
    )
    if top is not None and bottom is not None:
        value = _fraction(top, bottom, match["whole"] or match["whole2"])
    elif match["ten"] is not None:
        value = _scaled("1", match["ten"])
    elif match["period"] is not None:
        value = _repeating(match["head"], match["period"])
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


def _repeating(head: str, period: str) -> Fraction | None:
    if len(head) + len(period) > MAX_DIGITS:
        return None
    digits = len(head) - head.index(".") - 1
    return Fraction("0" + head + "0") + Fraction(int(period), (10 ** len(period) - 1) * 10**digits)


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


def _currency(text: str) -> str:
    """The word for the currency sign in an answer; a pair of dollar signs only delimits mathematics."""
    if text.isascii() and "$" not in text:
        return ""
    found = next((word for sign, word in _CURRENCIES.items() if sign in text), "")
    return found + " " if found else "dollar " if text.count("$") == 1 else ""


def parse_unit(text: str) -> Unit | None:
    """The unit at the start of ``text`` (``km/h``, ``square feet``); ``None`` for an unknown one and for none."""
    if not text or text.isspace():
        return None
    text = _SHORT.sub(lambda match: _SHORT_FOR[match[1]], text)
    text = _TEMPERATURE.sub(lambda match: _SHORT_FOR.get(match[1], match[1].lower()), text)
    dimensions: dict[str, int] = {}
    size, sign, power = Fraction(1), 1, 1
    tokens = _UNIT_TOKEN.findall(text)
    for token, ahead in zip(tokens, [*tokens[1:], ""], strict=True):
        if token in ("/", "per"):
            sign = -1
        elif token.lower() in _POWERS:
            power = _POWERS[token.lower()]
        elif token[0] != "^":
            known = _known(token)
            exponent = sign * (int(ahead.strip("^ {}")) if ahead[:1] == "^" else power)
            if known is None or (dimensions and exponent > 0) or (token == "in" and ahead):
                break  # ``5 dollars in total``: words, no product of units
            dimensions[known[0]] = dimensions.get(known[0], 0) + exponent
            size *= known[1] ** exponent
            sign, power = 1, 1
    return Unit(tuple(sorted(dimensions.items())), size) if dimensions and sign > 0 else None


def _known(word: str) -> tuple[str, Fraction] | None:
    for name in (word, word.lower() if len(word) > 2 else word):
        for singular in (name, name.removesuffix("s"), name.removesuffix("es")):
            if singular in _UNITS and (len(singular) > 1 or singular == name):
                return _UNITS[singular]
    return None
