"""The bundled model and the script that makes it."""

from __future__ import annotations

import os
import re
import stat
import string
import unicodedata
from pathlib import Path

import pytest
import torch
from build_tiny import Phase, Recipe, answer_all, build, is_right, main
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import build_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Tokenizer

from igrpo_lite.problems.synthetic import GENERATORS, load
from igrpo_lite.prompts import STAGE2_TEMPLATES, SYSTEM_PROMPTS, AnswerStyle, Placement, PromptBuilder
from igrpo_lite.tiny import MODEL_DIR

TOKENIZER = AutoTokenizer.from_pretrained(MODEL_DIR)
PRINTABLE = string.digits + string.ascii_letters + string.punctuation + " \n"


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


def test_the_folder_is_small_complete_and_readable() -> None:
    files = {path.name: path for path in MODEL_DIR.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
    assert sum(path.stat().st_size for path in files.values()) < 2_000_000
    if os.name == "posix":
        assert all(path.stat().st_mode & stat.S_IROTH for path in files.values())


def test_the_model_is_tiny_and_ordinary(model) -> None:
    config = model.config
    assert config.model_type == "qwen2"
    assert config.hidden_size // config.num_attention_heads in (32, 64)
    assert config.max_position_embeddings >= 1024
    assert config.tie_word_embeddings
    assert config.vocab_size == len(TOKENIZER) <= 640
    assert 700_000 < sum(p.numel() for p in model.parameters()) < 1_100_000
    assert next(model.parameters()).dtype == torch.float32
    assert (
        model.generation_config.eos_token_id == TOKENIZER.eos_token_id == TOKENIZER.convert_tokens_to_ids("<|im_end|>")
    )
    assert model.generation_config.pad_token_id == TOKENIZER.pad_token_id != TOKENIZER.eos_token_id


def test_the_bundled_tokenizer_is_the_built_one() -> None:
    built = build_tokenizer(TOKENIZER.model_max_length)
    assert built.get_vocab() == TOKENIZER.get_vocab()
    assert built.chat_template == TOKENIZER.chat_template


@given(st.one_of(st.text(PRINTABLE), st.text()))
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back(text: str) -> None:
    text = unicodedata.normalize("NFC", text.encode("utf-8", "ignore").decode())
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert TOKENIZER.decode(ids) == text


@pytest.mark.parametrize("number", ["7", "42", "90817"])
def test_digits_stand_alone(number: str) -> None:
    assert TOKENIZER.tokenize(number) == list(number)


def test_it_is_qwen2s_own_tokenizer_class() -> None:
    """transformers gives every model of this architecture that class, whatever the folder asks for."""
    assert isinstance(TOKENIZER, Qwen2Tokenizer)
    assert not {"<think>", "</think>", "<answer>", "</answer>", "\\boxed"} & set(TOKENIZER.all_special_tokens)


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("style", ["boxed", "tags"])
@pytest.mark.parametrize("placement", ["plain", "multi-turn"])
def test_real_prompts_cost_about_a_token_per_word(name: str, style: AnswerStyle, placement: Placement) -> None:
    builder = PromptBuilder(TOKENIZER, SYSTEM_PROMPTS[style], STAGE2_TEMPLATES[placement], placement)
    for problem in load(name, "train", 50):
        first = builder.first(problem.question)
        draft = [*TOKENIZER.encode(problem.columns["solution"]), TOKENIZER.eos_token_id]
        second = builder.second(problem.question, first, draft)
        for prompt in (first, second):
            units = re.findall(r"<\|?/?\w+\|?>|\w*?[A-Za-z]+|\d|[^\w\s]", prompt.text)
            assert len(prompt.ids) <= 1.35 * len(units), TOKENIZER.convert_ids_to_tokens(prompt.ids)
            letters = [t for t in TOKENIZER.convert_ids_to_tokens(prompt.ids) if re.fullmatch("\u0120?[A-Za-z]", t)]
            assert set(letters) <= {"a", "\u0120a"}
            assert TOKENIZER.decode(prompt.ids) == prompt.text


def test_the_bundled_model_knows_something_and_not_everything(model) -> None:
    problems = load("two-step", "validation", 60)
    builder = PromptBuilder(TOKENIZER, SYSTEM_PROMPTS["boxed"], STAGE2_TEMPLATES["plain"])
    answers = answer_all(model, TOKENIZER, [builder.first(problem.question).ids for problem in problems])
    assert all(answer[-1] == TOKENIZER.eos_token_id for answer in answers)
    texts = TOKENIZER.batch_decode(answers, skip_special_tokens=True)
    form = re.compile(r"\d+[+*-]\d+=\d+; \d+[+*-]\d+=\d+; \\boxed\{\d+\}")
    assert sum(bool(form.fullmatch(text)) for text in texts) >= 54
    right = sum(is_right(text, problem) for text, problem in zip(texts, problems, strict=True))
    assert 18 <= right <= 42


def test_a_short_build_runs_and_repeats_itself(tmp_path: Path) -> None:
    weights = []
    for name in ("one", "two"):
        phases = (Phase(1, rare=1.0, drills=1.0, drafts=0.0), Phase(2, rare=0.1, drills=0.0, drafts=0.7, decay=0.5))
        recipe = Recipe(phases=phases, batch=4)
        build(recipe, tmp_path / name / "model", problems=4, log_every=1)
        weights.append((tmp_path / name / "model" / "model.safetensors").read_bytes())
        assert "step    3" in (tmp_path / name / "build.log").read_text()
    assert weights[0] == weights[1]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one" / "model")
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()


def test_the_command_line_builds(tmp_path: Path) -> None:
    arguments = ["--output-dir", str(tmp_path / "model"), "--max-steps", "1", "--problems", "0", "--seed", "5"]
    assert main(arguments) == 0
    assert (tmp_path / "model" / "config.json").is_file()
