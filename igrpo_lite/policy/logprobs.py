"""Log-probabilities of chosen completion tokens under the policy, with gradient, and never of anything else.

Two layouts bring the tokens to the model; both give the same numbers:

* :class:`TreeLayout`: packed token trees, each distinct node once (:mod:`igrpo_lite.policy.tree`). In stage 2 the draft
  stands in the prompt, so this is about half the tokens of separate rows.
* :class:`RowLayout`: right-padded rows of similar length, for models whose attention cannot take a tree: sliding
  windows, capped scores, other attention functions than ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from igrpo_lite.policy.attention import GROUPED_SDPA
from igrpo_lite.policy.chunked_head import head_logprobs
from igrpo_lite.policy.heads import split_heads
from igrpo_lite.policy.precision import low_precision
from igrpo_lite.policy.tree import Branch, grow, pack
from igrpo_lite.policy.tree_attention import plan_trees


@dataclass(slots=True)
class TokenLogprobs:
    """Of the chosen tokens of ``B`` branches, right-padded to the largest number ``K`` of them.

    Attributes:
        logprobs: ``[B, K]``, 0 where padded.
        entropies: nats, without gradient, ``[B, K]``.
        mask: real tokens, ``[B, K]``.
        backbone_tokens: places that went through the layers, padding included.
        head_rows: states that went through the head.
    """

    logprobs: Tensor
    entropies: Tensor
    mask: Tensor
    backbone_tokens: int
    head_rows: int


class States(NamedTuple):
    """Hidden states ``[M, H]`` and, for each branch, which of them predict its chosen tokens."""

    hidden: Tensor
    places: list[np.ndarray]


class Layout(Protocol):
    """How branches become the model's input."""

    def batches(self, branches: Sequence[Branch], budget: int) -> Iterator[list[int]]:
        """Split into micro-batches of at most ``budget`` tokens through the model; indices into ``branches``."""
        ...

    def run(self, backbone: nn.Module, branches: Sequence[Branch]) -> States:
        """The model's states for one micro-batch."""
        ...


def chosen_logprobs(model: PreTrainedModel, branches: Sequence[Branch], layout: Layout | None = None) -> TokenLogprobs:
    """Log-probability of every chosen token after what stands before it, and the entropy there.

    Args:
        model: causal language model without PEFT's outer wrapper (its layers may be adapted, its head not).
        branches: one micro-batch; those of one prompt next to each other, as :meth:`Layout.batches` gives them.
        layout: unset: :func:`best_layout`.
    """
    backbone, head = split_heads(model)
    layout = layout or best_layout(model)
    with low_precision(model):  # not the head, which computes in float32
        hidden, places = layout.run(backbone, branches)
    mask, pairs, place, target, temperature = _head_rows(branches, places)
    device = hidden.device
    states = hidden[torch.from_numpy(place).to(device)]
    logprobs, entropies = head_logprobs(
        head, states, torch.from_numpy(target).to(device), torch.from_numpy(temperature).to(device)
    )
    mask = mask.to(device)
    chosen = torch.from_numpy(pairs).to(device)
    empty = torch.zeros(mask.shape, device=device)
    return TokenLogprobs(
        empty.masked_scatter(mask, logprobs[chosen]),
        empty.masked_scatter(mask, entropies[chosen]),
        mask,
        hidden.shape[0],
        len(place),
    )


def best_layout(model: PreTrainedModel) -> Layout:
    """Trees where the model takes them (every layer attends to everything through our function), else rows."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windows = getattr(config, "sliding_window", None) is not None and "layer_types" not in config
    ours = getattr(config, "_attn_implementation", None) == GROUPED_SDPA
    fits = kinds == {"full_attention"} and ours and not windows
    return TreeLayout() if fits and _takes_trees(model) else RowLayout()


@torch.no_grad()
def _takes_trees(model: PreTrainedModel) -> bool:
    """Whether a small tree gives what rows give: some architectures do not hand to their attention what they do not
    know (StableLM, Nemotron)."""
    ids = tuple(token % model.config.get_text_config().vocab_size for token in range(3, 15))
    completions = (ids[4:9], ids[4:6] + ids[9:], ids[:3])
    probe = [Branch(ids[:4], completion, (len(completion) - 1,)) for completion in completions]
    probe.append(Branch(ids[2:4], ids[5:], (1, 6)))
    try:
        trees = chosen_logprobs(model, probe, TreeLayout())
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return False
    rows = chosen_logprobs(model, probe, RowLayout())
    return bool(torch.allclose(trees.logprobs, rows.logprobs, rtol=0.02, atol=0.05))


class TreeLayout:
    """Packed token trees: ``batches`` counts distinct nodes."""

    def batches(self, branches: Sequence[Branch], budget: int) -> Iterator[list[int]]:
        return pack(branches, budget)

    def run(self, backbone: nn.Module, branches: Sequence[Branch]) -> States:
        trees = grow(branches)
        weight = next(backbone.parameters())
        plan = plan_trees(trees, weight.device, weight.dtype, _attention_shape(backbone.config))
        ids, depth = (np.concatenate([getattr(tree, name) for tree in trees]) for name in ("ids", "depth"))
        padding = (0, -len(ids) % plan.pad)
        tokens, positions = (torch.from_numpy(np.pad(row, padding))[None].to(weight.device) for row in (ids, depth))
        hidden = backbone(
            input_ids=tokens,
            position_ids=positions,
            # Any mask of four dimensions is taken as it is, which keeps transformers from making a dense one. An empty
            # one fits no scores, so that a model that loses the trees on the way to its attention fails.
            attention_mask=weight.new_zeros(1, 1, 0, 0),
            token_trees=plan,
            use_cache=False,
        ).last_hidden_state[0]
        starts = np.cumsum([0, *map(len, trees)])
        return States(hidden, [start + p for start, t in zip(starts, trees, strict=False) for p in t.predictors])


def _attention_shape(config: Any) -> tuple[int, int, int]:
    """Query heads, key heads and their size: what FlexAttention is compiled for."""
    heads = int(config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, int(getattr(config, "num_key_value_heads", None) or heads), int(size)


class RowLayout:
    """Right-padded rows of prompt and completion, sorted by length and trimmed to the longest of a micro-batch."""

    def batches(self, branches: Sequence[Branch], budget: int) -> Iterator[list[int]]:
        taken: list[int] = []
        for row in sorted(range(len(branches)), key=lambda row: _row_length(branches[row])):
            if taken and (len(taken) + 1) * _row_length(branches[row]) > budget:
                yield taken
                taken = []
            taken.append(row)
        if taken:
            yield taken

    def run(self, backbone: nn.Module, branches: Sequence[Branch]) -> States:
        width = max(map(_row_length, branches))
        ids = np.zeros((len(branches), width), dtype=np.int64)
        for row, branch in enumerate(branches):
            ids[row, : _row_length(branch)] = (*branch.prompt, *branch.path)
        tokens = torch.from_numpy(ids).to(next(backbone.parameters()).device)
        hidden = backbone(input_ids=tokens, use_cache=False).last_hidden_state
        places = [
            row * width + len(branch.prompt) - 1 + np.array(branch.indices) for row, branch in enumerate(branches)
        ]
        return States(hidden.flatten(0, 1), places)


def _row_length(branch: Branch) -> int:
    return len(branch.prompt) + len(branch.path)


def _head_rows(
    branches: Sequence[Branch], places: Sequence[np.ndarray]
) -> tuple[Tensor, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The distinct (state, target, temperature) to be scored, and which of them each chosen token is."""
    counts = [len(branch.indices) for branch in branches]
    mask = torch.arange(max(counts))[None, :] < torch.tensor(counts)[:, None]
    targets = np.concatenate([np.array(branch.targets) for branch in branches])
    temperatures = np.repeat(np.array([branch.temperature for branch in branches], dtype=np.float32), counts)
    kinds, kind = np.unique(temperatures, return_inverse=True)
    key = (np.concatenate(list(places)) * (targets.max() + 1) + targets) * len(kinds) + kind
    _, first, pairs = np.unique(key, return_index=True, return_inverse=True)
    return mask, pairs, np.concatenate(list(places))[first], targets[first], temperatures[first]
