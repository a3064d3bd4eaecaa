"""Finding and comparing final answers: the traps other checkers fall into, and every gold answer of the real sets."""

from __future__ import annotations

import json
import time
from fractions import Fraction
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_data import real_data

from igrpo_lite.answers.answers import MAX_SHOWN, Found, Reason, find_answer, gold_answer, verdict
from igrpo_lite.answers.equality import same_answer
from igrpo_lite.answers.quantities import parse_number, parse_quantity

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
    ("0.5", "50%"),
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
    ("0.5", "0.5%"),
    ("0.5", "50"),
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
    ("::::", ":"),
    ("$", "**"),
    ("(1, $)", "(1, 2)"),
    ("5", ""),
]


@pytest.mark.parametrize(("found", "gold"), SAME)
def test_same(found: str, gold: str) -> None:
    assert same_answer(found, gold) is True


@pytest.mark.parametrize(("found", "gold"), NOT_SAME)
def test_not_same(found: str, gold: str) -> None:
    assert same_answer(found, gold) is not True


@pytest.mark.parametrize(
    ("text", "gold", "reason"),
    [
        (r"\boxed{2 or 3}", "2", "several_answers"),
        (r"\boxed{A or B}", "A", "several_answers"),
        (r"\boxed{1,2,3,4,5,6,7,8,9}", "5", "several_answers"),
        (r"\boxed{\pm 3}", "3", "several_answers"),
        (r"\boxed{\{1, 2\}}", "1", "several_answers"),
        (r"\boxed{2} or $\boxed{3}$", "3", "several_answers"),
        (r"\boxed{2}, \boxed{3}", "3", "several_answers"),
        (r"\boxed{2} \boxed{3}", "3", "several_answers"),
        ("<answer>2</answer> or <answer>3</answer>", "2", "several_answers"),
        ("The answer is 3 or 4.", "3", "several_answers"),
        (r"\boxed{2} and \boxed{3}", "2, 3", "correct"),
        (r"\boxed{3} and \boxed{2}", r"\{2, 3\}", "correct"),
        (r"\boxed{2} and \boxed{3}", "2, 4", "wrong"),
        (r"\boxed{2} = \boxed{2}", "2", "correct"),
        (r"\boxed{2}, \boxed{2.0}", "2", "wrong"),
        ("\\boxed{2}\n\n\\boxed{3}", "3", "correct"),
        (r"\boxed{2}. No: \boxed{3}", "3", "correct"),
        (r"\boxed{[0,10]}", "5", "wrong"),
        (r"\boxed{3+4}", "7", "unparsed"),
        (r"\boxed{7=7}", "7", "unparsed"),
    ],
)
def test_several_answers_are_not_one_and_expressions_no_number(text: str, gold: str, reason: str) -> None:
    assert verdict(text, gold, False).reason == reason


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Final: \\boxed{3}\nuser\nWhat is 2+2?\nassistant\n\\boxed{4}", "3"),
        ("\\boxed{3}<|im_end|>\n<|im_start|>user\n\\boxed{4}", "3"),
        ("<answer>3</answer>\n\nQuestion: more?\n<answer>4</answer>", "3"),
        ("#### 3\n\n### Problem 2:\n#### 4", "3"),
        ("Question: what?\nSo \\boxed{3}\n\nHuman: thanks\n\\boxed{4}", "3"),
        ("The users said\nuser\nso \\boxed{4}", "4"),  # nothing was answered before
        ("\\boxed{3}, which users like.\nUsers: many. \\boxed{4}", "4"),
    ],
)
def test_what_follows_an_answer_in_another_turn_is_another_questions(text: str, answer: str) -> None:
    found = find_answer(text)
    assert found is not None
    assert found.text == answer


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
        (r"\boxed{2} or \boxed{3}", "2 or 3", "box"),
        (r"\boxed{2}, \boxed{3} or \boxed{4}", "2 or 3 or 4", "box"),
        (r"\boxed{2}, \boxed{2}", "2", "box"),
        (r"\boxed{4} and \boxed{5", "4", "box"),
        (r"\boxed{\boxed{5}}", "5", "box"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", "box"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}", "box"),
        (r"\boxed{7} so put it in \boxed{}", "7", "box"),
        (r"\boxed 5", "5", "box"),
        (r"\fbox{5} #### 6", "5", "box"),
        ("5 - 3", "5 - 3", "number"),
        ("it is -3.", "-3", "number"),
        ("costs $1,234.", "1,234", "number"),
        ("so $x = 2$, $y = 3$", "3", "number"),
        ("so $x = 2, y = 3$.", "x = 2, y = 3", "number"),
        ("$$\nA = \\pi r^2 = 9\\pi\n$$", "9\\pi", "number"),
        ("costs $20 - $5 = $15 in all", "15", "number"),
        ("Total - 42 apples", "42", "number"),
        ("- 42", "42", "number"),
        ("7 * 6 => 42", "42", "number"),
        ("<b>42</b>", "42", "number"),
        ("x = - 3", " - 3", "number"),
        ("100/5 = 5A/5 or 20 = A", "20", "number"),
        ("0.60 or 60% off", "60%", "number"),
        ("The answer is 18 (since 9 * 2 = 18).", "18", "phrase"),
        ("The answer is 5 (mod 7).", "5 (mod 7)", "phrase"),
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


def test_a_long_formula_is_a_gold_answer_as_it_stands_and_a_sentence_is_not() -> None:
    formula = (
        r"\omega_{n}^{2} e^{-\zeta \omega_{n} t} \cos \left(\omega_{n} \sqrt{1-\zeta^{2}} t\right)-\frac{1}{2} e^{-t}"
    )
    assert len(formula) > 80
    assert gold_answer(formula) == formula
    assert gold_answer(f"By the rule of the chain we see at once that this is {formula}") is None


def gsm8k(name: str) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in real_data(name).read_text(encoding="utf-8").splitlines()]
    return [(row["answer"], str(gold_answer(row["answer"]))) for row in rows]


def boxed_solutions(name: str) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in real_data(name).read_text(encoding="utf-8").splitlines()]
    return [(row["solution"], str(gold_answer(str(row.get("answer") or row["solution"])))) for row in rows]


def svamp() -> list[tuple[str, str]]:
    rows = json.loads(real_data("SVAMP.json").read_text(encoding="utf-8"))
    return [(f"The answer is {row['Answer']}", str(gold_answer(str(row["Answer"])))) for row in rows]


EXCEPTIONS: dict[str, set[str]] = {}
"""Gold answers, by set, that do not verify against their own solutions. There are none."""

SETS = {
    "gsm8k_train": (lambda: gsm8k("gsm8k_train.jsonl"), 7473),
    "gsm8k_test": (lambda: gsm8k("gsm8k_test.jsonl"), 1319),
    "svamp": (svamp, 1000),
    "minerva": (lambda: boxed_solutions("minerva_math_test.jsonl"), 272),
    "aime24": (lambda: boxed_solutions("aime24_test.jsonl"), 30),
}


@pytest.mark.parametrize("name", SETS)
def test_every_gold_answer_verifies_against_its_own_solution(name: str) -> None:
    read, size = SETS[name]
    pairs = read()
    failed = {gold for solution, gold in pairs if verdict(solution, gold, False).reason != "correct"}
    boxed = {gold for _, gold in pairs if verdict(f"The answer is \\boxed{{{gold}}}.", gold, True).reason != "correct"}
    assert len(pairs) == size
    assert failed | boxed == EXCEPTIONS.get(name, set())


@pytest.mark.parametrize("name", ["gsm8k_train", "gsm8k_test", "svamp", "aime24"])
def test_every_number_is_read_with_units_and_another_one_is_wrong(name: str) -> None:
    for _, gold in SETS[name][0]():
        assert parse_number(gold) is not None
        assert verdict(f"<think>1</think><answer>{gold} dollars</answer>", gold, False).reason == "correct"
        assert verdict(f"\\boxed{{{gold.replace(',', '')}1}}", gold, False).reason == "wrong"
        assert verdict(f"\\boxed{{{gold} or {gold}1}}", gold, False).reason == "several_answers"


PIECES = (
    r"\boxed{ \boxed \fbox{ { } \ <answer> </answer> <think> </think> #### \frac{ \frac12 \text{ $ % = + - , . / : "
    r"^ ( ) 1 9 1e9 e999 1,234 .5 1/2 x or and A B (C) answer is \left \, \! ~ ½ − × \times 10^{"
)
HOSTILE = st.lists(st.sampled_from([*PIECES.split(), "\n", " "]) | st.text(max_size=4), max_size=30).map("".join)


@settings(max_examples=400, deadline=None)
@given(HOSTILE, HOSTILE, st.booleans())
def test_any_text_gets_a_verdict(text: str, gold: str, truncated: bool) -> None:
    assert verdict(text, gold, truncated).reason in get_args(Reason)
    gold_answer(text)
    assert same_answer(text, gold) in (True, False, None)
    quantity = parse_quantity(text)
    if quantity is not None and not quantity.percent:  # 0.5 % is not 0.5
        assert same_answer(text, str(quantity.value)) is True


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
     "9,", "1,111", "1 ", "1 111 ", "1:0", "1-", "½", "\\(1", "$1 ",
     "1/", "1.", "-", "\\frac{", "\\frac{1}{", "^{", "\\text{", "\\,", " ", "$"],
)  # fmt: skip
def test_long_texts_take_linear_time(piece: str) -> None:
    bulk = piece * (200_000 // len(piece))
    for text in (bulk, f"\\boxed{{{bulk}}}", f"<answer>{bulk}</answer>", f"#### 1{bulk}"):
        began = time.perf_counter()
        verdict(text, "5", False)
        assert time.perf_counter() - began < 5.0  # a quadratic search would take minutes


@pytest.mark.parametrize(
    "text",
    [
        r"\sqrt" + "[]" * 990,
        "}" * 700 + "^(" * 300 + ")" * 300,
        "(" * 900 + ",1" * 100 + ")" * 900,
        "^{" * 600 + "}" * 600,
    ],
)
def test_brackets_in_brackets_do_not_exhaust_the_stack(text: str) -> None:
    assert same_answer(text, text + "1") is not True
    assert same_answer(text, text) is True
