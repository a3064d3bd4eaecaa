"""A causal language model as two parts: the backbone that makes hidden states and the head that makes logits.

Sampling needs logits of the last position only, the loss of completion positions only; running the two parts apart
keeps every other row out of the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

BACKBONE = "igrpo_lite_backbone"
"""Attribute of a model whose own backbone cannot be called apart from its head (:mod:`igrpo_lite.policy.unsloth`)."""


@dataclass(frozen=True, slots=True)
class Head:
    """What makes logits of hidden states: a linear map and what the architecture does to its output.

    Attributes:
        module: the linear layer.
        factor: the logits are multiplied by it (Cohere; Granite divides).
        cap: and softly capped to this size (Gemma 2).
    """

    module: nn.Linear
    factor: float = 1.0
    cap: float | None = None

    @property
    def weight(self) -> Tensor:
        """``[V, H]``."""
        return self.module.weight

    @property
    def bias(self) -> Tensor | None:
        """``[V]``, where there is one."""
        return self.module.bias

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., V]`` of ``hidden [..., H]``, in float32."""
        return self.shape_(self.module(hidden.to(self.weight.dtype)).float())

    def shape_(self, logits: Tensor) -> Tensor:
        """The factor and the cap, in place."""
        if self.factor != 1.0:
            logits *= self.factor
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, logits: Tensor) -> Tensor | None:
        """Derivative of the cap at finished ``logits``; ``None`` without one."""
        return None if self.cap is None else 1.0 - (logits / self.cap).square_()


def split_heads(model: PreTrainedModel) -> tuple[Any, Head]:
    """Backbone and head of a causal language model. :func:`check_split` verifies that they are all there is.

    The backbone is called with ``input_ids`` and gives ``last_hidden_state``. It is the model's own, unless the model
    brings another under :data:`BACKBONE`.
    """
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    backbone = getattr(model, BACKBONE, None)
    if backbone is None:
        backbone = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    divisor = float(getattr(config, "logits_scaling", None) or 1.0)
    factor = float(getattr(config, "logit_scale", None) or 1.0) / divisor
    cap = getattr(config, "final_logit_softcapping", None)
    return backbone, Head(model.get_output_embeddings(), factor, cap)


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
    theirs = model(input_ids=ids, use_cache=False).logits
    # In low precision their own cap (Gemma 2) rounds several times; another head would be off by far more.
    tolerance = 1e-3 if theirs.dtype == torch.float32 else 2e-2
    theirs = theirs.float()
    return bool(torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max())))


def _probe(model: PreTrainedModel) -> Tensor:
    """A few token ids, ``[1, 8]``, that any vocabulary has."""
    vocabulary = model.config.get_text_config().vocab_size
    return torch.arange(3, 11, device=next(model.parameters()).device)[None] % vocabulary
