"""The bundled model's tokenizer: Qwen2's own kind (byte-level BPE, single digits), small enough for whole words.

Its merges are learned until every word of the real prompts is one token: system prompts, stage-2 templates and the
synthetic questions with their solutions. Every other text is spelt in smaller pieces, at worst in bytes.
"""

from __future__ import annotations

import json
import re
from itertools import islice

from tokenizers import pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from igrpo_lite.problems.synthetic import GENERATORS, NAMES, THINGS, draw
from igrpo_lite.prompts import PLAIN_CHAT_TEMPLATE, STAGE2_TEMPLATES, SYSTEM_PROMPTS

PAD, START, END = SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def prompt_texts() -> list[str]:
    """What the merges are learned from: everything a synthetic problem's prompts and solutions contain."""
    texts = [*SYSTEM_PROMPTS.values(), *STAGE2_TEMPLATES.values(), "system\n", "user\n", "assistant\n"]
    texts += [f"{word} {word}" for word in (*NAMES, *THINGS)]
    texts.append(re.sub(r"\{[%{].*?[%}]\}", " ", PLAIN_CHAT_TEMPLATE))
    for name in GENERATORS:
        for worked in islice(draw(name, "warmup", 0), 200):
            texts.append(STAGE2_TEMPLATES["plain"].format(question=worked.question, draft=worked.solution))
    return texts


def build_tokenizer(max_length: int) -> Qwen2Tokenizer:
    """The tokenizer, equal on every call. ``max_length`` is the model's context."""
    learner = Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=10_000, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(prompt_texts(), trainer)
    learned = json.loads(learner.to_str())["model"]
    vocabulary = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    return Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate((*SPECIALS, *vocabulary))},
        merges=[tuple(pair) for pair in learned["merges"]],
        pad_token=PAD,
        unk_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
