"""Finding and comparing final answers: the traps other checkers fall into, and every gold answer of the real sets."""

from __future__ import annotations

import json
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_data import real_data

from igrpo_lite.rewards.answers import MAX_SHOWN, Found, find_answer, gold_answer, verdict
from igrpo_lite.rewards.equality import parse_number, same_answer

SAME = [
    ("18", "18.0"),
    ("18.", "18"),
    ("018", "18"),
    ("１８", "18"),
    ("1,234", "1234"),
    ("1,000,000.50", "1000000.5"),
    ("1{,}234", "1234"),
    (r"1\,000", "1000"),
    (r"10,\!000", "10000"),
    ("1\u202f000", "1000"),
    ("$18", "18"),
    (r"\$18", "18"),
    ("$18$", "18"),
    (r"\(18\)", "18"),
    ("€5", "5"),
    ("-$5", "-5"),
    ("\u22125", "-5"),
    ("+5", "5"),
    (r"\frac{1}{2}", "0.5"),
    (r"\dfrac12", "1/2"),
    (r"-\tfrac{1}{2}", "-.5"),
    ("6/2", "3"),
    ("1 1/2", "1.5"),
    (r"1\frac{1}{2}", "3/2"),
    ("1½", "1.5"),
    ("50%", "50"),
    ("50", r"50\%"),
    (r"50\%", "50%"),
    ("5 percent", "5%"),
    ("18 dollars.", "18"),
    (r"18\text{ cm}^2", "18"),
    ("18kg", "18"),
    ("5 km/h", "5"),
    ("18-year-old", "18"),
    (r"90^\circ", "90"),
    ("90°", "90"),
    (r"\text{18}", "18"),
    ("**18**", "18"),
    ("{5}", "5"),
    ("x=5", "5"),
    ("x_1 = 5", "5"),
    ("f(x)=5", "5"),
    ("Answer: 5", "5"),
    ("She makes 18 dollars every day at the farmer's market.", "18"),
    ("1e3", "1000"),
    ("1E-3", "0.001"),
    (r"3 \times 10^{8}", "3e8"),
    ("10^3", "1000"),
    ("(3, 4)", "(3,4)"),
    (r"(3.0, \frac12)", "(3, 0.5)"),
    ("2, 3", "2,3"),
    ("2 and 3", "2, 3"),
    ("B", "(B)"),
    ("b", "B"),
    ("B. Paris", "B"),
    ("option C", "C"),
    ("(B) Paris", "B"),
    ("Yes.", "yes"),
    (r"\text{Evelyn}", "Evelyn"),
    ("6:30", "6:30"),
    (r"\frac{ \sqrt{2} }{2}", r"\dfrac{\sqrt{2}}{2}"),
    ("7=7", "7=7"),
]

NOT_SAME = [
    ("7=7", "7"),
    ("3+4", "7"),
    ("2 or 3", "2"),
    ("2, 3", "2"),
    ("2 and 3", "3"),
    ("1,2,3,4,5,6,7,8,9", "5"),
    ("[0,10]", "5"),
    ("0.5", "50%"),
    ("18x", "18"),
    ("18 x", "18"),
    ("2nd", "2"),
    ("3 million", "3"),
    ("not 5", "5"),
    ("less than 5", "5"),
    ("9^{9^{9^9}}", "9"),
    ("1e999999999", "1"),
    ("1" * 1500, "1"),
    (r"\frac1{2004!}", r"\frac1{2006!}"),
    (r"\sqrt2", "1.41421356"),
    ("6:30", "1/5"),
    ("12:30", "12"),
    ("1e3", "1"),
    ("1,2345", "12345"),
    ("5!", "5"),
    ("1/0", "1"),
    ("x-5", "-5"),
    ("5-6", "5"),
    ("2^3", "8"),
    (r"2\pi", "2"),
    ("H2", "2"),
    ("5 hours 30 minutes", "5"),
    ("x>=5", "5"),
    ("(2,1)", "(1,2)"),
    ("(3,4)", "[3,4]"),
    ("A", "B"),
    ("A or B", "A"),
    ("A, B, C", "A"),
    ("(A) or (B)", "A"),
    ("cat", "dog"),
    ("5", "cat"),
    ("", "5"),
    ("5", ""),
]


@pytest.mark.parametrize(("found", "gold"), SAME)
def test_same(found: str, gold: str) -> None:
    assert same_answer(found, gold) is True


@pytest.mark.parametrize(("found", "gold"), NOT_SAME)
def test_not_same(found: str, gold: str) -> None:
    assert same_answer(found, gold) is not True


def test_several_answers_are_wrong_and_expressions_unparsed() -> None:
    assert verdict(r"\boxed{2 or 3}", "2", False).reason == "wrong"
    assert verdict(r"\boxed{A or B}", "A", False).reason == "wrong"
    assert verdict(r"\boxed{3+4}", "7", False).reason == "unparsed"
    assert verdict(r"\boxed{7=7}", "7", False).reason == "unparsed"


@pytest.mark.parametrize(
    ("text", "answer", "source"),
    [
        ("<answer>42</answer>", "42", "tag"),
        ("<ANSWER>\n42\n</ANSWER> in 6 steps", "42", "tag"),
        ("<answer>1</answer> no: <answer>2</answer>", "2", "tag"),
        ("<answer></answer> so 6", "6", "number"),
        ("<SOLUTION>\n42\n</SOLUTION>", "42", "number"),
        ("#### 42", "42", "hash"),
        ("#### Step 3\nso 5", "5", "number"),
        ("#### 1. First\nthen 9", "9", "number"),
        ("The answer is 42.", "42", "phrase"),
        ("**Final Answer:** 18", "18", "phrase"),
        ("The answer is 6 * 3 = 18.", "18", "phrase"),
        ("The answer is 18, as 6 * 3 = 18", "18", "phrase"),
        ("The answer is 3 or 4.", "3 or 4", "phrase"),
        ("The correct answer is (B).", "(B)", "phrase"),
        (r"\boxed{2} then \boxed{3}", "3", "box"),
        (r"\boxed{4} and \boxed{5", "4", "box"),
        (r"\boxed{\boxed{5}}", "5", "box"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", "box"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}", "box"),
        (r"\boxed{7} so put it in \boxed{}", "7", "box"),
        (r"\boxed 5", "5", "box"),
        (r"\fbox{5} #### 6", "5", "box"),
        ("5 - 3", "3", "number"),
        ("it is -3.", "-3", "number"),
        ("costs $1,234.", "1,234", "number"),
        ("so x^2", None, None),
        ("nothing at all", None, None),
        ("", None, None),
    ],
)
def test_places(text: str, answer: str | None, source: str | None) -> None:
    found = find_answer(text)
    assert (found and found.text, found and found.source) == (answer, source)


def test_thinking_counts_only_when_nothing_follows() -> None:
    assert find_answer(r"<think>\boxed{3}</think> so 4") == Found("4", "number")
    assert find_answer(r"<think>\boxed{3}</think> so") == Found("3", "box")
    assert find_answer(r"it is \boxed{3}</think> so \boxed{4}") == Found("4", "box")
    assert find_answer(r"\boxed{3} <think> or \boxed{4}") == Found("3", "box")


def test_truncated_needs_an_explicit_answer() -> None:
    assert verdict("so 3 + 4 is 7", "7", True).reason == "truncated"
    assert verdict("The answer is 7", "7", True).reason == "truncated"
    assert verdict("", "7", True).reason == "truncated"
    assert verdict(r"\boxed{7} and then", "7", True).reason == "correct"
    assert verdict("#### 8", "7", True).reason == "wrong"
    assert verdict("", "7", False).reason == "no_answer"


def test_a_verdict_keeps_little() -> None:
    answer = verdict("\\boxed{" + "7" * 5000 + "}", "7", False).answer
    assert answer is not None
    assert len(answer) == MAX_SHOWN


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("48/2 = <<48/2=24>>24\n#### 72", "72"),
        ("#### 2,125", "2,125"),
        (r"Thus \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("<answer>7</answer>", "7"),
        ("145.0", "145"),
        (" (3,4) ", "(3,4)"),
        ("First this.\nThen that. The answer is 12.", "12"),
        ("A long story about apples\nwith no end", None),
        ("####", None),
        ("", None),
    ],
)
def test_gold(text: str, gold: str | None) -> None:
    assert gold_answer(text) == gold


@pytest.mark.parametrize("name", ["gsm8k_train.jsonl", "gsm8k_test.jsonl"])
def test_gsm8k_verifies_against_itself(name: str) -> None:
    solutions = [json.loads(line)["answer"] for line in real_data(name).read_text(encoding="utf-8").splitlines()]
    assert len(solutions) > 1000
    for solution in solutions:
        gold = gold_answer(solution)
        assert gold is not None
        assert parse_number(gold) is not None
        assert verdict(solution, gold, False).reason == "correct"
        assert verdict(f"The answer is \\boxed{{{gold}}}.", gold, True).reason == "correct"
        assert verdict(f"<think>1</think><answer>{gold} dollars</answer>", gold, False).reason == "correct"
        assert verdict(f"\\boxed{{{gold}1}}", gold, False).reason == "wrong"


def test_svamp_verifies_against_itself() -> None:
    rows = json.loads(real_data("SVAMP.json").read_text(encoding="utf-8"))
    for row in rows:
        gold = gold_answer(str(row["Answer"]))
        assert gold is not None
        assert verdict(f"The answer is \\boxed{{{row['Answer']}}}", gold, False).reason == "correct"
        assert verdict(f"#### {gold}", gold, False).reason == "correct"


def test_aime_verifies_against_itself() -> None:
    rows = [json.loads(line) for line in real_data("aime24_test.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        gold = gold_answer(str(row["answer"]))
        assert gold is not None
        assert verdict(row["solution"], gold, False).reason == "correct"
        assert verdict(f"\\boxed{{{gold}}}", gold, False).reason == "correct"


def test_minerva_golds_are_found_and_equal_themselves() -> None:
    rows = real_data("minerva_math_test.jsonl").read_text(encoding="utf-8").splitlines()
    golds = [gold_answer(json.loads(line)["solution"]) for line in rows]
    assert all(gold and same_answer(gold, gold) for gold in golds)


PIECES = (
    r"\boxed{ \boxed \fbox{ { } \ <answer> </answer> <think> </think> #### \frac{ \frac12 \text{ $ % = + - , . / : "
    r"^ ( ) 1 9 1e9 e999 1,234 .5 1/2 x or and A B (C) answer is \left \, \! ~ ½ − × \times 10^{"
)
HOSTILE = st.lists(st.sampled_from([*PIECES.split(), "\n", " "]) | st.text(max_size=4), max_size=30).map("".join)


@settings(max_examples=400, deadline=None)
@given(HOSTILE, HOSTILE, st.booleans())
def test_any_text_gets_a_verdict(text: str, gold: str, truncated: bool) -> None:
    assert verdict(text, gold, truncated).reason in {"correct", "wrong", "no_answer", "unparsed", "truncated"}
    gold_answer(text)
    assert same_answer(text, gold) in (True, False, None)
    if (number := parse_number(text)) is not None:
        assert same_answer(text, str(number)) is True


@settings(max_examples=200, deadline=None)
@given(st.integers(-(10**12), 10**12), st.integers(1, 10**6))
def test_written_numbers_are_read_exactly(top: int, bottom: int) -> None:
    assert parse_number(f"{top:,}") == top
    assert parse_number(f"\\frac{{{top}}}{{{bottom}}}") == Fraction(top, bottom)
    assert same_answer(f"{top}/{bottom}", f"{2 * top}/{2 * bottom}") is True
    assert same_answer(str(top), str(top + bottom)) is False


@pytest.mark.parametrize(
    "piece",
    ["\\boxed{", "{", "\\boxed{}", "\\boxed ", "<answer>", "</answer>", "<think>", "####", "answer ", "answer is ", "9",
     "9,", "1,111", "1/", "1.", "-", "\\frac{", "\\frac{1}{", "^{", "\\text{", "\\,", " ", "$"],
)  # fmt: skip
def test_a_megabyte_takes_linear_time(piece: str) -> None:
    bulk = piece * (1_000_000 // len(piece))
    for text in (bulk, f"\\boxed{{{bulk}}}", f"<answer>{bulk}</answer>", f"#### 1{bulk}"):
        began = time.perf_counter()
        verdict(text, "5", False)
        assert time.perf_counter() - began < 5.0  # a quadratic search would take hours
