"""Real word problems for the study: SVAMP and short GSM8K problems as texts with slots for numbers.

A problem's solution is a chain of calculations over the numbers in its text, so that the warm-up can practise the
same text with other numbers.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lessons import STEP, Subject, calculate, calculations, multiplication_drill, synthetic

from igrpo_lite.problems.synthetic import Worked

Split = Literal["base", "warmup", "train", "held-out"]

MAX_WORDS = 45
MAX_STEPS = 2
MAX_NUMBER = 9999
SHARED_WORDS = 8

_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")
_ANNOTATION = re.compile(r"<<([^>]*)>>")
_WORD = re.compile(r"[a-z]+|#")
_PAIR = re.compile(r"\( ([^()]+) ([-+*/]) ([^()]+) \)")
_TRIES = 200

Operand = tuple[Literal["number", "result"], int]


@dataclass(frozen=True)
class WordProblem:
    """A question, the numbers in it and the calculations that answer it.

    Attributes:
        kind: source and number of steps, like ``svamp-1``.
        parts: the question's text between its numbers.
        slots: for each number in the text, its place in ``numbers``.
        numbers: the different numbers of the text.
        steps: operands, each a number of the text or the result of an earlier step, and the operation between them.
    """

    kind: str
    parts: tuple[str, ...]
    slots: tuple[int, ...]
    numbers: tuple[int, ...]
    steps: tuple[tuple[Operand, str, Operand], ...]

    def worked(self, numbers: Sequence[int] | None = None) -> Worked | None:
        """Question and solution with these numbers; ``None`` where a step has no whole result or a large one."""
        numbers = self.numbers if numbers is None else numbers
        results: list[int] = []
        lines = []
        for first, operation, second in self.steps:
            values = {"number": numbers, "result": results}
            left, right = (values[source][index] for source, index in (first, second))
            result = calculate(left, operation, right)
            if result is None or result > MAX_NUMBER:
                return None
            results.append(result)
            lines.append(f"{left}{operation}{right}={result}")
        text = self.parts[0]
        for slot, part in zip(self.slots, self.parts[1:], strict=True):
            text += f"{numbers[slot]}{part}"
        return Worked(self.kind, text, tuple(lines), results[-1])

    def varied(self, r: random.Random) -> Worked:
        """The same text with other numbers of the same size; with its own where none are found that fit."""
        for _ in range(_TRIES):
            numbers = [r.randint(max(1, value // 2), value + 5) for value in self.numbers]
            if len(set(numbers)) == len(numbers) and (worked := self.worked(numbers)) is not None:
                return worked
        worked = self.worked()
        assert worked is not None, "problems that are read have a solution"
        return worked


def word_problem(source: str, question: str, steps: Sequence[tuple[str, str, str]], answer: str) -> WordProblem | None:
    """A problem from its text and calculations; ``None`` where it is not a short chain over whole numbers in the text.

    Args:
        steps: left operand, operation, right operand of each calculation.
    """
    question = " ".join(question.split())
    found = [text.replace(",", "") for text in _NUMBER.findall(question)]
    if not 1 <= len(steps) <= MAX_STEPS or len(question.split()) > MAX_WORDS or not all(map(str.isdigit, found)):
        return None
    numbers = tuple(dict.fromkeys(map(int, found)))
    results: list[int] = []
    chain = []
    for left, operation, right in steps:
        operands: list[Operand] = []
        for text in (left, right):
            value = int(text) if text.isdigit() else -1
            if results and value == results[-1]:
                operands.append(("result", len(results) - 1))
            elif value in numbers:
                operands.append(("number", numbers.index(value)))
            elif value in results:
                operands.append(("result", results.index(value)))
            else:
                return None
        result = calculate(int(left), operation, int(right))
        if result is None:
            return None
        results.append(result)
        chain.append((operands[0], operation, operands[1]))
    parts = tuple(_NUMBER.split(question))
    slots = tuple(numbers.index(int(text)) for text in found)
    problem = WordProblem(f"{source}-{len(chain)}", parts, slots, numbers, tuple(chain))
    worked = problem.worked()
    return problem if worked is not None and str(worked.answer) == answer else None


def read_svamp(path: Path) -> Iterator[WordProblem]:
    """SVAMP's own file, a JSON list; ``Equation`` is a term in brackets."""
    for row in json.loads(path.read_text(encoding="utf-8")):
        term, steps = row["Equation"].replace(".0", ""), []
        while match := _PAIR.search(term):
            left, operation, right = match.groups()
            result = calculate(int(left), operation, int(right)) if left.isdigit() and right.isdigit() else None
            if result is None:
                break
            steps.append((left, operation, right))
            term = term[: match.start()] + str(result) + term[match.end() :]
        body = row["Body"].strip()
        question = f"{body}{'' if body.endswith(('.', '?', '!', ',')) else ','} {row['Question']}"
        problem = word_problem("svamp", question, steps, f"{row['Answer']:.0f}") if term.isdigit() else None
        if problem is not None:
            yield problem


def read_gsm8k(path: Path) -> Iterator[WordProblem]:
    """GSM8K's own file, JSON lines; its solutions carry their calculations as ``<<48/2=24>>``."""
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        notes = [STEP.fullmatch(note.replace(" ", "")) for note in _ANNOTATION.findall(row["answer"])]
        if not all(notes):
            continue
        steps = [(match[1], match[2], match[3]) for match in notes if match]
        answer = row["answer"].rpartition("####")[2].strip().replace(",", "")
        problem = word_problem("gsm8k", row["question"], steps, answer)
        if problem is not None:
            yield problem


def split(problems: Iterable[WordProblem]) -> dict[Split, list[WordProblem]]:
    """The problems by split, each text once.

    SVAMP asks several questions about most of its stories. Half of the stories, with all their questions, are the
    ``base`` of the warm-up. Of the other half, each question is by itself for the rest of the warm-up (3 of 10), for
    reinforcement learning (4) or held out (3): no question is in two splits, but its story can be. (After the base
    alone, so with stories kept apart, a model of this size solved 1 to 7 % of the held-out problems.) Stories are the
    same where two texts share :data:`SHARED_WORDS` words in a row, whatever their numbers. All is decided by hashes of
    the texts.
    """
    distinct = list({problem.parts: problem for problem in problems}.values())
    found: dict[Split, list[WordProblem]] = {"base": [], "warmup": [], "train": [], "held-out": []}
    for problem, story in zip(distinct, stories(distinct), strict=True):
        if _digest(story) % 10 < 5:
            found["base"].append(problem)
            continue
        residue = _digest("question " + "#".join(problem.parts)) % 10
        found["warmup" if residue < 3 else "train" if residue < 7 else "held-out"].append(problem)
    for share in found.values():
        random.Random(0).shuffle(share)
    return found


def stories(problems: Sequence[WordProblem]) -> list[str]:
    """For each problem the name of its story: the first, in order of the alphabet, of the texts that tell it."""
    story = list(range(len(problems)))

    def root(index: int) -> int:
        while story[index] != index:
            index = story[index]
        return index

    owners: dict[tuple[str, ...], int] = {}
    for index, problem in enumerate(problems):
        tokens = _WORD.findall("#".join(problem.parts).lower())
        for start in range(max(1, len(tokens) - SHARED_WORDS + 1)):
            owner = owners.setdefault(tuple(tokens[start : start + SHARED_WORDS]), index)
            story[root(index)] = root(owner)
    names: dict[int, str] = {}
    for index, problem in enumerate(problems):
        text = "#".join(problem.parts)
        names[root(index)] = min(text, names.get(root(index), text))
    return [names[root(index)] for index in range(len(problems))]


def _digest(text: str) -> int:
    return hashlib.sha256(text.encode()).digest()[0]


def write_problems(problems: Sequence[WordProblem], path: Path) -> None:
    """JSON lines with ``question``, ``answer``, ``kind`` and ``solution``."""
    with path.open("w", encoding="utf-8") as file:
        for problem in problems:
            worked = problem.worked()
            assert worked is not None, "problems that are read have a solution"
            row = {"question": worked.question, "answer": str(worked.answer)}
            row |= {"kind": worked.kind, "solution": worked.solution}
            print(json.dumps(row, ensure_ascii=False), file=file)


def subject(problems: Sequence[WordProblem]) -> Subject:
    """These problems with ever other numbers; calculations are drilled as they occur in them.

    Beside them come the bundled model's templates, as often as a phase's ``rare`` says: from these a model learns
    within minutes to copy numbers out of a question, which the diverse texts alone teach slowly.
    """
    kinds = sorted({problem.kind for problem in problems})
    by_kind = {kind: [problem for problem in problems if problem.kind == kind] for kind in kinds}
    weights = [len(by_kind[kind]) ** 0.5 for kind in kinds]
    templates = synthetic("two-step", multiplication_drill).example

    def example(r: random.Random, template: float = 0.0) -> Worked:
        if r.random() < template:
            return templates(r, 1.0)
        return r.choice(by_kind[r.choices(kinds, weights)[0]]).varied(r)

    return Subject(example, lambda r: r.choice(calculations(example(r))), operations="+-*/")
