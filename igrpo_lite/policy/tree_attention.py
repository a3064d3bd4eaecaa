"""Attention on packed token trees: node ``i`` sees node ``j`` exactly when ``j <= i < end[j]``.

Two ways to compute it. On CUDA GPUs from capability 8.0, FlexAttention with that formula as mask, which skips blocks
that see nothing. Elsewhere two plain SDPA calls a tree: the trunk (what all branches share: the prompt) with causal
attention, and the branches below it as rows over the trunk and their own nodes. Linear layers still see each node once;
only attention repeats nodes that some branches share. A dense mask over all nodes would pay for what trees and branches
never see of each other.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from igrpo_lite.policy.causal_attention import causal_attention
from igrpo_lite.policy.tree import Branch, TokenTree

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

QUERY_BLOCK = 128
"""Places of a branch that attend at once: SDPA computes what the mask hides, and smaller blocks hide less."""

FLEX_BLOCK = 128
"""Nodes are padded to whole blocks of FlexAttention."""

RECOMPILE_LIMIT = 64
"""Graphs of FlexAttention that a process may compile: about ten models."""


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
            # Copies: views would keep all of query, key and value for the backward pass, beside the branches' own.
            trunk = [t[:, :, : tree.trunk].contiguous() for t in (q, k, v)]
            parts.append(causal_attention(module, *trunk, scaling=scaling, is_causal=True)[0])
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
        self.bias = bias[None, None].to(device)
        self.biases: dict[tuple[int, int], Tensor] = {}
        self.identity = len(owner) == rows.size  # nothing is padded or shared: rows are the nodes in order

    def branches(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Output of the nodes below the trunk, ``[1, n, H, D]``; the query heads of a key head are folded together."""
        assert self.rows is not None
        count, width = self.rows.shape
        heads, kv_heads, size = query.shape[1], key.shape[1], query.shape[3]
        groups = heads // kv_heads
        q = query[0].transpose(0, 1)[self.rows].view(count, width, kv_heads, groups, size)
        k, v = (
            torch.cat([t[:, :, : self.trunk].expand(count, -1, -1, -1), self._rows_of(t)], dim=2) for t in (key, value)
        )
        outs = []
        for start in range(0, width, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, width)
            folded = q[:, start:end].permute(0, 2, 3, 1, 4).reshape(count, kv_heads, groups * (end - start), size)
            seen = slice(0, self.trunk + end)
            bias = self._bias(groups, start, end)
            out = scaled_dot_product_attention(folded, k[:, :, seen], v[:, :, seen], attn_mask=bias, scale=scaling)
            outs.append(out.view(count, kv_heads, groups, end - start, -1).permute(0, 3, 1, 2, 4))
        out = torch.cat(outs, dim=1).reshape(count * width, heads, -1)
        return (out if self.identity else out[self.owner])[None]

    def _bias(self, groups: int, start: int, end: int) -> Tensor:
        # Made for the heads that are there: configurations name them in too many ways (GPT-BigCode's multi-query).
        if (groups, start) not in self.biases:
            self.biases[groups, start] = self.bias[:, :, start:end, : self.trunk + end].repeat(1, 1, groups, 1)
        return self.biases[groups, start]

    def _rows_of(self, tensor: Tensor) -> Tensor:
        return tensor[0].transpose(0, 1)[self.rows].transpose(1, 2)


class FlexTrees:
    """Packed trees for FlexAttention (CUDA); nodes padded to whole blocks.

    transformers compiles FlexAttention once for a process, and each model adds about six graphs, whatever the trees'
    sizes. Beyond dynamo's recompile limit (8 by default) attention would run uncompiled, on ``[H, N, N]`` scores. So
    the limit is raised, and beyond it these trees are computed with SDPA, as ``plan_trees`` then does at once.
    """

    pad = FLEX_BLOCK
    exhausted = False

    def __init__(self, trees: Sequence[TokenTree], device: torch.device) -> None:
        self.trees, self.device = trees, device
        starts = np.cumsum([0, *map(len, trees)])
        ends = np.concatenate([tree.end + start for tree, start in zip(trees, starts, strict=False)])
        padding = -len(ends) % FLEX_BLOCK
        # A padding node sees itself alone: a row that sees nothing has no softmax.
        ends = np.concatenate([ends, np.arange(len(ends), len(ends) + padding) + 1])
        self.block_mask = _block_mask(torch.from_numpy(ends), device)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, **kwargs: Any
    ) -> Tensor:
        """Attention output ``[1, N, H, D]``, as :meth:`SdpaTrees.attend`."""
        from torch._dynamo.exc import FailOnRecompileLimitHit
        from transformers.integrations.flex_attention import flex_attention_forward

        try:
            with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT, fail_on_recompile_limit_hit=True):
                return flex_attention_forward(module, query, key, value, self.block_mask, scaling=scaling, **kwargs)[0]
        except FailOnRecompileLimitHit:
            if not FlexTrees.exhausted:
                warnings.warn(
                    f"FlexAttention was compiled {RECOMPILE_LIMIT} times in this process; token trees use SDPA from "
                    "here on, which is slower: start a new process for further models",
                    stacklevel=2,
                )
            FlexTrees.exhausted = True
        size = sum(map(len, self.trees))
        q, k, v = (part[:, :, :size] for part in (query, key, value))
        out = SdpaTrees(self.trees, self.device, query.dtype).attend(module, q, k, v, scaling, **kwargs)
        return pad(out, (0, 0, 0, 0, 0, query.shape[2] - size))


def _block_mask(end: Tensor, device: torch.device) -> BlockMask:
    """FlexAttention's mask for ``end [N]``, its blocks found from ``end`` alone, never as ``[N, N]``.

    Below the diagonal ``j < i`` holds in the whole block, so some node of block row I sees one of block column J if the
    largest ``end`` of J is beyond the first node of I, and all see all if the smallest is beyond the last.
    """
    from torch.nn.attention.flex_attention import BlockMask

    blocks = end.view(-1, FLEX_BLOCK)
    first = torch.arange(len(blocks))[:, None] * FLEX_BLOCK
    below = torch.ones(len(blocks), len(blocks), dtype=torch.bool).tril(-1)
    full = below & (blocks.amin(dim=1)[None, :] > first + FLEX_BLOCK - 1)
    partial = (below & (blocks.amax(dim=1)[None, :] > first) & ~full) | torch.eye(len(blocks), dtype=torch.bool)
    end = end.to(device)

    def sees(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i < end[j])

    def listed(kind: Tensor) -> tuple[Tensor, Tensor]:
        order = kind.int().argsort(dim=1, descending=True, stable=True)
        return kind.sum(dim=1)[None, None].int().to(device), order[None, None].int().to(device)

    return BlockMask.from_kv_blocks(*listed(partial), *listed(full), BLOCK_SIZE=FLEX_BLOCK, mask_mod=sees)


@cache
def flex_runs(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]) -> bool:
    """Whether FlexAttention compiles for (query heads, key heads, head size), forward and backward, and gives SDPA's
    numbers on a small tree."""
    tree = TokenTree([Branch((1,) * 150, (k,) * 40, (39,)) for k in range(3)])
    plain = _trial(SdpaTrees([tree], device, dtype), len(tree), device, dtype, shape)
    try:
        flex = _trial(FlexTrees([tree], device), len(tree), device, dtype, shape)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a compiler may raise
        return False
    return all(torch.allclose(a, b, rtol=0.05, atol=0.05) for a, b in zip(flex, plain, strict=True))


def _trial(
    plan: TreePlan, size: int, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]
) -> list[Tensor]:
    """Output and gradients of attention."""
    heads, kv_heads, width = shape
    module = nn.Module()
    module.num_key_value_groups = heads // kv_heads  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    padding = (0, 0, 0, -size % plan.pad)
    parts = [pad(torch.randn(1, n, size, width, generator=generator), padding) for n in (heads, kv_heads, kv_heads)]
    query, key, value = (part.to(device, dtype).requires_grad_() for part in parts)
    out = plan.attend(module, query, key, value, scaling=None)[:, :size]
    gradients = torch.autograd.grad(out.square().sum(), (query, key, value))
    return [out.detach(), *(gradient[:, :, :size] for gradient in gradients)]


TreePlan = SdpaTrees | FlexTrees


def plan_trees(
    trees: Sequence[TokenTree], device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]
) -> TreePlan:
    """How the attention of packed trees is computed on ``device``.

    Args:
        dtype: of the queries.
        shape: query heads, key heads and their size.
    """
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if able and flex_runs(device, dtype, shape) and not FlexTrees.exhausted:
        return FlexTrees(trees, device)
    return SdpaTrees(trees, device, dtype)
