"""Log-probabilities of completion tokens under the policy, with gradient, and never of anything else.

Two layouts compute the same numbers:

* ``shared_prefix`` runs a group's prompt once and its completions as rows over the prompt's keys and values: prompt
  plus completions tokens instead of (prompt + completion) for each. In stage 2 the draft stands in the prompt, so this
  is most of the work saved.
* ``rows`` repeats the prompt in every row; for models whose layers do not all attend to everything, and with gradient
  checkpointing, under which transformers keeps no keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel

from igrpo_lite.policy.heads import Head, split_heads

HEAD_CHUNK_TOKENS = 1024
"""Hidden states that pass the head at once; beyond it logits are recomputed in the backward pass, not kept."""


@dataclass(slots=True)
class TokenLogprobs:
    """Of ``B`` completions of one prompt, right-padded to ``T``: log-probabilities, entropies (nats, no gradient) and
    the mask of real tokens, all ``[B, T]``."""

    logprobs: Tensor
    entropies: Tensor
    mask: Tensor


Layout = Callable[[nn.Module, Sequence[int], Sequence[Sequence[int]], torch.device], Tensor]


def completion_logprobs(
    model: PreTrainedModel,
    prompt: Sequence[int],
    completions: Sequence[Sequence[int]],
    temperature: float,
    layout: Layout | None = None,
) -> TokenLogprobs:
    """Log-probability of every token of ``completions`` after ``prompt``, under logits divided by ``temperature``.

    Args:
        model: causal language model without PEFT's outer wrapper (its layers may be adapted).
        layout: :func:`shared_prefix` or :func:`rows`; unset: :func:`best_layout`.
    """
    device = next(model.parameters()).device
    backbone, head = split_heads(model)
    layout = layout or best_layout(model)
    hidden = layout(backbone, prompt, completions, device)  # [B, T, H]: the state that predicts each token
    targets, mask = pad_rows(completions, device)
    logprobs, entropies = hidden.new_zeros(mask.shape, dtype=torch.float32), torch.zeros(mask.shape, device=device)
    picked, entropy = head_logprobs(head, hidden[mask], targets[mask], temperature)
    return TokenLogprobs(logprobs.masked_scatter(mask, picked), entropies.masked_scatter(mask, entropy), mask)


def best_layout(model: PreTrainedModel) -> Layout:
    """:func:`shared_prefix` where every layer attends to everything and keys are kept, else :func:`rows`."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    recomputed = bool(getattr(model, "is_gradient_checkpointing", False))
    full = kinds == {"full_attention"} and (getattr(config, "sliding_window", None) is None or "layer_types" in config)
    return shared_prefix if full and not recomputed else rows


def shared_prefix(
    backbone: nn.Module, prompt: Sequence[int], completions: Sequence[Sequence[int]], device: torch.device
) -> Tensor:
    """Hidden states ``[B, T, H]`` that predict the completions' tokens; the prompt runs once."""
    cache = DynamicCache()
    ids = torch.tensor([list(prompt)], device=device)
    first = backbone(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state[:, -1:]
    tokens, _ = pad_rows(completions, device)
    batch, width = tokens.shape
    first = first.expand(batch, -1, -1)
    if width == 1:
        return first
    for layer in cache.layers:
        layer.keys = layer.keys.expand(batch, -1, -1, -1)
        layer.values = layer.values.expand(batch, -1, -1, -1)
    # The last token predicts nothing. What pads on the right is causally invisible to what comes before.
    position = torch.arange(len(prompt), len(prompt) + width - 1, device=device)
    seen = torch.arange(len(prompt) + width - 1, device=device)[None, :] <= position[:, None]
    rest = backbone(
        input_ids=tokens[:, :-1],
        position_ids=position.expand(batch, -1),
        attention_mask=seen[None, None],  # one for all rows: it is kept for the backward pass in every layer
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return torch.cat([first, rest], dim=1)


def rows(
    backbone: nn.Module, prompt: Sequence[int], completions: Sequence[Sequence[int]], device: torch.device
) -> Tensor:
    """Hidden states ``[B, T, H]`` that predict the completions' tokens; every row holds prompt and completion."""
    tokens, _ = pad_rows([[*prompt, *completion[:-1]] for completion in completions], device)
    hidden = backbone(input_ids=tokens, use_cache=False).last_hidden_state
    return hidden[:, len(prompt) - 1 :]


def head_logprobs(head: Head, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of selected positions, ``hidden [N, H]`` and ``targets [N]``, in chunks.

    No ``[N, V]`` tensor outlives its chunk: with several chunks each is recomputed in the backward pass.
    """

    def piece(h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = torch.log_softmax(head(h) / temperature, dim=-1)
        entropy = -(logprobs.detach().exp() * logprobs.detach()).sum(dim=-1)
        return logprobs.gather(1, t[:, None])[:, 0], entropy

    chunks = list(zip(hidden.split(HEAD_CHUNK_TOKENS), targets.split(HEAD_CHUNK_TOKENS), strict=True))
    if len(chunks) == 1 or not hidden.requires_grad:
        parts = [piece(h, t) for h, t in chunks]
    else:
        parts = [checkpoint(piece, h, t, use_reentrant=False) for h, t in chunks]
    return torch.cat([p for p, _ in parts]), torch.cat([e for _, e in parts])


def pad_rows(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids right-padded with 0, and the mask of real ones, both ``[B, T]``."""
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = True
    return ids.to(device), mask.to(device)
