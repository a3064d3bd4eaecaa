"""What low-precision weights are computed in: everything in their own type, the adapter's float32 matrices included."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

LOW = (torch.bfloat16, torch.float16)


def low_precision(model: nn.Module) -> AbstractContextManager[object]:
    """Autocast to the type of a bfloat16 or float16 model; nothing for float32.

    The adapter stays float32, and so do its gradients. Without this PEFT computes it in float32, for which it makes a
    float32 copy of every adapted layer's input and keeps it for the backward pass: 60 instead of 41 KiB a token in a
    small model, with the same distance of log-probabilities and gradients from exact ones.
    """
    first = next(p for p in model.parameters() if p.is_floating_point())  # packed weights (uint8) do not tell
    if first.dtype not in LOW:
        return nullcontext()
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.cast_input_dtype_enabled = _UnlessAutocast(first.device.type)
    return torch.autocast(first.device.type, first.dtype)


class _UnlessAutocast:
    """PEFT's switch for that copy. Recomputed activations must find what they found before, and of all that is set
    around a forward pass ``torch.utils.checkpoint`` restores autocast only."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __bool__(self) -> bool:
        return not torch.is_autocast_enabled(self.device)
