"""What the study's start models practise: worked solutions, drafts with one mistake, lines of single calculations."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from transformers import Qwen2Tokenizer

from igrpo_lite.problems.synthetic import GENERATORS, Worked, split_of

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))  # build_tiny
from build_tiny import Lessons, Phase, Recipe, Row
from tiny_tokenizer import START

STEP = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")

Calculation = tuple[int, str, int]
"""Left operand, operation, right operand."""


def calculate(left: int, operation: str, right: int) -> int | None:
    """The result, where it is a whole number that is not negative."""
    if operation == "/":
        return left // right if right and left % right == 0 else None
    result = {"+": left + right, "-": left - right, "*": left * right}[operation]
    return result if result >= 0 else None


def calculations(worked: Worked) -> list[Calculation]:
    """The steps of a worked solution, without their results."""
    found = [STEP.fullmatch(step) for step in worked.steps]
    return [(int(match[1]), match[2], int(match[3])) for match in found if match]


def mistaken(worked: Worked, r: random.Random, operations: str = "") -> str:
    """The solution with one mistake, carried through to a wrong answer.

    The mistake is a wrong digit or, where there is a choice of ``operations``, another operation or swapped operands.
    """
    steps = calculations(worked)
    while True:
        bad, wrong_choice = r.randrange(len(steps)), bool(operations) and r.random() < 0.6
        changed: dict[int, int] = {}
        lines: list[str] = []
        value: int | None = None
        for index, (left, operation, right) in enumerate(steps):
            original = calculate(left, operation, right)
            left, right = changed.get(left, left), changed.get(right, right)
            if index == bad and wrong_choice:
                operation, left, right = r.choice(operations), *r.choice(((left, right), (right, left)))
            value = calculate(left, operation, right)
            if index == bad and not wrong_choice and value is not None:
                value += r.choice((-1, 1, -2, 2)) * 10 ** r.randrange(len(str(value)))
            if value is None or value < 0 or original is None:
                break
            changed[original] = value
            lines.append(f"{left}{operation}{right}={value}")
        else:
            if value != worked.answer:
                return "; ".join(lines) + f"; \\boxed{{{value}}}"


def number(r: random.Random, digits: int) -> int:
    """A number of one to ``digits`` digits, every length as likely."""
    return r.randrange(10 ** r.randint(1, digits))


@dataclass(frozen=True)
class Subject:
    """What is taught.

    Attributes:
        example: draws a worked problem that may be practised; the kinds that are hardly practised come this often,
            where every other comes with a weight of 1.
        drill: draws a single calculation.
        operations: what a wrong draft may calculate instead; empty: wrong drafts have wrong digits only.
        terse: for kinds of problems, the share of demonstrations that are nothing but the boxed answer.
    """

    example: Callable[[random.Random, float], Worked]
    drill: Callable[[random.Random], Calculation]
    operations: str = ""
    terse: Mapping[str, float] = field(default_factory=dict)


def synthetic(
    name: str,
    drill: Callable[[random.Random], Calculation],
    rare: Container[str] = (),
    terse: Mapping[str, float] | None = None,
) -> Subject:
    """A synthetic set; only its ``warmup`` split is practised."""

    def example(r: random.Random, weight: float) -> Worked:
        while True:
            worked = GENERATORS[name](r)
            if worked is None or split_of(worked) != "warmup":
                continue
            if worked.kind not in rare or r.random() < weight:
                return worked

    return Subject(example, drill, terse=terse or {})


def addition_drill(r: random.Random) -> Calculation:
    """Sums like those of the set's steps: a running total and the next term."""
    return number(r, 4) % 3000, "+", number(r, 3)


def multiplication_drill(r: random.Random) -> Calculation:
    """Partial products and their sums."""
    if r.random() < 0.3:
        return 10 * number(r, 4), "+", number(r, 4)
    return number(r, 3), "*", r.randint(1, 9) * r.choice((1, 1, 10))


class StudyLessons(Lessons):
    """Endless batches of warm-up rows about one subject; everything else is the bundled model's."""

    def __init__(self, recipe: Recipe, tokenizer: Qwen2Tokenizer, subject: Subject) -> None:
        super().__init__(recipe, tokenizer)
        self.subject = subject

    def drill(self) -> Row:
        """A line of single calculations, of which only the results are learned."""
        ids, learned = list(self.tokenizer.encode(START)), [False]
        count = 0
        while count < self.recipe.drill_length:
            left, operation, right = self.subject.drill(self.random)
            result = calculate(left, operation, right)
            if result is None:
                continue
            count += 1
            for text, learn in ((f"{left}{operation}{right}=", False), (str(result), True), ("; ", True)):
                piece = self.tokenizer.encode(text, add_special_tokens=False)
                ids += piece
                learned += [learn] * len(piece)
        return tuple(ids), tuple(learned)

    def demonstration(self, worked: Worked) -> str:
        """A right solution: in full, or, for a share of some kinds, only the answer."""
        share = self.subject.terse.get(worked.kind, 0.0)
        if share and self.random.random() < share:
            return f"\\boxed{{{worked.answer}}}"
        return worked.solution

    def batch(self, phase: Phase) -> list[Row]:
        """Rows of one step: all drills, all of stage 1, or all of stage 2 with one placement of the draft."""
        recipe, r = self.recipe, self.random
        if r.random() < phase.drills:
            return [self.drill() for _ in range(recipe.batch)]
        second = r.random() < phase.drafts
        builder = self.turns if r.random() < recipe.multi_turn else self.plain
        rows = []
        for _ in range(recipe.batch):
            worked = self.subject.example(r, phase.rare)
            prompt = builder.first(worked.question)
            if second:
                right = r.random() < recipe.right_drafts
                draft = self.demonstration(worked) if right else mistaken(worked, r, self.subject.operations)
                prompt = builder.second(worked.question, prompt, self.answer(draft))
            answer = self.answer(self.demonstration(worked))
            rows.append((prompt.ids + answer, (False,) * len(prompt.ids) + (True,) * len(answer)))
        return rows
