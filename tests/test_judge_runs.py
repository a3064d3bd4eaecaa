"""The judge as a reward of the scorer and of whole runs, and what users' functions log; against a real server."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bad_parts import SMALL, assert_same, records, steps
from judge_parts import Answer, Asker, attempt, refused, said
from reward_parts import PROBLEM, PROMPT, RIGHT, WRONG, Make, completion

from igrpo_lite.config.resolve import resolve
from igrpo_lite.errors import RewardError
from igrpo_lite.rewards.endpoint import CONCURRENCY
from igrpo_lite.rewards.scorer import Scorer
from igrpo_lite.training import train


@pytest.fixture
def asker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Asker]:
    made = Asker(tmp_path, monkeypatch)
    yield made
    made.close()


def by_text(body: dict[str, Any], number: int) -> Answer:
    """A score that depends on the completion alone, so that runs can be compared."""
    return said(f"Hm.\nScore: {hashlib.sha256(attempt(body).encode()).digest()[0] / 255:.3f}")


# The scorer


def test_the_judges_score_is_a_part_like_any_other(asker: Asker) -> None:
    server = asker.serve(lambda body, number: said("Score: 0.25" if "8" in attempt(body) else "Score: 0.75"))
    config = asker.config(server, reward_funcs=["accuracy", "judge"], reward_weights=[1.0, 2.0])
    with Scorer(config, "boxed") as scorer:
        assert scorer.in_worker, "the collector must not wait for it"
        assert scorer.threads == CONCURRENCY
        scorer.check(PROBLEM)
        assert len(server.requests) == 2
        scores = scorer.score(PROBLEM, PROMPT, [completion(RIGHT), completion(WRONG)])
        assert [score.reward for score in scores] == [2.5, 0.5]
        assert scores[1].parts == {"accuracy": 0.0, "judge": 0.25}
        assert scorer.take_logged() == {"reward/judge/cached": 0.0, "reward/judge/tokens": 10.0}
        scorer.score(PROBLEM, PROMPT, [completion(RIGHT), completion("9")])
        assert scorer.take_logged() == {"reward/judge/cached": 0.5, "reward/judge/tokens": 5.0}
        assert scorer.take_logged() == {}
        calls = scorer.failures["judge"]
        assert (calls.made, calls.failed, calls.tokens) == (5, 0, 50)


def test_a_judge_that_does_not_answer_is_found_on_the_first_row(asker: Asker) -> None:
    server = asker.serve(lambda body, number: refused(500, "out of memory"))
    with Scorer(asker.config(server, retries=0), "boxed") as scorer, pytest.raises(RewardError) as raised:
        scorer.check(PROBLEM)
    (finding,) = raised.value.problems
    assert finding == f"reward judge failed on the first row: {server.url} answered 500 (out of memory)"


def test_failing_calls_leave_the_part_out_and_too_many_stop_the_run(asker: Asker) -> None:
    server = asker.serve(lambda body, number: refused(400, "no") if "bad" in attempt(body) else said("Score: 1"))
    with Scorer(asker.config(server, retries=0, reward_funcs=["accuracy", "judge"]), "boxed") as scorer:
        texts = ["bad", *(f"fine {i}" for i in range(19))]
        scores = scorer.score(PROBLEM, PROMPT, [completion(text) for text in texts])
        assert [score.parts["judge"] for score in scores] == [None] + [1.0] * 19
        assert scores[0].reward == 0.0, "from what is left"
        assert scorer.failures["judge"].failed == 1
        with pytest.raises(RewardError, match=r"judge failed in 2 of 21 calls; check its endpoint\. The first .* 400"):
            scorer.score(PROBLEM, PROMPT, [completion("bad too")])


def test_groups_are_judged_at_the_same_time(asker: Asker) -> None:
    """Two groups of two, scored from two threads as the collector does: their four calls meet at the server."""
    together = threading.Barrier(4)

    def behave(body: dict[str, Any], number: int) -> Answer:
        together.wait(20)
        return said("Score: 1")

    server = asker.serve(behave)
    with Scorer(asker.config(server, retries=0, judge_model="m"), "boxed") as scorer:
        groups = [[completion(f"{name}{i}") for i in range(2)] for name in "ab"]
        threads = [threading.Thread(target=scorer.score, args=(PROBLEM, PROMPT, group)) for group in groups]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (scorer.failures["judge"].made, scorer.failures["judge"].failed) == (4, 0)
    assert server.most_at_once == 4


# What users' functions log


def test_logged_values_come_back_from_the_worker(make: Make) -> None:
    scorer = make(
        """
        def reward(completions, log_metric, log_extra):
            log_metric("n", len(completions)); log_metric("n", 10)
            log_extra("first", [c[:1] for c in completions])
            for c in completions: log_extra("size", [len(c)])
            log_extra("cut", ["\\ud83d" for c in completions])
            return [1.0] * len(completions)
        async def each(completion, log_metric, log_extra):
            log_metric("length", len(completion)); log_extra("half", {"of": len(completion) / 2}); log_extra("o", {1})
            return 0.0
        def sync(completion, log_extra): log_extra("me", [completion]); return 0.0
        """,
        "reward",
        "each",
        "sync",
    )
    scorer.check(PROBLEM)
    assert scorer.take_logged() == {}, "the check is no step"
    scores = scorer.score(PROBLEM, PROMPT, [completion("abc"), completion("de")])
    assert scorer.take_logged() == {"reward/each/length": 2.5, "reward/reward/n": 6.0}
    logged = {"reward/cut": "?", "each/o": "{1}"}  # half of a surrogate pair could not be written to samples.jsonl
    assert [score.extras for score in scores] == [
        logged | {"reward/first": "a", "reward/size": 3, "each/half": {"of": 1.5}, "sync/me": ["abc"]},
        logged | {"reward/first": "d", "reward/size": 2, "each/half": {"of": 1.0}, "sync/me": ["de"]},
    ]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("log_metric('x', float('nan'))", "log_metric('x', nan): expected a finite number"),
        ("log_metric('x', 'high')", "could not convert string to float: 'high'"),
        ("log_extra('x', [1])", "log_extra('x', ...) got 1 values for 2 completions"),
        ("log_extra('x', 'ab')", "log_extra('x', ...): expected a list of 2 values, one per completion"),
    ],
)
def test_what_cannot_be_logged_is_the_functions_error(make: Make, body: str, told: str) -> None:
    scorer = make(f"def reward(completions, log_metric, log_extra):\n    {body}\n    return [1.0] * len(completions)")
    with pytest.raises(RewardError) as raised:
        scorer.check(PROBLEM)
    assert told in str(raised.value)
    assert "failed on the first row" in str(raised.value)


# Whole runs


OWN = """
def own(completions, log_metric, log_extra):
    log_metric("longest", max(map(len, completions)))
    log_extra("size", [len(c) for c in completions])
    return [0.0] * len(completions)
"""


def run_settings(server: Any, **settings: Any) -> dict[str, Any]:
    judged = {"reward_funcs": "judge", "judge_url": server.url}
    return SMALL | judged | {"progress": "off", "max_steps": 3, "save_steps": 1, "eval_size": 2} | settings


@pytest.mark.parametrize("schedule", ["overlap", "ahead"])
def test_a_run_with_a_judge_and_logging(
    schedule: str, asker: Asker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judge's score chooses the draft; what was logged stands in the records; resumed, all is the same."""
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    server = asker.serve(by_text)
    settings = run_settings(server, reward_funcs="judge,own.py:own", schedule=schedule)
    train(resolve(settings | {"output_dir": "one"}))
    judged = len(server.requests)
    samples = records(Path("one"), "samples.jsonl")
    entries = [entry for record in samples for stage in ("drafts", "refinements") for entry in record[stage]]
    assert len(entries) == 3 * SMALL["prompts_per_step"] * SMALL["num_generations"]
    for entry in entries:
        expected = hashlib.sha256(entry["text"].encode()).digest()[0] / 255
        assert entry["reward"] == entry["rewards"]["judge"] == pytest.approx(expected, abs=5e-4)
        assert entry["extras"]["own/size"] == len(entry["text"])
        assert entry["extras"]["judge/reply"].startswith("Hm.\nScore: ")
    for record in samples:
        assert record["drafts"][record["chosen"]]["reward"] == max(entry["reward"] for entry in record["drafts"])
    metrics = [record for record in records(Path("one"), "metrics.jsonl") if record["kind"] == "step"]
    assert all({"reward/own/longest", "reward/judge/cached", "reward/judge/tokens"} <= step.keys() for step in metrics)
    if schedule == "overlap":  # with ``ahead`` drafts are scored a step before they are recorded
        groups = [record[stage] for record in samples if record["step"] == 1 for stage in ("drafts", "refinements")]
        longest = [max(len(entry["text"]) for entry in group) for group in groups]
        assert metrics[0]["reward/own/longest"] == pytest.approx(sum(longest) / len(longest))
    for minutes in (1e-6, None):
        train(resolve(settings | {"output_dir": "two", "max_minutes": minutes}))
    assert_same(tmp_path / "one", tmp_path / "two")
    assert len(server.requests) == judged + 2 * 2, "only the checks of the two starts ask again"


def test_a_run_stops_at_its_budget_and_goes_on_with_a_larger_one(
    asker: Asker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    server = asker.serve(by_text)
    monkeypatch.setattr("igrpo_lite.rewards.endpoint.CONCURRENCY", 1)
    settings = run_settings(server, output_dir="run")
    with pytest.raises(RewardError, match=r"read and written 1[0-9]0 tokens, and judge_token_budget is 100;"):
        train(resolve(settings | {"judge_token_budget": 100}))
    assert len(server.requests) == 10
    assert (tmp_path / "run" / "checkpoints").is_dir()
    with pytest.raises(RewardError, match="judge_token_budget is 100"):
        train(resolve(settings | {"judge_token_budget": 100}))
    assert len(server.requests) == 12, "the check asks, the run does not: what was spent is remembered"
    train(resolve(settings | {"judge_token_budget": 100_000}))
    assert steps(tmp_path / "run") == [1, 2, 3]
    train(resolve(run_settings(server, output_dir="straight")))
    assert_same(tmp_path / "run", tmp_path / "straight")


@pytest.mark.skipif(os.name != "posix", reason="no other way to lose a server in the middle")
def test_a_server_that_is_lost_stops_the_run_with_everything_saved(
    asker: Asker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    server = asker.serve(lambda body, number: by_text(body, number) if number < 12 else refused(401, "key withdrawn"))
    with pytest.raises(RewardError, match="key withdrawn"):
        train(resolve(run_settings(server, output_dir="run")))
    done = steps(tmp_path / "run")
    assert done
    server.behave = by_text
    train(resolve(run_settings(server, output_dir="run")))
    assert steps(tmp_path / "run") == [1, 2, 3]
