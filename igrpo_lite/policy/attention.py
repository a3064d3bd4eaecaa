"""The attention function that models are loaded with: grouped keys (GQA) under an explicit mask, and token trees.

transformers' own ``sdpa`` repeats keys and values once per query head as soon as a mask is given. In decoding, and in
rows over a shared prompt, that copy is most of the traffic. Folding the heads that share a key head into the query
dimension gives the same numbers without it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from igrpo_lite.policy.causal_attention import causal_attention
from igrpo_lite.policy.tree_attention import TreePlan

GROUPED_SDPA = "grouped_sdpa"
"""Name to load a model with (``attn_implementation``), once :func:`register` has run."""


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    token_trees: TreePlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of ``query [B, H, T, D]`` over ``key``, ``value [B, H / n, L, D]`` under ``mask [B, 1, T, L]``.

    Falls back to transformers' ``sdpa`` where there is no mask (its causal kernels need none:
    :mod:`igrpo_lite.policy.causal_attention`) or nothing to fold. Given packed ``token_trees``, their plan attends
    instead and the mask is not looked at.
    """
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


def register() -> str:
    """Make :data:`GROUPED_SDPA` known to transformers; returns its name."""
    AttentionInterface.register(GROUPED_SDPA, grouped_attention)
    AttentionMaskInterface.register(GROUPED_SDPA, sdpa_mask)
    return GROUPED_SDPA
