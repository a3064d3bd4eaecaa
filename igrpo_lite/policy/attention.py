"""The attention function that models are loaded with: grouped keys (GQA) under an explicit mask, and token trees.

transformers' own ``sdpa`` repeats keys and values once per query head as soon as a mask is given. In decoding, and in
rows over a shared prompt, that copy is most of the traffic. Folding the heads that share a key head into the query
dimension gives the same numbers without it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from igrpo_lite.policy.causal_attention import causal_attention
from igrpo_lite.policy.tree_attention import TreePlan

GROUPED_SDPA = "grouped_sdpa"
"""Name to load a model with (``attn_implementation``), once :func:`register` has run. transformers refuses names with
"sdpa" in them where SDPA cannot give what the architecture needs (attention sinks), which holds for ours too."""
CAPPED = "capped"
"""The same function's name for models that cap their scores softly (Gemma 2): SDPA cannot, ours can."""


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    token_trees: TreePlan | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of ``query [B, H, T, D]`` over ``key``, ``value [B, H / n, L, D]`` under ``mask [B, 1, T, L]``.

    Falls back to transformers' ``sdpa`` where there is no mask (its causal kernels need none:
    :mod:`igrpo_lite.policy.causal_attention`) or nothing to fold. Given packed ``token_trees``, their plan attends
    instead and the mask is not looked at. With a ``softcap`` on the scores no kernel of SDPA's does.
    """
    if softcap is not None:
        return _capped(query, key, value, attention_mask, softcap, scaling), None
    if token_trees is not None:
        return token_trees.attend(module, query, key, value, scaling, **kwargs), None
    if attention_mask is None:
        return causal_attention(module, query, key, value, dropout, scaling, **kwargs)
    groups = getattr(module, "num_key_value_groups", 1)
    biased = kwargs.get("position_bias") is not None
    if attention_mask.shape[1] != 1 or groups == 1 or biased:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    batch, heads, length, width = query.shape
    folded = query.reshape(batch, heads // groups, groups * length, width)
    mask = attention_mask if length == 1 else attention_mask.repeat(1, 1, groups, 1)
    output = scaled_dot_product_attention(folded, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return output.view(batch, heads, length, -1).transpose(1, 2).contiguous(), None


def _capped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, cap: float, scaling: float | None
) -> Tensor:
    """Attention with scores ``cap * tanh(score / cap)``, ``[B, T, H, D]``. They are made again in the backward pass, so
    that no layer keeps them; without dropout, which a policy never has."""
    length, keys = query.shape[2], key.shape[2]
    if mask is None:
        mask = query.new_ones(length, keys, dtype=torch.bool).tril(keys - length)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        grouped = query.unflatten(1, (key.shape[1], -1))
        scores = cap * torch.tanh((grouped @ key[:, :, None].mT).float() * (scale / cap))
        weights = scores.masked_fill(~mask[..., None, :, :], torch.finfo(scores.dtype).min).softmax(-1)
        return (weights.to(value.dtype) @ value[:, :, None]).flatten(1, 2)

    output: Tensor = checkpoint(attend, query, key, value, use_reentrant=False, preserve_rng_state=False)
    return output.transpose(1, 2).contiguous()


def register(config: Any) -> str:
    """Make our attention known to transformers; returns the name to load a model of this configuration with."""
    for name in (GROUPED_SDPA, CAPPED):
        AttentionInterface.register(name, grouped_attention)
        AttentionMaskInterface.register(name, sdpa_mask)
    return CAPPED if getattr(config.get_text_config(), "attn_logit_softcapping", None) else GROUPED_SDPA
