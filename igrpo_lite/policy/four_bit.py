"""Frozen weights in 4 bits: NF4 with double quantisation by bitsandbytes (QLoRA, arXiv 2305.14314), on CUDA and CPU.

Only linear layers are packed; embeddings, norms and the output layer stay in the type that is computed in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from igrpo_lite.errors import ModelError


def loading_arguments(config: Any, wanted: bool, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What ``from_pretrained`` needs for 4-bit weights; empty for others.

    Args:
        config: the model's, of transformers.
        wanted: pack weights that are not.
        dtype: what weights that are packed here compute in; :func:`compute_in` tells those that were saved packed.

    Raises:
        ModelError: the device has no 4-bit weights.
    """
    packed = is_packed(config)
    if not packed and not wanted:
        return {}
    if device.type not in ("cpu", "cuda"):
        raise ModelError(f"4-bit weights work on CUDA and CPU, not on {device.type}; choose another --device")
    arguments: dict[str, Any] = {"device_map": {"": str(device)}}
    if packed:
        return arguments
    from transformers import BitsAndBytesConfig

    return arguments | {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    }


def is_packed(config: Any) -> bool:
    """Whether the weights that a transformers configuration belongs to are in 4 bits."""
    return getattr(config, "quantization_config", None) is not None


def compute_in(model: Any, dtype: torch.dtype) -> None:
    """Make packed layers compute in ``dtype`` and have the other weights in it, but for those that the architecture
    keeps in float32. Weights that were saved packed bring the type of the GPU they were made on, often bfloat16, which
    older ones only emulate; transformers overrides neither reliably (5.24 leaves embeddings and norms as saved)."""
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    for module in model.modules():
        if hasattr(module, "compute_type_is_set"):
            module.compute_dtype, module.compute_type_is_set = dtype, True
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not hasattr(weight, "quant_state") and kept.isdisjoint(name.split(".")):
            weight.data = weight.data.to(dtype)


def keep_trainable(model: nn.Module) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes 0.50 packs a weight anew when it is first used without gradient, for good,
    and the backward pass then misreads it. Such a weight must stay as it is."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
