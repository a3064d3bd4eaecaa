"""Finding the question and the answer among a row's columns, and turning their values into text."""

from __future__ import annotations

import datetime
import decimal
import json
from typing import Any

import pytest

from igrpo_lite.errors import DataError
from igrpo_lite.problems.columns import Columns, answer_text, choose_columns, jsonable, question_of
from igrpo_lite.problems.files import Row


def rows(*values: dict[str, Any]) -> list[Row]:
    return [Row(index, f"a:{index}", value) for index, value in enumerate(values)]


def chosen(*names: str, **asked: str) -> tuple[str, str]:
    columns = choose_columns("a", rows(dict.fromkeys(names, "x")), **asked)
    return columns.question_text, columns.answer


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("question", "answer"), ("question", "answer")),  # openai/gsm8k
        (("solution", "answer", "subject", "problem"), ("problem", "answer")),  # MATH-500
        (("problem", "solution", "type", "level"), ("problem", "solution")),  # MATH-lighteval
        (("ID", "Problem", "Solution", "Answer"), ("Problem", "Answer")),  # Maxwell-Jia/AIME_2024
        (("prompt", "solution", "data_source", "reward_model"), ("prompt", "solution")),  # DAPO, processed
        (("data_source", "prompt", "ability", "reward_model"), ("prompt", "reward_model")),  # DAPO, verl's
        (("ID", "Body", "Question", "Equation", "Answer"), ("Body+Question", "Answer")),  # SVAMP
        (("instruction", "input", "output"), ("instruction+input", "output")),  # Alpaca
        (("id", "solution", "final_answer", "question"), ("question", "final_answer")),  # OlympiadBench
        (("QUERY", "Ground Truth"), ("QUERY", "Ground Truth")),
    ],
)
def test_found_by_name(names: tuple[str, ...], expected: tuple[str, str]) -> None:
    assert chosen(*names) == expected


def test_a_column_that_is_always_empty_is_not_chosen() -> None:
    columns = choose_columns("a", rows({"instruction": "q", "input": "", "answer": None, "solution": "s"}))
    assert columns == Columns(("instruction",), "solution")


def test_asked_for() -> None:
    assert chosen("question", "x", "answer", "y", question_column="x", answer_column="Y") == ("x", "y")
    assert chosen("a+b", "a", "b", "answer", question_column="a+b") == ("a+b", "answer")
    assert chosen("Body", "Question", "answer", question_column="body + question") == ("Body+Question", "answer")


def test_what_is_missing_is_said_at_once() -> None:
    with pytest.raises(DataError) as caught:
        chosen("question", "final_answer", "id", question_column="Querstion", answer_column="final-answer")
    assert caught.value.problems == [
        "a: --question-column Querstion: there is no such column; there are question, final_answer, id; "
        "did you mean question?",
        "a: --answer-column final-answer: there is no such column; there are question, final_answer, id; "
        "did you mean final_answer?",
    ]
    with pytest.raises(DataError) as caught:
        choose_columns("a", rows({"text": "q", "score": 1}, {"label": None}))
    assert caught.value.problems == [
        "a: no column that could be the question; there are text, score, label (empty). Name it with --question-column",
        "a: no column that could be the answer; there are text, score, label (empty). Name it with --answer-column",
    ]


def test_joined_question() -> None:
    columns = Columns(("Body", "Question"), "Answer")
    assert (
        question_of({"Body": " Ann has 2 apples. ", "Question": "How many?"}, columns) == "Ann has 2 apples. How many?"
    )
    assert question_of({"Body": None, "Question": "How many?"}, columns) == "How many?"


def test_conversation() -> None:
    columns = Columns(("prompt",), "answer")
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "reply"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " last "}]},
    ]
    assert question_of({"prompt": turns}, columns) == "last"
    assert question_of({"prompt": turns[:3]}, columns) == "first"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "no question"),
        ("  ", "no question"),
        (3, "holds int"),
        (["a"], "holds list"),
        ([{"role": "system", "content": "x"}], "without a user message"),
        ([{"role": "user", "content": None}], "no question"),
    ],
)
def test_no_question(value: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        question_of({"prompt": value}, Columns(("prompt",), "answer"))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (" x ", "x"),
        (72, "72"),
        (145.0, "145.0"),
        (0, "0"),
        (["$2$"], "$2$"),
        ([["2"]], "2"),
        ({"ground_truth": "34", "style": "rule"}, "34"),
        (decimal.Decimal("1.50"), "1.50"),
        ([1, 2], None),
        ([], None),
        ({}, None),
        ("", None),
        (None, None),
        (float("nan"), None),
    ],
)
def test_answer_text(value: object, expected: str | None) -> None:
    assert answer_text(value) == expected


def test_jsonable() -> None:
    value = {
        "a": [1, 2.5, True, None, float("nan"), float("inf")],
        "b": datetime.date(2024, 5, 1),
        "c": b"\x00\x01",
        4: (decimal.Decimal("1.5"),),
    }
    expected = {"a": [1, 2.5, True, None, None, None], "b": "2024-05-01", "c": "<2 bytes>", "4": ["1.5"]}
    assert json.loads(json.dumps(jsonable(value), allow_nan=False)) == expected
