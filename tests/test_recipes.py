"""Every recipe resolves, says how it is run, and can be copied to start from."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
from make_docs import filled

from igrpo_lite.cli import main, recipes
from igrpo_lite.config.resolve import load_file, resolve
from igrpo_lite.errors import ConfigError
from igrpo_lite.inputs import input_findings
from igrpo_lite.planning.gpus import GIB
from igrpo_lite.planning.models import find_model

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))
from card_recipes import TITLE, card_recipes, comment, table, with_comment  # noqa: E402


@pytest.mark.parametrize("name", recipes.names())
def test_recipe_resolves_and_names_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    path = recipes.folder() / f"{name}.yaml"
    assert path.read_text(encoding="utf-8").splitlines()[0] == f"# igrpo-lite train --config recipes/{name}.yaml"
    assert re.search(r"CPU|GPU", "".join(path.read_text(encoding="utf-8").splitlines()[1:4])), "says what it runs on"
    assert recipes.summary(name)
    given = load_file(path)
    config = resolve(given)
    assert input_findings(config) == []


METHODS = {"s-grpo": ("grpo", "s-grpo"), "t-spmo": ("grpo", "t-spmo")}
CARDS = card_recipes()


@pytest.mark.parametrize("recipe", CARDS, ids=lambda recipe: recipe.name)
def test_a_recipe_for_a_gpu_is_what_its_name_says_and_fits(recipe) -> None:
    config = resolve(load_file(recipes.find(recipe.name)))
    assert find_model(config.model) == find_model(recipe.model)
    assert (config.algorithm, config.tokens) == METHODS.get(recipe.method, (recipe.method, "all"))
    made = recipe.plan()
    assert made.setup.gpu == recipe.gpu
    assert made.verdict == "fits"
    assert not any("context" in note for note in made.notes)
    assert "does not fit" not in comment(recipe)
    assert "load_in_4bit" in load_file(recipes.find(recipe.name)), "plan would choose it, and train would not"


@pytest.mark.parametrize("recipe", CARDS, ids=lambda recipe: recipe.name)
def test_a_recipe_for_a_gpu_says_what_plan_says_now(recipe, capsys: pytest.CaptureFixture[str]) -> None:
    """``make docs`` writes the numbers anew."""
    text = recipes.find(recipe.name).read_text(encoding="utf-8")
    assert text == with_comment(recipe)
    assert main(["plan", "--config", recipe.name, "--gpu", recipe.card]) == 0
    printed = capsys.readouterr().out
    phases = re.search(r"load ([\d.]+), rollout ([\d.]+), update ([\d.]+) of", text)
    assert phases
    assert re.search(rf"^total +{' +'.join(map(re.escape, phases.groups()))}$", printed, re.MULTILINE)
    assert f"{recipe.gpu.memory_gib:.2f} GiB ({recipe.plan().share:.0%})" in printed
    (hours,) = re.findall(r"([\d.]+ h) for", printed)
    assert f"steps: about {hours}" in text
    for chosen in re.findall(r"^#   the run chooses (.*)$", text, re.MULTILINE):
        assert f"chosen: {chosen}\n" in printed
    assert max(phase.total for phase in recipe.plan().phases) < recipe.gpu.memory_gib * GIB


def test_the_table_of_recipes_is_current() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert page == filled(page, TITLE, table())


def test_there_is_a_recipe_for_every_kind_of_card() -> None:
    assert {"t4", "3060", "3090", "4090", "a100-40", "a100-80", "h100", "h200"} <= {recipe.card for recipe in CARDS}
    assert {"igrpo", "igrpo-joint", "grpo", "s-grpo", "t-spmo"} <= {recipe.method for recipe in CARDS}
    assert len(CARDS) == sum("/" in name for name in recipes.names()), "every recipe in a folder is for a GPU"


def test_an_outdated_comment_is_replaced_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = next(recipe for recipe in CARDS if recipe.name == "qwen2-1.5b/s-grpo_t4")
    text = recipes.find(recipe.name).read_text(encoding="utf-8")
    monkeypatch.setattr("card_recipes.path_of", lambda name: tmp_path / "it.yaml")
    for old in (text.replace("steps: about", "leaps: about"), text.replace(comment(recipe) + "\n", "")):
        assert old != text
        (tmp_path / "it.yaml").write_text(old, encoding="utf-8")
        assert with_comment(recipe) == text


def test_the_first_recipe_is_what_train_does_without_flags() -> None:
    assert resolve(load_file(recipes.folder() / "tiny-igrpo.yaml")) == resolve({})


def test_paper_recipe_holds_the_papers_numbers() -> None:
    config = resolve(load_file(recipes.folder() / "paper-exact.yaml"))
    assert (config.num_drafts, config.n_refinements, config.temperature) == (4, 4, 0.7)
    assert (config.max_prompt_length, config.max_completion_length) == (1024, 4096)
    assert (config.reward_weights, config.beta) == ([1.0, 1.0], 0.0)
    assert (config.lr_scheduler_type, config.warmup_ratio) == ("cosine_with_min_lr", 0.1)


def test_ls_lists_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "ls"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == recipes.names()


def test_ls_puts_recipes_for_gpus_behind_and_show_prints_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert ["/" in name for name in recipes.names()] == sorted("/" in name for name in recipes.names())
    assert main(["recipes", "show", "s-grpo_t4"]) == 0
    assert capsys.readouterr().out == (recipes.folder() / "qwen2-1.5b/s-grpo_t4.yaml").read_text(encoding="utf-8")
    assert main(["recipes", "show", "s-grpo_t5"]) == 2
    assert "did you mean qwen2-1.5b/s-grpo_t4?" in capsys.readouterr().err


def test_cp_brings_the_files_a_recipe_names_and_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "cp", "own-reward"]) == 0
    copy = tmp_path / "own-reward.yaml"
    assert copy.read_text(encoding="utf-8").startswith("# igrpo-lite train --config own-reward.yaml\n")
    assert input_findings(resolve(load_file(copy))) == []
    copy.write_text("mine")
    assert main(["recipes", "cp", "own-reward"]) == 2
    assert copy.read_text() == "mine"
    assert "exists already" in capsys.readouterr().err
    assert main(["recipes", "cp", "own-data", "deep/er/mine.yaml"]) == 0
    assert input_findings(resolve(load_file("deep/er/mine.yaml"))) == []


def test_recipes_are_found_by_file_then_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipes.find("tiny-grpo") == recipes.find("recipes/tiny-grpo.yaml") == recipes.folder() / "tiny-grpo.yaml"
    (tmp_path / "tiny-grpo").write_text("seed: 1")
    assert recipes.find("tiny-grpo") == Path("tiny-grpo")
    with pytest.raises(ConfigError, match="did you mean tiny-grpo"):
        recipes.find("elsewhere/tiny-grpi.yaml")


def test_recipes_in_folders_are_found_by_their_last_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = recipes.folder() / "qwen2-1.5b" / "s-grpo_t4.yaml"
    for name in ("qwen2-1.5b/s-grpo_t4", "recipes/qwen2-1.5b/s-grpo_t4.yaml", "s-grpo_t4", r"qwen2-1.5b\s-grpo_t4"):
        assert recipes.find(name) == file
    with pytest.raises(ConfigError, match=r"qwen2-1\.5b may be .*qwen2-1\.5b/igrpo_t4, "):
        recipes.find("qwen2-1.5b")
    monkeypatch.setattr(recipes, "names", lambda: ["a/igrpo_t4", "b/igrpo_t4"])
    with pytest.raises(ConfigError, match="igrpo_t4 may be a/igrpo_t4, b/igrpo_t4; name one"):
        recipes.find("igrpo_t4")


def test_train_takes_a_recipe_for_a_gpu_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", "qwen2-1.5b/s-grpo_t4", "--max-steps", "3", "--dump-config"]) == 0
    (tmp_path / "dumped.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    config = resolve(load_file("dumped.yaml"))
    assert (config.model, config.tokens, config.max_steps, config.load_in_4bit) == ("qwen2-1.5b", "s-grpo", 3, True)
    assert main(["recipes", "cp", "qwen2-1.5b/s-grpo_t4"]) == 0
    assert (
        (tmp_path / "s-grpo_t4.yaml")
        .read_text(encoding="utf-8")
        .startswith("# igrpo-lite train --config s-grpo_t4.yaml\n")
    )


def test_example_reward_returns_one_number_per_completion() -> None:
    spec = importlib.util.spec_from_file_location("brevity", ROOT / "recipes/examples/brevity.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.brevity(completions=["", "x" * 500], answer=["1", "2"]) == [1.0, 0.0]
    assert module.brevity(completions=[[{"role": "assistant", "content": "x" * 100}]]) == [0.5]
