"""The adapter added into the base's weights: computed in float32, rounded once, written as a plain model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from igrpo_lite.errors import ModelError
from igrpo_lite.export.source import Options, Source
from igrpo_lite.planning.models import MODELS
from igrpo_lite.policy.loading import load_policy, model_path


@dataclass(frozen=True, slots=True)
class Base:
    """Weights to merge onto, known from their configuration alone.

    Attributes:
        name: hub id or folder, as the user knows it; ``path`` is what is loaded.
        revision: of a hub model; only the run's own model has the run's.
        commit: what the hub gave for it; unset for a folder.
        parameters: how many; tied ones count once.
        dtype: that its weights are stored in.
        target: that merged ones get.
        quantized: it holds 4-bit weights only.
    """

    name: str
    path: str
    revision: str | None
    commit: str | None
    parameters: int
    dtype: torch.dtype
    target: torch.dtype
    quantized: bool

    @property
    def target_name(self) -> str:
        return str(self.target).removeprefix("torch.")

    @property
    def merged_bytes(self) -> int:
        return self.parameters * self.target.itemsize


def own_base(source: Source, options: Options) -> Base:
    """The model that the run was trained on; raises :class:`ModelError` where there is none."""
    return _read(source.config.model, source.config.revision, options)


def merge_base(own: Base, options: Options) -> Base:
    """What the adapter is merged onto: the run's own model, the original of a 4-bit copy, or the one that was named.

    Raises:
        ModelError: no such model, or 4-bit weights whose original is not known.
    """
    if options.onto == "dequantized" or (options.base is None and not own.quantized):
        return own
    copies = {copy: m.ungated or m.hub_id for m in MODELS for copy in (m.four_bit, m.four_bit_dynamic) if copy}
    name = options.base or copies.get(own.name)
    base = None if name is None else _read(name, None, options)
    if base is None or base.quantized:
        raise ModelError(
            f"{name or own.name} holds 4-bit weights only; name the 16-bit model that it was made from with --base, or "
            "merge onto the run's own weights with --onto dequantized"
        )
    return base


def _read(name: str, revision: str | None, options: Options) -> Base:
    path = model_path(name)
    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise ModelError(f"base model {name!r} cannot be used: {_first_line(error)}") from error
    stored = config.dtype or torch.float32
    target = getattr(torch, options.dtype) if options.dtype != "auto" else stored
    if options.dtype == "auto" and stored.itemsize != 2:
        target = torch.bfloat16
    return Base(
        name=name,
        path=path,
        revision=revision,
        commit=getattr(config, "_commit_hash", None),
        parameters=sum(p.numel() for p in model.parameters()),
        dtype=stored,
        target=target,
        quantized=getattr(config, "quantization_config", None) is not None,
    )


def load_base(base: Base, source: Source, options: Options, device: torch.device) -> Any:
    """The weights to merge onto, in the type that they are stored in.

    With ``--onto dequantized`` these are the 4-bit weights of the run in 16 bits, as the adapter met them in training.
    """
    if options.onto == "dequantized":
        changes = {"device": str(device), "dtype": source.dtype}
        policy = load_policy(source.config.model_copy(update=changes), source.config.seed)
        packed: Any = policy.model.unload()
        return packed.dequantize(packed.dtype)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            base.path, revision=base.revision, dtype=base.dtype, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"base model {base.name!r} could not be loaded: {_first_line(error)}") from error
    if report["missing_keys"]:
        raise ModelError(f"base model {base.name!r}: its weights file lacks {min(report['missing_keys'])}")
    return model.to(device).eval()


@torch.no_grad()
def merge(model: Any, adapter: Path, target: torch.dtype) -> Any:
    """Add an adapter into a model, in place and in float32, and give its weights their final type.

    Raises:
        ModelError: the adapter does not fit.
    """
    try:
        adapted = PeftModel.from_pretrained(model, adapter)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"adapter {adapter} does not fit the base: {_first_line(error)}") from error
    embeddings = {id(module.weight) for module in adapted.modules() if isinstance(module, nn.Embedding)}
    for name, module in adapted.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        linear: Any = module.get_base_layer()
        if not isinstance(linear, (nn.Linear, Conv1D)) or id(linear.weight) in embeddings:
            raise ModelError(f"adapter {adapter}: {name} is no linear layer with weights of its own; cannot be merged")
        delta = module.get_delta_weight("default").float()
        linear.weight.data = (linear.weight.float() + delta).to(target)
    return adapted.unload().to(target)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
