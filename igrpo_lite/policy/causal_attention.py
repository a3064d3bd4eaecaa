"""Causal attention without a mask, on a fused kernel also where query heads share keys and the GPU is an old one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward


def copies_keys(device: torch.device) -> bool:
    """Whether shared keys and values are copied for every query head.

    Below capability 8.0 the one fused kernel that torch has left, the memory-efficient one, does not take shared keys;
    SDPA's plain form, which would take over, keeps every score
    (https://github.com/huggingface/transformers/issues/48633).
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)


def causal_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' ``sdpa`` without a mask: ``[B, T, H, D]`` of ``query [B, H, T, D]`` over ``key``, ``value
    [B, H / n, L, D]``; what else it takes is handed on (``dropout``, ``scaling``, ``is_causal``)."""
    groups = getattr(module, "num_key_value_groups", 1)
    attending: Any = module
    if groups > 1 and copies_keys(query.device):
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        attending = SimpleNamespace(is_causal=getattr(module, "is_causal", True))  # nothing is shared any more
    return sdpa_attention_forward(attending, query, key, value, None, *arguments, **kwargs)
