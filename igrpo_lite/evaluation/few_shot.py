"""Worked examples for the prompt, taken from the training problems. Off by default: after reinforcement learning on
plain prompts they cost accuracy more often than they bring any."""

from __future__ import annotations

import re
from collections.abc import Sequence

from igrpo_lite.answers.answers import boxes, find_answer
from igrpo_lite.answers.equality import same_answer
from igrpo_lite.errors import DataError
from igrpo_lite.prompts import AnswerStyle, Shot
from igrpo_lite.sampling.base import request_seed
from igrpo_lite.types import Problem

COLUMNS = ("solution", "answer", "rationale", "output", "response")
"""Columns in which a worked solution is looked for, after the answer column that the settings name."""

MIN_WORDS = 7
"""Words and numbers beside the answer from which on a text is a worked solution (``Therefore, the final answer is
$\\boxed{18}$`` has six)."""

_WORD = re.compile(r"\w+")
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")


def worked_examples(
    problems: Sequence[Problem], count: int, style: AnswerStyle, answer_column: str | None = None
) -> tuple[Shot, ...]:
    """``count`` questions with a worked solution in the style asked for; a hash of the questions chooses them, so the
    order of the rows and the run's seed are no matter.

    Raises:
        DataError: fewer problems have one.
    """
    columns = (answer_column, *COLUMNS) if answer_column else COLUMNS
    shots: list[Shot] = []
    for problem in sorted(problems, key=lambda problem: request_seed("few-shot", problem.question)):
        if len(shots) == count:
            break
        if (solution := worked_solution(problem, style, columns)) is not None:
            shots.append((problem.question, solution))
    if len(shots) < count:
        raise DataError(
            f"--few-shot {count}: only {len(shots)} of {len(problems)} training problems have a worked solution, that "
            f"is steps and the final answer in one of the columns {', '.join(columns)}; leave --few-shot out, or use "
            "--data that has them"
        )
    return tuple(shots)


def worked_solution(problem: Problem, style: AnswerStyle, columns: Sequence[str] = COLUMNS) -> str | None:
    """The problem's solution as a model should write it, or ``None`` where no column holds one that ends in the gold
    answer. GSM8K's calculator marks and its line after ``####`` are taken out."""
    for column in columns:
        text = problem.columns.get(column)
        if not isinstance(text, str) or not (found := find_answer(text)) or not same_answer(found.text, problem.answer):
            continue
        before, mark, last = text.rpartition("####")  # the answer's line, or a heading
        steps = before if mark and same_answer(last.strip(), problem.answer) else text
        steps = _CALCULATOR.sub("", steps).strip()
        if len(_WORD.findall(steps)) < MIN_WORDS + len(_WORD.findall(problem.answer)):
            continue
        if style == "tags":
            return f"<think>\n{steps}\n</think>\n<answer>{problem.answer}</answer>"
        return steps if any(boxes(steps)) else f"{steps}\nThe answer is \\boxed{{{problem.answer}}}."
    return None
