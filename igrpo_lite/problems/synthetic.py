"""Problems made from a seed: two-step word problems, multi-digit multiplication, additions.

They need no download and no public test set can leak into them. A problem's split is a hash of its content, so the
splits ``train``, ``validation`` and ``test`` (and ``warmup``, from which the bundled model learned before any
reinforcement learning) share no problem whatever the seed or the number of problems drawn.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from igrpo_lite.types import Problem

Split = Literal["warmup", "train", "validation", "test"]

_SPLIT_OF_RESIDUE: tuple[Split, ...] = ("test", "validation", "train", "train", "train", "train") + ("warmup",) * 6

NAMES = ("Ana", "Ben", "Eva", "Ian", "Kim", "Leo", "Mia", "Tom")
THINGS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps")


@dataclass(frozen=True, slots=True)
class Worked:
    """A problem with a worked solution in the form the bundled model writes (``steps; \\boxed{answer}``)."""

    kind: str
    question: str
    steps: tuple[str, ...]
    answer: int

    @property
    def solution(self) -> str:
        return "; ".join(self.steps) + f"; \\boxed{{{self.answer}}}"


def _buy_give(r: random.Random) -> Worked | None:
    a, b, c = r.randint(2, 49), r.randint(2, 49), r.randint(2, 49)
    if not (a + b <= 99 and a + b - c >= 0):
        return None
    question = f"{r.choice(NAMES)} has {a} {{o}}, buys {b} and gives away {c}. How many {{o}} are left?"
    return _two_step("buy-give", question, r, f"{a}+{b}", a + b, f"{a + b}-{c}", a + b - c)


def _lose_sell(r: random.Random) -> Worked | None:
    a, b, c = r.randint(20, 99), r.randint(2, 49), r.randint(2, 49)
    if a - b - c < 0:
        return None
    question = f"{r.choice(NAMES)} has {a} {{o}}, loses {b} and sells {c}. How many {{o}} are left?"
    return _two_step("lose-sell", question, r, f"{a}-{b}", a - b, f"{a - b}-{c}", a - b - c)


def _boxes_more(r: random.Random) -> Worked | None:
    a, b, c = r.randint(2, 9), r.randint(2, 9), r.randint(2, 49)
    if a * b + c > 99:
        return None
    question = f"There are {a} boxes of {b} {{o}} each and {c} more. How many {{o}} are there?"
    return _two_step("boxes-more", question, r, f"{a}*{b}", a * b, f"{a * b}+{c}", a * b + c)


def _bags_lose(r: random.Random) -> Worked | None:
    a, b, c = r.randint(2, 9), r.randint(2, 9), r.randint(2, 49)
    if a * b - c < 0:
        return None
    question = f"{r.choice(NAMES)} buys {a} bags of {b} {{o}} each and loses {c}. How many {{o}} are left?"
    return _two_step("bags-lose", question, r, f"{a}*{b}", a * b, f"{a * b}-{c}", a * b - c)


def _two_find(r: random.Random) -> Worked | None:
    a, b, c = r.randint(2, 30), r.randint(2, 30), r.randint(2, 39)
    first, second = r.sample(NAMES, 2)
    question = f"{first} has {a} {{o}}, {second} has {b} and they find {c}. How many {{o}} are there?"
    return _two_step("two-find", question, r, f"{a}+{b}", a + b, f"{a + b}+{c}", a + b + c)


def _two_step(kind: str, question: str, r: random.Random, e1: str, v1: int, e2: str, v2: int) -> Worked:
    return Worked(kind, question.format(o=r.choice(THINGS)), (f"{e1}={v1}", f"{e2}={v2}"), v2)


def _multiplication(r: random.Random) -> Worked:
    digits_a, digits_b = r.choice(((2, 1), (2, 2), (3, 1), (3, 2)))
    a = r.randint(10 ** (digits_a - 1), 10**digits_a - 1)
    b = r.randint(max(2, 10 ** (digits_b - 1)), 10**digits_b - 1)
    tens, ones = b - b % 10, b % 10
    if tens and ones:
        steps: tuple[str, ...] = (f"{a}*{tens}={a * tens}", f"{a}*{ones}={a * ones}", f"{a * tens}+{a * ones}={a * b}")
    else:
        steps = (f"{a}*{b}={a * b}",)
    return Worked(f"{digits_a}x{digits_b}", f"What is {a} * {b}?", steps, a * b)


def _addition(r: random.Random) -> Worked:
    terms = [r.randint(2, 999) for _ in range(r.randint(2, 4))]
    steps, total = [], terms[0]
    for term in terms[1:]:
        steps.append(f"{total}+{term}={total + term}")
        total += term
    return Worked(f"{len(terms)}-terms", f"What is {' + '.join(map(str, terms))}?", tuple(steps), total)


TWO_STEP_KINDS: dict[str, Callable[[random.Random], Worked | None]] = {
    "buy-give": _buy_give,
    "lose-sell": _lose_sell,
    "boxes-more": _boxes_more,
    "bags-lose": _bags_lose,
    "two-find": _two_find,
}


def _two_step_any(r: random.Random) -> Worked | None:
    return TWO_STEP_KINDS[r.choice(tuple(TWO_STEP_KINDS))](r)


GENERATORS: dict[str, Callable[[random.Random], Worked | None]] = {
    "two-step": _two_step_any,
    "multiplication": _multiplication,
    "addition": _addition,
}
"""Name of each synthetic problem set and what draws one candidate (``None``: outside the set's range, draw again)."""


def split_of(worked: Worked) -> Split:
    """The split a problem belongs to: a hash of its kind and calculation, names and objects ignored."""
    key = f"{worked.kind}|{worked.steps}".encode()
    return _SPLIT_OF_RESIDUE[hashlib.sha256(key).digest()[0] % len(_SPLIT_OF_RESIDUE)]


def draw(name: str, split: Split, seed: int) -> Iterator[Worked]:
    """Endless stream of distinct problems of one set and split; equal arguments give the equal stream."""
    r = random.Random(f"{name}/{split}/{seed}")
    seen: set[str] = set()
    while True:
        worked = GENERATORS[name](r)
        if worked is None or worked.question in seen or split_of(worked) != split:
            continue
        seen.add(worked.question)
        yield worked


def load(name: str, split: Split, size: int, seed: int = 0) -> list[Problem]:
    """``size`` problems of one synthetic set, with the columns ``kind`` and ``solution``."""
    stream = draw(name, split, seed)
    problems = []
    for index in range(size):
        worked = next(stream)
        columns = {"kind": worked.kind, "solution": worked.solution}
        problems.append(Problem(f"{name}/{split}/{index}", worked.question, str(worked.answer), columns))
    return problems
