"""KV cache of the sequences being decoded: one slot a sequence, live slots in front.

A finished sequence leaves by having a live one from the back moved into its place; a new one is appended. So every
decode step reads one contiguous block without copying it, whatever the mix of lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

_CAPACITY_STEP = 64


class SlotCache(Cache):
    """A key-value cache whose rows have lengths of their own.

    ``live`` rows are in use, row ``i`` holding ``lengths[i]`` tokens. A forward pass over one token per live row writes
    each at its own position; the caller passes the matching mask (:meth:`mask`) and position ids (:attr:`positions`).
    Tensors have shape ``[slots, kv_heads, capacity, head_dim]``, one pair a layer, and grow on demand.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self.num_slots = num_slots
        self.device = device
        self.live = 0
        self.width = 0  # tokens of the longest live row
        self.lengths = torch.zeros(num_slots, dtype=torch.long, device=device)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._rows = torch.arange(num_slots, device=device)

    @property
    def positions(self) -> Tensor:
        """Position id of each live row's next token, ``[live, 1]``."""
        return self.lengths[: self.live, None]

    def mask(self, window: int | None = None) -> Tensor:
        """Which keys the next token of each live row sees, itself included: bool ``[live, 1, 1, width + 1]``."""
        key = torch.arange(self.width + 1, device=self.device)
        position = self.lengths[: self.live, None]
        seen = key <= position
        if window is not None:
            seen &= key > position - window
        return seen[:, None, None, :]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by each attention layer with one new token per live row, ``[live, kv_heads, 1, head_dim]``."""
        rows, at = self._rows[: self.live], self.lengths[: self.live]
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys[rows, :, at] = key_states[:, :, 0]
        values[rows, :, at] = value_states[:, :, 0]
        return keys[: self.live, :, : self.width + 1], values[: self.live, :, : self.width + 1]

    def advance(self) -> None:
        """Count the token that a forward pass has just written to every live row."""
        self.lengths[: self.live] += 1
        self.width += 1

    def append(self, prefix: PrefixKV, count: int) -> None:
        """Fill ``count`` new live rows with one prompt's keys and values."""
        new = slice(self.live, self.live + count)
        self.reserve(prefix)
        for layer, (keys, values) in enumerate(prefix.layers):
            self.keys[layer][new, :, : prefix.length] = keys
            self.values[layer][new, :, : prefix.length] = values
        self.lengths[new] = prefix.length
        self.live += count
        self.width = max(self.width, prefix.length)

    def remove(self, moves: Sequence[tuple[int, int]], live: int) -> None:
        """Move rows (``source``, ``target``) into the holes that finished ones left, and keep ``live`` rows."""
        if moves and live:
            source, target = torch.tensor(moves, device=self.device).T
            width = self.width
            for block in (*self.keys, *self.values):
                block[target, :, :width] = block[source, :, :width]
            self.lengths[target] = self.lengths[source]
        self.live = live
        self.width = int(self.lengths[:live].max()) if live else 0

    def reserve(self, prefix: PrefixKV) -> None:
        """Make room for ``prefix.reserve`` tokens in every slot, rounded up so that growing stays rare."""
        capacity = -(-prefix.reserve // _CAPACITY_STEP) * _CAPACITY_STEP
        if not self.keys:
            # Zeros, not whatever the memory holds: a masked NaN is still a NaN.
            for keys, values in prefix.layers:
                shape = (self.num_slots, keys.shape[0], capacity, keys.shape[2])
                self.keys.append(keys.new_zeros(shape))
                self.values.append(values.new_zeros(shape))
        elif self.keys[0].shape[2] < prefix.reserve:
            for blocks in (self.keys, self.values):
                for layer, old in enumerate(blocks):
                    blocks[layer] = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
                    blocks[layer][:, :, : old.shape[2]] = old

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.width

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.width + query_length, 0


class PrefixKV:
    """Keys and values of one prefilled prompt, ``[kv_heads, length, head_dim]`` a layer.

    ``reserve`` is the number of tokens that a slot holding it must have room for.
    """

    def __init__(self, cache: DynamicCache, row: int, length: int, reserve: int) -> None:
        self.length = length
        self.reserve = reserve
        self.layers = [(layer.keys[row, :, :length], layer.values[row, :, :length]) for layer in cache.layers]
