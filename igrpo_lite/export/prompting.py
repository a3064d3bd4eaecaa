"""The prompts of a run as a server has to make them: messages, chat template, end tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from igrpo_lite.prompts import PLAIN_CHAT_TEMPLATE, PromptBuilder

Message = dict[str, str]

_CONTENT = "{{ message['content'] }}"
_PLAIN_TEMPLATE = PLAIN_CHAT_TEMPLATE.replace(
    _CONTENT, f"{{% if message['role'] == 'assistant' %}}Solution:\n{{% endif %}}{_CONTENT}"
)
"""The plain template with what an earlier answer in the conversation was written after."""

_QUESTION, _ANSWER, _FURTHER = "What is 6 * 7?", "42, so \\boxed{42}.", "And 6 * 8?\nThink."


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
        """The run's tokenizer; where it had no chat template it has one now, which makes the run's own prompts."""
        tokenizer = self.prompts.tokenizer
        if self.prompts.plain_template and not tokenizer.chat_template:
            # Our plain prompts rely on the tokenizer for the first token; chat endpoints take the template's alone.
            start = "{{ bos_token }}" if self.adds_bos else ""
            tokenizer.chat_template = start + _PLAIN_TEMPLATE
        return tokenizer

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer puts a token before every text."""
        tokenizer = self.prompts.tokenizer
        return tokenizer.bos_token_id is not None and tokenizer.encode("?")[:1] == [tokenizer.bos_token_id]

    @cached_property
    def system_turn(self) -> bool:
        """Whether the system prompt is a message of its own; else it stands before the first question."""
        system = self.prompts.system_prompt
        asked: Message = {"role": "user", "content": _QUESTION}
        own = [{"role": "system", "content": system}, asked]
        try:
            return bool(system) and self.render(own) == self.trained_on(_QUESTION)
        except Exception:  # templates refuse the role in their own words
            return False

    def messages(self, question: str, *further: str) -> list[Message]:
        """The conversation whose rendering is the run's prompt; ``further``: answer and question in turn."""
        system, roles = self.prompts.system_prompt, ("user", "assistant")
        if system and not self.system_turn:
            question = f"{system}\n\n{question}"
        turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate((question, *further))]
        return [{"role": "system", "content": system}, *turns] if self.system_turn else turns

    def render(self, messages: Sequence[Message]) -> str:
        """What the chat template makes of a conversation, ready for an answer."""
        return self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)

    def trained_on(self, question: str) -> str:
        """The run's prompt, with all its special tokens."""
        prompt = self.prompts.first(question)
        return self.tokenizer.bos_token + prompt.text if self.prompts.plain_template and self.adds_bos else prompt.text

    def stops(self) -> list[str]:
        """The texts of the end tokens."""
        return [self.tokenizer.decode([token]) for token in self.stop_ids]

    def generation_config(self) -> GenerationConfig:
        """End tokens and nothing else: what models bring along (Qwen2: a repetition penalty) was not there in training,
        and servers apply it unasked."""
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


class OllamaTemplate(NamedTuple):
    """A chat format as a template of Ollama: the texts around system prompt, question and answer of one round."""

    family: str
    start: str
    before_system: str
    after_system: str
    before_question: str
    before_answer: str
    end: str

    def text(self) -> str:
        """The template, in Go's language."""
        system = f"{{{{ if .System }}}}{self.before_system}{{{{ .System }}}}{self.after_system}{{{{ end }}}}"
        question = f"{self.before_question}{{{{ .Prompt }}}}{self.before_answer}"
        return f"{self.start}{system}{question}{{{{ .Response }}}}{self.end}"

    def render(self, system: str, turns: Sequence[str]) -> str:
        """What Ollama makes of it: one round after the other, the last up to the answer; the system prompt in the first
        (``Template.Execute`` in https://github.com/ollama/ollama/blob/main/template/template.go)."""
        text = ""
        for i in range(0, len(turns), 2):
            shown = f"{self.before_system}{system}{self.after_system}" if system and i == 0 else ""
            text += f"{self.start}{shown}{self.before_question}{turns[i]}{self.before_answer}"
            text += f"{turns[i + 1]}{self.end}" if i + 1 < len(turns) else ""
        return text


def _turn(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


_CHATML = OllamaTemplate(
    "ChatML",
    "",
    "<|im_start|>system\n",
    "<|im_end|>\n",
    "<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n",
    "<|im_end|>\n",
)
_LLAMA3 = OllamaTemplate(
    "Llama 3", "", _turn("system"), "<|eot_id|>", _turn("user"), f"<|eot_id|>{_turn('assistant')}", "<|eot_id|>"
)
_GEMMA = OllamaTemplate(
    "Gemma",
    "<start_of_turn>user\n",
    "",
    "\n\n",
    "",
    "<end_of_turn>\n<start_of_turn>model\n",
    "<end_of_turn>\n",
)
_PLAIN = OllamaTemplate("plain", "", "", "\n\n", "", "\n\nSolution:\n", "\n\n")


def ollama_template(served: Served) -> OllamaTemplate | None:
    """The family whose template makes the run's own prompts, of one round and of two; ``None`` where none does.

    llama.cpp puts the tokenizer's first token before every prompt, so the template must not.
    """
    start = served.tokenizer.bos_token if served.adds_bos else ""
    system, turns = served.prompts.system_prompt, (_QUESTION, _ANSWER, _FURTHER)
    try:
        two_rounds = served.render(served.messages(*turns))
    except Exception:  # a template may refuse a second round in its own words
        return None
    for template in (_CHATML, _LLAMA3, _GEMMA, _PLAIN):
        one = start + template.render(system, turns[:1]) == served.trained_on(_QUESTION)
        if one and start + template.render(system, turns) == two_rounds:
            return template
    return None
