"""The answer checker: traps that others fall into, math-verify as fallback in its subprocesses, hostile texts."""

from __future__ import annotations

import contextlib
import importlib
import json
import subprocess
import sys
import threading
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import psutil
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

import igrpo_lite
from igrpo_lite.answers.answers import EXPLICIT, Reason, verdict
from igrpo_lite.answers.checker import AnswerChecker
from igrpo_lite.answers.opinion import MEMORY, equivalent

TESTS = Path(__file__).resolve().parent
HARD = [json.loads(line) for line in (TESTS / "data" / "hard_pairs.jsonl").read_text(encoding="utf-8").splitlines()]
TOWER = r"\boxed{9^{9^{9^9}}}"
ASKED = (r"\boxed{1+x}", "x+1", False)
"""A pair that only the fallback can judge, quickly."""


@pytest.fixture(scope="module")
def checker():
    with AnswerChecker() as made:
        yield made


def children() -> set[int]:
    return {process.pid for process in psutil.Process().children()}


def hard_items() -> list[tuple[str, str, bool]]:
    return [(row["completion"], row["gold"], False) for row in HARD]


def test_the_hard_pairs_are_many_and_diverse():
    pairs = Counter((row["completion"], row["gold"]) for row in HARD)
    assert len(pairs) == len(HARD) >= 300
    assert sum(not row["expected"] for row in HARD) >= 150
    assert len({row["kind"] for row in HARD}) >= 15


def test_no_hard_pair_is_judged_wrongly(checker):
    verdicts = checker.judge(hard_items())
    judged = [(row["completion"], row["gold"], found.reason) for row, found in zip(HARD, verdicts, strict=True)]
    assert [item for item, row in zip(judged, HARD, strict=True) if (item[2] == "correct") != row["expected"]] == []


def test_without_the_second_opinion_nothing_becomes_correct_that_is_not():
    for row in HARD:
        found = verdict(row["completion"], row["gold"], False)
        assert row["expected"] or found.reason != "correct"
        assert found.reason != "timeout"


# What math-verify 0.9.0 says of these: nothing found in the tags, both numbers of two boxes, the run-on's answer, 0 for
# 1\,000, 1 for 1e3, times as fractions, letters and words unreadable, percent one way only, the rest "equal".
TRAPS = [
    ("<answer>42</answer>", "42", "correct"),
    ("<answer>$18</answer>", "18", "correct"),
    ("<answer>18 dollars</answer>", "18", "correct"),
    ("<SOLUTION>\n42\n</SOLUTION>", "42", "correct"),
    ("#### 42", "42", "correct"),
    ("The answer is 42.", "42", "correct"),
    (r"\boxed{2} then \boxed{3}", "3", "correct"),
    (r"\boxed{2} then \boxed{3}", "2", "wrong"),
    ("Final: \\boxed{3}\nuser\nAnd 2+2?\nassistant\n\\boxed{4}", "3", "correct"),
    ("Final: \\boxed{3}\nuser\nAnd 2+2?\nassistant\n\\boxed{4}", "4", "wrong"),
    (r"\boxed{1\,000}", "1000", "correct"),
    (r"\boxed{1\,000}", "0", "wrong"),
    ("answer: 1e3", "1000", "correct"),
    ("answer: 1e3", "1", "wrong"),
    (r"\boxed{6:30}", "6:30", "correct"),
    (r"\boxed{6:30}", "1/5", "unparsed"),
    (r"\boxed{12}", "12:30", "unparsed"),
    (r"\boxed{A}", "A", "correct"),
    (r"\boxed{\text{(A)}}", "A", "correct"),
    (r"\boxed{yes}", "Yes", "correct"),
    (r"\boxed{Evelyn}", r"\text{Evelyn}", "correct"),
    (r"\boxed{(3,4)}", "(3,4)", "correct"),
    (r"\boxed{(2,1)}", "(1,2)", "wrong"),
    (r"\boxed{0.5}", r"50\%", "correct"),
    (r"\boxed{50\%}", "0.5", "correct"),
    (r"\boxed{50\%}", "50", "correct"),
    (r"\boxed{50}", r"50\%", "correct"),
    (r"\boxed{50}", "0.5", "wrong"),
    (r"\boxed{\frac1{2004!}}", r"$\frac1{2006!}$", "wrong"),
    (r"\boxed{1.414}", r"\sqrt2", "wrong"),
    (r"\boxed{1.41421356}", r"\sqrt2", "wrong"),
    (r"\boxed{\sqrt2}", "1.41421356", "unparsed"),
    (r"\boxed{7=7}", "7", "unparsed"),
    (r"\boxed{3+4}", "7", "unparsed"),
    (r"\boxed{1,2,3,4,5,6,7,8,9}", "7", "several_answers"),
    (r"\boxed{[0,10]}", "7", "wrong"),
]


@pytest.mark.parametrize(("text", "gold", "reason"), TRAPS)
def test_known_traps(checker, text, gold, reason):
    assert checker.judge([(text, gold, False)])[0].reason == reason


def test_what_takes_forever_costs_one_slot_and_not_the_run():
    before = children()
    with AnswerChecker(timeout=1.0, workers=2) as checker:
        (warm,) = checker.judge([ASKED])
        items = [(TOWER, r"\sqrt2", False), ASKED, (r"\boxed{\sqrt{8}}", r"2\sqrt2", False), (TOWER, r"\sqrt3", False)]
        items += [(rf"\boxed{{{n}+\pi}}", rf"\pi+{n}", False) for n in range(2, 8)]
        reasons = [found.reason for found in checker.judge(items)]
        assert warm.reason == "correct"
        assert reasons == ["timeout", "correct", "correct", "timeout", *["correct"] * 6]
        assert checker.judge([(r"\boxed{\sqrt{12}}", r"2\sqrt3", False)])[0].reason == "correct"
    assert children() == before


def test_processes_start_with_the_first_question_and_end_with_the_checker():
    before = children()
    checker = AnswerChecker(workers=1)
    easy = [
        (r"\boxed{5}", "5", False),
        (r"\boxed{3+4}", "7", False),
        ("", r"\sqrt2", False),
        (r"\boxed{cat}", "dog", False),
    ]
    checker.judge(easy)
    assert children() == before
    checker.judge([ASKED])
    (started,) = children() - before
    if sys.platform == "linux":
        assert psutil.Process(started).rlimit(psutil.RLIMIT_AS)[0] == MEMORY
    checker.close()
    assert children() == before
    assert checker.judge([ASKED])[0].reason == "correct"  # remembered
    assert children() == before


def test_one_checker_serves_several_threads():
    items = [(rf"\boxed{{{n}x+y}}", rf"y+{n}x", False) for n in range(2, 14)]
    found: dict[int, list[str]] = {}
    with AnswerChecker(workers=2) as checker:

        def judge(at: int) -> None:
            found[at] = [verdict.reason for verdict in checker.judge(items[at : at + 6])]

        threads = [threading.Thread(target=judge, args=(at,)) for at in (0, 3, 6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {at: ["correct"] * 6 for at in (0, 3, 6)}


def test_truncated_and_strict(checker):
    cut = checker.judge([("so the answer is 7", "7", True), (r"\boxed{7} and", "7", True), ("it is 7", "7", False)])
    assert [(found.reason, found.source in EXPLICIT) for found in cut] == [
        ("truncated", False),
        ("correct", True),
        ("correct", False),
    ]


def test_the_package_offers_it_as_a_function():
    assert igrpo_lite.verify(r"so \boxed{1,234}", 1234).reason == "correct"
    assert igrpo_lite.verify("#### 18", "He has 9 + 9.\n#### 18").reason == "correct"
    assert igrpo_lite.verify("it is 18", "18", truncated=True).reason == "truncated"
    assert igrpo_lite.verify(*ASKED[:2]).reason == "correct"
    assert igrpo_lite.verify(None, "18").reason == "no_answer"
    assert igrpo_lite.verify("it is 18", None).reason == "unparsed"


def python(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", script, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_it_works_without_math_verify():
    script = (
        "import sys; sys.modules['math_verify'] = None\n"
        "import igrpo_lite as i\n"
        "print([i.verify(rf'\\boxed{{{a}}}', g).reason for a, g in (('0.5', '1/2'), ('1+x', 'x+1'), ('x', 'y'))])\n"
    )
    done = python(script)
    assert (done.stdout, done.stderr) == ("['correct', 'unparsed', 'wrong']\n", "")


def test_the_interpreter_ends_while_an_opinion_is_due():
    script = (
        "import sys, threading, time, igrpo_lite.answers.checker as c\n"
        "checker = c.AnswerChecker(timeout=30.0, workers=1)\n"
        "ask = lambda *pair: checker.judge([(*pair, False)])\n"
        "ask(r'\\boxed{1+x}', 'x+1')\n"
        "threading.Thread(target=ask, args=(sys.argv[1], r'\\sqrt2'), daemon=True).start()\n"
        "time.sleep(0.3)\n"
        "print(checker._workers[0].pid)\n"
    )
    done = python(script, TOWER)
    assert (done.returncode, done.stderr) == (0, "")
    worker = int(done.stdout)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(worker).wait(timeout=60)
    assert not psutil.pid_exists(worker)


def test_importing_and_exact_judging_load_neither_sympy_nor_torch():
    script = (
        "import sys, igrpo_lite; igrpo_lite.verify('\\\\boxed{5}', '5')\n"
        "print(sorted({'torch', 'sympy', 'math_verify', 'numpy', 'pydantic'} & set(sys.modules)))\n"
    )
    assert python(script).stdout == "[]\n"


coefficients = st.integers(-9, 9).filter(bool)


@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.generate])
@example(-3, 8, -5, 1, -5)  # a root that is a simple fraction
@given(coefficients, coefficients, coefficients, coefficients, coefficients)
def test_an_opinion_on_polynomials_is_their_expansion(a, b, c, d, error):
    """The product of two linear factors against its coefficients, worked out here."""
    factors = f"({a} x + ({b})) ({c} x + ({d}))"
    expanded = [a * c, a * d + b * c, b * d]
    text = "({}) x^{{2}} + ({}) x + ({})"
    assert equivalent(text.format(*expanded), factors) is True
    assert equivalent(text.format(expanded[0], expanded[1], expanded[2] + error), factors) is False
    assert equivalent(text.format(*(Fraction(n, 7) for n in expanded)), factors) is False


def test_an_opinion_tells_numbers_apart_that_rounding_does_not():
    assert equivalent(r"\sqrt{2}", r"\sqrt{2} + 10^{-22}") is False
    assert equivalent(r"\frac{1}{10^{40}} \pi", r"\frac{1}{10^{41}} \pi") is False
    assert equivalent("x y + 1", "1 + y x") is True
    assert equivalent("x < y", "y > x") is True
    assert equivalent("x < y", "x > y") is False
    assert equivalent(r"\frac{", "x") is None


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(TESTS.parent / "benchmarks"))
    try:
        return importlib.import_module("verify")
    finally:
        del sys.path[0]


def test_hostile_texts_get_a_verdict(benchmark: Any):
    """A few of what the benchmark script runs by the ten thousand."""
    found = benchmark.hostile(100, timeout=1.0)
    assert found["inputs"] >= 100
    assert set(found["reasons"]) <= set(get_args(Reason))
    assert len(found["reasons"]) >= 5


def test_the_benchmark_measures_both_sides_on_checks_with_known_verdicts(benchmark: Any):
    items = benchmark.simple_checks(60)
    right = [verdict(*item).reason == "correct" for item in items]
    assert right == [at % 3 > 0 for at in range(60)]
    assert right == [benchmark.math_verify_says(text, gold) for text, gold, _ in items]
