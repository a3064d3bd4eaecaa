"""The command line as a user meets it: in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from igrpo_lite import __version__
from igrpo_lite.cli import app, main
from igrpo_lite.cli.flags import SHORT
from igrpo_lite.config.fields import FIELDS
from igrpo_lite.config.resolve import load_file, resolve

ROOT = Path(__file__).resolve().parents[1]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "igrpo_lite", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_nothing_heavy_is_imported_before_work_begins() -> None:
    script = (
        "import sys, contextlib, io, igrpo_lite\n"
        "from igrpo_lite.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):\n"
        "    main(['train', '--help']); main(['train', '--dump-config']); main(['train', '--max-steps', '0'])\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'peft', 'pandas', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_shows_defaults_and_choices_with_the_four_main_flags_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help-all"]) == 0
    text = capsys.readouterr().out
    flags = [line.split()[1] for line in text.splitlines() if line.startswith("│ --")]
    assert flags[:4] == ["--model", "--data", "--algorithm", "--tokens"]
    assert "igrpo-joint" in text
    assert "[default: 768; tiny: 48]" in text


def test_help_is_short_and_the_rest_is_a_flag_away(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    """Two screens of 80 columns; hidden settings work as flags all the same."""
    monkeypatch.setenv("COLUMNS", "80")
    shown = {}
    for flag in ("--help", "--help-all"):
        assert main(["train", flag]) == 0
        text = capsys.readouterr().out
        shown[flag] = set(re.findall(r"^│ --([\w-]+)", text, re.MULTILINE)) - {"config", "dump-config"}
        if flag == "--help":
            assert len(text.rstrip().splitlines()) <= 48
            assert text.rstrip().endswith("All settings: igrpo-lite train --help-all")
    assert shown["--help-all"] == {name.replace("_", "-") for name in FIELDS}
    brief = {name.replace("_", "-") for lines in SHORT.values() for name in lines}
    assert shown["--help"] == brief
    assert len(brief) == 25
    assert main(["train", "--warmup-ratio", "2"]) == 2
    assert "warmup_ratio: must be a number from 0 to 1" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["eval", "compare", "check", "scan", "show-prompt", "plan"])
def test_the_short_help_of_other_verbs_hides_settings_but_none_of_their_own_flags(verb, capsys) -> None:
    own = set()
    for flag in ("--help", "--help-all"):
        assert main([verb, flag]) == 0
        found = set(re.findall(r"--([\w-]+)", capsys.readouterr().out))
        own = own or found
    assert own - {"help-all"} < found


def test_version_and_module_agree() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout.strip()) == (0, __version__)


def test_dumped_configuration_holds_flags_over_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("max_steps: 3\nlearning-rate: 2e-4\n")
    done = run(
        "train", "--config", str(recipe), "--max-steps", "7", "--fresh", "--report_to", "wandb,trackio", "--dump-config"
    )
    assert (done.returncode, done.stderr) == (0, "")
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(done.stdout)
    config = resolve(load_file(dumped))
    assert (config.max_steps, config.learning_rate, config.fresh) == (7, 2e-4, True)
    assert config.report_to == ["wandb", "trackio"]
    assert yaml.safe_load(done.stdout)["num_drafts"] == 8


def test_all_mistakes_come_at_once_in_one_line_each_without_traceback(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("max_step: 3\ntemperature: hot\n")
    more = ("--model", "./none", "--draft-selection", "worse")
    done = run("train", "--config", str(recipe), "--learning-rate", "-1", "--num-drafts", "99", *more)
    lines = done.stderr.splitlines()
    assert done.returncode == 2
    assert all(line.startswith("error: ") for line in lines)
    for words in (
        "max_step;",
        "draft_selection: must be one of best, random",
        "temperature:",
        "learning_rate:",
        "num_drafts:",
        "model: no such folder",
    ):
        assert sum(words in line for line in lines) == 1, done.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "--max-step", "3"], ["unknown flag --max-step; did you mean --max-steps?"]),
        (["train", "--lr", "3"], ["did you mean --learning-rate?"]),
        (
            ["train", "--agorithm=grpo", "--zzz", "--seed", "x"],
            ["did you mean --algorithm?", "--zzz; see igrpo-lite train --help", "seed: must be a whole number"],
        ),
        (
            ["train", "--draft-answer", "hidden"],
            ["draft_answer: was removed; every run now has draft_answer shown; leave it out"],
        ),
        (["train", "stray"], ["unexpected 'stray'"]),
        (["train", "--max-steps"], ["--max-steps requires an argument"]),
        (["train", "--output-dir", "--fresh"], ["--output-dir requires an argument"]),
        (["train", "--config", "tiny-igrp"], ["did you mean tiny-igrpo?"]),
        (["tran"], ['Did you mean "train"']),
        (["eval"], ["RUN_OR_MODEL"]),
        (["eval", "tiny", "--lora-r", "3"], ["unknown flag --lora-r"]),
        (["recipes", "cp", "nothing-like-it"], ["igrpo-lite recipes ls"]),
    ],
)
def test_mistakes_on_the_command_line(
    words: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(expected)
    for line, text in zip(lines, expected, strict=True):
        assert line.startswith("error: ")
        assert text in line


def test_an_interrupt_before_the_run_has_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("igrpo_lite.cli.recipes.ls", stop)
    assert app.run(["recipes", "ls"]) == 130


@pytest.mark.parametrize(("stopped_by", "code"), [("diagnosis", 3), ("SIGTERM", 143), ("time", 0), (None, 0)])
def test_exit_codes_of_a_run(stopped_by: str | None, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("igrpo_lite.training.train", lambda config: {"stopped_by": stopped_by})
    assert app.run(["train", "--report-to", "none"]) == code


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("igrpo_lite.cli.recipes.ls", stop)
    with pytest.raises(ZeroDivisionError):
        app.run(["recipes", "ls"])


@pytest.mark.parametrize(
    "words",
    [
        ["--reward-funcs", "accuracy", "format", "--max-steps", "7"],
        ["--reward-funcs", "accuracy,format", "--max-steps", "7"],
        ["--reward-funcs", "accuracy", "--max-steps", "7", "--reward-funcs", "format"],
    ],
)
def test_lists_are_written_as_in_other_trainers(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["train", *words, "--dump-config"]) == 0
    output = capsys.readouterr().out
    assert "reward_funcs: [accuracy, format]" in output
    assert "max_steps: 7" in output
