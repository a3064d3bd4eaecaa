"""Built-in rewards, weights and what is checked before anything runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from reward_parts import PROBLEM, PROMPT, RIGHT, WRONG, Make, completion

from igrpo_lite.config import RunConfig
from igrpo_lite.errors import RewardError
from igrpo_lite.rewards.builtin import format_reward, opens_thinking
from igrpo_lite.rewards.findings import reward_findings
from igrpo_lite.rewards.scorer import Scorer
from igrpo_lite.types import Problem, Prompt
from igrpo_lite.worker.functions import find_function_error

# Built-in rewards


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (RIGHT, 1.0),
        (r"\boxed{1} \boxed{2}", 0.0),
        (r"\boxed{1} \boxed{2", 0.0),
        (r"\boxed{ }", 0.0),
        (r"\fbox{1}", 0.0),
        ("7", 0.0),
        (r"<think>\boxed{1}</think> \boxed{2}", 1.0),
    ],
)
def test_format_boxed(text: str, value: float) -> None:
    assert format_reward(text, False, "boxed") == value
    assert format_reward(text, True, "boxed") == 0.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>\na\nb\n</think>\n<answer>\n7\n</answer>\n", 1.0),
        ("<think></think><answer>7</answer>", 1.0),
        ("<think>a</think><answer> </answer>", 0.0),
        ("<think>a</think> so <answer>7</answer>", 0.0),
        ("<think>a</think><answer>7</answer> done", 0.0),
        ("so <think>a</think><answer>7</answer>", 0.0),
        ("<think>a</think><answer>7</answer><answer>7</answer>", 0.0),
        ("<think>a<think>b</think><answer>7</answer>", 0.0),
        ("<answer>7</answer><think>a</think>", 0.0),
        ("a</think><answer>7</answer>", 0.0),
    ],
)
def test_format_tags(text: str, value: float) -> None:
    assert format_reward(text, False, "tags") == value


def test_format_tags_after_an_opened_thought() -> None:
    assert opens_thinking("<|assistant|>\n<think>\n")
    assert not opens_thinking("<think></think> go")
    assert format_reward("a\nb</think>\n<answer>7</answer>", False, "tags", think_opened=True) == 1.0
    assert format_reward("<think>a</think><answer>7</answer>", False, "tags", think_opened=True) == 0.0


def test_weights_and_reasons() -> None:
    with Scorer(RunConfig(), "boxed") as scorer:
        assert (scorer.names, scorer.weights) == (("accuracy", "format"), (1.0, 0.1))
        scorer.check(PROBLEM)
        texts = [completion(RIGHT), completion(WRONG), completion("7"), completion("hm"), completion("7", "length")]
        scores = scorer.score(PROBLEM, PROMPT, texts)
    assert [score.reward for score in scores] == [1.1, 0.1, 1.0, 0.0, 0.0]
    assert [score.reason for score in scores] == ["correct", "wrong", "correct", "no_answer", "truncated"]
    assert [score.answer for score in scores] == ["7", "8", "7", None, None]


def test_neither_prompt_nor_draft_is_read() -> None:
    with Scorer(RunConfig(), "boxed") as scorer:
        (score,) = scorer.score(PROBLEM, Prompt(f"How many?\nDraft:\n{RIGHT}", (1,)), [completion("I agree.")])
    assert (score.reward, score.reason) == (0.0, "no_answer")


def test_check_refuses_a_gold_that_cannot_be_verified() -> None:
    with Scorer(RunConfig(), "boxed") as scorer, pytest.raises(RewardError, match="answer_column"):
        scorer.check(Problem("p", "q", ""))


# Settings


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"judge_url": "http://x/v1"}, "judge_url: belongs to the reward judge, which reward_funcs does not name"),
        ({"judge_token_budget": 1, "judge_model": "x"}, "judge_model: .*\njudge_token_budget: "),
        ({"reward_funcs": ["judge"]}, "judge_url: the reward judge needs an endpoint"),
        ({"reward_funcs": ["cosin"]}, "did you mean cosine"),
        ({"reward_funcs": ["accuracy:2"]}, "accuracy:2: weights have a setting of their own, reward_weights"),
    ],
)
def test_settings_that_are_idle_or_do_not_fit(settings: dict[str, Any], told: str) -> None:
    assert re.search(told, "\n".join(reward_findings(RunConfig(**settings))))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"judge_url": "localhost:8000/v1"}, "must be like http://localhost:8000/v1"),
        ({"judge_url": "http://[x/v1"}, "is not a valid address"),
        ({"judge_url": "http://x:port/v1"}, "is not a valid address"),
        ({"judge_url": "https://me:key@x/v1"}, "must not hold a key"),
        ({"judge_url": "https://x/v1/chat/completions"}, "up to the version, like https://x/v1"),
        ({"judge_url": "https://x/v1?a=b"}, "up to the version"),
        ({"judge_prompt": "none.txt"}, "no such file: none.txt"),
        ({"judge_prompt": "Grade {completion}"}, "must contain {question}"),
        ({"judge_prompt": "{question} {completion} {gold}"}, "unknown placeholder {gold}"),
        ({"judge_prompt": r"{question} {completion} \boxed{}"}, "write a literal brace as {{ or }}"),
        ({"judge_prompt": "{question} {completion} {"}, "write a literal brace as"),
    ],
)
def test_settings_of_a_judge_that_cannot_work(settings: dict[str, Any], told: str) -> None:
    config = RunConfig(**{"reward_funcs": ["judge"], "judge_url": "http://x/v1", **settings})
    (finding,) = reward_findings(config)
    assert finding.startswith(next(iter(settings)))
    assert told in finding


def test_settings_of_a_judge_that_are_fine(tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("{question} is answered with {completion}; right would be {answer}, in a {{box}}")
    for url in ("http://localhost:8000/v1", "https://api.openai.com/v1/", "http://[::1]:11434/v1"):
        config = RunConfig(
            reward_funcs=["accuracy", "judge", "soft_overlong", "repetition"],
            judge_url=url,
            judge_prompt=str(prompt),
        )
        assert reward_findings(config) == []


def test_findings_come_all_at_once(tmp_path: Path) -> None:
    broken, other = tmp_path / "broken.py", tmp_path / "other.py"
    broken.write_text("def f(:\n", encoding="utf-8")
    other.write_text("def length_reward(completions): ...\n", encoding="utf-8")
    specs = ["acuracy", "nowhere.py:f", f"{broken}:f", f"{other}:lenght_reward", f"{other}", "no_such_package.x:f"]
    findings = reward_findings(RunConfig(reward_funcs=specs, reward_weights=[0.0, 0.0]))
    expected = [
        "did you mean accuracy",
        "no file nowhere.py",
        "line 1",
        "did you mean length_reward",
        "names no function",
        "no module no_such_package",
        "2 weights for 6 rewards",
        "all are 0",
    ]
    assert len(findings) == len(expected)
    assert all(part in finding for part, finding in zip(expected, findings, strict=True))
    with pytest.raises(RewardError) as raised:
        Scorer(RunConfig(reward_funcs=specs), "boxed")
    assert len(raised.value.problems) == 6


def test_static_check_runs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "danger.py"
    path.write_text("raise SystemExit\nif 1:\n    def late(completions): ...\nalias = late\n", encoding="utf-8")
    assert find_function_error(f"{path}:late") is None
    assert find_function_error(f"{path}:alias") is None
    assert find_function_error("json.decoder:scanstring") is None


def test_functions_go_by_their_own_name(make: Make, tmp_path: Path) -> None:
    scorer = make("def a(completions): ...\ndef b(completions): ...", "a", "accuracy", "b", weights=[2, 1, 0.5])
    assert scorer.names == ("a", "accuracy", "b")
    assert scorer.weights == (2, 1, 0.5)
    (tmp_path / "own.py").write_text("def format(completions): ...\n", encoding="utf-8")
    own = Scorer(RunConfig(reward_funcs=[f"{tmp_path}/own.py:format"]), "boxed")
    assert (own.names, own.weights) == (("format",), (1.0,)), "0.1 is for the built-in one"
