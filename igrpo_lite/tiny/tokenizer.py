"""The bundled model's tokenizer: whole words of the real prompts, single digits, every ASCII character as a fall-back.

It is built, not trained: the vocabulary holds each word of the system prompts, the stage-2 templates and the synthetic
questions, with and without the space before it, so that a real prompt costs about one token per word.
"""

from __future__ import annotations

import json
import re
import string
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from igrpo_lite.problems.synthetic import GENERATORS, NAMES, THINGS, draw
from igrpo_lite.prompts import PLAIN_CHAT_TEMPLATE, STAGE2_TEMPLATES, SYSTEM_PROMPTS

PAD, START, END, UNKNOWN = SPECIALS = ("<|pad|>", "<|im_start|>", "<|im_end|>", "<|unk|>")
MARKUP = (r"\boxed{", "<think>", "</think>", "<answer>", "</answer>", "; ")
ROLES = ("system", "user", "assistant")
CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n\t"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_WORD = re.compile(r"[A-Za-z]+")
_PIECE = "|".join(map(re.escape, MARKUP)) + r"| ?[A-Za-z]+|\d|\n|[^A-Za-z\d\n]"
_WORD_SCORE, _CHARACTER_SCORE = -5.0, -10.0


def prompt_words() -> list[str]:
    """Every word a synthetic problem's prompts contain, sorted: system prompts, templates, roles, questions."""
    texts = [*SYSTEM_PROMPTS.values(), *STAGE2_TEMPLATES.values(), *ROLES, *NAMES, *THINGS]
    texts.append(re.sub(r"\{[%{].*?[%}]\}", " ", PLAIN_CHAT_TEMPLATE))
    for name in GENERATORS:
        stream = draw(name, "warmup", 0)
        texts += [next(stream).question for _ in range(200)]
    return sorted({word for text in texts for word in _WORD.findall(text)})


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer, equal on every call. ``max_length`` is the model's context."""
    words = [word for word in prompt_words() if len(word) > 1]
    pieces = [(token, 0.0) for token in SPECIALS]
    pieces += [(character, _CHARACTER_SCORE) for character in CHARACTERS]
    pieces += [(token, _WORD_SCORE) for token in MARKUP]
    pieces += [(space + word, _WORD_SCORE) for word in words for space in ("", " ")]
    pieces.append((" a", _WORD_SCORE))
    core = Tokenizer(models.Unigram(pieces, unk_id=SPECIALS.index(UNKNOWN), byte_fallback=False))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECE), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Saves it so that old and new versions of transformers load it with ``AutoTokenizer``."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
