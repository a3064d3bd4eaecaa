"""Gold answers out of the values of a row."""

from __future__ import annotations

import math
import re
from typing import Any

from igrpo_lite.answers.answers import gold_answer
from igrpo_lite.problems.columns import answer_text
from igrpo_lite.problems.registry import Form

_LONGEST = 300
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)")
_DOLLARS = re.compile(r"\$([^$]+)\$")


def read_gold(value: Any, form: Form | None) -> str | None:
    """The gold answer in a row's ``value``; ``None`` when it has none. ``form`` is ``None`` where it is not known."""
    text = answer_text(value[0] if form == "list0" and isinstance(value, list | tuple) and value else value)
    if text is None:
        return None
    if form == "hash":
        after = text.rpartition("####")
        return re.sub(r"[$,]", "", after[2].strip().partition("\n")[0]).strip() or None if after[1] else None
    if form == "boxed":
        return gold_answer(text) if _BOX.search(text) else None
    if form == "float-int":
        return _whole(text)
    if form == "list0" and (inner := _DOLLARS.fullmatch(text)):
        text = inner[1].strip()
    answer = gold_answer(text)
    if answer or form is None:
        return answer or None
    return text if len(text) <= _LONGEST and "\n" not in text else None


def _whole(text: str) -> str | None:
    """``145.0`` is 145 and ``033`` is 33; 0.5 stays; what is not a finite number is not an answer."""
    try:
        number = float(text.replace(",", ""))
    except ValueError:
        return None
    if not math.isfinite(number):
        return None
    return str(int(number)) if number.is_integer() and abs(number) < 2**53 else text
