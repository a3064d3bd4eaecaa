"""Every recipe resolves, says how it is run, and can be copied to start from."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from igrpo_lite.cli import main, recipes
from igrpo_lite.errors import ConfigError
from igrpo_lite.settings import load_file, preflight, resolve

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", recipes.names())
def test_recipe_resolves_and_names_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    path = recipes.folder() / f"{name}.yaml"
    assert path.read_text(encoding="utf-8").splitlines()[0] == f"# igrpo-lite train --config recipes/{name}.yaml"
    assert re.search(r"CPU|GPU", "".join(path.read_text(encoding="utf-8").splitlines()[1:4])), "says what it runs on"
    assert recipes.summary(name)
    given = load_file(path)
    config = resolve(given)
    assert preflight(config) == []


def test_the_first_recipe_is_what_train_does_without_flags() -> None:
    assert resolve(load_file(recipes.folder() / "tiny-igrpo.yaml")) == resolve({})


def test_paper_recipe_holds_the_papers_numbers() -> None:
    config = resolve(load_file(recipes.folder() / "paper-exact.yaml"))
    assert (config.num_drafts, config.num_refinements, config.temperature) == (4, 4, 0.7)
    assert (config.max_prompt_length, config.max_completion_length) == (1024, 4096)
    assert (config.reward_weights, config.beta) == ([1.0, 1.0], 0.0)
    assert (config.lr_scheduler_type, config.min_lr_rate, config.warmup_ratio) == ("cosine_with_min_lr", 0.1, 0.1)


def test_ls_lists_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "ls"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == recipes.names()


def test_cp_brings_the_files_a_recipe_names_and_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "cp", "own-reward"]) == 0
    copy = tmp_path / "own-reward.yaml"
    assert copy.read_text(encoding="utf-8").startswith("# igrpo-lite train --config own-reward.yaml\n")
    assert preflight(resolve(load_file(copy))) == []
    copy.write_text("mine")
    assert main(["recipes", "cp", "own-reward"]) == 2
    assert copy.read_text() == "mine"
    assert "exists already" in capsys.readouterr().err
    assert main(["recipes", "cp", "own-data", "deep/er/mine.yaml"]) == 0
    assert preflight(resolve(load_file("deep/er/mine.yaml"))) == []


def test_recipes_are_found_by_file_then_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipes.find("tiny-grpo") == recipes.find("recipes/tiny-grpo.yaml") == recipes.folder() / "tiny-grpo.yaml"
    (tmp_path / "tiny-grpo").write_text("seed: 1")
    assert recipes.find("tiny-grpo") == Path("tiny-grpo")
    with pytest.raises(ConfigError, match="did you mean tiny-grpo"):
        recipes.find("elsewhere/tiny-grpi.yaml")


def test_example_reward_returns_one_number_per_completion() -> None:
    spec = importlib.util.spec_from_file_location("brevity", ROOT / "recipes/examples/brevity.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.brevity(completions=["", "x" * 500], answer=["1", "2"]) == [1.0, 0.0]
    assert module.brevity(completions=[[{"role": "assistant", "content": "x" * 100}]]) == [0.5]
