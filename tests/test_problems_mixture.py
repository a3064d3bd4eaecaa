"""Mixtures: shares as asked, nothing repeated, nothing left to chance; conversations as questions."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_data import real_data

from igrpo_lite.config import DataOptions
from igrpo_lite.errors import DataError
from igrpo_lite.problems import synthetic
from igrpo_lite.problems.loading import ProblemSets, load_problems
from igrpo_lite.problems.mixture import shares
from igrpo_lite.types import Problem


def load(seed: int = 0, **options: Any) -> ProblemSets:
    return load_problems(DataOptions(**options), seed)


def write(path: Path, rows: list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def sums(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(start, start + count)]


def by_set(problems: list[Problem]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for problem in problems:
        name = problem.id.rpartition("/")[0]
        counts[name] = counts.get(name, 0) + 1
    return counts


def questions(problems: list[Problem]) -> set[str]:
    return {problem.question for problem in problems}


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 400), st.integers(1, 12)), min_size=1, max_size=5),
    st.none() | st.integers(1, 900),
)
def test_shares_are_as_large_and_as_even_as_can_be(parts: list[tuple[int, int]], most: int | None) -> None:
    sizes, weights = [size for size, _ in parts], [weight for _, weight in parts]
    counts = shares(sizes, weights, most)
    total, whole = sum(counts), sum(weights)
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
    # The largest real number of problems in these proportions, by trying every part as the one that runs out.
    largest = min([Fraction(size * whole, weight) for size, weight in parts] + ([Fraction(most)] if most else []))
    assert largest - len(parts) < total <= largest
    assert counts == [largest * weight // whole for weight in weights]


def test_shares_without_weights_are_everything_or_of_each_the_same_share() -> None:
    assert shares([7, 11, 2]) == [7, 11, 2]
    assert shares([700, 1100, 200], None, 100) == [35, 55, 10]
    assert shares([7], None, 100) == [7]
    assert shares([7], [0.1]) == [7]
    assert shares([1000, 1000], [0.1, 0.3]) == [333, 1000]
    assert shares([5, 0], [1, 1]) == [0, 0]


def test_real_sets_mixed() -> None:
    gsm8k, svamp = real_data("gsm8k_train.jsonl"), real_data("SVAMP.json")
    data = f"gsm8k={gsm8k}:3,svamp={svamp}:1"
    sets = load(data=data, eval_data=f"minerva={real_data('minerva_math_test.jsonl')}", eval_size=20)
    assert by_set(sets.train) == {"gsm8k_train": 3000, "SVAMP": 1000}
    assert len(questions(sets.train)) == len({problem.id for problem in sets.train}) == 4000
    assert "mixture: 3,000 of gsm8k_train.jsonl (75%), 1,000 of SVAMP.json (25%)" in sets.report.lines()
    limited = load(data=data, max_problems=101)
    assert by_set(limited.train) == {"gsm8k_train": 75, "SVAMP": 25}
    assert by_set(limited.held_out) == {"gsm8k_train": 150, "SVAMP": 50}  # held out in the same shares
    assert not questions(limited.train) & questions(limited.held_out)
    again, other = load(data=data, max_problems=101), load(seed=1, data=data, max_problems=101)
    assert again.train == limited.train != other.train
    assert again.held_out == limited.held_out == other.held_out
    assert by_set(load(data=f"gsm8k={gsm8k},svamp={svamp}").train) == {"gsm8k_train": 7473 - 176, "SVAMP": 1000 - 23}


def test_the_order_of_rows_and_parts_does_not_change_what_is_drawn(tmp_path: Path) -> None:
    first, second = sums(60), sums(30, 100)
    a, b = write(tmp_path / "a.jsonl", first), write(tmp_path / "b.jsonl", second)
    c, d = write(tmp_path / "c.jsonl", first[::-1]), write(tmp_path / "d.jsonl", second[::-1])
    one, two = load(data=f"{a}:2,{b}:1", max_problems=21), load(data=f"{d}:1,{c}:2", max_problems=21)
    assert questions(one.train) == questions(two.train)
    assert questions(one.held_out) == questions(two.held_out)
    assert by_set(one.train) == {"a": 14, "b": 7}


def test_a_question_of_two_parts_counts_for_the_first(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", sums(30)), write(tmp_path / "x" / "a.jsonl", sums(30, 20))
    sets = load(data=f"{a},{b}", eval_data="two-step")
    assert by_set(sets.train) == {"a": 30, "a-2": 20}  # files of one name, ids of their own
    assert [part.duplicates for part in sets.report.parts] == [0, 10]
    whole = write(tmp_path / "b.jsonl", sums(5))
    with pytest.raises(DataError, match=r"b\.jsonl: every question of it is also in the sets before it"):
        load(data=f"{a},{whole}")
    made = synthetic.load("addition", "train", 3)
    rows = [{"question": problem.question, "answer": problem.answer} for problem in made] + sums(5)
    mixed = load(data=f"{write(tmp_path / 'made.jsonl', rows)},addition", eval_data="two-step")
    assert by_set(mixed.train) == {"made": 8, "addition/train": 4000 - 3}
    assert len(questions(mixed.train)) == 4005


def test_held_out_mixture(tmp_path: Path) -> None:
    a, b, c = (write(tmp_path / f"{name}.jsonl", sums(30, 100 * i)) for i, name in enumerate("abc"))
    sets = load(data=a, eval_data=f"{b}:1,{c}:2", eval_size=12)
    assert by_set(sets.held_out) == {"b": 4, "c": 8}
    assert [problem.id[0] for problem in sets.held_out] != sorted(problem.id[0] for problem in sets.held_out)
    assert "held out: 4 of b.jsonl (33%), 8 of c.jsonl (67%)" in sets.report.lines()
    assert by_set(load(data=a, eval_data=f"{b}:1,{c}:2").held_out) == {"b": 15, "c": 30}
    small = load(data=f"{a}:1,{write(tmp_path / 'd.jsonl', sums(1, 900))}:1")
    assert by_set(small.held_out) == {"a": 3}  # nothing is held out of the only problem of a part
    assert by_set(small.train) == {"a": 1, "d": 1}


def test_columns_in_a_mixture_are_those_of_the_files(tmp_path: Path) -> None:
    odd = [{"text": f"{i}?", "gold": str(i), "question": "not this", "answer": "nor this"} for i in range(20)]
    data = f"{write(tmp_path / 'odd.jsonl', odd)},gsm8k={real_data('gsm8k_test.jsonl')},addition"
    sets = load(data=data, question_column="text", answer_column="gold")
    columns = [(part.question_column, part.answer_column) for part in sets.report.parts]
    assert columns == [("text", "gold"), ("question", "answer"), (None, None)]
    with pytest.raises(DataError) as raised:
        load(data=data, question_column="txt", answer_column="GOLD")
    assert raised.value.problems == [
        "question_column: no part of the mixture has a column txt; found by name: question, question"
    ]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_the_same_opening_of_all_conversations_is_left_out_and_said(tmp_path: Path) -> None:
    opening = [turn("system", "Be brief."), turn("user", "1 + 1?"), turn("assistant", "2")]
    rows = [{"prompt": [*opening, turn("user", f"{i} + {i}?")], "answer": str(2 * i)} for i in range(20)]
    sets = load(data=write(tmp_path / "a.jsonl", rows))
    assert questions([*sets.train, *sets.held_out]) == {f"{i} + {i}?" for i in range(20)}
    told = [line for line in sets.report.lines() if "every row begins with the same messages" in line]
    assert "`Be brief. User: 1 + 1? Assistant: 2`" in told[0]
    assert list(sets.train[0].columns["messages"]) == rows[int(sets.train[0].id.rpartition("/")[2])]["prompt"]


def test_what_differs_before_the_last_user_message_belongs_to_the_question(tmp_path: Path) -> None:
    ask = turn("user", "And how many in all?")
    rows = [
        {
            "messages": [turn("user", f"{i} apples."), turn("assistant", "Noted."), ask, turn("assistant", "the gold")],
            "answer": str(i),
        }
        for i in range(10)
    ] + [{"messages": [turn("user", "7 + 7?"), turn("assistant", "14")], "answer": "14"}]
    sets = load(data=write(tmp_path / "a.jsonl", rows))
    everything = [*sets.train, *sets.held_out]
    assert len(everything) == 11  # ten questions with the same last message are ten questions
    assert "User: 3 apples.\n\nAssistant: Noted.\n\nAnd how many in all?" in questions(everything)
    assert "7 + 7?" in questions(everything)
    assert not any("the gold" in json.dumps(dict(problem.columns)) for problem in everything)
    assert any("10 questions begin with the messages before the user's last" in line for line in sets.report.lines())
