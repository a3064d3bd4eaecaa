"""The module that a transformers sampler runs: the policy itself, or a merged copy of a small one.

On a small model Python's cost per layer outweighs the arithmetic, and unmerged LoRA layers double it. There a copy with
the adapter added in is kept beside the policy (a few megabytes). A large model is run as it is: a second copy would
cost what it cannot spare, and the frozen weights are never merged into, because unmerging does not give them back.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from igrpo_lite.policy.precision import low_precision

MERGED_COPY_LIMIT = 128 * 2**20
"""Bytes of parameters up to which ``auto`` keeps a merged copy."""


def can_merge(policy: PeftModel) -> bool:
    """Whether a merged copy is small and gives the policy's own numbers.

    Float32 only: rounded to bfloat16, most of a young adapter would vanish in the weights it is added to, and weights
    in 4 bits would be packed anew. Linear layers with weights of their own only: in a tied head the adapter would also
    change the embedding.
    """
    parameters = list(policy.parameters())
    if any(p.dtype != torch.float32 for p in parameters):
        return False
    if sum(p.numel() * p.element_size() for p in parameters) > MERGED_COPY_LIMIT:
        return False
    embeddings = {id(module.weight) for module in policy.modules() if isinstance(module, nn.Embedding)}
    bases = [module.get_base_layer() for module in policy.modules() if isinstance(module, LoraLayer)]
    return all(isinstance(base, nn.Linear) and id(base.weight) not in embeddings for base in bases)


class Replica:
    """Follows a PEFT model for sampling.

    Use as a context manager around decoding: it gives the module to run, in evaluation mode, and restores the policy's
    training mode afterwards.

    Args:
        policy: the model being trained.
        kind: ``merged`` keeps a copy with the adapter added in, ``shared`` runs the policy itself; ``auto`` takes the
            copy where :func:`can_merge` allows it.
    """

    def __init__(self, policy: PeftModel, kind: Literal["auto", "merged", "shared"] = "auto") -> None:
        self.policy = policy
        self.device = next(policy.parameters()).device
        if kind == "auto":
            kind = "merged" if can_merge(policy) else "shared"
        self.kind = kind
        self._copy: nn.Module | None = None
        self._merges: list[tuple[LoraLayer, nn.Linear]] = []
        if kind == "merged":
            self._build_copy()

    def __enter__(self) -> nn.Module:
        if self._copy is not None:
            return self._copy
        self._was_training = self.policy.training
        self.policy.eval()
        model = self.policy.get_base_model()
        self._precision = low_precision(model)  # as in the update, so that both compute the same
        self._precision.__enter__()
        return model

    def __exit__(self, *exception: Any) -> None:
        if self._copy is None:
            self._precision.__exit__(*exception)
            self.policy.train(self._was_training)

    @torch.no_grad()
    def refresh(self) -> None:
        """Recompute the copy's adapted weights from the untouched base and the adapter's current tensors."""
        for source, target in self._merges:
            target.weight.copy_(source.get_base_layer().weight)
            for name in () if source.disable_adapters else source.active_adapters:
                if name in source.lora_A:
                    target.weight.add_(source.get_delta_weight(name).to(target.weight.dtype))

    def _build_copy(self) -> None:
        base = copy.deepcopy(self.policy.get_base_model())
        for name, module in list(base.named_modules()):
            if isinstance(module, LoraLayer):
                parent, _, child = name.rpartition(".")
                setattr(base.get_submodule(parent), child, module.get_base_layer())
        for name, module in self.policy.get_base_model().named_modules():
            if isinstance(module, LoraLayer):
                self._merges.append((module, base.get_submodule(name)))
        self._copy = base.eval().requires_grad_(False)
        self.refresh()
