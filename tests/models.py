"""Small random models of the supported families: wrong masks and caches show on them as on large ones."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from igrpo_lite.policy.attention import register

VOCAB = 97
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}

FAMILIES = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SHAPE, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SHAPE, head_dim=32)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SHAPE)),
    "smollm": lambda: LlamaForCausalLM(LlamaConfig(**{**_SHAPE, "num_key_value_heads": 4}, tie_word_embeddings=True)),
    "mistral-window": lambda: MistralForCausalLM(MistralConfig(**_SHAPE, sliding_window=8)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_SHAPE, head_dim=16, sliding_window=8)),
}


def make_model(family: str, scale: float = 3.0, attention: str | None = None) -> PreTrainedModel:
    """A random model whose next-token distributions are far from uniform, so that mistakes are visible. Its attention
    is the one that models are loaded with, unless another is named."""
    torch.manual_seed(1)
    model = FAMILIES[family]().eval()
    model.set_attn_implementation(attention or register(model.config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(scale)
    return model


def make_policy(family: str) -> PeftModel:
    """The same with a random LoRA adapter that is not zero."""
    model = make_model(family)
    torch.manual_seed(2)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    policy = get_peft_model(model, config)
    assert isinstance(policy, PeftModel)
    return policy.eval()


class IdTokenizer:
    """Writes token ids as numbers; for models without a real tokenizer."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, ids))
