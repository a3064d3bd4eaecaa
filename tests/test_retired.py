"""Settings of the first edition in old recipes and run folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_parts import SMALL

from igrpo_lite.cli import main
from igrpo_lite.config import RunConfig
from igrpo_lite.config.resolve import examine, resolve
from igrpo_lite.config.retired import RETIRED, RETIRED_VALUES, gone
from igrpo_lite.errors import RunFolderError
from igrpo_lite.training import train

OLD = RETIRED | {"num_refinements": 3}  # as a run of six rollouts had it
RUN = SMALL | {"max_steps": 2, "eval_size": 4}


def test_no_retired_setting_is_one():
    assert not RETIRED.keys() & RunConfig.model_fields.keys()


@pytest.mark.parametrize("name", RETIRED)
def test_what_still_happens_is_accepted_and_all_else_gets_one_sentence(name):
    for value in (OLD[name], str(OLD[name]), None):
        assert examine(SMALL | {name: value}) == (resolve(SMALL), [])
    _, findings = examine(SMALL | {name: 0.5})
    assert findings == [gone(name)]
    _, findings = examine(SMALL | {name.replace("_", "-"): "0.5", "max_step": 3})
    assert len(findings) == 2


def test_an_old_count_of_refinements_is_checked_against_the_new_one():
    old = {"num_generations": 8, "num_drafts": 2, "num_refinements": 6}
    assert resolve(old).n_refinements == 6
    assert examine(old | {"num_refinements": 4})[1] == [gone("num_refinements")]
    assert resolve({"algorithm": "grpo", "num_refinements": None}).n_refinements == 0


@pytest.fixture(scope="module")
def first_step(tmp_path_factory):
    """A run that stopped after its first step."""
    folder = tmp_path_factory.mktemp("old") / "run"
    train(resolve(RUN | {"output_dir": str(folder), "max_minutes": 1e-6, "save_steps": 1}))
    return folder


def old_run(first_step, tmp_path: Path, **settings) -> Path:
    """The same run as the first edition would have left it."""
    run = shutil.copytree(first_step, tmp_path / "run")
    text = "".join(f"{name}: {json.dumps(value)}\n" for name, value in (OLD | settings).items())
    for name in settings.keys() & RETIRED_VALUES.keys():
        kept = [line for line in (run / "config.yaml").read_text().splitlines() if not line.startswith(f"{name}:")]
        (run / "config.yaml").write_text("\n".join(kept) + "\n")
    with (run / "config.yaml").open("a") as file:
        file.write(text)
    return run


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"save_minutes": 3.0, "sample_steps": 1, "math_verify_timeout": 1.0, "save_total_limit": 9},
        {"rebuild_steps": 5, "share_weights": False, "torch_threads": 3, "sgrpo_preset": "long"},
    ],
)
def test_a_run_with_the_values_that_are_left_goes_on(settings, first_step, tmp_path):
    """So does one with others of what changed no result."""
    run = old_run(first_step, tmp_path, **settings)
    assert train(resolve(RUN | {"output_dir": str(run), "save_steps": 1}))["steps"] == 2
    whole = tmp_path / "whole"
    train(resolve(RUN | {"output_dir": str(whole), "save_steps": 1}))
    adapter = "adapter/adapter_model.safetensors"
    assert (run / adapter).read_bytes() == (whole / adapter).read_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        {"plain_refinements": 0.5},
        {"draft_temperature": 1.5},
        {"loss_type": "bnpo"},
        {"draft_answer": "hidden", "top_p": 0.9},
        {"draft_selection": "worst_formatted"},
    ],
)
def test_another_run_is_refused_but_evaluated_and_exported(settings, first_step, tmp_path, capsys):
    run = old_run(first_step, tmp_path, **settings)
    name = next(iter(settings))
    assert name in RETIRED or settings[name] in RETIRED_VALUES[name]
    with pytest.raises(RunFolderError, match=f"cannot be used: {name}: .*, and start over with --fresh"):
        train(resolve(RUN | {"output_dir": str(run), "save_steps": 1}))
    assert main(["eval", str(run)]) == 0, capsys.readouterr().err
    made = tmp_path / "made"
    assert main(["export", str(run), "--to", "adapter", "--output", str(made), "--no-verify"]) == 0, (
        capsys.readouterr().err
    )
    assert (made / "adapter_model.safetensors").is_file()
