"""The run's prompts as a server makes them, and the lines that serve an export: vLLM, a first question, Ollama."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from igrpo_lite.export.merging import Base
from igrpo_lite.export.source import Kind, Source
from igrpo_lite.planning.memory import LORA_RANKS
from igrpo_lite.prompts import PLAIN_CHAT_TEMPLATE, PromptBuilder

CHATML = (
    "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}"
    "<|im_start|>user\n{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n{{ .Response }}<|im_end|>\n"
)
"""ChatML in Ollama's template language, which is Go's."""

_QUESTION = "Ana has 89 eggs, loses 20 and sells 22. How many eggs are left?"


@dataclass(frozen=True)
class Served:
    """What a server needs to show the model the prompts that it was trained on.

    Attributes:
        prompts: the run's prompt builder.
        stop_ids: tokens that end a completion, as in the run.
    """

    prompts: PromptBuilder
    stop_ids: tuple[int, ...]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The run's tokenizer; without a chat template it gets the plain one, which makes the run's own prompts."""
        tokenizer = self.prompts.tokenizer
        if self.prompts.plain_template and not tokenizer.chat_template:
            # In the run the tokenizer adds the first token; chat endpoints take the template's alone.
            tokenizer.chat_template = ("{{ bos_token }}" if self.adds_bos else "") + PLAIN_CHAT_TEMPLATE
        return tokenizer

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer puts a token before every text."""
        tokenizer = self.prompts.tokenizer
        return tokenizer.bos_token_id is not None and tokenizer.encode("?")[:1] == [tokenizer.bos_token_id]

    @cached_property
    def system_turn(self) -> bool:
        """Whether the system prompt is a message of its own; else it stands before the question."""
        system = self.prompts.system_prompt
        messages = [{"role": "system", "content": system}, {"role": "user", "content": _QUESTION}]
        try:
            rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception:  # templates refuse the role in their own words
            return False
        return bool(system) and rendered == self.trained_on(_QUESTION)

    def messages(self, question: str) -> list[dict[str, str]]:
        """The messages whose rendering is the run's prompt."""
        system = self.prompts.system_prompt
        if self.system_turn:
            return [{"role": "system", "content": system}, {"role": "user", "content": question}]
        return [{"role": "user", "content": f"{system}\n\n{question}" if system else question}]

    def trained_on(self, question: str) -> str:
        """The run's prompt, with all its special tokens."""
        prompt = self.prompts.first(question)
        return self.tokenizer.bos_token + prompt.text if self.prompts.plain_template and self.adds_bos else prompt.text

    def stops(self) -> list[str]:
        """The texts of the end tokens."""
        return [self.tokenizer.decode([token]) for token in self.stop_ids]

    def generation_config(self) -> GenerationConfig:
        """End tokens and nothing else: servers also apply what a base's own brings along (Qwen2: a repetition penalty),
        which training did not."""
        tokens: dict[str, Any] = {
            "bos_token_id": self.tokenizer.bos_token_id,
            "pad_token_id": self.tokenizer.pad_token_id,
            "eos_token_id": list(self.stop_ids),
        }
        return GenerationConfig(**tokens)


def end_tokens(path: str, revision: str | None, prompts: PromptBuilder) -> tuple[int, ...]:
    """Tokens that end a completion in a run: of the generation config, the tokenizer and the chat template."""
    try:
        config = GenerationConfig.from_pretrained(path, revision=revision)
    except OSError:  # there is none
        config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(path, revision=revision))
    ids = config.eos_token_id
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    return tuple(sorted({*listed, prompts.tokenizer.eos_token_id, *prompts.end_of_turn()}))


def vllm_rank(rank: int) -> int | None:
    """The least ``--max-lora-rank`` for an adapter; ``None`` for a rank that vLLM cannot serve."""
    return next((allowed for allowed in LORA_RANKS if allowed >= rank), None)


def vllm_command(
    kind: Kind, folder: Path, source: Source, base: Base, dtype: str, served: Served, four_bit: bool
) -> str | None:
    """``vllm serve`` for an adapter on its base, or for a merged model; ``None`` where vLLM cannot.

    Args:
        dtype: type to compute in: that of the run, or of the merged weights.
        four_bit: the adapter was trained on 4-bit weights, and is served on such.
    """
    if kind == "adapter":
        rank = vllm_rank(source.rank)
        if rank is None:
            return None
        words = [base.path, *(["--revision", base.revision] if base.revision else [])]
        words += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{source.name}={folder}"]
        if four_bit:
            words += ["--quantization", "bitsandbytes"]
            dtype = "bfloat16" if dtype == "float32" else dtype  # vLLM has no float32 for these
        words += ["--generation-config", str(folder)]  # else the base's is applied, penalties and all
        if served.prompts.plain_template:
            words += ["--chat-template", str(folder / "chat_template.jinja")]
    elif kind == "merged-16bit":
        words = [str(folder), "--served-model-name", source.name]
    else:
        return None
    return shlex.join(["vllm", "serve", *words, "--dtype", dtype])


def curl_command(source: Source, served: Served, port: int = 8000) -> str:
    """A first question, in the messages that make the run's own prompt, answered greedily like the evaluation's."""
    body = {
        "model": source.name,
        "messages": served.messages(_QUESTION),
        "temperature": 0,
        "max_tokens": source.config.max_completion_length,
    }
    url = f"http://localhost:{port}/v1/chat/completions"
    return shlex.join(["curl", url, "-H", "Content-Type: application/json", "-d", json.dumps(body)])


def ollama_template(served: Served) -> str | None:
    """:data:`CHATML` where it makes the run's own prompt; ``None`` where the model has another chat format."""
    roles = [("system", served.prompts.system_prompt)] if served.prompts.system_prompt else []
    turns = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in (*roles, ("user", _QUESTION)))
    same = f"{turns}<|im_start|>assistant\n" == served.trained_on(_QUESTION)
    return CHATML if same and not served.adds_bos else None


def modelfile(origin: str, served: Served, source: Source) -> str:
    """Ollama's ``Modelfile``: ``FROM origin``, template where it is known, system prompt, greedy decoding, end tokens,
    context."""
    template, system = ollama_template(served), served.prompts.system_prompt
    lines = [f"FROM {origin}"]
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    else:
        lines.append("# No TEMPLATE: Ollama chooses one; compare it with the model's own: ollama show --template")
    if '"""' in system:
        lines.append('# The system prompt contains """ and cannot be written here; send it with each request.')
    elif system:
        lines.append(f'SYSTEM """{system}"""')
    length = source.config.max_prompt_length + source.config.max_completion_length
    numbers = {"temperature": 0, "repeat_penalty": 1, "num_ctx": length}
    lines += [f"PARAMETER {name} {value}" for name, value in numbers.items()]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in served.stops()]
    return "\n".join(lines) + "\n"
