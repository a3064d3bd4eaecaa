"""What the tests of rewards share: one problem, completions, and scorers of functions written to real files."""

from __future__ import annotations

from collections.abc import Callable

from igrpo_lite.rewards.scorer import Scorer
from igrpo_lite.types import Completion, Problem, Prompt

PROBLEM = Problem("p1", "How many?", "7", {"level": "easy"})
PROMPT = Prompt("How many?", (1, 2))
RIGHT, WRONG = r"It is \boxed{7}", r"It is \boxed{8}"

Make = Callable[..., Scorer]


def completion(text: str, finish: str = "stop") -> Completion:
    return Completion((5, 6), text, (-0.1, -0.2), "length" if finish == "length" else "stop")


def parts(scorer: Scorer, *texts: str, name: str = "reward") -> list[float | None]:
    return [score.parts[name] for score in scorer.score(PROBLEM, PROMPT, [completion(text) for text in texts])]
