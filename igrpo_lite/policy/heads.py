"""A causal language model as two parts: the backbone that makes hidden states and the head that makes logits.

Sampling needs logits of the last position only, the loss of completion positions only; running the two parts apart
keeps every other row out of the head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Head = Callable[[Tensor], Tensor]


def split_heads(model: PreTrainedModel) -> tuple[nn.Module, Head]:
    """Backbone and head of a causal language model; ``head(hidden [..., H]) -> logits [..., V]`` in float32.

    Applies the logit scaling and soft-capping of the architectures that have one. :func:`check_split` verifies it.
    """
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    backbone = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    weight_head = model.get_output_embeddings()
    divisor = float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
    factor = float(getattr(config, "logit_scale", None) or 1.0) / divisor  # Cohere
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2

    def head(hidden: Tensor) -> Tensor:
        logits = weight_head(hidden.to(weight_head.weight.dtype)).float()
        if factor != 1.0:
            logits = logits * factor
        return torch.tanh(logits / cap) * cap if cap else logits

    return backbone, head


@torch.no_grad()
def is_causal(model: PreTrainedModel) -> bool:
    """Whether no position sees a later one: models like BERT load as language models and are none that can sample."""
    ids = _probe(model)
    other = ids.clone()
    other[0, -1] = ids[0, 0]
    first, second = (model(input_ids=row, use_cache=False).logits[:, :-1].float() for row in (ids, other))
    return bool(torch.allclose(first, second, rtol=0.02, atol=0.02 * float(first.abs().max())))


@torch.no_grad()
def check_split(model: PreTrainedModel) -> bool:
    """Whether backbone and head together give the model's own logits on a short probe."""
    backbone, head = split_heads(model)
    ids = _probe(model)
    ours = head(backbone(input_ids=ids, use_cache=False).last_hidden_state)
    theirs = model(input_ids=ids, use_cache=False).logits.float()
    return bool(torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max())))


def _probe(model: PreTrainedModel) -> Tensor:
    """A few token ids, ``[1, 8]``, that any vocabulary has."""
    vocabulary = model.config.get_text_config().vocab_size
    return torch.arange(3, 11, device=next(model.parameters()).device)[None] % vocabulary
