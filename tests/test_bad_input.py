"""Data, models and settings that cannot work: a clear line for each mistake, exit code 2, and no traceback."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_parts import ROWS, records, write_rows
from safetensors.torch import load_file, save_file

from igrpo_lite.cli import main
from igrpo_lite.config.resolve import examine
from igrpo_lite.inputs import input_findings
from igrpo_lite.tiny import MODEL_DIR

# Data


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "rows.jsonl: no such file"),
        ("", "rows.jsonl: the file is empty"),
        ("\n  \n", "rows.jsonl: no rows in it"),
        ('{"question": "1 + 1?", "number": 2}\n', "no column that could be the answer; there are question, number"),
        ('{"question": "1 + 1?", "answer": " "}\n', "no column that could be the answer; there are question, answer ("),
        ('{"question": "1 + 1?", "answer": "\\\\boxed{"}\n' * 2, "--answer-column"),
        ('{"question": "1 + 1?", "answer": "2"}\n', "one problem is too few to train on and to hold out"),
        ('{"question": " \\t", "answer": "2"}\n', "rows.jsonl:1: no question in column question"),
    ],
)
def test_data_that_cannot_be_used(content: str | None, told: str, refused, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "rows.jsonl").write_text(content)
    if "no question" in told:
        write_rows(tmp_path / "rows.jsonl", [json.loads(content or ""), *ROWS])
    assert told in refused(data="rows.jsonl")


def test_a_broken_line_is_named_and_may_be_left_out(say, refused, tmp_path: Path) -> None:
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "rows.jsonl").write_text(text + '{"question": "cut o\n')
    told = refused(data="rows.jsonl")
    assert "rows.jsonl:31: not JSON" in told
    assert "1 of 31 rows cannot be read; fix them, or go on without them with --max-bad-rows 1" in told
    code, _, shown = say(data="rows.jsonl", max_bad_rows=1)
    assert code == 0
    assert "left out 1 unreadable rows: rows.jsonl:31: not JSON" in shown


def test_gold_answers_that_cannot_be_read_are_dropped_counted_and_shown(say, tmp_path: Path) -> None:
    bad = [
        {"question": f"Who is {name}?", "answer": gold}
        for name, gold in (("Ana", ""), ("Ben", "#### "), ("Kim", "\\boxed{4"))
    ]
    code, _, shown = say(data=write_rows(tmp_path / "rows.jsonl", ROWS + bad))
    assert code == 0
    assert "rows.jsonl: 33 rows, 30 problems" in shown
    told = (
        "left out 3 rows without a readable gold answer: rows.jsonl:31 (empty); rows.jsonl:32 `####`; rows.jsonl:33 `"
    )
    assert told in shown


def test_strange_text_goes_through_a_whole_run(say, tmp_path: Path) -> None:
    strange = [
        "\U0001f600\U0001f389",
        "\u202eمرحبا",
        "\x1b[31mred\x1b[0m\x00\x07",
        "<|im_end|><|im_start|>system",
        "Z\u0301\u200b",
        "{draft} {question} {0}",
        "[bold]x[/]",
        "\\boxed{7}",
    ]
    rows = [{"question": f"{text} {i} + 2?", "answer": str(i + 2)} for i in range(2) for text in strange]
    code, _, shown = say(data=write_rows(tmp_path / "rows.jsonl", rows), prompts_per_step=14, max_problems=None)
    assert code == 0
    assert not set(shown) & set("\x1b\x00\x07\u202e\u200b")
    assert {record["question"] for record in records(tmp_path / "run", "samples.jsonl")} <= {
        row["question"] for row in rows
    }


def test_half_a_surrogate_pair_is_a_bad_row(refused, tmp_path: Path) -> None:
    told = refused(data=write_rows(tmp_path / "rows.jsonl", [*ROWS, {"question": "\ud83d?", "answer": "1"}]))
    assert "rows.jsonl:31: half of a surrogate pair" in told


def test_fewer_problems_than_asked_for(say, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ROWS[:2])
    code, _, shown = say(data=data, prompts_per_step=5, eval_size=1000)
    assert code == 0
    assert "1 training problems; 1 held out" in shown
    assert len(records(tmp_path / "run", "samples.jsonl")) == 5


# Model


def model_folder(tmp_path: Path, **config: Any) -> Path:
    """The bundled model under another name, with some of its configuration changed."""
    folder = tmp_path / "model"
    shutil.copytree(MODEL_DIR, folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | config))
    return folder


def test_models_that_are_no_causal_language_model(refused, tmp_path: Path) -> None:
    from transformers.models.bert import BertConfig, BertLMHeadModel, BertModel
    from transformers.models.t5 import T5Config, T5ForConditionalGeneration
    from transformers.utils import logging

    logging.set_verbosity_error()  # of what is made here; it would write where an earlier test's stderr was
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertConfig(vocab_size=2000, initializer_range=1.0, **shape)
    made = {
        "bert": BertModel(bert),
        "bert-head": BertLMHeadModel(bert),
        "t5": T5ForConditionalGeneration(
            T5Config(vocab_size=400, d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16)
        ),
    }
    for name, model in made.items():
        model.save_pretrained(tmp_path / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(MODEL_DIR / file, tmp_path / name)
    assert "bert is not a causal language model (its config.json says BertModel)" in refused(model="./bert")
    assert "t5 is not a causal language model" in refused(model="./t5")
    # Without architectures in config.json only loading can tell.
    config = json.loads((tmp_path / "t5" / "config.json").read_text())
    (tmp_path / "t5" / "config.json").write_text(json.dumps(config | {"architectures": None}))
    small = {"max_completion_length": 4}
    assert "is not a causal language model (its config.json says t5)" in refused(model="./t5", **small)
    assert "is not a causal language model (BertLMHeadModel looks ahead)" in refused(model="./bert-head", **small)


def _cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def _halve(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def _reshape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] += 32
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"version'), "no usable tokenizer"),
        (lambda folder: (folder / "config.json").write_text('{"model_type'), "config.json cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
        (_cut, "could not be loaded: Error while deserializing"),
        (_halve, "its weights file lacks model.layers.1."),
        (_reshape, "does not have the shapes that config.json says for model.layers.0.mlp"),
    ],
    ids=["no tokenizer", "broken tokenizer", "broken config", "no weights", "cut", "incomplete", "other shapes"],
)
def test_model_folders_that_are_spoilt(spoil: Callable[[Path], object], told: str, refused, tmp_path: Path) -> None:
    spoil(model_folder(tmp_path))
    assert told in refused(model="./model")


def test_missing_models(refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no such folder: ./none" in refused(model="./none")
    assert "empty has no config.json" in refused(model="./empty")


def test_a_context_that_is_too_small_comes_with_the_sum_and_what_fits(say, refused, tmp_path: Path) -> None:
    model_folder(tmp_path, max_position_embeddings=150)
    told = refused(model="./model", max_completion_length=100)
    context, prompt, draft, completion, needed, fits = map(int, re.findall(r"\d+", told))
    assert (context, draft, completion, needed) == (150, 100, 100, prompt + 200)
    assert f"set --max-completion-length {fits}" in told
    assert prompt + 2 * fits <= context < prompt + 2 * (fits + 1)
    assert say(model="./model", max_completion_length=fits)[0] == 0, "mending it must not need another folder"


def test_long_prompts_are_left_out_and_counted(say, refused, tmp_path: Path) -> None:
    long = {"question": "How many? " * 400, "answer": "400"}
    data = write_rows(tmp_path / "rows.jsonl", [*ROWS, long])
    code, _, shown = say(data=data)
    assert code == 0
    assert "left out as longer than 1024 prompt tokens: 1 training and 0 held-out problems" in " ".join(shown.split())
    told = refused(data=data, max_prompt_length=5, output_dir="other")
    assert "every training prompt is longer than max_prompt_length = 5 tokens; raise --max-prompt-length" in told


def test_devices_that_are_not_there(refused) -> None:
    assert re.search("device 'cuda:77' cannot be used: .*; try device auto", refused(device="cuda:77"))
    assert "device: must be auto, cpu" in refused(device="gpu")


# Settings


def test_everything_comes_at_once_and_before_torch(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "max_step: 3\ndtype: nonsense\nmodel: ./none\ndata: none.jsonl\ntemperature: -1\nreport_to: [trackio]\n"
        "reward_funcs: [acuracy]\nstage2_template: only {question}\n"
    )
    script = (
        "import sys, importlib.util as u; u.find_spec = lambda n, f=u.find_spec: None if n == 'trackio' else f(n)\n"
        "from igrpo_lite.cli import main\n"
        "code = main(['train', '--config', 'mine.yaml', '--num-generations', '2', '--nope'])\n"
        "print(code, main(['train', '--config', 'mine.yaml']), 'torch' in sys.modules, 'transformers' in sys.modules)\n"
    )
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["2", "2", "False", "False"], done.stderr
    lines = done.stderr.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    for words in ("unknown flag --nope", "num_drafts: must leave at least 2 refinements"):
        assert sum(words in line for line in lines) == 1, done.stderr
    for words in (
        "max_step; did you mean max_steps?",
        "dtype: must be one of",
        "temperature: must be",
        "model: no such folder",
        "data: none.jsonl: no such file",
        "did you mean accuracy?",
        "must contain {draft} exactly once",
        "report_to: trackio needs a package",
    ):
        assert sum(words in line for line in lines) == 2, "in both commands"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"algorithm": "grpo", "num_generations": 1}, "num_generations: must be at least 2"),
        ({"num_generations": 2}, "num_drafts: must leave at least 2 refinements"),
        ({"num_drafts": 0}, "num_drafts: must be a whole number of at least 1"),
        ({"draft_answer": "hidden"}, "draft_answer: was removed; every run now has draft_answer shown"),
        ({"stage2_template": "{question}"}, "stage2_template: must contain {draft} exactly once"),
        ({"stage2_template": "none.txt"}, "stage2_template: no such file: none.txt"),
        ({"stage2_template": "bytes.txt"}, "stage2_template: bytes.txt cannot be read as UTF-8 text"),
        ({"system_prompt": "bytes.txt"}, "system_prompt: bytes.txt cannot be read as UTF-8 text"),
        ({"reward_funcs": "none.py:f"}, "reward_funcs: no file none.py"),
        ({"dtype": "nonsense"}, "dtype: must be one of auto, float32"),
    ],
)
def test_settings_that_cannot_be(given: dict[str, Any], told: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe {question} {draft}")
    config, findings = examine(given)
    assert [told in finding for finding in findings + input_findings(config)] == [True]


def test_only_training_needs_the_rewards_and_trackers_of_a_recipe(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("reward_funcs: [gone.py:f]\nreward_weights: [2]\nreport_to: [wandb]\n")
    assert main(["show-prompt", "--config", "mine.yaml"]) == 0
    assert main(["train", "--config", "mine.yaml", "--dump-config"]) == 0
    assert main(["train", "--config", "mine.yaml"]) == 2
    assert "no file gone.py" in capsys.readouterr().err


def test_templates_from_files_and_rewards_from_modules_work(say, tmp_path: Path) -> None:
    (tmp_path / "template.txt").write_text("Q {question}\nD {draft}\n")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "__init__.py").touch()
    (tmp_path / "own" / "module.py").write_text("def f(completions, **_): return [1.0] * len(completions)\n")
    assert say(stage2_template="template.txt", reward_funcs="own.module:f")[0] == 0
    drafts = records(tmp_path / "run", "samples.jsonl")[0]["drafts"]
    assert [draft["rewards"] for draft in drafts] == [{"f": 1.0}] * 2
