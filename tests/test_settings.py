"""Settings: every finding at once and in words, precedence, and files that give back what was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import igrpo_lite
from igrpo_lite import inputs
from igrpo_lite.config import SECTIONS, ModelOptions, PromptOptions, RunConfig
from igrpo_lite.config.defaults import MODEL_DEFAULTS
from igrpo_lite.config.fields import FIELDS, allowed
from igrpo_lite.config.resolve import RESUMABLE, differences, dump, examine, load_file, merge, resolve
from igrpo_lite.errors import ConfigError
from igrpo_lite.inputs import input_findings


def findings(**given: Any) -> list[str]:
    return examine(given)[1]


def test_all_findings_come_at_once_and_in_words() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({"max_step": 3, "learning_rate": -1, "algorithm": "igrp", "epsilon_high": 0.1, "device": "gpu"})
    assert caught.value.problems == [
        "unknown setting max_step; did you mean max_steps?",
        "learning_rate: must be a number above 0, not -1",
        "algorithm: must be one of grpo, igrpo, igrpo-joint, not 'igrp'; did you mean igrpo?",
        "epsilon_high: 0.1 is below epsilon 0.2; it widens the clip range above 1",
        "device: must be auto, cpu, cuda, cuda:<number> or mps, not 'gpu'",
    ]
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"max_steps": "ten"}, "a whole number of at least 1, not 'ten'"),
        ({"max_steps": True}, "a whole number of at least 1, not true"),
        ({"max_steps": None}, "not nothing"),
        ({"seed": -1}, "from 0 to 2147483647"),
        ({"temperature": float("nan")}, "a number above 0"),
        ({"fresh": "maybe"}, "true or false, not 'maybe'"),
        ({"revision": 7}, "text (or none), not 7; write it in quotes"),
        ({"report_to": "wandb,foo"}, "each one of wandb, tensorboard, trackio"),
        ({"reward_funcs": ""}, "at least one item"),
        ({"warmup_ratio": 1.5}, "from 0 to 1"),
        ({"num_drafts": 2.5}, "a whole number of at least 1 (or none)"),
        ({"model": {"name": "x"}}, "must be text"),
    ],
)
def test_bad_values_say_what_is_allowed(given: dict[str, Any], words: str) -> None:
    (found,) = findings(**given)
    assert found.startswith(f"{next(iter(given))}: must be ")
    assert words in found


@pytest.mark.parametrize(
    ("given", "counts"),
    [
        ({}, (16, 8, 8)),
        ({"model": "org/name"}, (8, 4, 4)),
        ({"model": "org/name", "num_generations": 7}, (7, 3, 4)),
        ({"num_drafts": 4}, (16, 4, 12)),
        ({"num_generations": 6, "num_drafts": 4}, (6, 4, 2)),
        ({"algorithm": "grpo"}, (16, None, 0)),
    ],
)
def test_rollouts_are_derived(given: dict[str, Any], counts: tuple[int | None, ...]) -> None:
    config = resolve(given)
    assert (config.num_generations, config.num_drafts, config.n_refinements) == counts


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"num_generations": 2}, "no spread, so no advantage"),
        ({"num_generations": 8, "num_drafts": 7}, "num_drafts: must leave at least 2 refinements"),
        ({"num_generations": 8, "num_drafts": 9}, "num_drafts: must leave at least 2 refinements"),
        ({"algorithm": "grpo", "num_generations": 1}, "no spread, so no advantage"),
        ({"algorithm": "grpo", "num_drafts": 4}, "grpo has one stage"),
        ({"epsilon_high": 0.1}, "below epsilon 0.2"),
    ],
)
def test_contradictions_are_named(given: dict[str, Any], reason: str) -> None:
    (found,) = findings(**given)
    assert reason in found


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tokens": "t-spmo", "loss_type": "dapo"}, "loss_type: dapo does not go with tokens t-spmo"),
        ({"tokens": "t-spmo", "loss_type": "grpo"}, "leave loss_type out"),
        ({"sgrpo_k": 8}, "sgrpo_k: belongs to tokens s-grpo, but tokens is all"),
        ({"tokens": "s-grpo", "tspmo_replay": 4}, "tspmo_replay: belongs to tokens t-spmo, but tokens is s-grpo"),
        ({"tokens": "t-spmo", "scale_rewards": "batch"}, "scale_rewards: has no effect with tokens t-spmo"),
        ({"tokens": "s-grpo", "sgrpo_p": 0.0}, "sgrpo_p: 0 with sgrpo_alpha 0 leaves no token to learn from"),
        ({"loss_type": "cispo", "epsilon_high": 0.28}, "epsilon_high: cispo takes it as the highest ratio itself"),
        ({"loss_type": "dapo", "epsilon_high": 0.1}, "epsilon_high: 0.1 is below epsilon 0.2"),
        (
            {"lora_layers": "last sixth"},
            "lora_layers: must be all, last half, last third, last quarter or last <number>",
        ),
        ({"lora_layers": "last 0"}, "not 'last 0'"),
        ({"lora_layers": "first half"}, "not 'first half'"),
        ({"tokens": "s_grpo"}, "did you mean s-grpo?"),
        ({"tokens": "sgrpo"}, "did you mean s-grpo?"),
        ({"loss_type": "drgrpo"}, "did you mean dr_grpo?"),
        ({"sgrpo_p": 1.5}, "from 0 to 1"),
    ],
)
def test_findings_about_the_update(given: dict[str, Any], words: str) -> None:
    (found,) = findings(**given)
    assert words in found
    assert found.split(":")[0] in given or found.startswith("sgrpo_k")


@pytest.mark.parametrize(
    "given",
    [
        {"tokens": "s-grpo", "sgrpo_p": 0, "sgrpo_alpha": 5},
        {"loss_type": "cispo", "epsilon_high": 5.0},
        {"loss_type": "cispo"},
        {"tokens": "t-spmo"},
        {"lora_layers": "last-third"},
        {"lora_layers": "last 12"},
    ],
)
def test_nothing_to_say_about_the_update(given: dict[str, Any]) -> None:
    assert findings(**given) == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"max_completion_length": 599}, (0, 0.4, 0)),
        ({"max_completion_length": 600}, (100, 0.5, 300)),
        ({"max_completion_length": 2048, "sgrpo_p": 0.25}, (100, 0.25, 300)),
        ({"max_completion_length": 2048, "sgrpo_alpha": 0, "sgrpo_k": 0}, (0, 0.5, 0)),
        ({"sgrpo_alpha": 7}, (7, 0.4, 0)),  # the bundled model's answers are short
    ],
)
def test_defaults_of_sgrpo(given: dict[str, Any], expected: tuple[Any, ...]) -> None:
    """By the length of completions, and none where they mean nothing."""
    names = ("sgrpo_alpha", "sgrpo_p", "sgrpo_k")
    config = resolve({"tokens": "s-grpo"} | given)
    assert tuple(getattr(config, name) for name in names) == expected
    other, said = examine({"tokens": "all"} | given)
    assert all(getattr(other, name) is None for name in names if name not in given)
    assert len(said) == sum(name.startswith("sgrpo_") for name in given)


def test_contradictions_are_found_beside_bad_fields_but_not_because_of_them() -> None:
    found = findings(max_steps=0, device="gpu")
    assert len(found) == 2
    assert len(findings(num_generations="x", num_drafts=20)) == 1


def test_text_from_flags_and_yaml_becomes_values() -> None:
    config = resolve(
        {
            "learning-rate": "1e-5",
            "fresh": "true",
            "max_minutes": "none",
            "reward_weights": "1,0.1",
            "report_to": "none",
        }
    )
    assert (config.learning_rate, config.fresh, config.max_minutes) == (1e-5, True, None)
    assert (config.reward_weights, config.report_to) == ([1.0, 0.1], [])
    assert resolve({"reward_funcs": ["accuracy", "format,own.py:f"], "reward_weights": None}).reward_funcs == [
        "accuracy",
        "format",
        "own.py:f",
    ]


def test_what_is_set_wins_over_the_models_defaults_and_these_over_the_general_ones() -> None:
    assert resolve({}).max_steps == MODEL_DEFAULTS["tiny"]["max_steps"]
    assert resolve({"model": "org/name"}).max_steps == RunConfig.model_fields["max_steps"].default
    assert resolve(merge({"max_steps": 3, "seed": 4}, {"max_steps": "5"})).max_steps == 5


def test_a_flag_takes_back_the_counts_that_follow_from_the_old_ones() -> None:
    file = {"num_generations": 8, "num_drafts": 4, "num-refinements": 4}
    assert resolve(merge(file, {"num_generations": "12"})).num_drafts == 6
    assert resolve(merge(file, {"num_drafts": "2"})).n_refinements == 6
    assert resolve(merge(file, {"algorithm": "grpo"})).num_generations == 8


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"algorithm": "grpo", "model": "org/name"},
        {"system_prompt": "two\nlines: {with} 'quotes' # and more", "learning_rate": 1e-6, "report_to": ["wandb"]},
        {"tokens": "s-grpo", "lora_layers": "last third", "loss_type": "dapo", "epsilon_high": 0.28},
        {"system_prompt": "", "reward_weights": [1, 0.5], "revision": "123", "stage2_template": "{question} é {draft}"},
    ],
)
def test_a_dumped_configuration_loads_to_the_same(given: dict[str, Any], tmp_path: Path) -> None:
    config = resolve(given)
    path = tmp_path / "config.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert resolve(load_file(path)) == config
    assert all(f"# ---- {section.__doc__}" in path.read_text(encoding="utf-8") for section in SECTIONS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\n b: 2", "line 2"),
        ("seed: 1\nseed: 2", "line 2: seed is given twice"),
        ("- seed", "must be lines of `name: value`, not list"),
        ("just words", "must be lines"),
    ],
)
def test_broken_recipes_are_named_with_the_line(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        load_file(path)
    assert str(path) in str(caught.value)


def test_recipes_take_dashes_and_may_be_empty(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("max-steps: 3")
    assert load_file(path) == {"max_steps": 3}
    path.write_text("# nothing\n")
    assert load_file(path) == {}
    with pytest.raises(ConfigError, match="no such recipe file"):
        load_file(tmp_path / "none.yaml")


def test_differences_and_what_a_continued_run_may_change() -> None:
    found = differences(resolve({}), resolve({"seed": 1, "max_steps": 99}))
    assert found == {"max_steps": (60, 99), "seed": (0, 1)}
    assert found.keys() - RESUMABLE == {"seed"}
    assert set(FIELDS) >= RESUMABLE


def test_the_package_offers_its_settings_and_checks_them_before_training() -> None:
    assert igrpo_lite.resolve is resolve
    assert igrpo_lite.RunConfig is RunConfig
    with pytest.raises(ConfigError, match=r"(?s)did you mean max_steps.*no such folder"):
        igrpo_lite.train(max_step=1, model="./none")
    with pytest.raises(AttributeError):
        _ = igrpo_lite.nothing


def test_every_field_has_a_sentence_and_allowed_values() -> None:
    for name, field in FIELDS.items():
        assert field.description, name
        assert field.description.endswith((".", ")")), name
        assert allowed(field), name
    assert set(FIELDS) == set(RunConfig.model_fields)
    for defaults in MODEL_DEFAULTS.values():
        assert defaults.keys() <= FIELDS.keys()


def test_preflight_gathers_what_is_wrong_with_files_and_functions() -> None:
    found = input_findings(
        resolve({"model": "./none", "data": "none.jsonl", "reward_funcs": "acuracy", "reward_weights": [1, 2]})
    )
    assert [text.split(":")[0] for text in found] == ["model", "data", "reward_funcs", "reward_weights"]


def _model(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["Qwen2ForCausalLM"], **config}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def test_model_folders_are_checked_without_loading(tmp_path: Path) -> None:
    good = _model(tmp_path / "good")
    assert inputs.model_findings(ModelOptions(model=str(good))) == []
    bad = _model(tmp_path / "bad", architectures=["BertForMaskedLM"])
    (bad / "tokenizer.json").unlink()
    (bad / "model.safetensors").unlink()
    found = "\n".join(inputs.model_findings(ModelOptions(model=str(bad))))
    assert "not a causal language model" in found
    assert "no tokenizer" in found
    assert "no weights" in found
    (good / "config.json").write_text("{")
    assert "cannot be read" in inputs.model_findings(ModelOptions(model=str(good)))[0]
    (good / "config.json").unlink()
    assert "no config.json" in inputs.model_findings(ModelOptions(model=str(good)))[0]
    (good / "adapter_config.json").write_text("{}")
    assert "adapter only" in inputs.model_findings(ModelOptions(model=str(good)))[0]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("./missing", "no such folder"),
        ("/missing/model", "no such folder"),
        ("a/b/c", "no such folder"),
        ("two words", "neither tiny, nor a folder, nor a hub id"),
        ("tinny", "did you mean tiny"),
        ("tiny", None),
        ("gpt2", None),
        ("Qwen/Qwen2.5-0.5B-Instruct", None),
    ],
)
def test_model_names(model: str, words: str | None) -> None:
    found = inputs.model_findings(ModelOptions(model=model))
    assert words in found[0] if words else found == []


def test_prompt_files_and_templates(tmp_path: Path) -> None:
    template = tmp_path / "stage2.txt"
    template.write_text("{question} and {drift}")
    options = PromptOptions(stage2_template=str(template), system_prompt="Think hard.")
    assert any("{drift}" in found for found in inputs.prompt_findings(options))
    missing = PromptOptions(stage2_template="none/stage2.txt", system_prompt="none/system.md")
    assert [found.split(":")[0] for found in inputs.prompt_findings(missing)] == ["system_prompt", "stage2_template"]
