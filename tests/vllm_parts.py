"""Real vLLM engines for tests: one on the bundled model that all tests share, others on models made on the spot."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from igrpo_lite.config.resolve import resolve
from igrpo_lite.policy.loading import Policy, load_policy
from igrpo_lite.policy.prompting import prompt_builder
from igrpo_lite.prompts import PromptBuilder
from igrpo_lite.sampling.base import Request, request_seed
from igrpo_lite.sampling.vllm import VllmSampler
from igrpo_lite.tiny import MODEL_DIR
from igrpo_lite.types import Completion, Prompt

MAX_MODEL_LEN = 320
# All of one architecture: vLLM looks at each new one in a process of its own, which takes many seconds.
SHAPES: dict[str, dict[str, Any]] = {
    "24m": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 1536,
        "initializer_range": 0.05,
    },
    "untied": {
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "intermediate_size": 160,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    },
    "narrow heads": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
    },
}


def model_folder(folder: Path, shape: str, dtype: torch.dtype = torch.float32) -> Path:
    """A folder with a random model of one of :data:`SHAPES` and the bundled model's tokenizer.

    Its generation config asks for all the things that samplers must not take from there.
    """
    settings = {"vocab_size": 575, "max_position_embeddings": 1024, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(Qwen2Config(**settings, **SHAPES[shape])).to(dtype)
    model.save_pretrained(folder)
    for path in MODEL_DIR.glob("*token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    traps = {
        "eos_token_id": 2,
        "do_sample": True,
        "top_k": 3,
        "top_p": 0.4,
        "temperature": 0.2,
        "repetition_penalty": 1.7,
    }
    (folder / "generation_config.json").write_text(json.dumps(traps), encoding="utf-8")
    return folder


def make_policy(**settings: Any) -> tuple[Policy, PromptBuilder, Any]:
    """A policy with an adapter that is far from zero, its prompt builder and its configuration."""
    config = resolve(settings)
    policy = load_policy(config, 0)
    move(policy, 1)
    return policy, prompt_builder(config), config


def move(policy: Policy, seed: int, std: float = 0.05) -> None:
    """Give the adapter other values, as a training step would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.adapter_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def make_sampler(**settings: Any) -> VllmSampler:
    """A sampler of a fresh policy; arguments of the sampler itself under ``engine``."""
    engine = settings.pop("engine", {})
    policy, prompts, config = make_policy(**settings)
    return VllmSampler(policy, prompts, config, MAX_MODEL_LEN, **({"max_num_seqs": 16} | engine))


@cache
def _shared() -> VllmSampler:
    return make_sampler(model="tiny")


def shared_sampler() -> VllmSampler:
    """The engine on the bundled model, in the state in which the first test found it."""
    sampler = _shared()
    move(sampler.policy, 1)
    if alive(sampler):
        sampler.load_adapter()
    else:
        sampler.rebuild()
    return sampler


def alive(sampler: VllmSampler) -> bool:
    """Whether it can sample: neither closed, replaced by another engine, nor dead."""
    return sampler.died is None and sampler.engine.llm is not None


def make_prompts(count: int, words: int = 12) -> list[Prompt]:
    """Prompts of different lengths, in tokens that the bundled model knows."""
    generator = torch.Generator().manual_seed(3)
    return [
        Prompt("", tuple(torch.randint(5, 570, (words + 7 * i,), generator=generator).tolist())) for i in range(count)
    ]


def requests(prompts: list[Prompt], count: int, limit: int = 24, temperature: float = 1.0) -> list[Request]:
    """``count`` requests for each prompt, each with a seed of its own."""
    return [
        Request(prompt, request_seed(7, i, j), limit, temperature)
        for i, prompt in enumerate(prompts)
        for j in range(count)
    ]


def policy_logprobs(policy: Policy, request: Request, completion: Completion) -> Tensor:
    """What the transformers model says of a completion: the whole sequence at once, no cache."""
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([request.prompt.ids + completion.ids])).logits[0].float()
    logprobs = torch.log_softmax(logits[len(request.prompt.ids) - 1 : -1] / (request.temperature or 1.0), dim=-1)
    return logprobs.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]


def gap(sampler: VllmSampler, wanted: list[Request], completions: list[Completion] | None = None) -> float:
    """Largest difference of log-probability between engine and policy, on ``completions`` or on fresh ones."""
    if completions is None:
        completions = sampler.run(wanted)
    pairs = zip(wanted, completions, strict=True)
    return max(float((policy_logprobs(sampler.policy, r, c) - torch.tensor(c.logprobs)).abs().max()) for r, c in pairs)
