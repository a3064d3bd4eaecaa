"""The policy's side of sampling with vLLM: its adapter in the form that vLLM reads, and its frozen weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from igrpo_lite.errors import SamplerError

MAIN_MEMORY_SHARE = 0.9
"""Of the free main memory, what a copy of the weights may take; vLLM's start needs some too."""


@dataclass(frozen=True, slots=True, eq=False)
class AdapterLayer:
    """One adapted linear layer: it adds ``scale * B A x``.

    Attributes:
        name: path of the layer in the transformers model.
        a: ``[rank, in]``, the policy's own tensor.
        b: ``[out, rank]``, likewise.
    """

    name: str
    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def made_up(self, generator: torch.Generator) -> AdapterLayer:
        """A layer of the same shape and scale with random numbers."""
        a, b = (torch.randn(t.shape, generator=generator) for t in (self.a, self.b))
        return replace(self, a=a, b=b)

    def views(self, slot_a: Tensor, slot_b: Tensor) -> tuple[Tensor, Tensor] | None:
        """The parts of buffers ``[slot rank, in]`` and ``[out, slot rank]`` that it fills; ``None``: too small."""
        a, b = slot_a[: self.rank, : self.a.shape[1]], slot_b[: self.b.shape[0], : self.rank]
        return (a, b) if a.shape == self.a.shape and b.shape == self.b.shape else None

    @torch.no_grad()
    def write(self, a: Tensor, b: Tensor) -> None:
        """Copy A and ``scale * B`` into :meth:`views`. (Scaling in place would change the policy's own B.)"""
        a.copy_(self.a)
        torch.mul(self.b, self.scale, out=b)

    @torch.no_grad()
    def is_in(self, slot_a: Tensor, slot_b: Tensor) -> bool:
        """Whether the buffers hold exactly this layer, and zeros around it."""
        expected_a, expected_b = torch.zeros_like(slot_a), torch.zeros_like(slot_b)
        parts = self.views(expected_a, expected_b)
        if parts is None:
            return False
        parts[0].copy_(self.a)
        parts[1].copy_(self.b * self.scale)
        return torch.equal(expected_a, slot_a) and torch.equal(expected_b, slot_b)


def adapter_layers(model: PeftModel) -> list[AdapterLayer]:
    """The layers of the active adapter.

    Raises:
        SamplerError: parts of the adapter that vLLM has nothing for: DoRA, biases, whole modules, embeddings, the head.
    """
    adapter = model.active_adapter
    base = model.get_base_model()
    ends = {id(base.get_input_embeddings()), id(base.get_output_embeddings())}
    layers = []
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A and id(module) not in ends:
            a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            layers.append(AdapterLayer(name, a, b, float(module.scaling[adapter])))
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    known = {f"base_model.model.{layer.name}.lora_{part}.weight" for layer in layers for part in "AB"}
    others = sorted(state.keys() - known)
    if others or not layers:
        what = f"{others[0]} and {len(others) - 1} more tensors" if others else "no linear layer"
        raise SamplerError(
            f"the adapter has {what}; vLLM takes plain LoRA on linear layers between the embedding and the head: "
            "change --lora-target-modules, or use the transformers sampler"
        )
    return layers


def adapter_disabled(model: PeftModel) -> bool:
    """Whether the model runs without its adapter at the moment (``disable_adapter()``)."""
    return next(module.disable_adapters for module in model.modules() if isinstance(module, LoraLayer))


def write_adapter(folder: Path, layers: Sequence[AdapterLayer]) -> None:
    """Write an adapter folder that vLLM loads exactly as it is meant.

    vLLM knows one scale and one rank for all layers. So the scale goes into B, and the configuration says 1.
    """
    rank = max(layer.rank for layer in layers)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({layer.name.rpartition(".")[2] for layer in layers}),
        "bias": "none",
    }
    tensors = {}
    for layer in layers:
        tensors[f"base_model.model.{layer.name}.lora_A.weight"] = layer.a.detach().cpu().contiguous()
        tensors[f"base_model.model.{layer.name}.lora_B.weight"] = (layer.b.detach() * layer.scale).cpu().contiguous()
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors")


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The frozen parameters by the names they have without an adapter."""
    return {name.replace(".base_layer.", "."): p for name, p in model.named_parameters() if "lora_" not in name}


@contextmanager
def set_aside(model: Any, device: torch.device) -> Iterator[None]:
    """Keep copies of the frozen weights in main memory meanwhile, in place of those on ``device``.

    So a GPU need not hold the engine's as well, and an engine whose weights they were can be freed. Afterwards they are
    back on ``device``; those that have been replaced by tensors there stay as they are. Quantised weights are not
    moved, and neither are those that an outer call has set aside.

    Raises:
        SamplerError: they do not fit into the main memory that is free. (The system would kill the process.)
    """
    parameters = [p for p in base_parameters(model).values() if p.is_floating_point() and p.device.type == device.type]
    size, free = sum(p.numel() * p.element_size() for p in parameters), psutil.virtual_memory().available
    if size > MAIN_MEMORY_SHARE * free:
        raise SamplerError(
            f"the model's {size / 2**30:.1f} GiB of weights must wait in main memory while vLLM starts or stops, but "
            f"only {free / 2**30:.1f} GiB of it are free: close other programs, take a smaller or a 4-bit model, or "
            "use --sampler transformers"
        )
    try:
        for parameter in parameters:
            parameter.data = parameter.data.to("cpu", copy=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        yield
    finally:
        for parameter in parameters:
            if parameter.device.type != device.type:
                parameter.data = parameter.data.to(device)
