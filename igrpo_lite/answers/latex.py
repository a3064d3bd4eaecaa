r"""Brings the notations of one expression together: LaTeX, Unicode, and plain text such as ``sqrt(2)*x**2``.

:func:`clean` takes off what only dresses an answer; :func:`canonical` goes on to one spelling, token by token, so that
equal spellings compare as text and the rest can be handed to a parser. Nothing is evaluated.
"""

from __future__ import annotations

import re

_DASHES = dict.fromkeys("−–‐‑‒﹣－", "-")
_DIGITS = {chr(0xFF10 + digit): str(digit) for digit in range(10)}
_FRACTIONS = {"½": " 1/2", "¼": " 1/4", "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3", "⅕": " 1/5", "⅛": " 1/8"}
_FRACTIONS |= {"⅖": " 2/5", "⅗": " 3/5", "⅘": " 4/5", "⅙": " 1/6", "⅚": " 5/6", "⅜": " 3/8", "⅝": " 5/8", "⅞": " 7/8"}
_SIGNS = {
    **{"⁄": "/", "÷": "/", "⋅": "×", "·": "×", "∙": "×", "°": r"^\circ ", "％": "%", "’": "'", "“": '"', "”": '"'},
    **{
        "≤": r"\leq ",
        "≥": r"\geq ",
        "≠": r"\neq ",
        "±": r"\pm ",
        "≈": r"\approx ",
        "¢": " cents",
        "∞": r"\infty ",
        "∪": r"\cup ",
        "∈": r"\in ",
    },
    **{"√": r"\sqrt ", "π": r"\pi ", "∅": r"\emptyset ", "²": "^2 ", "³": "^3 ", "⟨": r"\langle ", "⟩": r"\rangle "},
}
_GREEK_LETTERS = "αβγδεζηθικλμνξρστφχψωΓΔΘΛΞΣΦΨΩ"
_GREEK_NAMES = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau phi chi psi omega "
    "Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega"
)
_GREEK = {letter: f"\\{name} " for letter, name in zip(_GREEK_LETTERS, _GREEK_NAMES.split(), strict=True)}
_CHARACTERS = str.maketrans({**_DASHES, **dict.fromkeys("€£¥₹"), **_DIGITS, **_FRACTIONS, **_SIGNS, **_GREEK})

_GROUP_SPACE = re.compile(r"(?<=[0-9])(?:\\,|[\u00a0\u2006\u2009\u200a\u202f])(?=[0-9]{3}(?![0-9]))")
_GROUPS = re.compile(r"(?<![0-9.,] )(?<![0-9.,/])[1-9][0-9]{0,2}(?:\\? [0-9]{3})+(?![0-9]|\s*/)")  # ``12 500``
_GOES_ON = re.compile(r"(\.[0-9]+)\s*(?:\.\.+|…)")  # ``0.333...`` is not 0.333
_NEGATIVE_SPACE = re.compile(r"\\!\s*")
_SPACE = re.compile(r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~|[\u00a0\u2006\u2009\u200a\u202f]")
_FRAC = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_TIMES = re.compile(r"\\(?:times|cdot)(?![A-Za-z])")
_DEGREES = re.compile(
    r"\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})|\\degree(?![A-Za-z])|(?<![\\A-Za-z])deg(?:rees?)?(?![A-Za-z])"
)
_HALF_DAY = re.compile(r"(?<=[0-9])\s*([apAP])\.\s?[mM]\b\.?")
_WRAPPER = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathit|mathsf|mbox|operatorname)\s*\{([^{}]*)\}"
    r"|\\(?:mathbf|boldsymbol)\s*\{([^{}]*[^A-Za-z{}][^{}]*)\}"  # bold letters are vectors and stay so
)
_DELIMITER = re.compile(
    r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|bf|rm|it)(?![A-Za-z])|(?<!\\)\\[()\[\]]|\$|\*\*(?![0-9A-Za-z(])"
    r"|(?<![0-9A-Za-z)])\*\*"
)
_SAME = {
    r"\le": r"\leq",
    r"\ge": r"\geq",
    r"\ne": r"\neq",
    r"\leqslant": r"\leq",
    r"\geqslant": r"\geq",
    r"\lt": "<",
    r"\gt": ">",
    r"\lbrace": r"\{",
    r"\rbrace": r"\}",
    r"\lvert": "|",
    r"\rvert": "|",
    r"\vert": "|",
    r"\mid": "|",
    r"\varnothing": r"\emptyset",
    r"\varphi": r"\phi",
    r"\varepsilon": r"\epsilon",
    "×": r"\cdot",
    "*": r"\cdot",
}
_BARE_NAME = re.compile(
    r"(?<![A-Za-z\\])(arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|pi|infty|infinity"
    r"|theta|alpha|beta|gamma|lambda|omega)(?![A-Za-z])"
)
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[0-9]+(?:\.[0-9]+)?|\.[0-9]+|\S", re.DOTALL)
_NUMBER = re.compile(r"[0-9.]+")
_AMBIGUOUS = re.compile(
    r"\\(?:frac|sqrt) (?![{\[])|\\frac \{[^{}]*\} (?!\{)|[0-9] [0-9]|[0-9] \\frac \{ [0-9.]+ \} \{ [0-9.]+ \}"
    r"|/ (?:[0-9.]+|[A-Za-z]|\\(?!sqrt|frac)[A-Za-z]+)(?: _ \{[^{}]*\})? (?:[A-Za-z(]|\\(?!cdot))"
    r"|\\(?:sin|cos|tan|cot|sec|csc|arc...|log|ln) [^(){}+-]*/"
)
_INVERSE = re.compile(r"\\(sin|cos|tan) \^ \{ - 1 \}")
_PAIRS = {"(": ")", "{": "}"}

MAX_DEPTH = 60
"""Braces in one another beyond which an expression is left as it is written."""


def clean(text: str) -> str:
    """The text without what only dresses it: LaTeX fonts, spaces and delimiters, currency signs, bold stars."""
    text = _GOES_ON.sub(r"\1\\ldots ", text.translate(_CHARACTERS))
    if not text.isascii() or "\\" in text or "{" in text or "~" in text:
        text = _NEGATIVE_SPACE.sub("", text).replace("{,}", ",").replace("\\%", "%").replace("\\$", "")
        text = _SPACE.sub(" ", _GROUP_SPACE.sub("", text))
        text = _TIMES.sub("×", _FRAC.sub(r"\\frac", text))
        for _ in range(2):  # \text{\bf ...} inside one another: two levels, as more are not seen
            text = _WRAPPER.sub(r" \1\2", text)
    text = _GROUPS.sub(lambda match: match.group().replace("\\ ", "").replace(" ", ""), text)
    return " ".join(_DELIMITER.sub("", text).split()).lstrip(" :`\"'").rstrip(" .,;:`\"'\\")


def units_as_words(cleaned: str) -> str:
    """Every degree sign as the word, ``p.m.`` as ``pm``."""
    return _HALF_DAY.sub(r" \1m", _DEGREES.sub(" degrees ", cleaned))


def canonical(cleaned: str) -> str:
    r"""One spelling of a cleaned expression: its tokens with single spaces between them.

    ``x^23`` and ``x^{23}``, ``\frac12`` and ``\frac{1}{2}``, ``sqrt(2)`` and ``\sqrt{2}`` become the same. Digits side
    by side stay apart (``2 3`` is not ``23``), upper and lower case too.
    """
    text = cleaned.replace("**", "^").replace(">=", r"\geq ").replace("<=", r"\leq ")
    text = _BARE_NAME.sub(_command, text)
    tokens = [_SAME.get(token, token) for token in _TOKEN.findall(_DEGREES.sub(r"^{\\circ}", text))]
    if _depth(tokens) > MAX_DEPTH:
        return " ".join(tokens)
    if tokens[:1] == ["+"]:
        del tokens[0]
    return _INVERSE.sub(r"\\arc\1", " ".join(_number(token) for token in _braced(tokens)))


def ambiguous(spelling: str) -> bool:
    r"""Whether a canonical spelling may be read in two ways: ``\sqrt10``, ``1/2x``, ``\tan x/2``, ``2\frac12x``."""
    return _AMBIGUOUS.search(spelling) is not None


def _depth(tokens: list[str]) -> int:
    depth = deepest = 0
    for token in tokens:
        depth = max(0, depth + (token in _PAIRS) - (token in ")}"))
        deepest = max(deepest, depth)
    return deepest


def _command(match: re.Match[str]) -> str:
    return "\\" + ("infty" if match[1] == "infinity" else match[1]) + " "


def _number(token: str) -> str:
    if token[0] == ".":
        token = "0" + token
    return token.rstrip("0").rstrip(".") if "." in token and _NUMBER.fullmatch(token) else token


def _braced(tokens: list[str]) -> list[str]:
    r"""Puts braces round what ``^``, ``_``, ``\frac`` and ``\sqrt`` apply to, where that is not open to doubt."""
    result: list[str] = []
    at = 0
    while at < len(tokens):
        token = tokens[at]
        at += 1
        result.append(token)
        if token in ("^", "_"):
            at = _argument(tokens, at, result, whole_number=True)
        elif token == "\\sqrt":
            at = _argument(tokens, at, result, whole_number=False)
        elif token == "\\frac":
            if at < len(tokens) and re.fullmatch("[0-9]{2}", tokens[at]):
                result += ["{", tokens[at][0], "}", "{", tokens[at][1], "}"]
                at += 1
                continue
            for _ in range(2):
                at = _argument(tokens, at, result, whole_number=False)
    return result


def _argument(tokens: list[str], at: int, result: list[str], whole_number: bool) -> int:
    """Appends the argument that starts at ``at``, in braces; returns where the rest goes on."""
    if at >= len(tokens):
        return at
    if tokens[at] == "[":  # the root of \sqrt[3]{x}
        end = next((i for i in range(at, len(tokens)) if tokens[i] == "]"), at)
        result += tokens[at : end + 1] if end > at else []
        at = end + 1 if end > at else at
        if at >= len(tokens):
            return at
    signed = whole_number and tokens[at] in "+-" and at + 1 < len(tokens)
    sign = [tokens[at]] if signed and tokens[at] == "-" else []
    at += signed
    if tokens[at] in _PAIRS:
        end = _closing(tokens, at)
        if end < 0:
            result += sign
            return at
        result += ["{", *sign, *_braced(tokens[at + 1 : end]), "}"]
        return end + 1
    if not (whole_number or len(tokens[at]) == 1 or tokens[at][0] == "\\") or tokens[at] in ("}", ")", "^", "_"):
        return at
    result += ["{", *sign, tokens[at], "}"]
    return at + 1


def _closing(tokens: list[str], at: int) -> int:
    opening, closing = tokens[at], _PAIRS[tokens[at]]
    depth = 0
    for place in range(at, len(tokens)):
        depth += (tokens[place] == opening) - (tokens[place] == closing)
        if depth == 0:
            return place
    return -1
