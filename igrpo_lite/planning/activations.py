"""What the update's forward pass keeps for its backward pass, and the most that is there at once; term by term.

The terms follow ``policy/logprobs.py``, transformers' blocks and PEFT's LoRA layers under autocast, tensor by tensor,
so they can be checked against the real modules without a GPU (``tests/test_planning_activations.py``). In bytes for
each token, with ``b`` bytes a value, ``h`` the residual stream, ``f`` the MLP, ``q`` and ``k`` all query and all key
heads, ``r`` the rank:

* a norm keeps its input in float32 and a root: ``4 h + 4``;
* LoRA's A keeps its input, once for all layers that read the same: ``b h`` before attention and before the MLP, ``b q``
  and ``b f`` before their last layers; B keeps what A made: ``b r``;
* the MLP keeps the gate before and after its activation, and the other factor: ``3 b f``;
* attention keeps queries, keys, values, its output and a sum by head: ``2 b q + 2 b k + 4 heads``; ``4 b q`` where it
  copies shared keys and values; in trees those of a trunk count once for it and once for each of its branches;
* frozen weights keep nothing, and neither do sums, rotations (but their angles) or casts, except those of the adapter's
  own weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from igrpo_lite.planning.shapes import Linear, Shape
from igrpo_lite.planning.work import Batch

TILE = (4096, 8192)
"""Rows and vocabulary entries that the head runs at once on a GPU: ``policy.chunked_head.TILES``."""

QUERY_BLOCK = 128
"""Places of a branch that attend at once: ``policy.tree_attention.QUERY_BLOCK``."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """Which linear layers of a block have LoRA, of which rank, and in how many blocks from the top."""

    linears: tuple[Linear, ...]
    rank: int
    layers: int

    def reading(self, reads: Literal["attention", "heads", "mlp", "product"]) -> list[Linear]:
        return [linear for linear in self.linears if linear.reads == reads]

    @property
    def parameters(self) -> int:
        return self.layers * self.rank * sum(linear.inputs + linear.outputs for linear in self.linears)


class Activations(NamedTuple):
    """Bytes of one micro-batch: what is left at the start of the backward pass, and the two moments with the most:
    inside the blocks, and inside the head, of which ``tile`` is the head's own."""

    kept: int
    blocks: int
    head: int
    tile: int

    @property
    def peak(self) -> int:
        """Most at any moment."""
        return max(self.blocks, self.head)


def activations(
    shape: Shape, adapter: Adapter, batch: Batch, *, item: int, checkpointing: bool, copies: bool = False
) -> Activations:
    """Bytes that one micro-batch takes beyond weights, gradients and optimizer.

    Args:
        item: bytes a value that the model computes in.
        copies: attention without a mask copies shared keys and values (``policy.causal_attention``).
    """
    h, tokens = shape.hidden, batch.tokens
    norm = (4 * h + 4) * tokens
    mlp = _mlp(shape, adapter, item) * tokens
    block = _attention(shape, adapter, batch, item, copies) + mlp
    stream = item * h * tokens
    angles = 2 * item * shape.head_dim * (tokens if batch.leaves else batch.causal[1])
    casts = item * adapter.parameters if item < 4 and not checkpointing else 0
    others = norm + item * h * batch.rows + angles + _masks(shape, batch, item) + casts
    # The lowest adapted block's input has no gradient, so its norm keeps nothing.
    kept = (adapter.layers * stream if checkpointing else adapter.layers * block - norm) + others
    # While a block is differentiated, the last norm and the head's gradients are gone.
    layer = kept - norm - item * h * batch.rows + (block if checkpointing else 0)
    layer += _working(shape, adapter, item, checkpointing) * tokens
    last_norm = kept + 20 * h * tokens  # differentiated with everything still there: five tensors in float32
    tile = head_tile(shape, batch.rows, item)
    head = kept + stream + item * h * batch.rows + tile
    return Activations(round(kept), round(max(layer, last_norm)), round(head), tile)


def head_tile(shape: Shape, rows: int, item: int) -> int:
    """The head's working memory: logits and exponentials of one tile, those again in the weights' type, and the mean of
    the head's rows and what is added to it."""
    rows, columns = min(rows, TILE[0]), min(shape.vocab, TILE[1])
    return rows * columns * (8 + (item if item < 4 else 0)) + 8 * rows * shape.hidden


def _attention(shape: Shape, adapter: Adapter, batch: Batch, item: int, copies: bool) -> float:
    h, q, k, heads = shape.hidden, shape.queries, shape.keys, shape.heads
    count, length = batch.causal
    # Rows longer than a window need a mask, which torch makes a number for every score and copies for shared keys.
    masked = shape.window is not None and length > shape.window
    # Fused attention's output has the layout that the next layer wants, unless it is pieced together.
    pieced = bool(batch.leaves) or masked or shape.fused
    readers, last = adapter.reading("attention"), adapter.reading("heads")
    each = (4 * h + 4) * (shape.norms // 2) + item * (h * bool(readers) + q * (bool(last) and pieced))
    each += item * adapter.rank * (len(readers) + len(last))
    if shape.qk_norm:
        each += 4 * (q + k) + 4 * (heads + shape.kv_heads)
    causal = count * length * (item * (2 * q + 2 * (q if copies else k)) + 4 * heads)
    if shape.fused and not batch.leaves and not copies:  # the values are a view of one tensor with queries and keys
        causal += count * length * item * (q + k)
    if masked:
        causal += item * (heads // shape.kv_heads) * count * length**2
    places = batch.leaves * batch.leaf
    branches = places * (2 * item * q + 4 * heads) + 2 * item * k * batch.leaves * (batch.trunk + batch.leaf)
    return each * batch.tokens + causal + branches


def _mlp(shape: Shape, adapter: Adapter, item: int) -> int:
    h, f = shape.hidden, shape.intermediate
    readers, last = adapter.reading("mlp"), adapter.reading("product")
    each = (4 * h + 4) * (shape.norms // 2) + item * (h * bool(readers) + (4 if last else 3) * f)
    return each + item * adapter.rank * (len(readers) + len(last))


def _working(shape: Shape, adapter: Adapter, item: int, checkpointing: bool) -> int:
    """Per token: how much more there is in the middle of the MLP than when the block is through.

    Backward, at the product: what it keeps, and the gradients of it and of both factors, beside the gradient that came
    in. Forward, at the widest layer: its result, and LoRA's before and after the scale, beside the residual stream and
    the block's input; with checkpointing the block is run again in its own backward pass, while the gradient that came
    in waits, and what its last layer has made of that for LoRA.
    """
    h, f = shape.hidden, shape.intermediate
    kept = 4 if adapter.reading("product") else 3
    result = 3 if adapter.reading("mlp") else 1
    forward = result * 2 * f if shape.fused else (2 + result) * f
    return item * (max(6 * f + h, forward + (3 if checkpointing else 2) * h) - kept * f)


def _masks(shape: Shape, batch: Batch, item: int) -> float:
    """Masks of the branches: one for each tree, and again for the heads that share keys."""
    if not batch.leaves:
        return 0.0
    width, groups = batch.leaf, shape.heads // shape.kv_heads
    blocks = width * (batch.trunk + min(width, (width + QUERY_BLOCK) / 2))
    return item * batch.causal[0] * (width * (batch.trunk + width) + groups * blocks)
