"""Whole runs on the bundled model: what they leave behind, and that stopping anywhere changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_parts import SMALL, small_config

from igrpo_lite.config.resolve import load_file as load_settings
from igrpo_lite.config.resolve import resolve
from igrpo_lite.errors import RunFolderError
from igrpo_lite.evaluation.statistics import wilson
from igrpo_lite.training import train
from igrpo_lite.training.loop import Trainer

SETTINGS = SMALL | {"max_steps": 6, "eval_steps": 3, "save_steps": 2}


def command(folder: Path, **settings: Any) -> list[str]:
    merged = SETTINGS | {"output_dir": str(folder), "progress": "plain"} | settings
    flags = [part for name, value in merged.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, "-m", "igrpo_lite", "train", *flags]


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def without_time(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without clocks, memory, and the parity probes that every start makes."""
    kept = [record for record in records if record["kind"] != "parity"]
    return [{key: value for key, value in record.items() if key not in ("time", "memory")} for record in kept]


def assert_same_run(a: Path, b: Path) -> None:
    """Bit-equal adapters, samples and evaluations; metrics equal but for clocks."""
    for name in ("adapter", "best"):
        left, right = (load_file(folder / name / "adapter_model.safetensors") for folder in (a, b))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left), name
    assert (a / "samples.jsonl").read_bytes() == (b / "samples.jsonl").read_bytes()
    assert without_time(lines(a, "metrics.jsonl")) == without_time(lines(b, "metrics.jsonl"))
    names = sorted(path.name for path in (a / "evaluations").iterdir())
    assert names == sorted(path.name for path in (b / "evaluations").iterdir())
    assert all((a / "evaluations" / n).read_bytes() == (b / "evaluations" / n).read_bytes() for n in names)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(resolve(SETTINGS | {"output_dir": str(folder)}))
    return folder


def test_what_a_run_leaves_behind(whole):
    summary = json.loads((whole / "summary.json").read_text())
    for when in ("before", "after"):
        for measure in ("single", "refined"):
            found = summary[when][measure]
            assert found["n"] == 8
            assert found["low"] <= found["accuracy"] <= found["high"]
            assert found == vars_of(wilson(round(found["accuracy"] * 8), 8))
    assert (summary["steps"], summary["stopped"], summary["seed"]) == (6, None, 0)
    assert summary["rollouts"] == 6 * 3 * 6
    assert {"loading", "rollout", "update", "evaluation"} <= summary["time"].keys()
    assert {"torch", "transformers", "peft", "igrpo-lite"} <= summary["versions"].keys()
    assert [r["step"] for r in lines(whole, "metrics.jsonl") if r["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in lines(whole, "metrics.jsonl") if r["kind"] == "evaluation"] == [0, 3, 6]
    assert resolve(load_settings(whole / "config.yaml")).max_steps == 6
    samples = lines(whole, "samples.jsonl")
    assert len(samples) == 6 * 3
    for sample in samples:
        assert len(sample["drafts"]) == len(sample["refinements"]) == 3
        chosen = sample["drafts"][sample["chosen"]]
        assert chosen["reward"] == max(draft["reward"] for draft in sample["drafts"])
        assert chosen["rewards"].keys() == {"accuracy", "format"}
        assert chosen["reason"] in ("correct", "wrong", "no_answer", "unparsed", "truncated")


def vars_of(estimate) -> dict[str, Any]:
    return {"accuracy": estimate.accuracy, "n": estimate.n, "low": estimate.low, "high": estimate.high}


def test_the_adapter_loads_with_peft_alone(whole):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from igrpo_lite.tiny import MODEL_DIR

    base = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7]])
    plain = base(input_ids=ids).logits
    adapted = PeftModel.from_pretrained(base, whole / "adapter")(input_ids=ids).logits
    assert not torch.allclose(plain, adapted)


def test_the_same_seed_is_the_same_run(whole, tmp_path):
    train(resolve(SETTINGS | {"output_dir": str(tmp_path / "again")}))
    assert_same_run(whole, tmp_path / "again")


def test_another_seed_is_another_run(whole, tmp_path):
    train(resolve(SETTINGS | {"output_dir": str(tmp_path / "other"), "seed": 1}))
    assert (whole / "samples.jsonl").read_bytes() != (tmp_path / "other" / "samples.jsonl").read_bytes()


@pytest.mark.parametrize("algorithm", ["grpo", "igrpo-joint"])
def test_stopped_and_resumed_is_bit_equal(algorithm, tmp_path):
    settings = SETTINGS | {"algorithm": algorithm}
    train(resolve(settings | {"output_dir": str(tmp_path / "straight")}))
    for minutes in (1e-6, 1e-6, None):  # stops after its first step, twice
        summary = train(resolve(settings | {"output_dir": str(tmp_path / "parts"), "max_minutes": minutes}))
        assert (summary["stopped"] is None) is (minutes is None)
    assert_same_run(tmp_path / "straight", tmp_path / "parts")


def test_stopping_where_an_evaluation_is_due_does_not_lose_it(whole, tmp_path):
    """Stops after every single step, the ones with an evaluation and a checkpoint among them."""
    folder = tmp_path / "steps"
    for step in range(1, 6):
        summary = train(resolve(SETTINGS | {"output_dir": str(folder), "max_minutes": 1e-6}))
        assert (summary["steps"], summary["stopped_by"]) == (step, "time")
    train(resolve(SETTINGS | {"output_dir": str(folder)}))
    assert_same_run(whole, folder)


def test_a_checkpoint_half_replaced_is_taken_back(tmp_path):
    """Killed between setting the old one aside and naming the new one."""
    folder = tmp_path / "run"
    train(small_config(output_dir=str(folder), max_steps=1))
    *older, kept = sorted((folder / "checkpoints").iterdir())
    for path in older:
        shutil.rmtree(path)
    kept.rename(kept.with_name(f".old-{kept.name}"))
    summary = train(small_config(output_dir=str(folder), max_steps=2))
    assert summary["steps"] == 2
    assert [r["step"] for r in lines(folder, "metrics.jsonl") if r["kind"] == "step"] == [1, 2]


def run_until(arguments: list[str], condition, number: signal.Signals) -> tuple[int, str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    deadline = time.monotonic() + 120
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[0]
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def steps_written(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_text().count('"kind": "step"') if file.exists() else 0


@pytest.mark.parametrize("after", [1, 3, 4])
def test_killed_at_any_moment_and_resumed_is_bit_equal(whole, tmp_path, after):
    folder = tmp_path / "killed"
    code, _ = run_until(command(folder), lambda: steps_written(folder) >= after, signal.SIGKILL)
    assert code == -signal.SIGKILL
    train(resolve(SETTINGS | {"output_dir": str(folder)}))
    assert_same_run(whole, folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_runs_save_and_say_how_to_go_on(whole, tmp_path, number):
    folder = tmp_path / "interrupted"
    code, output = run_until(command(folder), lambda: steps_written(folder) >= 1, number)
    assert code == 128 + number, output
    assert number.name in output
    assert "run the same command again" in output
    steps = steps_written(folder)
    assert (folder / "checkpoints" / f"step-{steps:06d}").is_dir()
    assert json.loads((folder / "summary.json").read_text())["steps"] == steps
    train(resolve(SETTINGS | {"output_dir": str(folder)}))
    assert_same_run(whole, folder)


def test_a_finished_run_is_left_alone(whole):
    before = {
        path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file() and path.name == "samples.jsonl"
    }
    summary = train(resolve(SETTINGS | {"output_dir": str(whole)}))
    assert summary["steps"] == 6
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_longer_run_goes_on_from_a_finished_one(tmp_path):
    train(small_config(output_dir=str(tmp_path / "run"), max_steps=2))
    summary = train(small_config(output_dir=str(tmp_path / "run"), max_steps=3))
    assert summary["steps"] == 3
    steps = [record["step"] for record in lines(tmp_path / "run", "metrics.jsonl") if record["kind"] == "step"]
    assert steps == [1, 2, 3]


def test_fresh_keeps_the_old_run_under_another_name(tmp_path):
    folder = tmp_path / "run"
    train(small_config(output_dir=str(folder), max_steps=1))
    old = (folder / "samples.jsonl").read_bytes()
    train(small_config(output_dir=str(folder), max_steps=1, seed=3, fresh=True))
    assert (tmp_path / "run.1" / "samples.jsonl").read_bytes() == old
    assert (folder / "samples.jsonl").read_bytes() != old


def test_another_configuration_is_refused_and_nothing_is_lost(tmp_path):
    folder = tmp_path / "run"
    train(small_config(output_dir=str(folder), max_steps=1))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(RunFolderError, match=r"learning_rate: 0.001 then, 0.5 now.*\n.*--fresh"):
        train(small_config(output_dir=str(folder), max_steps=1, learning_rate=0.5))
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_stopped_by_the_diagnosis_gets_another_chance(tmp_path):
    """Equal rewards everywhere: nothing to learn. The same command goes on for as many steps again."""
    reward = tmp_path / "flat.py"
    reward.write_text("def flat(completions, **columns):\n    return [0.5] * len(completions)\n")
    settings = {"reward_funcs": [f"{reward}:flat"], "patience_dead": 2, "output_dir": str(tmp_path / "run")}
    for steps in (2, 4):
        summary = train(small_config(**settings, max_steps=9))
        assert (summary["steps"], summary["stopped_by"]) == (steps, "diagnosis")
    summary = train(small_config(**settings | {"patience_dead": 0}, max_steps=5))
    assert (summary["steps"], summary["stopped"]) == (5, None)


def test_after_is_never_an_older_evaluation(tmp_path, monkeypatch):
    """A signal in the last step: the evaluation that is due is left to the next start."""
    folder = str(tmp_path / "run")
    step = Trainer._step

    def last_step(trainer: Trainer) -> None:
        step(trainer)
        if trainer.progress.step == 2:
            signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)  # a real one would end pytest

    monkeypatch.setattr(Trainer, "_step", last_step)
    summary = train(small_config(output_dir=folder, max_steps=2))
    assert (summary["steps"], summary["after"], summary["stopped_by"]) == (2, None, "SIGTERM")
    monkeypatch.undo()
    assert train(small_config(output_dir=folder, max_steps=2))["after"]["step"] == 2


def test_a_damaged_newer_checkpoint_does_not_crowd_out_sound_ones(tmp_path):
    settings = SETTINGS | {"output_dir": str(tmp_path / "run"), "eval_steps": 100}
    train(resolve(settings | {"max_steps": 4}))
    damaged = tmp_path / "run" / "checkpoints" / "step-000004" / "random.pt"
    damaged.write_bytes(b"")
    for steps in (3, 4):
        summary = train(resolve(settings | {"max_steps": 6, "max_minutes": 1e-6}))
        assert summary["steps"] == steps
    assert train(resolve(settings | {"max_steps": 6}))["steps"] == 6


def test_damaged_checkpoints_are_passed_over(tmp_path, capsys):
    folder = tmp_path / "run"
    settings = SETTINGS | {"output_dir": str(folder), "max_steps": 4}
    train(resolve(settings))
    train(resolve(settings | {"output_dir": str(tmp_path / "longer"), "max_steps": 6}))
    optimizer = folder / "checkpoints" / "step-000004" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:100])
    train(resolve(settings | {"max_steps": 6, "progress": "plain"}))
    output = " ".join(capsys.readouterr().out.split())
    assert "step-000004 is damaged (optimizer.pt does not match its hash); going on from step 2" in output
    assert [r["step"] for r in lines(folder, "metrics.jsonl") if r["kind"] == "step"] == [1, 2, 3, 4, 5, 6]


def test_no_sound_checkpoint_is_an_error_that_says_so(tmp_path):
    folder = tmp_path / "run"
    train(small_config(output_dir=str(folder), max_steps=1))
    for manifest in folder.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    with pytest.raises(RunFolderError, match="no sound checkpoint"):
        train(small_config(output_dir=str(folder), max_steps=2))


def test_a_changed_data_file_is_noticed(tmp_path):
    data = tmp_path / "sums.jsonl"
    rows = [{"question": f"What is {i} + {i + 1}?", "answer": str(2 * i + 1)} for i in range(30)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"data": str(data), "output_dir": str(tmp_path / "run"), "max_problems": None, "max_steps": 1}
    train(small_config(**settings))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows[5:]))
    with pytest.raises(RunFolderError, match="problems are not those"):
        train(small_config(**settings | {"max_steps": 2}))


def test_gradient_checkpointing_trains_alike(tmp_path):
    """The same computation, some of it twice: rewards and gradients of the first step agree."""
    first = {}
    for checkpointed in (False, True):
        folder = tmp_path / str(checkpointed)
        train(small_config(output_dir=str(folder), max_steps=1, gradient_checkpointing=checkpointed))
        first[checkpointed] = next(r for r in lines(folder, "metrics.jsonl") if r["kind"] == "step")
    assert first[True]["grad_norm"] == pytest.approx(first[False]["grad_norm"], rel=1e-3)
    assert first[True]["entropy"] == pytest.approx(first[False]["entropy"], rel=1e-4)
    assert first[True]["tokens/backbone"] == first[False]["tokens/backbone"]
    assert first[True]["stage2/reward"] == first[False]["stage2/reward"]
