"""What a test set knows is found, as brute force finds it, and nothing else."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_data import real_data

from igrpo_lite.config import DataOptions
from igrpo_lite.errors import DataError
from igrpo_lite.problems.decontamination import NGRAM, runs, split_known, whole_key
from igrpo_lite.problems.loading import ProblemSets, load_problems
from igrpo_lite.types import Problem


def load(**options: Any) -> ProblemSets:
    return load_problems(DataOptions(**options), 0)


def write(path: Path, questions: list[str]) -> str:
    rows = [{"question": question, "answer": "1"} for question in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def problems(questions: list[str]) -> list[Problem]:
    return [Problem(f"p/{i}", question, "1") for i, question in enumerate(questions)]


def left(train: list[str], test: list[str], ngrams: bool = True) -> list[str]:
    kept, _ = split_known(problems(train), [(f"t/{i}", question) for i, question in enumerate(test)], "test", ngrams)
    return [problem.question for problem in kept]


def spelt(question: str) -> list[str]:
    """Words as a person would say them: letters and digits, lower case."""
    return re.sub(r"[^a-z0-9]+", " ", question.lower()).split()


def longest_run(first: list[str], second: list[str]) -> int:
    """Brute force: the longest common run of words, by the table of all pairs of places."""
    longest, row = 0, [0] * (len(second) + 1)
    for word in first:
        row = [0] + [row[j] + 1 if word == second[j] else 0 for j in range(len(second))]
        longest = max(longest, *row)
    return longest


sentences = st.lists(st.lists(st.sampled_from("ab"), min_size=1, max_size=22).map(" ".join), min_size=1, max_size=8)


@settings(max_examples=200, deadline=None)
@given(sentences, sentences, st.booleans())
def test_against_brute_force(train: list[str], test: list[str], ngrams: bool) -> None:
    expected = [
        question
        for question in train
        if question not in test
        and not (ngrams and any(longest_run(question.split(), other.split()) >= NGRAM for other in test))
    ]
    assert left(train, test, ngrams) == expected


def test_gsm8k_train_against_gsm8k_test() -> None:
    train, test = (f"gsm8k={real_data(f'gsm8k_{split}.jsonl')}" for split in ("train", "test"))
    sets = load(data=train, eval_data=test)
    kept = {problem.id for problem in sets.train}
    found = {place for place in range(7473) if f"gsm8k_train/{place}" not in kept}
    (overlap,) = sets.report.overlaps
    assert (overlap.whole, overlap.runs, overlap.of, len(found)) == (0, 4, 7473, 4)
    asked = [
        [spelt(json.loads(line)["question"]) for line in real_data(f"gsm8k_{split}.jsonl").open()]
        for split in ("train", "test")
    ]
    some = random.Random(0).sample(range(7473), 10) + sorted(found)
    longest = {place: max(longest_run(asked[0][place], other) for other in asked[1]) for place in some}
    assert {place for place in some if longest[place] >= NGRAM} == found


def test_what_is_the_same_question() -> None:
    assert whole_key("Janet’s ducks -- how many?") == whole_key(" janet's  DUCKS, how many ?")
    assert whole_key("a two-step problem") == whole_key("A two step problem.")
    assert whole_key("What is 3 + 4?") != whole_key("What is 3 - 4?")
    assert whole_key("12*3") != whole_key("12/3")
    assert whole_key("x^2") != whole_key("x2")
    assert whole_key("😀") != whole_key("🎉")  # without a word in it
    assert runs("$\\frac{1}{2}$ of 1,000_m " + "x " * 6) == ["frac 1 2 of 1 000 m x x x x x x"]
    assert runs("x " * 12) == []


def test_short_questions_are_compared_as_a_whole() -> None:
    run = "one two three four five six seven eight nine ten eleven twelve"
    assert left([f"{run}.", f"{run} more"], [run.upper()]) == [f"{run} more"]
    assert left([f"{run} a b", f"x {run} a", f"{run} c"], [f"{run} a"]) == [f"{run} c"]
    assert left([f"{run} a b"], [f"{run} a"], False) == [f"{run} a b"]


def test_sets_are_counted_one_by_one_with_an_example(tmp_path: Path) -> None:
    long = "a train leaves at noon and drives for three hours at sixty miles an hour"
    data = write(
        tmp_path / "train.jsonl", [f"Number {i}: what is {i} * {i}?" for i in range(40)] + [f"{long}, how far?", "Why?"]
    )
    tested = write(tmp_path / "test.jsonl", ["why", "Is it?"])
    known = write(tmp_path / "known.jsonl", [f"Suppose {long}; when?"])
    (tmp_path / "unanswered.jsonl").write_text('{"question": "Number 3: what is 3 * 3", "answer": ""}\n')
    sets = load(data=data, eval_data=tested, decontaminate=[known, str(tmp_path / "unanswered.jsonl"), "two-step"])
    assert [(part.name, part.whole, part.runs) for part in sets.report.overlaps] == [
        ("test.jsonl", 1, 0),
        ("known.jsonl", 0, 1),
        ("unanswered.jsonl", 1, 0),  # a question counts though its answer cannot be read
        ("two-step/test", 0, 0),
    ]
    assert (len(sets.train), sum(part.count for part in sets.report.overlaps)) == (39, 3)
    shown = "\n".join(sets.report.lines())
    told = "also in test.jsonl: 1 whole questions, 0 by 13 words in a row, e.g. train/41, test/0: `Why?`"
    assert told in shown
    assert "also in known.jsonl: 0 whole questions, 1 by 13 words in a row, e.g. train/40, known/0: `a train" in shown
    assert "no training problem is in two-step/test" in shown


def test_rows_of_one_file_may_share_phrases_but_no_question(tmp_path: Path) -> None:
    phrase = "in the town of many words there lived a man who had a number of apples"
    data = write(
        tmp_path / "a.jsonl",
        [f"{phrase}, {i} of them" for i in range(50)] + [f"{phrase} {i} of them." for i in range(50)],
    )
    sets = load(data=data)
    assert len(sets.held_out) == 10
    assert not {whole_key(problem.question) for problem in sets.train} & {
        whole_key(problem.question) for problem in sets.held_out
    }
    (overlap,) = sets.report.overlaps
    assert len(sets.train) == 90 - overlap.count > 70  # the other spelling of a held-out question is left out
    assert overlap.name == "the problems held out"
    assert overlap.runs == 0


def test_too_much_in_common_is_said(tmp_path: Path) -> None:
    phrase = "in the town of many words there lived a man who had a number of apples"
    data = write(tmp_path / "a.jsonl", [f"{phrase} {i}" for i in range(10)] + [f"q{i}" for i in range(30)])
    tested = write(tmp_path / "b.jsonl", [f"{phrase} 99"])
    assert "  that is 25% of the training problems" in "\n".join(load(data=data, eval_data=tested).report.lines())
    with pytest.raises(DataError, match=r"a\.jsonl: every question of it is also in a\.jsonl, so nothing is left"):
        load(data=data, eval_data=tested, decontaminate=[data])
    shared = write(tmp_path / "c.jsonl", [f"{phrase} {i}" for i in range(5)])
    with pytest.raises(DataError, match=r"c\.jsonl: every .* in b\.jsonl, or has 13 words in a row in common with it,"):
        load(data=shared, eval_data=tested)


def test_settings_of_synthetic_sets_are_left_alone() -> None:
    sets = load(data="two-step", max_problems=500)
    (overlap,) = sets.report.overlaps
    assert (len(sets.train), overlap.count, overlap.ngrams) == (500, 0, False)
    (overlap,) = load(data="two-step", max_problems=500, eval_data="two-step", eval_split="test").report.overlaps
    assert overlap.count == 0


def test_broken_sets_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": 1}\n')
    with pytest.raises(DataError, match="no column that could be the question"):
        load(data="two-step", decontaminate=[str(tmp_path / "x.jsonl")])
