"""A sampling engine that dies: the run stops with what it has, says so, and goes on as if nothing had happened."""

from __future__ import annotations

import json

import pytest
from bad_parts import SMALL, assert_same, records

from igrpo_lite.config.resolve import resolve
from igrpo_lite.errors import SamplerError
from igrpo_lite.sampling.transformers import TransformersSampler
from igrpo_lite.training import train

RUN = SMALL | {"max_steps": 4, "eval_steps": 2, "save_steps": 100, "parity_steps": 3, "num_generations": 6}
DEATH = "the engine died while 5 requests were decoding: out of blocks"


def kept_records(folder):
    kept = [record for record in records(folder, "metrics.jsonl") if record["kind"] != "parity"]
    return [{key: value for key, value in record.items() if key not in ("time", "memory")} for record in kept]


def checkpoints(folder):
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def straight(request, tmp_path_factory):
    """A run whose engine never died."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    train(resolve(RUN | {"schedule": request.param, "output_dir": str(folder), "progress": "off"}))
    return request.param, folder


def die_at(monkeypatch, when, method="run"):
    """Of the engine's calls, those of a method that ``when`` picks by number and arguments fail."""
    original, calls = getattr(TransformersSampler, method), []

    def dying(self, *arguments):
        calls.append(arguments)
        if when(len(calls), *arguments):
            raise SamplerError(DEATH)
        return original(self, *arguments)

    monkeypatch.setattr(TransformersSampler, method, dying)


def trains(step):
    """Whether requests are for the refinements of a step, counted from 0."""

    def picked(_, requests, *__):
        return any(getattr(r.tag, "step", None) == step and r.tag.stage == "stage2" for r in requests)

    return picked


def evaluates(step_calls):
    seen = []

    def picked(_, requests, *__):
        tag = requests[0].tag
        evaluation = tag is not None and not hasattr(tag, "slot")  # a place in a step is the training's
        seen.extend([1] * evaluation)
        return evaluation and len(seen) == step_calls

    return picked


def probes(number):
    seen = []

    def picked(_, requests, *__):
        seen.extend([1] * (requests[0].tag is None))
        return requests[0].tag is None and len(seen) == number

    return picked


FAULTS = {
    "sampling step 3": ("run", lambda schedule: first_wave_of(2, schedule), 2),
    "the evaluation of step 2": ("run", lambda schedule: evaluates(2), 2),
    "the probe at the start": ("run", lambda schedule: probes(1), 0),
    "the probe of step 3": ("run", lambda schedule: probes(4), 3),
    # One push at the end of each step, and two of each probe: the first probe is before step 1.
    "the push after step 3": ("load_adapter", lambda schedule: lambda number, *_: number == 5, 3),
    "falling asleep in step 2": ("sleep", lambda schedule: lambda number, *_: number == 2, 1),
    "waking up after step 2": ("wake", lambda schedule: lambda number, *_: number == 2, 2),
}


def first_wave_of(step, schedule):
    """The requests that a step's sampling starts with: its drafts, or where they are there already its refinements."""
    if schedule == "ahead":
        return trains(step)
    return lambda _, requests, *__: getattr(requests[0].tag, "step", None) == step


OVERLAP = ["sampling step 3"]  # the others know nothing of schedules


@pytest.mark.parametrize(
    ("straight", "fault"),
    [*(("overlap", fault) for fault in OVERLAP), *(("ahead", fault) for fault in FAULTS)],
    indirect=["straight"],
)
def test_a_dead_engine_leaves_a_checkpoint_and_a_clear_line(fault, straight, say, tmp_path, monkeypatch):
    schedule, whole = straight
    method, when, step = FAULTS[fault]
    die_at(monkeypatch, when(schedule), method)
    code, lines, _ = say(**RUN, schedule=schedule)
    assert (code, lines) == (2, [f"error: {DEATH}"])
    folder = tmp_path / "run"
    assert checkpoints(folder)[-1] == step
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert say(**RUN, schedule=schedule)[0] == 0
    assert_same(whole, folder)
    assert kept_records(whole) == kept_records(folder)
    summaries = [json.loads((place / "summary.json").read_text()) for place in (whole, folder)]
    assert summaries[0]["rollouts"] == summaries[1]["rollouts"] == 4 * 2 * 6


def test_failing_calls_of_rewards_do_not_count_twice(tmp_path, monkeypatch):
    """Those of the step that the engine died in are made again."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        "def f(completions):\n    if sum(map(len, completions)) % 3 == 0: raise ValueError('unlucky')\n"
        "    return [1.0] * len(completions)\n"
    )
    monkeypatch.setattr("igrpo_lite.rewards.scorer.MAX_FAILED_SHARE", 1.0)
    settings = RUN | {"reward_funcs": "accuracy,own.py:f", "eval_size": 2, "progress": "off", "schedule": "barrier"}
    train(resolve(settings | {"output_dir": "straight"}))
    die_at(monkeypatch, trains(2))  # its drafts are sampled and scored by then
    with pytest.raises(SamplerError):
        train(resolve(settings | {"output_dir": "run"}))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("igrpo_lite.rewards.scorer.MAX_FAILED_SHARE", 1.0)
    train(resolve(settings | {"output_dir": "run"}))
    assert_same(tmp_path / "straight", tmp_path / "run")
    assert kept_records(tmp_path / "straight") == kept_records(tmp_path / "run")
    assert kept_records(tmp_path / "run")[-2]["reward_failures"] > 0
