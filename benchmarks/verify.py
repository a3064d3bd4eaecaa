"""The answer checker against math-verify: checks per second, mistakes on the hard pairs, and hostile inputs.

Both sides judge the same completions and are given the whole text. Simple checks are word problems' numbers, right and
wrong, each seen once; our caches are emptied before every turn.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from measuring import paired, provenance, shown, spread, take_turns, write_json

from igrpo_lite.answers import forms, quantities
from igrpo_lite.answers.answers import Reason
from igrpo_lite.answers.checker import AnswerChecker

PAIRS = Path(__file__).resolve().parents[1] / "tests" / "data" / "hard_pairs.jsonl"
Item = tuple[str, str, bool]

_STORY = "First we add 3 and 4, which is 7. Then we take it {n} times, so 7 * {n} = {product}.\n\n"
_ENDS = ("The answer is \\boxed{{{a}}}.", "Thus \\boxed{{{a}}} dollars are left.", "So $\\boxed{{{a}}}$ it is.")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checks", type=int, default=3000, help="simple checks in a turn")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--hostile", type=int, default=10_000, help="hostile inputs")
    parser.add_argument("--timeout", type=float, default=1.0, help="seconds of one opinion on a hostile input")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args(arguments)
    logging.disable(logging.CRITICAL)  # math-verify logs every time limit that it reaches
    result = provenance("verify.py", arguments, threads=1)
    result["versions"]["math-verify"] = version("math-verify")
    result |= {
        "speed": speed(options.checks, options.repeats),
        "hard_pairs": hard_pairs(),
        "hostile": hostile(options.hostile, options.timeout),
    }
    write_json(options.json, result)
    return result


def speed(count: int, repeats: int) -> dict[str, Any]:
    """Checks per second of processor time, on one core."""
    items = simple_checks(count)
    checker = AnswerChecker()

    def ours() -> None:
        quantities.parse_quantity.cache_clear()
        forms.parse_cached.cache_clear()
        checker.judge(items)

    def baseline() -> None:
        for text, gold, _ in items:
            math_verify_says(text, gold)

    baseline()  # loads sympy
    seconds = take_turns({"igrpo-lite": ours, "math-verify": baseline}, repeats)
    rates = {name: spread([count / each for each in clocks["cpu"]]) for name, clocks in seconds.items()}
    ratio = paired(seconds["math-verify"]["cpu"], seconds["igrpo-lite"]["cpu"])
    for name, rate in rates.items():
        print(f"{name:<12} {shown(rate, digits=0):>28} simple checks/s")
    print(f"{'ratio':<12} {shown(ratio, digits=1):>28}")
    return {"checks": count, "repeats": repeats, "per_second": rates, "ratio": ratio}


def simple_checks(count: int) -> list[Item]:
    """Short solutions that end in a number in one of its notations; two in three state the gold answer."""
    draw = random.Random(0)
    notations: list[Callable[[int], str]] = [str, lambda n: f"{n:,}", lambda n: f"{n}.0", lambda n: f"\\${n}"]
    items = []
    for at in range(count):
        gold = 100 + 7 * at
        stated = draw.choice(notations)(gold + (0 if at % 3 else draw.randint(1, 9)))
        story = _STORY.format(n=at, product=7 * at)
        items.append((story + draw.choice(_ENDS).format(a=stated), str(gold), False))
    return items


def math_verify_says(text: str, gold: str) -> bool:
    """The way its documentation uses it; the gold answer in dollar signs, as it asks for."""
    from math_verify import parse, verify

    return bool(verify(parse(f"${gold}$"), parse(text)))


def hard_pairs() -> dict[str, Any]:
    """Mistakes of both on ``tests/data/hard_pairs.jsonl``, which was written for our rules: its equal pairs hold some
    that are a matter of opinion, the unequal ones hardly."""
    rows = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    with AnswerChecker() as checker:
        verdicts = checker.judge([(row["completion"], row["gold"], False) for row in rows])
    said = {
        "igrpo-lite": [verdict.reason == "correct" for verdict in verdicts],
        "math-verify": [math_verify_says(row["completion"], row["gold"]) for row in rows],
    }
    counts = Counter(row["expected"] for row in rows)
    result: dict[str, Any] = {"equal": counts[True], "not_equal": counts[False]}
    for name, answers in said.items():
        wrong = [row for row, answer in zip(rows, answers, strict=True) if answer != row["expected"]]
        false_correct = sum(not row["expected"] for row in wrong)
        result[name] = {"false_correct": false_correct, "false_wrong": len(wrong) - false_correct}
        print(
            f"{name:<12} false correct {false_correct} of {counts[False]}, false wrong {len(wrong) - false_correct} ",
            end="",
        )
        print(f"of {counts[True]}")
    return result


def hostile(count: int, timeout: float) -> dict[str, Any]:
    """Judges generated texts one by one, with opinions limited to ``timeout``; an exception would end the run."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    seconds: list[float] = []
    reasons: Counter[Reason] = Counter()
    slow: list[tuple[float, int, Reason]] = []
    longest = 0
    with AnswerChecker(timeout=timeout, workers=3) as checker:
        # Every process is started before anything is timed; a killed one is replaced while the next input is judged.
        checker.judge([(rf"\boxed{{{letter}+1}}", f"1+{letter}", False) for letter in "abc"])

        @settings(
            max_examples=count,
            database=None,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(completions(), golds(), st.booleans())
        def judge(text: str, gold: str, truncated: bool) -> None:
            nonlocal longest
            began = time.perf_counter()
            (verdict,) = checker.judge([(text, gold, truncated)])
            seconds.append(time.perf_counter() - began)
            reasons[verdict.reason] += 1
            slow.append((seconds[-1], len(text), verdict.reason))
            slow.sort(reverse=True)
            del slow[5:]
            longest = max(longest, len(text))

        judge()
    ordered = sorted(seconds)
    result = {
        "inputs": len(seconds),
        "longest_text": longest,
        "opinion_timeout": timeout,
        "seconds": {"median": ordered[len(ordered) // 2], "p99": ordered[int(0.99 * len(ordered))], "max": ordered[-1]},
        "over_2_s": sum(each > 2 for each in seconds),
        "slowest": [dict(zip(("seconds", "characters", "reason"), each, strict=True)) for each in slow],
        "reasons": dict(reasons.most_common()),
    }
    print(f"hostile      {len(seconds):,} inputs up to {longest:,} characters, slowest {ordered[-1]:.2f} s")
    return result


_MARKS = (
    r"\boxed{ \boxed \fbox{ { } \ \\ <answer> </answer> <think> </think> #### \frac{ \frac12 \frac \sqrt \sqrt[ \text{ "
    r"$ % = + - , ; . ... / : ^ _ ( ) [ ] \{ \} \langle \cup \cap \in \pm \leq < > ≤ 1 9 1e9 e999 1,234 .5 1/2 x y i e "
    r"or and A B (C) answer is \left \right \, \! ~ ½ − × π √ ∞ \times 10^{ \infty \pi ! | & \begin{pmatrix} "
    r"\overline{ €5 \$5 50% cm km/h 🙂 ١٢ ﬀ <|im_end|>"
)
_PIECES = (*_MARKS.split(), " ", "\n", "\nuser\n", "\nQuestion:", "\u202f", "\u200b", "\ud7ff")


def expressions() -> Any:
    """Expressions that have to be asked about: power towers, factorials of factorials, nested fractions and roots."""
    from hypothesis import strategies as st

    leaves = st.sampled_from(["x", "y", "n", "e", "i", r"\pi", "2", "9", "99", "0.5", "123456789"])

    def grown(inner: Any) -> Any:
        two = st.tuples(inner, inner)
        return st.one_of(
            *(
                two.map(lambda pair, form=form: form.format(*pair))
                for form in ("{}+{}", "{}-{}", "({})({})", "{{{}}}^{{{}}}", r"\frac{{{}}}{{{}}}")
            ),
            *(
                inner.map(lambda one, form=form: form.format(one))
                for form in (r"\sqrt{{{}}}", "({})!", r"\sin({})", r"\ln({})")
            ),
        )

    return st.recursive(leaves, grown, max_leaves=12)


def completions() -> Any:
    from hypothesis import strategies as st

    piece = st.sampled_from(_PIECES) | st.text(max_size=4)
    mixed = st.lists(piece, max_size=40).map("".join)
    size = st.sampled_from([30] * 20 + [2000] * 10 + [50_000] * 2 + [1_000_000])
    repeated = st.tuples(st.lists(piece, min_size=1, max_size=3).map("".join), size).map(
        lambda drawn: (drawn[0] or "{") * max(1, drawn[1] // max(1, len(drawn[0])))
    )
    content = st.one_of(mixed, mixed, repeated, expressions(), expressions())
    frame = st.sampled_from(
        ["%s", "\\boxed{%s}", "<answer>%s</answer>", "#### 1%s", "The answer is %s.", "\\boxed{1}\n%s"]
    )
    return st.tuples(frame, content).map(lambda drawn: drawn[0].replace("%s", drawn[1]))


def golds() -> Any:
    from hypothesis import strategies as st

    usual = st.sampled_from(
        ["5", "1/2", "50%", "A", "yes", "(1,2)", "[0,1)", "1, 2", r"\sqrt{2}", "x^2+1", r"2\pi", "x=5"]
    )
    return st.one_of(usual, expressions(), st.lists(st.sampled_from(_PIECES), max_size=10).map("".join))


if __name__ == "__main__":
    main()
