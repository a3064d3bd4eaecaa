"""Whole comparisons on the bundled model: real processes, extended, interrupted, killed, and with a run that fails."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tiny_parts import SMALL

from igrpo_lite.cli import main
from igrpo_lite.comparison import compare
from igrpo_lite.comparison.processes import _reason

SETTINGS = SMALL | {"num_generations": 4, "prompts_per_step": 2, "max_steps": 2, "eval_steps": 1, "parity_steps": 0}
del SETTINGS["progress"]


def words(*methods: str, folder: Path, **settings: Any) -> list[str]:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in (SETTINGS | settings).items()]
    return ["compare", *methods, f"--output-dir={folder}", *flags]


def metrics(folder: Path) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def steps(folder: Path) -> list[int]:
    return [record["step"] for record in metrics(folder) if record["kind"] == "step"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One method and seed, beside one whose run fails; then extended to two methods and seeds."""
    folder = tmp_path_factory.mktemp("compare")
    said: list[str] = []
    (folder / "bad-2-steps-seed-0").mkdir()
    (folder / "bad-2-steps-seed-0" / "mine.txt").write_text("keep me")
    first = compare(["bad=igrpo", "grpo"], seeds=1, output_dir=folder, say=said.append, **SETTINGS)
    assert said[0] == "2 runs: 0 are there, 2 to make, 1 at a time"
    assert said[1].startswith("[1/2] bad-2-steps-seed-0: FAILED: ")
    assert first["missing"].keys() == {"bad-2-steps-seed-0"}
    assert "bad-2-steps-seed-0 holds files but no run" in first["missing"]["bad-2-steps-seed-0"]
    assert [(run["method"], run["seed"]) for run in first["runs"]] == [("grpo", 0)]
    assert first["paired"] == {}
    made = {path: path.stat().st_mtime_ns for path in (folder / "grpo-2-steps-seed-0").iterdir()}
    said.clear()
    compare(["grpo", "joint=igrpo-joint"], seeds="0,1", output_dir=folder, jobs=2, say=said.append, **SETTINGS)
    assert said[0] == "4 runs: 1 are there, 3 to make, 2 at a time"
    assert [line[:5] for line in said[1:]] == ["[1/3]", "[2/3]", "[3/3]"]
    assert "left" in said[1]
    assert "left" not in said[3]
    assert made == {path: path.stat().st_mtime_ns for path in (folder / "grpo-2-steps-seed-0").iterdir()}
    return folder


def test_the_results_are_those_of_the_runs_own_files(done):
    result = json.loads((done / "comparison.json").read_text())
    assert result["missing"] == {}
    assert [(run["method"], run["seed"]) for run in result["runs"]] == [
        (method, seed) for method in ("grpo", "joint") for seed in (0, 1)
    ]
    for run in result["runs"]:
        folder = done / f"{run['method']}-2-steps-seed-{run['seed']}"
        summary, found = json.loads((folder / "summary.json").read_text()), metrics(folder)
        evaluations = [record for record in found if record["kind"] == "evaluation"]
        assert [point["step"] for point in run["points"]] == [0, 1, 2]
        assert [point["rollouts"] for point in run["points"]] == [0, 8, 16]
        for measure in ("single", "refined"):
            assert [p[measure] for p in run["points"]] == [record[measure]["accuracy"] for record in evaluations]
            assert run["points"][-1][measure] == summary["after"][measure]["accuracy"]
        sampled = [record["tokens/sampled"] for record in found if record["kind"] == "step"]
        assert [point["sampled_tokens"] for point in run["points"]] == [0, sampled[0], sum(sampled)]
        assert run["rollouts"] == summary["rollouts"] == 16
    wider = result["paired"]["joint"]["single"]["problems"]
    assert wider["low"] <= result["paired"]["joint"]["single"]["mean"] <= wider["high"]
    assert result["command"].startswith("igrpo-lite compare grpo joint=igrpo-joint --seeds 0,1 --num-generations 4")
    assert str(done) not in json.dumps(result)
    assert "| `joint` |" in (done / "comparison.md").read_text()
    assert (done / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert result["methods"]["joint"]["settings"]["algorithm"] == "igrpo-joint"


def test_tables_are_made_again_without_running_anything(done, capsys, tmp_path):
    folder = shutil.copytree(done, tmp_path / "copy")
    kept = json.loads((folder / "comparison.json").read_text())
    for name in ("comparison.json", "comparison.md", "comparison.png"):
        (folder / name).unlink()
    (folder / "joint-2-steps-seed-1" / "summary.json").unlink()
    assert main([*words("grpo", "joint=igrpo-joint", folder=folder), "--seeds", "2", "--no-run"]) == 3
    shown = capsys.readouterr()
    assert "missing, not run yet: joint-2-steps-seed-1" in shown.err
    assert "| joint |" in shown.out
    again = json.loads((folder / "comparison.json").read_text())
    assert again["table"]["grpo"] == kept["table"]["grpo"]
    assert again["runs"] == kept["runs"][:3]
    assert again["paired"]["joint"]["seeds"] == [0]

    arguments = words("grpo", "joint=igrpo-joint", folder=folder, learning_rate=0.5)
    assert main([*arguments, "--seeds", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "made with other settings: learning_rate (grpo-2-steps-seed-0, joint-2-steps-seed-0); use the same" in line
    arguments = words("grpo", folder=folder, learning_rate=0.5)
    assert main([*arguments, "--seeds", "1", "--no-run"]) == 3
    assert "missing, made with other settings: learning_rate: grpo-2-steps-seed-0" in capsys.readouterr().err
    assert json.loads((folder / "comparison.json").read_text()) == again  # nothing to say, so nothing is written


def test_runs_that_were_cut_off_without_a_word_are_no_others_either(done, capsys, tmp_path):
    """The machine went down: checkpoints are there, but no summary."""
    folder = shutil.copytree(done, tmp_path / "copy")
    for name in ("grpo", "joint"):
        (folder / f"{name}-2-steps-seed-0" / "summary.json").unlink()
    assert main([*words("grpo", "joint=igrpo-joint", folder=folder, learning_rate=0.5), "--seeds", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "made with other settings: learning_rate (grpo-2-steps-seed-0, joint-2-steps-seed-0); use the same" in line


def test_a_command_that_allows_unequal_runs_says_so(done, tmp_path):
    specs = ["grpo", "joint=igrpo-joint", "more=grpo+max_steps=3"]
    result = compare(specs, seeds=1, output_dir=shutil.copytree(done, tmp_path / "copy"), allow_unequal=True, run=False,
                     **SETTINGS)  # fmt: skip
    assert "--allow-unequal" in result["command"].split()
    assert len(result["runs"]) == 2


def test_a_process_that_was_killed_is_said_to_be(tmp_path):
    log = tmp_path / "log"
    log.write_text("some library has something to say\n")
    assert _reason(log, -signal.SIGKILL) == "its process was ended by signal 9 (Killed); out of memory?"
    assert _reason(log, -signal.SIGSEGV) == "its process was ended by signal 11 (Segmentation fault)"
    assert _reason(log, 1) == "some library has something to say"
    log.write_text("error: a\nnoise\nerror: b\n")
    assert _reason(log, 2) == "a; b"


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_killed_and_interrupted_comparisons_go_on(tmp_path, capsys):
    reward = tmp_path / "slow.py"
    reward.write_text(
        "import time\n\n\ndef slow(completions, **columns):\n"
        "    time.sleep(0.3)\n    return [float(len(str(c))) for c in completions]\n"
    )
    settings = {"reward_funcs": f"{reward}:slow", "max_steps": 25, "eval_steps": 100, "save_steps": 100}
    folder = tmp_path / "runs"
    run, log = folder / "grpo-25-steps-seed-3", folder / "logs" / "grpo-25-steps-seed-3.log"
    arguments = [*words("grpo", folder=folder, **settings), "--seeds", "3,"]

    def stopped(number: signal.Signals, when: Callable[[], bool]) -> tuple[int, str]:
        command = [sys.executable, "-m", "igrpo_lite", *arguments]
        # A shell's background job inherits that Ctrl-C is ignored; here it must not be.
        usual = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=usual) as process:
            wait_for(lambda: when() or process.poll() is not None)
            process.send_signal(number)
            _, errors = process.communicate(timeout=120)
            return process.returncode, errors

    code, errors = stopped(signal.SIGKILL, lambda: bool(steps(run)))
    assert code == -signal.SIGKILL, errors
    # Nobody is left to ask it, and yet the run saves and ends.
    wait_for((run / "summary.json").exists)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["stopped_by"] == "SIGINT"
    assert 1 <= summary["steps"] == len(steps(run)) < 25
    assert (run / "checkpoints" / f"step-{summary['steps']:06d}").is_dir()
    assert main([*arguments, "--no-run"]) == 3
    assert f"not finished: {summary['steps']} of 25 steps" in capsys.readouterr().err

    log.unlink()
    code, errors = stopped(signal.SIGINT, log.exists)
    assert code == 130, errors
    assert "stopping grpo-25-steps-seed-3" in errors
    assert "the same command goes on" in errors

    reward.write_text(reward.read_text().replace("0.3", "0.0"))
    assert main(arguments) == 0
    assert steps(run) == list(range(1, 26))
    assert json.loads((run / "summary.json").read_text())["stopped"] is None
