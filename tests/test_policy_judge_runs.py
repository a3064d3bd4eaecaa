"""Runs with the policy as the judge: on the bundled model, in vLLM, and what other verbs make of it."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import Path

import pytest
from bad_parts import SMALL as RUN
from bad_parts import assert_same, records, steps
from judge_parts import JUDGED, REPLAY
from tiny_parts import small_config

from igrpo_lite.algorithms.judging import PolicyJudge
from igrpo_lite.cli import main
from igrpo_lite.config.resolve import resolve
from igrpo_lite.errors import RewardError
from igrpo_lite.evaluation.preflight import preflight
from igrpo_lite.policy.prompting import check_context, prompt_builder
from igrpo_lite.rewards.judge import Judgement
from igrpo_lite.sampling.replica import Replica
from igrpo_lite.sampling.transformers import TransformersSampler
from igrpo_lite.training import train
from igrpo_lite.types import Completion, Problem


@pytest.fixture
def readable(monkeypatch):
    """The bundled model cannot grade. Its replies stay what they are, and get a last line that follows from them."""
    run, seen = TransformersSampler.run, []

    def graded(self, requests, on_finished=None, poll=None):
        def finished(request, reply):
            if getattr(request.tag, "turn", 0):
                seen.append((request, reply))
                percent = hashlib.sha256(str(request.prompt.ids + reply.ids).encode()).digest()[0] % 101
                reply = dataclasses.replace(reply, text=f"{reply.text}\nScore: {percent}%", finish="stop")
            return on_finished(request, reply)

        return run(self, requests, on_finished and finished, poll)

    monkeypatch.setattr(TransformersSampler, "run", graded)
    return seen


SETTINGS = RUN | JUDGED | {"progress": "off", "max_steps": 3, "save_steps": 1, "eval_size": 2, "parity_steps": 0}


@pytest.mark.parametrize("extra", [{"schedule": "overlap"}, {"schedule": "ahead"}, {"schedule": "barrier"} | REPLAY])
def test_a_resumed_run_is_the_same(extra, readable, tmp_path, monkeypatch):
    """Beside a user's function, whose process scores while the engine goes on; judged drafts of ``ahead`` are kept."""
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text("def own(completions):\n    return [len(text) % 3 for text in completions]\n")
    settings = SETTINGS | extra | {"reward_funcs": "accuracy,judge,own.py:own"}
    summary = train(resolve(settings | {"output_dir": "one"}))
    sampled = 3 * RUN["prompts_per_step"] * RUN["num_generations"]
    assert (summary["rollouts"] > sampled) if "tokens" in extra else (summary["rollouts"] == sampled)
    written = sum(len(reply.ids) for _, reply in readable)
    metrics = [record for record in records(Path("one"), "metrics.jsonl") if record["kind"] == "step"]
    assert sum(step["tokens/judge"] for step in metrics) == written > 0
    assert all(0 <= step["reward/judge/cached"] < 1 and step["reward/judge/tokens"] > 0 for step in metrics)
    entries = [
        e for r in records(Path("one"), "samples.jsonl") for stage in ("drafts", "refinements") for e in r[stage]
    ]
    assert all(entry["rewards"]["judge"] is not None and "judge/reply" in entry["extras"] for entry in entries)
    assert len({entry["rewards"]["judge"] for entry in entries}) > 5
    for minutes in (1e-6, 1e-6, None):
        train(resolve(settings | {"output_dir": "two", "max_minutes": minutes}))
    assert_same(tmp_path / "one", tmp_path / "two")
    asked = len(readable)
    assert main(["eval", "one"]) == 0
    assert len(readable) == asked, "an evaluation goes by the answers"


def test_barrier_and_overlap_grade_alike(readable, tmp_path):
    for schedule in ("barrier", "overlap"):
        train(resolve(SETTINGS | {"max_steps": 1, "schedule": schedule, "output_dir": str(tmp_path / schedule)}))
    barrier, overlap = (records(tmp_path / schedule, "samples.jsonl") for schedule in ("barrier", "overlap"))
    assert barrier == overlap


def test_a_policy_that_cannot_grade_stops_the_run_with_the_reason(tmp_path):
    """A real run, from ``check`` to the stop: not one reply of the bundled model ends with a score."""
    settings = SETTINGS | {"output_dir": str(tmp_path / "run"), "num_generations": 8}
    with pytest.raises(RewardError) as told:
        train(resolve(settings))
    text = str(told.value)
    assert re.search(
        r"reward judge failed in (\d+) of \1 calls; the policy's replies have no score: give another", text
    )
    assert "its reply" in text
    assert 3 not in steps(tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints").is_dir()


def test_the_policy_judges_in_vllm_as_it_does_without():
    """Grades are requests among others: greedy, with a reminder token by token behind the first reply."""
    pytest.importorskip("vllm")
    from vllm_parts import MAX_MODEL_LEN, shared_sampler

    sampler = shared_sampler()
    settings = {"reward_funcs": "judge", "judge_by": "policy", "judge_prompt": "{question}\n{completion}\nScore: x"}
    config = resolve(settings | {"judge_max_tokens": 20, "max_completion_length": 40})
    prompts, problem = prompt_builder(config), Problem("p", "Ana has 3 pens and buys 4. How many pens has she?", "7")
    assert check_context(config, prompts, problem) <= MAX_MODEL_LEN
    texts = ["3+4=7; \\boxed{7}", "3+4=8; \\boxed{8}", "", "3+4=7; \\boxed{7}"]
    completions = [Completion(tuple(prompts.tokenizer.encode(text)), text, (), "stop") for text in texts]
    ends = [*sampler.policy.stop_ids, *prompts.end_of_turn()]
    plain = TransformersSampler(Replica(sampler.policy.model), prompts.tokenizer, ends)
    found, other = (PolicyJudge(config, prompts).judge(s, problem, completions, 7) for s in (sampler, plain))
    assert found == other
    assert [judgement.asked for judgement in found] == [True, True, True, False]
    assert all("\n" in judgement.reply and judgement.error for judgement in found), (
        "it cannot grade, also when reminded"
    )


# Other verbs


def test_check_shows_the_judges_prompt_and_finds_that_it_cannot_grade():
    found = preflight(small_config(**JUDGED), problems=16, samples=4)
    parts = {part.title: part for part in found.parts}
    assert any(line.startswith("judge, ") for line in parts["prompts"].lines)
    assert parts["rewards"].findings == [], "whether a right answer earns more is not known without the policy"
    assert any("judge is the policy" in line for line in parts["rewards"].lines)
    (finding,) = parts["model"].findings
    assert finding.level == "error"
    assert "the policy's replies have no score" in finding.text


def test_check_says_whether_the_judge_knows_right_from_wrong(monkeypatch):
    def graded(self, sampler, problem, completions, *seed):
        low = [problem.answer not in completion.text for completion in completions]
        return [Judgement(0.25 if wrong is upright else 0.75) for wrong in low]

    monkeypatch.setattr(PolicyJudge, "judge", graded)
    for upright in (True, False):
        model = preflight(small_config(**JUDGED), problems=8, samples=4).parts[-1]
        assert set(model.numbers["judge"]) == {"right", "wrong"}
        told = [f.text for f in model.findings if "the judge grades wrong completions no lower" in f.text]
        assert bool(told) is not upright


def test_verbs_that_do_not_train_ask_no_judge(tmp_path, monkeypatch, capsys):
    """A recipe with the policy as judge serves the verbs that take one; so does a run's folder, see above."""
    monkeypatch.chdir(tmp_path)
    recipe = "model: tiny\nreward_funcs: [judge]\njudge_by: policy\nmax_problems: 4\neval_size: 2\n"
    Path("r.yaml").write_text(recipe + "max_completion_length: 24\n")
    assert main(["scan", "--config", "r.yaml", "--samples", "2", "--output", "out.jsonl"]) == 0
    assert main(["show-prompt", "--config", "r.yaml"]) == 0
    assert main(["eval", "tiny", "--config", "r.yaml"]) == 0
    capsys.readouterr()
