"""Attention on packed token trees: node ``i`` sees node ``j`` exactly when ``j <= i < end[j]``.

Two ways to compute it. On CUDA GPUs from capability 8.0, FlexAttention with that formula as mask, which skips blocks
that see nothing. Elsewhere two plain SDPA calls a tree: the trunk (what all branches share: the prompt) with causal
attention, and the branches below it as rows over the trunk and their own nodes. Linear layers still see each node once;
only attention repeats nodes that some branches share. A dense mask over all nodes would pay for what trees and branches
never see of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from igrpo_lite.policy.tree import TokenTree

FLEX_BLOCK = 128
"""Nodes are padded to whole blocks of FlexAttention."""


class SdpaTrees:
    """Packed trees for :func:`scaled_dot_product_attention`, on any device."""

    pad = 1

    def __init__(self, trees: Sequence[TokenTree], device: torch.device, dtype: torch.dtype) -> None:
        self.trees = [_Spread(tree, device, dtype) for tree in trees]

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, **kwargs: Any
    ) -> Tensor:
        """Attention output ``[1, N, H, D]`` of ``query [1, H, N, D]`` over ``key``, ``value [1, H / groups, N, D]``."""
        parts, start = [], 0
        for tree in self.trees:
            nodes = slice(start, start + tree.size)
            q, k, v = query[:, :, nodes], key[:, :, nodes], value[:, :, nodes]
            own = slice(0, tree.trunk)
            parts.append(
                sdpa_attention_forward(
                    module, q[:, :, own], k[:, :, own], v[:, :, own], None, scaling=scaling, is_causal=True
                )[0]
            )
            if tree.rows is not None:
                parts.append(tree.branches(q, k, v, scaling))
            start += tree.size
        return torch.cat(parts, dim=1)


class _Spread:
    """One tree as a trunk and right-padded rows ``[B, L]`` of the nodes below it."""

    def __init__(self, tree: TokenTree, device: torch.device, dtype: torch.dtype) -> None:
        self.size, self.trunk = len(tree), tree.trunk
        self.rows: Tensor | None = None
        if not tree.leaves:
            return
        width = max(map(len, tree.leaves))
        # Padding repeats a row's last node: being on the right it is causally invisible to the others.
        rows = np.stack([np.pad(leaf, (0, width - len(leaf)), mode="edge") for leaf in tree.leaves])
        # Of the rows that share a node, the first one with it gives its output.
        _, owner = np.unique(rows, return_index=True)
        self.rows = torch.from_numpy(rows).to(device)
        self.owner = torch.from_numpy(owner).to(device)
        seen = torch.arange(self.trunk + width)[None, :] <= self.trunk + torch.arange(width)[:, None]
        # Additive: SDPA makes this of a bool mask anyhow, but anew in every layer, and keeps it for the backward pass.
        bias = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, float("-inf"))
        self.biases = {1: bias[None, None].to(device)}

    def branches(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Output of the nodes below the trunk, ``[1, n, H, D]``; the query heads of a key head are folded together."""
        assert self.rows is not None
        count, width = self.rows.shape
        heads, kv_heads, size = query.shape[1], key.shape[1], query.shape[3]
        groups = heads // kv_heads
        q = query[0].transpose(0, 1)[self.rows].view(count, width, kv_heads, groups, size)
        q = q.permute(0, 2, 3, 1, 4).reshape(count, kv_heads, groups * width, size)
        k, v = (
            torch.cat([t[:, :, : self.trunk].expand(count, -1, -1, -1), self._rows_of(t)], dim=2) for t in (key, value)
        )
        out = scaled_dot_product_attention(q, k, v, attn_mask=self._bias(groups), scale=scaling)
        out = out.view(count, kv_heads, groups, width, -1).permute(0, 3, 1, 2, 4).reshape(count * width, heads, -1)
        return out[self.owner][None]

    def _bias(self, groups: int) -> Tensor:
        # Made for the heads that are there: configurations name them in too many ways (GPT-BigCode's multi-query).
        if groups not in self.biases:
            self.biases[groups] = self.biases[1].repeat(1, 1, groups, 1)
        return self.biases[groups]

    def _rows_of(self, tensor: Tensor) -> Tensor:
        return tensor[0].transpose(0, 1)[self.rows].transpose(1, 2)


class FlexTrees:
    """Packed trees for FlexAttention (CUDA); nodes padded to whole blocks."""

    pad = FLEX_BLOCK

    def __init__(self, trees: Sequence[TokenTree], device: torch.device) -> None:
        from torch.nn.attention.flex_attention import create_block_mask

        starts = np.cumsum([0, *map(len, trees)])
        ends = np.concatenate([tree.end + start for tree, start in zip(trees, starts, strict=False)])
        padding = -len(ends) % FLEX_BLOCK
        # A padding node sees itself alone: a row that sees nothing has no softmax.
        ends = np.concatenate([ends, np.arange(len(ends), len(ends) + padding) + 1])
        end = torch.from_numpy(ends).to(device)

        def sees(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j <= i) & (i < end[j])

        size = len(ends)
        self.block_mask = create_block_mask(sees, B=None, H=None, Q_LEN=size, KV_LEN=size, device=str(device))

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, **kwargs: Any
    ) -> Tensor:
        """Attention output ``[1, N, H, D]``, as :meth:`SdpaTrees.attend`."""
        from transformers.integrations.flex_attention import flex_attention_forward

        return flex_attention_forward(module, query, key, value, self.block_mask, scaling=scaling, **kwargs)[0]


TreePlan = SdpaTrees | FlexTrees


def plan_trees(trees: Sequence[TokenTree], device: torch.device, dtype: torch.dtype) -> TreePlan:
    """How the attention of packed trees is computed on ``device``, with queries of type ``dtype``."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return FlexTrees(trees, device)
    return SdpaTrees(trees, device, dtype)
