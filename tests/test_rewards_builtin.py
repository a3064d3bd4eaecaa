"""Built-in rewards beside TRL's functions of the same papers, and the properties that TRL's tests do not show."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from reward_parts import PROBLEM, PROMPT, RIGHT, WRONG

from igrpo_lite.config import RunConfig
from igrpo_lite.rewards.builtin import (
    COSINE_ENDS,
    cosine_scaled,
    format_reward,
    random_reward,
    repetition_penalty,
    soft_overlong,
)
from igrpo_lite.rewards.scorer import Scorer
from igrpo_lite.types import Completion, Problem

CASES = 2000


@pytest.fixture
def scorer(request: pytest.FixtureRequest) -> Iterator[Any]:
    made: list[Scorer] = []

    def build(*names: str, **settings: Any) -> Scorer:
        made.append(Scorer(RunConfig(reward_funcs=list(names), **settings), "boxed"))
        return made[-1]

    yield build
    for one in made:
        one.close()


def of_length(length: int, text: str = RIGHT) -> Completion:
    return Completion(tuple(range(length)), text, (-0.1,) * length, "stop")


def test_soft_overlong_is_trls() -> None:
    trl = pytest.importorskip("trl.rewards")
    rng = random.Random(1)
    for _ in range(CASES):
        limit = rng.randint(1, 400)
        length = rng.randint(0, 500)
        (expected,) = trl.get_soft_overlong_punishment(limit, max(1, limit // 5))(completion_ids=[[0] * length])
        assert soft_overlong(length, limit) == expected


def test_soft_overlong_reaches_minus_one_at_the_limit_and_takes_a_fifth() -> None:
    assert [soft_overlong(n, 100) for n in (0, 80, 85, 90, 100, 101)] == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    assert soft_overlong(3, 3) == -1.0
    assert soft_overlong(2, 3) == 0.0


def test_cosine_is_trls_with_its_defaults() -> None:
    trl = pytest.importorskip("trl.rewards")
    rng = random.Random(2)
    completions = [[{"content": r"\boxed{7}"}], [{"content": r"\boxed{8}"}]]
    for _ in range(40):  # each asks math-verify
        limit = rng.randint(1, 300)
        lengths = [rng.randint(0, 400), rng.randint(0, 400)]
        expected = trl.get_cosine_scaled_reward(limit)(completions, ["7", "7"], [[0] * n for n in lengths])
        assert [cosine_scaled(lengths[0], limit, True), cosine_scaled(lengths[1], limit, False)] == expected


def test_cosine_falls_where_right_and_rises_where_wrong_between_its_ends() -> None:
    for right, (short, long) in COSINE_ENDS.items():
        values = [cosine_scaled(n, 50, right) for n in range(80)]
        assert (values[0], values[50], values[79]) == (short, long, long)
        assert values == sorted(values, reverse=right)


def test_repetition_is_trls_over_words() -> None:
    """TRL counts token ids; given one id per word, it must give the same."""
    trl = pytest.importorskip("trl.rewards")
    rng = random.Random(3)
    for _ in range(CASES):
        words = [rng.choice(["so", "So", "2", "+", "=", "the"]) for _ in range(rng.randint(0, 30))]
        text = rng.choice([" ", "\n", "  "]).join(words)
        ids = [sorted({"so", "2", "+", "=", "the"}).index(word.lower()) for word in words]
        ngram = rng.randint(2, 5)
        (expected,) = trl.get_repetition_penalty_reward(ngram)(completion_ids=[ids])
        assert repetition_penalty(text, ngram) == pytest.approx(expected, abs=1e-15)
        assert -1.0 < repetition_penalty(text, ngram) <= 0.0


def test_think_format_agrees_with_trls_where_both_speak_of_thinking() -> None:
    """TRL asks for the thought only; ours for an answer behind it too, so it is never the milder one."""
    trl = pytest.importorskip("trl.rewards")
    rng = random.Random(4)
    pieces = ["<think>", "</think>", "<answer>", "</answer>", "a", "\n", " ", "7"]
    earned = 0
    for _ in range(20 * CASES):
        text = "<think>" + "".join(rng.choice(pieces) for _ in range(rng.randint(3, 7)))
        if format_reward(text, False, "tags"):
            earned += 1
            assert trl.think_format_reward([[{"content": text}]]) == [1.0]
    assert earned > 5


def test_random_is_uniform_repeatable_and_blind() -> None:
    rng = random.Random(5)
    ids = [tuple(rng.randrange(1000) for _ in range(rng.randint(1, 20))) for _ in range(4000)]
    values = [random_reward(0, "p", one) for one in ids]
    assert values == [random_reward(0, "p", one) for one in ids]
    assert all(0.0 <= value < 1.0 for value in values)
    assert abs(sum(values) / len(values) - 0.5) < 0.02
    counts = [sum(low / 10 <= value < (low + 1) / 10 for value in values) for low in range(10)]
    assert max(abs(count - 400) for count in counts) < 100, "five standard deviations"
    assert random_reward(1, "p", ids[0]) != values[0] != random_reward(0, "q", ids[0])
    assert random_reward(0, "p", (1, 23)) != random_reward(0, "p", (12, 3))


def test_the_scorer_hands_each_what_it_needs(scorer: Any) -> None:
    names = ("soft_overlong", "cosine", "repetition", "random")
    built = scorer(*names, max_completion_length=100, seed=5)
    assert built.weights == (1.0,) * 4
    assert not built.in_worker
    assert not built.failures
    built.check(PROBLEM)
    completions = [of_length(90), of_length(50, WRONG), of_length(100, "so so so so so")]
    scores = built.score(PROBLEM, PROMPT, completions)
    assert [score.parts["soft_overlong"] for score in scores] == [-0.5, 0.0, -1.0]
    assert [score.parts["cosine"] for score in scores] == [
        cosine_scaled(90, 100, True),
        cosine_scaled(50, 100, False),
        cosine_scaled(100, 100, False),
    ]
    assert [score.parts["repetition"] for score in scores] == [0.0, 0.0, pytest.approx(1 / 3 - 1)]
    assert [score.parts["random"] for score in scores] == [random_reward(5, "p1", c.ids) for c in completions]
    assert [score.reward for score in scores] == [pytest.approx(sum(score.parts.values())) for score in scores]


def test_cosine_needs_a_gold_answer_that_verifies(scorer: Any) -> None:
    with pytest.raises(Exception, match="answer_column"):
        scorer("cosine").check(Problem("p", "q", ""))
