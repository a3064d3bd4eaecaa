"""Runs that break down half-way, and folders that cannot be used: a clear line, and nothing is lost."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from bad_parts import SMALL, assert_same, records, steps

from igrpo_lite.cli import main
from igrpo_lite.config.resolve import resolve
from igrpo_lite.errors import RewardError, RunFolderError
from igrpo_lite.training import train
from igrpo_lite.training.run_folder import RunFolder

# Rewards

GOOD = "    return [len(text) % 3 for text in completions]\n"
BROKEN = {
    "wrong count": ("return [1.0]", r"returned 1 values for 2 completions"),
    "not a number": ("return [float('nan')] * 2", r"returned nan \(float\), expected a finite number"),
    "raises": (
        "raise ValueError('out of order')",
        r"failed in 2 of 20 calls; .*ValueError: out of order \(.*own.py, line 6\)$",
    ),
    "hangs": (
        "time.sleep(60)",
        r"failed in 2 of 20 calls \(2 of them took longer than 0.5 s\).*own.py\", line 6 in f$",
    ),
}
FIRST = 19  # one call before the run, then four a step: the fifth step
REWARDED = SMALL | {"reward_funcs": "own.py:f", "reward_timeout": 0.5, "max_steps": 6, "save_steps": 100}


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("import nowhere_to_be_found", r"cannot be imported: ModuleNotFoundError: .* \(.*own.py, line 1\); fix the"),
        ("import os\n\n1 / 0", r"cannot be imported: ZeroDivisionError: division by zero \(.*own.py, line 3\)"),
        ("def f(completions", r"own.py, line 1: '\(' was never closed; the file is not valid Python"),
        ("def f(completions):\n    return [1.0]", "returned 1 values for 2 completions"),
        ("def f(completions):\n    return [float('nan')] * 2", "returned nan"),
        (
            "import json\ndef f(completions):\n    return json.loads('{')",
            r"failed on the first row: json.decoder.JSONDecodeError: .* \(.*own.py, line 3\); fix it",
        ),
        (
            "import time\ndef f(completions):\n    time.sleep(60)",
            r"failed on the first row: no reply within 0.5 s, so it was stopped in .*own.py\", line 3 in f; fix it",
        ),
    ],
)
def test_rewards_that_cannot_work_are_refused_before_the_model_loads(body: str, told: str, refused, tmp_path) -> None:
    (tmp_path / "own.py").write_text(body + ("" if "def f" in body else "\ndef f(completions): ...\n"))
    found = refused(reward_funcs="own.py:f", reward_timeout=0.5)
    assert re.search(told, found)
    assert found.count("\n") == 0


@pytest.fixture(scope="module")
def rewarded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose reward never failed."""
    folder = tmp_path_factory.mktemp("rewarded")
    (folder / "own.py").write_text("def f(completions):\n" + GOOD)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(resolve(REWARDED | {"output_dir": "run", "progress": "off"}))
    return folder / "run"


@pytest.mark.parametrize("kind", BROKEN)
def test_a_reward_that_breaks_down_in_mid_run_costs_nothing(kind: str, rewarded: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    line, told = BROKEN[kind]
    (tmp_path / "own.py").write_text(
        "import os, time\ndef f(completions):\n"
        f"    with open({str(tmp_path / 'calls')!r}, 'a') as calls: calls.write('.')\n"
        f"    if os.path.getsize({str(tmp_path / 'calls')!r}) >= {FIRST}:\n"
        f"        time.time()\n        {line}\n" + GOOD
    )
    config = resolve(REWARDED | {"output_dir": "run", "progress": "off"})
    with pytest.raises(RewardError, match=told):
        train(config)
    assert (tmp_path / "run" / "checkpoints" / "step-000004").is_dir(), "the last finished step"
    (tmp_path / "own.py").write_text("def f(completions):\n" + GOOD)
    assert train(config)["steps"] == 6
    assert_same(rewarded, tmp_path / "run")


def test_a_reward_that_fails_now_and_then_is_told_at_once(say, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        f"import os\ndef f(completions):\n    with open({str(tmp_path / 'calls')!r}, 'a') as calls: calls.write('.')\n"
        f"    if os.path.getsize({str(tmp_path / 'calls')!r}) == 3: raise KeyError('x')\n" + GOOD
    )
    code, _, shown = say(reward_funcs="accuracy,own.py:f")
    assert code == 0
    assert (
        "warning: reward f failed in 1 of 5 calls; those completions were scored without it: KeyError: 'x' ("
        in " ".join(shown.split())
    )


# The run folder


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes: the operating system refuses, as it does when a disk is full."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps without trouble; the folder ``six`` beside it has the first six of them."""
    folder = tmp_path_factory.mktemp("straight")
    for name, count in (("six", 6), ("eight", 8)):
        settings = {"output_dir": str(folder / name), "max_steps": count, "lr_scheduler_type": "constant"}
        train(resolve(SMALL | settings | {"warmup_ratio": 0.0, "progress": "off"}))
    return folder / "eight"


def going_on(straight: Path, tmp_path: Path, **settings: Any) -> tuple[Path, Any]:
    folder = tmp_path / "run"
    shutil.copytree(straight.parent / "six", folder)
    constant = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0, "progress": "off"}
    return folder, resolve(SMALL | constant | {"output_dir": str(folder), "max_steps": 8} | settings)


def test_a_full_disk_at_a_checkpoint(straight: Path, tmp_path: Path) -> None:
    folder, config = going_on(straight, tmp_path, save_steps=1)
    with (
        file_limit(100_000),
        pytest.raises(
            RunFolderError, match=r"checkpoint of step 7 could not .*File too large.* of step 6 is untouched"
        ),
    ):
        train(config)
    assert not list(folder.glob("checkpoints/.tmp*"))
    assert train(config)["steps"] == 8
    assert_same(straight, folder)


def test_a_full_disk_at_a_record(straight: Path, tmp_path: Path) -> None:
    folder, config = going_on(straight, tmp_path)
    largest = max((folder / name).stat().st_size for name in ("config.yaml", "samples.jsonl"))
    with (
        file_limit(largest + 300),  # config.yaml, which is written first, still fits
        pytest.raises(RunFolderError, match=r"jsonl could not be written: File too large; .* last checkpoint"),
    ):
        train(config)
    assert not (folder / "checkpoints" / "step-000007").exists(), "its records are not complete"
    assert train(config)["steps"] == 8
    assert_same(straight, folder)


def test_a_full_disk_at_the_summary(straight: Path, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    folder, config = going_on(straight, tmp_path)
    (folder / ".tmp-summary.json").symlink_to("/dev/full")
    with pytest.raises(RunFolderError, match=r"summary.json could not be written: No space left on device; make room"):
        train(config)
    assert train(config)["steps"] == 8
    assert_same(straight, folder)


def test_a_full_disk_at_the_first_adapter(tmp_path: Path) -> None:
    config = resolve(SMALL | {"output_dir": str(tmp_path / "run"), "progress": "off"})
    with file_limit(100_000), pytest.raises(RunFolderError, match=r"adapter could not be written to .*File too large"):
        train(config)
    assert train(config)["steps"] == 1


def test_a_log_on_a_full_disk() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with open("/dev/full", "wb", buffering=0) as full:
        command = [sys.executable, "-m", "igrpo_lite", "recipes", "ls"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: output: No space left on device; make room and run the same command again\n"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_folders_that_cannot_be_written(refused, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in ("/proc/run", "/sys/run", "file", "file/run"):
        assert re.fullmatch(
            rf"error: {folder} cannot be written: [^\[\]]+; set --output-dir to another folder",
            refused(output_dir=folder),
        )


def test_two_runs_in_one_folder(refused, tmp_path: Path) -> None:
    with RunFolder(resolve(SMALL | {"output_dir": str(tmp_path / "run")})):
        assert "run is in use by another run; wait for it or set --output-dir" in refused()
        assert "is in use by another run" in refused(fresh=True)


def test_folders_of_something_else(refused, say, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").touch()
    assert "run holds files but no run (no config.yaml); choose another --output-dir" in refused()
    assert "run holds files but no run" in refused(fresh=True)
    assert [path.name for path in (tmp_path / "run").iterdir() if path.name != ".lock"] == ["thesis.txt"]


def test_another_configuration_is_refused_only_once_there_is_something_to_lose(refused, say, tmp_path: Path) -> None:
    refused(data="two-step", device="cuda:77")
    assert say(data="addition")[0] == 0, "the first start came to nothing"
    told = refused(data="multiplication")
    assert "was made with other settings: data: 'addition' then, 'multiplication' now" in told
    assert "--fresh to start over" in told


def test_files_deleted_from_a_run_folder(straight: Path, tmp_path: Path, capsys) -> None:
    folder, config = going_on(straight, tmp_path, progress="plain")
    (folder / "metrics.jsonl").unlink()
    samples = (folder / "samples.jsonl").read_bytes()
    (folder / "samples.jsonl").write_bytes(samples[:-10])
    assert train(config)["steps"] == 8
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("has lost lines of earlier steps") == 2
    assert steps(folder) == [7, 8]
    assert len(records(folder, "samples.jsonl")) == len(records(straight, "samples.jsonl")) - 1

    shutil.rmtree(folder / "checkpoints")
    before = (folder / "samples.jsonl").read_bytes()
    with pytest.raises(RunFolderError, match="records of earlier steps but no checkpoint to go on from; use --fresh"):
        train(config.model_copy(update={"max_steps": 9}))
    assert (folder / "samples.jsonl").read_bytes() == before

    with (folder / "config.yaml").open("a") as file:
        file.write("of_another_version: 1\n")
    with pytest.raises(RunFolderError, match=r"config.yaml, .* cannot be used: unknown setting of_another_version; "):
        train(config)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["./none"], "model: no such folder: ./none"),
        (["none"], "no folder of that name here, and as a hub id it could not be loaded"),
        (["tiny", "--adapter", "none"], "none holds no adapter (no adapter_config.json)"),
        (["tiny", "--adapter", "cut"], "adapter cut does not fit the model"),
        (
            ["tiny", "--max-prompt-length", "3"],
            "every held-out prompt is longer than max_prompt_length = 3 tokens; raise",
        ),
        (["tiny", "--output", "none/results.json"], "--output none/results.json: there is no folder none"),
    ],
)
def test_evaluations_that_cannot_be(words: list[str], told: str, straight: Path, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(straight / "adapter", "cut")
    weights = Path("cut/adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    assert main(["eval", *words, "--eval-size", "4"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert told in lines[0]
