"""What a comparison is asked for: methods, seeds and settings, and every mistake in them at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from igrpo_lite.cli import main
from igrpo_lite.cli.recipes import find
from igrpo_lite.comparison.methods import read_methods, read_seeds
from igrpo_lite.comparison.processes import _environment
from igrpo_lite.comparison.run import compare
from igrpo_lite.config import RunConfig
from igrpo_lite.config.resolve import resolve
from igrpo_lite.errors import ConfigError

RUN = {"patience_dead": 0, "progress": "off"}


def only(spec: str, recipe: str | None = None, **common) -> tuple[str, RunConfig]:
    (method,), findings = read_methods([spec], common, recipe, find=find)
    assert findings == []
    return method.name, method.config


@pytest.mark.parametrize(
    ("spec", "name", "settings"),
    [
        ("grpo", "grpo", {"algorithm": "grpo"}),
        ("igrpo/s-grpo", "igrpo/s-grpo", {"tokens": "s-grpo"}),
        ("igrpo+draft_selection=random", "igrpo+draft_selection=random", {"draft_selection": "random"}),
        ("few=igrpo+num_drafts=4", "few", {"num_drafts": 4}),
        ("grpo/t-spmo+num-generations=8+tspmo_replay=4", None, {
            "algorithm": "grpo", "tokens": "t-spmo", "num_generations": 8, "tspmo_replay": 4,
        }),
        ("igrpo+system_prompt=1+1=2", None, {"system_prompt": "1+1=2"}),
        ("tiny-t-spmo", "tiny-t-spmo", None),
        ("t=tiny-t-spmo+lora_r=8", "t", None),
    ],
)  # fmt: skip
def test_a_method_stands_for_its_settings(spec, name, settings):
    found, config = only(spec)
    assert found == (name or spec)
    if settings is not None:
        assert config == resolve(RUN | settings)


def test_a_method_wins_over_common_settings_these_over_its_recipe_and_this_over_the_recipe_under_all(tmp_path):
    mine, under = tmp_path / "mine.yaml", tmp_path / "under.yaml"
    mine.write_text("algorithm: igrpo\nmax_steps: 3\nlora_r: 4\nnum_drafts: 4\nseed: 7\noutput_dir: runs/mine\n")
    under.write_text("lora_r: 2\neval_size: 9\nmax_steps: 2\nlearning_rate: 0.5\nmax_minutes: 3\nprogress: plain\n")
    name, config = only(f"{mine}+learning_rate=0.25", str(under), max_steps="5", num_generations="12")
    assert name == "mine+learning_rate=0.25"
    assert (config.learning_rate, config.max_steps, config.lora_r, config.eval_size) == (0.25, 5, 4, 9)
    # The count of all rollouts takes back what a recipe below says of their parts.
    assert (config.num_drafts, config.n_refinements) == (6, 6)
    assert (config.seed, config.output_dir, config.max_minutes, config.progress) == (0, None, None, "off")
    assert only("grpo", str(mine))[1].num_drafts is None
    assert only("igrpo", tokens="s-grpo", sgrpo_p="0.3")[1].sgrpo_p == 0.3


def test_folders_are_those_of_earlier_runs():
    methods, _ = read_methods(["grpo/t-spmo+tspmo_replay=4", "Mine=grpo"], {}, allow_unequal=True)
    assert [method.folder(3) for method in methods] == [
        "grpo-t-spmo-tspmo_replay-4-60-steps-seed-3",
        "mine-60-steps-seed-3",
    ]
    config = methods[0].run_config(3, Path("runs"))
    assert (config.seed, config.output_dir) == (3, "runs/grpo-t-spmo-tspmo_replay-4-60-steps-seed-3")
    assert resolve(config.model_dump()) == config  # a run's process gets them all


@pytest.mark.parametrize(
    ("text", "seeds"), [("5", [0, 1, 2, 3, 4]), (2, [0, 1]), ("0,3,7", [0, 3, 7]), ("7,", [7]), ([4, 2], [4, 2])]
)
def test_seeds_are_a_number_or_a_list(text, seeds):
    assert read_seeds(text) == (seeds, [])


@pytest.mark.parametrize("text", ["0", "", "x", "1,1", "-1,", "1.5", ",", [], [-1], f"{2**31},"])
def test_other_seeds_are_refused(text):
    seeds, (finding,) = read_seeds(text)
    assert (seeds, finding.startswith("seeds: must be")) == ([], True)


def test_all_mistakes_come_at_once_with_the_methods_that_they_concern(tmp_path, capsys):
    words = ["gpro", "igrpo+draft_selektion=random", "a=grpo+seed=3", "igrpo+algorithm=grpo", "none.yaml", "grpo"]
    more = ["--seeds", "x", "--jobs", "0", "--model", "./nope", "--output-dir", str(tmp_path / "out")]
    assert main(["compare", *words, *more]) == 2
    wanted = [
        "gpro: neither an algorithm (grpo, igrpo, igrpo-joint) nor a recipe's file; did you mean grpo?",
        "igrpo+algorithm=grpo: algorithm is given twice",
        "none.yaml: neither an algorithm",
        "igrpo+draft_selektion=random: unknown setting draft_selektion; did you mean draft_selection?",
        "igrpo+draft_selektion=random, a, igrpo+algorithm=grpo, grpo: model: no such folder: ./nope",
        "a: seed: is no setting of a comparison; say --seeds",
        "seeds: must be how many",
        "jobs: must be at least 1, not 0",
    ]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(wanted)
    for line, words_of_it in zip(lines, wanted, strict=True):
        assert line.startswith(f"error: {words_of_it}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["name at least one method"]),
        (["grpo", "igrpo", "grpo"], ["grpo: has the name of grpo; give it another one, as NAME=grpo"]),
        (["grpo", "x=grpo+system_prompt=a", "igrpo+system_prompt=" + "a" * 200], ["too long for a folder's name"]),
        (["grpo", "igrpo", "--model", "./nope"], ["model: no such folder"]),
        (["grpo", "grpo/s-grpo", "--sgrpo-p", "0.3"], ["grpo: sgrpo_p: belongs to tokens s-grpo"]),
        (["grpo", "--max-step", "3"], ["unknown flag --max-step; did you mean --max-steps?"]),
        (
            ["grpo", "igrpo+lora_r=0", "--max-step", "3", "--learning-rate", "x"],
            ["unknown flag --max-step", "learning_rate: must be", "igrpo+lora_r=0: lora_r: must be"],
        ),
        (["grpo", "--job=3"], ["unknown flag --job; did you mean --jobs?"]),
        (["--seed", "3", "grpo"], ["seed: is no setting of a comparison; say --seeds"]),
        (["grpo", "--config", "none.yaml"], ["no such recipe: none.yaml"]),
        (["grpo", "igrpo+eval_size=3"], ["igrpo+eval_size=3: is measured on other held-out problems than grpo (eval"]),
        (["grpo", "igrpo+data=addition"], ["measured on other held-out problems than grpo (data)"]),
        (
            ["grpo", "igrpo", "a=grpo+num_generations=8", "b=grpo/t-spmo+tspmo_replay=4"],
            [
                "rollouts of a run are not equal (7,680: grpo, igrpo; 3,840: a; 7,680 and what tspmo_replay 4 adds: "
                "b); set prompts_per_step, num_generations or max_steps, or compare all the same with --allow-unequal"
            ],
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(words, expected, capsys):
    assert main(["compare", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(expected)
    for line, text in zip(lines, expected, strict=True):
        assert line.startswith("error: ")
        assert text in line


def test_equal_rollouts_are_those_of_a_run_and_unequal_ones_are_allowed_where_asked_for():
    specs = ["grpo", "grpo+max_steps=30+prompts_per_step=16"]
    assert read_methods(specs, {})[1] == []
    assert read_methods(["grpo", "grpo+max_steps=30"], {}, allow_unequal=True)[1] == []
    # Names of the training data differ, but not what all are measured on.
    assert read_methods(["grpo", "grpo+data=addition"], {"eval_data": "two-step"})[1] == []


def test_the_function_refuses_as_the_command_does():
    with pytest.raises(ConfigError, match=r"output_dir: is no setting|fresh: is no setting"):
        compare(["grpo"], fresh=True)


def test_runs_on_a_cpu_have_one_thread_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert _environment(resolve({}))["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in _environment(resolve({"device": "cuda:1"}))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert _environment(resolve({}))["OMP_NUM_THREADS"] == "3"
