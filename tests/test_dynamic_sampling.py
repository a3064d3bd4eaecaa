"""DAPO's dynamic sampling: which problems give way, what the update gets, and what a run tells about it."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_sampler import ScriptedSampler
from tiny_parts import SMALL, small_config, tiny_parts

from igrpo_lite.algorithms.dynamic import is_informative, with_signal
from igrpo_lite.algorithms.methods import method_of
from igrpo_lite.algorithms.replay import Replay
from igrpo_lite.algorithms.rollout import Rollout, RolloutCollector
from igrpo_lite.config.resolve import resolve
from igrpo_lite.training import train
from igrpo_lite.types import Completion, Group, Problem, Prompt, Score

EQUAL, MIXED = (1.0, 1.0), (0.0, 1.0)
DOCS = Path(__file__).parents[1] / "docs"
# Short groups of a model that is mostly right: many are equal.
RUN = SMALL | {
    "algorithm": "grpo",
    "num_generations": 2,
    "prompts_per_step": 4,
    "dynamic_sampling": 2,
    "temperature": 0.7,
    "max_steps": 3,
    "eval_steps": 3,
    "eval_size": 4,
    "max_problems": 30,
}


def group_of(rewards, stage="stage1", problem="p"):
    completions = tuple(Completion((1, 2), "", (0.0, 0.0), "stop") for _ in rewards)
    scores = tuple(Score(reward, {}, "wrong") for reward in rewards)
    return Group(Problem(problem, "?", "1"), stage, Prompt("", ()), completions, scores)


def rollout_of(rewards, problem="p"):
    return Rollout(group_of(rewards, problem=problem))


@pytest.mark.parametrize(
    ("algorithm", "first", "second", "teaches"),
    [
        ("grpo", MIXED, None, True),
        ("grpo", EQUAL, None, False),
        ("igrpo", MIXED, EQUAL, False),
        ("igrpo", EQUAL, MIXED, True),
        ("igrpo-joint", MIXED, EQUAL, True),
        ("igrpo-joint", EQUAL, MIXED, True),
        ("igrpo-joint", EQUAL, EQUAL, False),
        ("grpo", (None, 1.0), None, False),
        ("grpo", (None, 1.0, 0.5), None, True),
    ],
)
def test_what_can_teach(algorithm, first, second, teaches):
    config = small_config(algorithm=algorithm)
    stage2 = None if second is None else group_of(second, "stage2")
    rollout = Rollout(group_of(first), None, stage2)
    assert is_informative(rollout, config) is teaches
    assert is_informative(Rollout(rollout.stage1, None, stage2, (Replay(group_of(EQUAL), 1),)), config) is teaches
    assert is_informative(Rollout(rollout.stage1, None, stage2, (Replay(group_of(MIXED), 1),)), config)
    stages = [group.stage for group, _ in method_of(config).learning_groups(rollout, config)]
    assert stages == {"grpo": ["stage1"], "igrpo": ["stage2"], "igrpo-joint": ["stage1", "stage2"]}[algorithm]


@given(st.lists(st.booleans(), min_size=1, max_size=6), st.lists(st.booleans(), max_size=20), st.integers(0, 4))
def test_rounds_fill_gaps_until_full_or_out_of_rounds_or_data(first, others, rounds):
    """Against a simulation on names."""
    config = small_config(algorithm="grpo", dynamic_sampling=rounds)
    rewards = {f"other{i}": MIXED if mixed else EQUAL for i, mixed in enumerate(others)}
    asked = []

    def collect(problems, slot):
        asked.append((slot, [problem.id for problem in problems]))
        return [rollout_of(rewards[problem.id], problem.id) for problem in problems]

    start = [rollout_of(MIXED if mixed else EQUAL, f"first{i}") for i, mixed in enumerate(first)]
    batch = with_signal(start, [Problem(name, "?", "1") for name in rewards], config, collect)

    queue, expected_rounds = list(rewards), 0
    names = [r.stage1.problem.id for r in start]
    good = [name for name, mixed in zip(names, first, strict=True) if mixed]
    expected_asked = []
    while expected_rounds < rounds and len(good) < len(first) and queue:
        gaps = len(first) - len(good)
        taken, queue = queue[:gaps], queue[gaps:]
        expected_asked.append((len(names), taken))
        names = names + taken
        good = good + [name for name in taken if rewards[name] == MIXED]
        expected_rounds += 1
    assert asked == expected_asked
    assert [r.stage1.problem.id for r in batch.sampled] == names
    assert batch.informative == len(good)
    if rounds == 0:
        assert (batch.kept, batch.rounds) == (tuple(start), None)
    else:
        assert batch.rounds == expected_rounds
        assert [r.stage1.problem.id for r in batch.kept] == (good or names[: len(first)])
        assert len(batch.kept) <= len(first)


def test_other_problems_are_read_only_as_far_as_needed():
    def endless():
        number = 0
        while True:
            number += 1
            assert number <= 1, "read further than the one gap"
            yield Problem(str(number), "?", "1")

    config = small_config(algorithm="grpo", dynamic_sampling=5)
    batch = with_signal(
        [rollout_of(EQUAL), rollout_of(MIXED)], endless(), config, lambda problems, _: [rollout_of(MIXED, "new")]
    )
    assert (batch.rounds, len(batch.sampled), batch.informative) == (1, 3, 2)


@pytest.fixture(scope="module")
def parts():
    made = tiny_parts(small_config())
    yield made
    made.scorer.close()


@pytest.mark.parametrize("schedule", ["overlap", "barrier"])
@pytest.mark.parametrize("algorithm", ["grpo", "igrpo"])
def test_later_rounds_have_seeds_of_their_own(algorithm, schedule, parts):
    """Even of a problem that was in the first batch."""
    config = small_config(algorithm=algorithm, schedule=schedule, tokens="t-spmo", tspmo_replay=2)
    sampler = ScriptedSampler(parts.prompts.tokenizer, [problem.answer for problem in parts.train[:2]])
    collector = RolloutCollector(sampler, parts.scorer, parts.prompts, config, config.seed)
    first = collector.collect(parts.train[:3], 0)
    again = collector.collect(parts.train[:3], 0, 3)
    seeds = [request.seed for request in sampler.requests]
    assert len(set(seeds)) == len(seeds) > 2 * 3 * 6
    assert [r.stage1.problem for r in again] == [r.stage1.problem for r in first]
    assert collector.collect(parts.train[:3], 0, 3) == again != first


def lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "dynamic"
    train(resolve(RUN | {"output_dir": str(folder)}))
    return folder


def steps_of(folder):
    return [record for record in lines(folder, "metrics.jsonl") if record["kind"] == "step"]


def test_a_run_tells_of_all_that_it_sampled(run):
    steps, samples = steps_of(run), lines(run, "samples.jsonl")
    assert {step["dynamic/rounds"] for step in steps} & {1, 2}
    for step in steps:
        own = [sample for sample in samples if sample["step"] == step["step"]]
        assert step["dynamic/problems"] == len(own) == len({sample["id"] for sample in own})
        rewards = [[completion["reward"] for completion in sample["drafts"]] for sample in own]
        mixed = sum(len(set(group)) > 1 for group in rewards)
        assert step["dynamic/kept"] == mixed
        assert step["stage1/informative"] == pytest.approx(mixed / len(own))
        reasons = Counter(completion["reason"] for sample in own for completion in sample["drafts"])
        assert step["stage1/accuracy"] == pytest.approx(reasons["correct"] / reasons.total())
        assert step["tokens/sampled"] == sum(c["tokens"] for sample in own for c in sample["drafts"])
        assert step["learning_sequences"] == 2 * mixed, "both completions of every group that differs, and no other"
        full = step["dynamic/kept"] == 4
        assert full or step["dynamic/rounds"] == 2
        assert len(own) >= 4 + step["dynamic/rounds"]
    assert any(step["dynamic/kept"] > 0 for step in steps)


def test_stopped_and_resumed_it_is_the_same_run(run, tmp_path):
    for minutes in (1e-6, None):
        train(resolve(RUN | {"output_dir": str(tmp_path / "parts"), "max_minutes": minutes}))
    assert (tmp_path / "parts" / "samples.jsonl").read_bytes() == (run / "samples.jsonl").read_bytes()
    without_time = [
        [{k: v for k, v in step.items() if k not in ("time", "memory")} for step in steps_of(folder)]
        for folder in (run, tmp_path / "parts")
    ]
    assert without_time[0] == without_time[1]


def test_later_rounds_go_on_counting_places(monkeypatch, tmp_path):
    calls, collect = [], RolloutCollector.collect

    def recorded(self, problems, step, first_slot=0, upcoming=()):
        calls.append((step, first_slot, len(problems)))
        return collect(self, problems, step, first_slot, upcoming)

    monkeypatch.setattr(RolloutCollector, "collect", recorded)
    train(resolve(RUN | {"output_dir": str(tmp_path / "run")}))
    for step in range(3):
        counts = [count for at, _, count in calls if at == step]
        assert [slot for at, slot, _ in calls if at == step] == [sum(counts[:i]) for i in range(len(counts))]
    assert len(calls) > 3


@pytest.mark.parametrize("algorithm", ["grpo", "igrpo-joint"])
def test_data_smaller_than_a_step_is_no_reason_to_stop(algorithm, tmp_path):
    settings = {"max_problems": 3, "prompts_per_step": 4, "max_steps": 1, "eval_steps": 1, "eval_size": 2}
    counts = {} if algorithm == "grpo" else {"num_generations": 4}
    train(resolve(RUN | settings | counts | {"algorithm": algorithm, "output_dir": str(tmp_path / "run")}))
    (step,) = steps_of(tmp_path / "run")
    assert (step["dynamic/rounds"], step["dynamic/problems"]) == (0, 4)


def test_every_number_that_a_run_records_is_described(tmp_path):
    """With replay and dynamic sampling, so that all their keys are there."""
    settings = {"algorithm": "igrpo", "num_generations": 6, "tokens": "t-spmo", "tspmo_replay": 2, "beta": 0.0}
    train(resolve(RUN | settings | {"max_steps": 2, "output_dir": str(tmp_path / "run")}))
    steps = steps_of(tmp_path / "run")
    keys = {key for step in steps for key in step}
    assert {"replay/count", "replay/start", "replay/informative", "replay/accuracy", "dynamic/kept"} <= keys
    table = (DOCS / "metrics.md").read_text(encoding="utf-8").partition("| key | meaning |")[2]
    cells = "\n".join(row.split("|")[1] for row in table.splitlines() if row.startswith("| `"))
    described = re.findall(r"`([^`]+)`", cells)
    patterns = [name.replace("stageK", "stage[12]").replace("NAME", ".+") for name in described]
    missing = sorted(key for key in keys - {"kind"} if not any(re.fullmatch(p, key) for p in patterns))
    assert not missing
    for step in steps:
        own = [sample for sample in lines(tmp_path / "run", "samples.jsonl") if sample["step"] == step["step"]]
        replays = [replay for sample in own for replay in sample["replays"]]
        assert step["replay/count"] == len(replays)
        continued = [completion for replay in replays for completion in replay["completions"]]
        right = [completion["reason"] == "correct" for completion in continued]
        assert step["replay/accuracy"] == pytest.approx(sum(right) / len(right))
        tokens = sum(c["tokens"] for sample in own for name in ("drafts", "refinements") for c in sample[name])
        tokens += sum(c["tokens"] - replay["start"] for replay in replays for c in replay["completions"])
        assert step["tokens/sampled"] == tokens
        shares = [r["start"] / s["refinements"][r["source"]]["tokens"] for s in own for r in s["replays"]]
        assert step["replay/start"] == pytest.approx(sum(shares) / len(shares))
        mixed = [
            len({s["refinements"][r["source"]]["reward"], *(c["reward"] for c in r["completions"])}) > 1
            for s in own
            for r in s["replays"]
        ]
        assert step["replay/informative"] == pytest.approx(sum(mixed) / len(mixed))
