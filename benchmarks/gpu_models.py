"""A random model in the exact shape of a preset, with a tokenizer that knows every id; and the machine itself."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_common import Found

from igrpo_lite.planning.models import find_model
from igrpo_lite.planning.shapes import Shape
from igrpo_lite.tiny import MODEL_DIR

if TYPE_CHECKING:
    import torch
    from gpu_worker import Context

NAME = "qwen2-1.5b"
_TINY = Shape(2, 128, 256, 4, 2, 32, 1024, True, 4096, biases="qkv")
"""As small as vLLM on a CPU (heads of 32 or more) and 4-bit weights (widths of 64 or more) allow."""


def machine(context: Context) -> None:
    """Does torch reach the GPU and compute on it in 16 bits? And the random model of the stages that follow."""
    import torch

    device = torch.device(context.device)
    ones = torch.ones(512, 512, device=device, dtype=torch.bfloat16)
    wrong = int((ones @ ones != 512).sum())
    context.outcome.found.append(Found("wrong entries of a 512 x 512 product in bfloat16", wrong, "", 0, cost=False))
    details = context.outcome.details
    details["torch"] = torch.__version__
    if context.on_gpu:
        found = torch.cuda.get_device_properties(device)
        details |= {
            "gpu": found.name,
            "capability": f"{found.major}.{found.minor}",
            "memory_gib": found.total_memory / 2**30,
            "free_gib": torch.cuda.mem_get_info(device)[0] / 2**30,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    shape = _TINY if context.tiny else find_model(NAME).shape
    parameters = write_model(
        Path(context.model()), shape, context.device, torch.bfloat16 if context.on_gpu else torch.float32
    )
    details["parameters"] = parameters
    off = abs(parameters / shape.parameters - 1)
    context.outcome.found.append(Found("weights of the model, off from the preset", off, "", 0.0, cost=False))
    if context.on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def write_model(folder: Path, shape: Shape, device: str, dtype: torch.dtype) -> int:
    """Save a random model with its tokenizer; the number of its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config_of(shape), dtype=dtype)
    model.save_pretrained(folder)
    write_tokenizer(folder, shape.vocab)
    return sum(p.numel() for p in model.parameters())


def config_of(shape: Shape) -> Any:
    """Of a Qwen2, or of a Qwen3 where queries and keys are normalised."""
    from transformers import Qwen2Config, Qwen3Config

    sizes: dict[str, Any] = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.context,
        "tie_word_embeddings": shape.tied,
        # Wider than usual: distributions then differ from each other, so that a wrong one shows.
        "initializer_range": 1.5 / shape.hidden**0.5,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return Qwen3Config(**sizes, head_dim=shape.head_dim) if shape.qk_norm else Qwen2Config(**sizes)


def write_tokenizer(folder: Path, vocab: int) -> None:
    """The bundled tokenizer, and behind its tokens one for every further id, which no text becomes but ids decode to.

    So text is read as by the bundled model, and what random weights sample has a text of its own.
    """
    for path in (*MODEL_DIR.glob("*token*"), *MODEL_DIR.glob("*template*")):
        shutil.copy(path, folder / path.name)
    content = json.loads((MODEL_DIR / "tokenizer.json").read_text(encoding="utf-8"))
    known = content["model"]["vocab"]
    taken = {*known.values(), *(token["id"] for token in content["added_tokens"])}
    for index in range(vocab):
        if index not in taken:
            known[f"Ġw{index}"] = index  # Ġ is a blank in the alphabet of bytes
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
