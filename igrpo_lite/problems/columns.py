"""The columns with the question and the gold answer, and the values of a row as text."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from igrpo_lite.errors import DataError
from igrpo_lite.problems.files import Row

JOINED: tuple[tuple[str, str, str], ...] = (("body", "question", " "), ("instruction", "input", "\n"))
"""Pairs of columns that make one question together, and the separator (SVAMP; Alpaca-like sets)."""

QUESTION_NAMES: tuple[str, ...] = (
    *("question", "problem", "prompt", "query", "instruction", "input"),
    *("question_text", "problem_text", "problem_statement", "question_content", "messages"),
)
"""Names of question columns, best first; case does not matter."""

ANSWER_NAMES: tuple[str, ...] = (
    *("answer", "final_answer", "gold_answer", "ground_truth", "gold", "reference_answer", "correct_answer"),
    *("expected_answer", "target", "label", "solution", "output", "response", "answers", "reward_model"),
)
"""Names of answer columns, best first; case does not matter. ``reward_model`` is verl's, an object with
``ground_truth``."""


@dataclass(frozen=True, slots=True)
class Columns:
    """The chosen columns: one or two of the question, the separator between these, and the one of the answer."""

    question: tuple[str, ...]
    answer: str
    separator: str = " "

    @property
    def question_text(self) -> str:
        """The question's columns as ``--question-column`` takes them."""
        return "+".join(self.question)


def choose_columns(
    source: str,
    rows: Sequence[Row],
    question_column: str | None = None,
    answer_column: str | None = None,
    answer_needed: bool = True,
) -> Columns:
    """The columns to use: those asked for, otherwise found by name among those that are not empty in every row.

    ``question_column`` may join columns with a plus sign (``Body+Question``). Where no answer is needed and none found,
    its column is empty.

    Raises:
        DataError: a column asked for does not exist, or none has a name that is known; both findings at once.
    """
    present: dict[str, bool] = {}  # column: whether any row has a value in it
    for row in rows:
        for name, value in row.values.items():
            present[name] = present.get(name, False) or not _empty(value)
    findings: list[str] = []
    if question_column is None:
        question, separator = _find_question(present)
        if not question:
            findings.append(_not_found(source, "question", present))
    else:
        question, separator, missing = _given_question(source, question_column, present)
        findings.extend(missing)
    if answer_column is None:
        answer = _find_named(ANSWER_NAMES, {name: full for name, full in present.items() if name not in question})
        if answer is None and answer_needed:
            findings.append(_not_found(source, "answer", present))
    else:
        answer = _exact(answer_column, present)
        if answer is None:
            findings.append(_missing(source, "answer", answer_column, present))
    if findings:
        raise DataError(findings)
    return Columns(question, answer or "", separator)


def has_columns(rows: Sequence[Row], column: str | None) -> bool:
    """Whether a column asked for exists in these rows (``A+B``: both)."""
    names = {name: True for row in rows for name in row.values}
    return column is not None and not _given_question("", column, names)[2]


def question_of(values: Mapping[str, Any], columns: Columns) -> str:
    """The question of one row, stripped. Of a conversation (a list of role and content) it is the last user message.

    Raises:
        ValueError: there is none; the message is the reason.
    """
    parts = [_question_part(name, values.get(name)) for name in columns.question]
    question = columns.separator.join(part for part in parts if part)
    if not question:
        raise ValueError(f"no question in column {columns.question_text}")
    try:
        f"{question}{answer_text(values.get(columns.answer))}".encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair (like \\ud83d), which is not a character") from None
    return question


def conversation_of(values: Mapping[str, Any], columns: Columns) -> list[dict[str, str]]:
    """The messages of a row whose question is a conversation, as far as the last of the user's; otherwise none.

    What follows is left out: it may be the solution.
    """
    value = values.get(columns.question[0]) if len(columns.question) == 1 else None
    turns = value if _is_conversation(value) else []
    messages = [{"role": str(turn["role"]), "content": _content(turn.get("content")).strip()} for turn in turns]
    while messages and messages[-1]["role"] != "user":
        messages.pop()
    return messages


def transcript(messages: Sequence[Mapping[str, str]]) -> str:
    """Messages as plain text: a system message as it is, the others after the speaker's role."""
    lines = [
        turn["content"] if turn["role"] == "system" else f"{turn['role'].capitalize()}: {turn['content']}"
        for turn in messages
        if turn["content"]
    ]
    return "\n\n".join(lines)


def answer_text(value: Any) -> str | None:
    """A row's raw gold answer as text: of a text, a number, a list of one or verl's object; ``None`` if empty."""
    if isinstance(value, Mapping):
        return answer_text(value.get("ground_truth"))
    if isinstance(value, list | tuple):
        return answer_text(value[0]) if len(value) == 1 else None
    if _empty(value):
        return None
    return str(value).strip()


def jsonable(value: Any) -> Any:
    """The value in JSON's types: bytes become their length, NaN and infinity ``None``, other types text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes | bytearray):
        return f"<{len(value)} bytes>"
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return str(value)


def _empty(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and not math.isfinite(value)) or value in ([], (), {})


def _find_question(present: Mapping[str, bool]) -> tuple[tuple[str, ...], str]:
    for *pair, separator in JOINED:
        names = [name for part in pair if (name := _find_named((part,), present)) is not None]
        if len(names) == 2:
            return tuple(names), separator
    name = _find_named(QUESTION_NAMES, present)
    return ((name,) if name is not None else ()), " "


def _find_named(names: Sequence[str], present: Mapping[str, bool]) -> str | None:
    by_name = {name.lower().replace(" ", "_"): name for name, full in reversed(list(present.items())) if full}
    return next((by_name[name] for name in names if name in by_name), None)


def _given_question(source: str, asked: str, present: Mapping[str, bool]) -> tuple[tuple[str, ...], str, list[str]]:
    parts = [asked] if _exact(asked, present) else [part.strip() for part in asked.split("+")]
    found = [(part, _exact(part, present)) for part in parts]
    missing = [_missing(source, "question", part, present) for part, name in found if name is None]
    question = tuple(name for _, name in found if name is not None)
    lower = tuple(name.lower() for name in question)
    return question, next((between for *pair, between in JOINED if tuple(pair) == lower), " "), missing


def _exact(asked: str, present: Mapping[str, bool]) -> str | None:
    if asked in present:
        return asked
    same = [name for name in present if name.lower() == asked.lower()]
    return same[0] if len(same) == 1 else None


def _missing(source: str, role: str, asked: str, present: Mapping[str, bool]) -> str:
    by_name = {name.lower(): name for name in present}
    near = difflib.get_close_matches(asked.lower(), by_name, n=1)
    hint = f"; did you mean {by_name[near[0]]}?" if near else ""
    return f"{source}: --{role}-column {asked}: there is no such column; there are {_listed(present)}{hint}"


def _not_found(source: str, role: str, present: Mapping[str, bool]) -> str:
    return f"{source}: no column that could be the {role}; there are {_listed(present)}. Name it with --{role}-column"


def _listed(present: Mapping[str, bool]) -> str:
    names = [name if full else f"{name} (empty)" for name, full in present.items()]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") if names else "none"


def _question_part(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value.strip()
    if _is_conversation(value):
        turns = [turn for turn in value if turn["role"] == "user"]
        if not turns:
            raise ValueError(f"column {name} is a conversation without a user message")
        return _content(turns[-1].get("content")).strip()
    raise ValueError(f"column {name} holds {type(value).__name__}, not text or a conversation")


def _is_conversation(value: Any) -> TypeGuard[list[Mapping[str, Any]]]:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(turn, Mapping) and "role" in turn for turn in value)


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):  # parts of a multi-modal message
        return "".join(part.get("text") or "" for part in content if isinstance(part, Mapping))
    return ""
