"""Servers must make the run's own prompts: messages, chat templates, end tokens, and the lines that start them."""

from __future__ import annotations

import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import jinja2
import pytest
import torch
from export_parts import options, short_run, source
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from igrpo_lite.config.resolve import resolve
from igrpo_lite.export.merging import own_base
from igrpo_lite.export.serving import (
    Served,
    curl_command,
    end_tokens,
    modelfile,
    ollama_template,
    vllm_command,
    vllm_rank,
)
from igrpo_lite.planning.memory import LORA_RANKS
from igrpo_lite.policy.loading import load_policy
from igrpo_lite.policy.prompting import prompt_builder
from igrpo_lite.prompts import PLAIN_CHAT_TEMPLATE, STAGE2_TEMPLATES, SYSTEM_PROMPTS, PromptBuilder
from igrpo_lite.tiny import MODEL_DIR

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA31 = LLAMA3.replace("{% if loop.index0 == 0 %}", "{% if loop.index0 == 0 %}{{ strftime_now('%d %b %Y') }}")
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
R1 = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
CASES = {
    "chatml": (CHATML, False),
    "chatml, first token": (CHATML, True),
    "llama 3": (LLAMA3, True),
    "llama 3.1, with a date": (LLAMA31, True),
    "llama 3, no first token": (LLAMA3, False),
    "gemma": (GEMMA, True),
    "r1": (R1, False),
    "none": (None, False),
    "none, first token": (None, True),
}


def tokenizer_with(template: str | None, bos: bool) -> PreTrainedTokenizerBase:
    """The bundled tokenizer with another template; with ``bos`` it puts a token before every text, as Llama's does."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    tokenizer.chat_template = template
    if template is LLAMA3 or bos:
        tokenizer.bos_token = "<|endoftext|>"
    if bos:
        first = ("<|endoftext|>", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", pair="$A $B", special_tokens=[first]
        )
    return tokenizer


def served(case: str, system: str = SYSTEM_PROMPTS["boxed"]) -> Served:
    template, bos = CASES[case]
    return Served(PromptBuilder(tokenizer_with(template, bos), system, STAGE2_TEMPLATES["plain"]), (2,))


def by_ollama(template: str, system: str, question: str) -> str:
    """What Ollama makes of the template up to the answer, with Jinja for Go."""
    text = template[: template.index("{{ .Response }}")].replace("{{ end }}", "{% endif %}")
    text = re.sub(r"\{\{ if \.(\w+) \}\}", r"{% if \1 %}", re.sub(r"\{\{ \.(\w+) \}\}", r"{{ \1 }}", text))
    return jinja2.Environment(keep_trailing_newline=True).from_string(text).render(System=system, Prompt=question)


@pytest.mark.parametrize("system", [SYSTEM_PROMPTS["tags"], ""], ids=["system", "none"])
@pytest.mark.parametrize("case", CASES)
def test_messages_render_to_the_runs_own_ids(case, system):
    made = served(case, system)
    for question in ("What is 2 + 3?", "Two lines:\n7 * 8"):
        prompt = made.prompts.first(question)
        ids = made.tokenizer.apply_chat_template(made.messages(question), add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        assert tuple(ids) == prompt.ids
    assert made.system_turn == (bool(system) and case != "gemma")


@pytest.mark.parametrize("case", CASES)
def test_a_template_for_ollama_makes_the_same_prompt_or_is_left_out(case):
    made = served(case)
    template = ollama_template(made)
    assert (template is not None) == (case == "chatml")
    if template is not None:
        question = "What is 2 + 3?"
        assert by_ollama(template, made.prompts.system_prompt, question) == made.trained_on(question)


def test_a_default_system_prompt_of_the_template_is_no_match_for_none():
    assert ollama_template(served("chatml", system="")) is None


def test_a_plain_template_goes_along_with_the_export(tmp_path):
    made = served("none, first token")
    made.tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template.startswith("{{ bos_token }}")
    rebuilt = PromptBuilder(tokenizer, made.prompts.system_prompt, STAGE2_TEMPLATES["plain"])
    assert not rebuilt.plain_template
    assert rebuilt.first("What is 2 + 3?").ids == made.prompts.first("What is 2 + 3?").ids
    one_turn = [{"role": "user", "content": "What is 2 + 3?"}]
    plain = tokenizer.apply_chat_template(
        one_turn, tokenize=False, add_generation_prompt=True, chat_template=PLAIN_CHAT_TEMPLATE
    )
    ours = tokenizer.apply_chat_template(one_turn, tokenize=False, add_generation_prompt=True)
    assert ours == tokenizer.bos_token + plain


def test_end_tokens_are_the_runs(tmp_path):
    config = resolve({"model": "tiny"})
    prompts = prompt_builder(config)
    policy = load_policy(config, 0)
    assert end_tokens(str(MODEL_DIR), None, prompts) == tuple(sorted({*policy.stop_ids, *prompts.end_of_turn()}))
    for file in MODEL_DIR.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    GenerationConfig(eos_token_id=[2, 0], repetition_penalty=1.1).save_pretrained(tmp_path)
    assert end_tokens(str(tmp_path), None, prompts) == (0, 2)
    (tmp_path / "generation_config.json").unlink()
    assert end_tokens(str(tmp_path), None, prompts) == (2,)
    made = Served(prompts, (0, 2)).generation_config()
    assert made.eos_token_id == [0, 2]
    assert made.repetition_penalty is None
    assert made.temperature is None


def test_ranks_are_those_that_vllm_takes():
    found = find_spec("vllm")
    if found is not None and found.origin is not None:
        text = (Path(found.origin).parent / "config" / "lora.py").read_text(encoding="utf-8")
        allowed = re.search(r"MaxLoRARanks = Literal\[([\d, ]+)\]", text)
        assert allowed is not None
        assert [int(rank) for rank in allowed[1].split(",")] == list(LORA_RANKS)
    for rank in range(1, 513):
        assert vllm_rank(rank) == min(allowed for allowed in LORA_RANKS if allowed >= rank)
    assert vllm_rank(513) is None


def test_lines_for_vllm(tmp_path):
    from_run = source()
    base = own_base(from_run, options("adapter", tmp_path))
    made = Served(prompt_builder(from_run.config), (2,))
    line = vllm_command("adapter", Path("/a b"), from_run, base, "bfloat16", made, four_bit=False)
    assert line is not None
    words = shlex.split(line)
    assert words[:3] == ["vllm", "serve", str(MODEL_DIR)]
    flags = {word: words[i + 1] for i, word in enumerate(words[:-1]) if word.startswith("--")}
    assert flags["--max-lora-rank"] == "16"
    assert flags["--lora-modules"] == "my-run=/a b"
    assert flags["--generation-config"] == "/a b"
    assert flags["--dtype"] == "bfloat16"
    assert "--quantization" not in flags
    packed = vllm_command("adapter", Path("/a"), from_run, base, "float32", served("none"), four_bit=True)
    assert packed is not None
    assert "--quantization bitsandbytes" in packed
    assert "--chat-template /a/chat_template.jinja" in packed
    assert "--dtype bfloat16" in packed
    merged = vllm_command("merged-16bit", Path("/m"), from_run, base, "float16", made, four_bit=True)
    assert merged == "vllm serve /m --served-model-name my-run --dtype float16"
    curl = shlex.split(curl_command(from_run, made))
    body = json.loads(curl[curl.index("-d") + 1])
    assert body["messages"][0] == {"role": "system", "content": made.prompts.system_prompt}
    assert (body["model"], body["temperature"]) == ("my-run", 0)


def test_modelfiles():
    from_run = source()
    made = Served(prompt_builder(from_run.config), (0, 2))
    text = modelfile("./x.gguf", made, from_run)
    assert text.startswith('FROM ./x.gguf\nTEMPLATE """{{ if .System }}<|im_start|>system\n')
    assert f'SYSTEM """{made.prompts.system_prompt}"""' in text
    assert 'PARAMETER stop "<|endoftext|>"\nPARAMETER stop "<|im_end|>"\n' in text
    assert "PARAMETER temperature 0\nPARAMETER repeat_penalty 1\n" in text
    text = modelfile(".", served("r1", 'Say """yes""".'), from_run)
    assert text.startswith("FROM .\n# No TEMPLATE")
    assert "SYSTEM " not in text


def test_the_base_is_known_without_its_weights(tmp_path):
    base = own_base(source(), options("merged-16bit", tmp_path))
    assert (base.parameters, base.dtype, base.target) == (862_208, torch.bfloat16, torch.bfloat16)
    assert base.merged_bytes == 2 * 862_208
    exact = own_base(source(), options("merged-16bit", tmp_path, dtype="float32"))
    assert exact.merged_bytes == 4 * 862_208
    assert source().dtype == "float32"
    assert short_run().name == "my run"
