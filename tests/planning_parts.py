"""Real modules of the presets' shapes, without weights: on the meta device, or with fake tensors that only count."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from igrpo_lite.planning.shapes import Shape
from igrpo_lite.policy import chunked_head
from igrpo_lite.policy.attention import register
from igrpo_lite.policy.tree import Branch

CONFIGS: dict[str, Any] = {
    "qwen2": Qwen2Config,
    "qwen2.5": Qwen2Config,
    "r1": Qwen2Config,
    "qwen3": Qwen3Config,
    "llama3.2": LlamaConfig,
    "llama3.1": LlamaConfig,
    "gemma3": Gemma3TextConfig,
    "phi4": Phi3Config,
    "smollm2": LlamaConfig,
    "smollm3": SmolLM3Config,
}


def transformers_config(alias: str, shape: Shape) -> Any:
    """The configuration of a preset's own class, written out from a shape."""
    entries: dict[str, Any] = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": shape.context,
        "pad_token_id": 0,
    }
    if shape.window is not None:
        entries["sliding_window"] = shape.window
    return CONFIGS[alias.partition("-")[0]](**entries)


def meta_model(alias: str, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model on the meta device, with the attention that models are loaded with."""
    with torch.device("meta"):
        config = transformers_config(alias, shape)
        return AutoModelForCausalLM.from_config(config, attn_implementation=register(config), dtype=dtype)


def adapted(model: Any, targets: Sequence[str] | str = "all-linear", last: int | None = None) -> PeftModel:
    """With LoRA of rank 16, in all layers or the ``last``."""
    layers = None if last is None else list(range(model.config.num_hidden_layers)[-last:])
    config = LoraConfig(r=16, lora_alpha=16, target_modules=targets, layers_to_transform=layers, task_type="CAUSAL_LM")
    with torch.device("meta"):
        peft_model = get_peft_model(model, config)
    assert isinstance(peft_model, PeftModel)
    return peft_model


@contextmanager
def counting_only(model: PeftModel) -> Iterator[Any]:
    """The model inside, with fake tensors on a CPU: every operator runs on shapes alone, so that sizes are exact and
    nothing is allocated. The head's tiles are those of a GPU."""
    model.eval()
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(patch.dict(chunked_head.TILES, cpu=chunked_head.TILES["cuda"]))
        # With fake tensors transformers takes itself for being traced, and would make masks that it else does without.
        stack.enter_context(patch("transformers.masking_utils.is_tracing", return_value=False))
        stack.enter_context(patch("transformers.masking_utils.find_packed_sequence_indices", return_value=None))
        _materialise(model)
        yield model.get_base_model()


def _materialise(model: nn.Module) -> None:
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, old in [*module._parameters.items(), *module._buffers.items()]:
            if old is None:
                continue
            if id(old) not in made:
                new = torch.empty(old.shape, dtype=old.dtype)
                made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
            (module._parameters if name in module._parameters else module._buffers)[name] = made[id(old)]


def group(trees: int, prompt: int, leaves: int, leaf: int) -> list[Branch]:
    """``leaves`` completions for each of some prompts, that part at once and learn with every token: ``leaf`` of them
    are run, one more is scored."""
    completion = [(7,) * leaf] * leaves
    return [
        Branch((tree + 1,) * prompt, (number + 1, *path), tuple(range(leaf + 1)))
        for tree in range(trees)
        for number, path in enumerate(completion)
    ]


def benchmark_module(name: str) -> Any:
    """A module of ``benchmarks/``, which is no package."""
    path = Path(__file__).resolve().parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"planning_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
