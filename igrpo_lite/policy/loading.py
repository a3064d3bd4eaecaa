"""Load the model that learns: frozen weights, a LoRA adapter, a tokenizer. How is the back end's part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from igrpo_lite.config import ModelOptions
from igrpo_lite.environment.hardware import dtype_for
from igrpo_lite.errors import ModelError
from igrpo_lite.inputs import weight_findings
from igrpo_lite.planning.memory import adapted_layers
from igrpo_lite.policy.backends import LoadRequest, Name, enter, model_path
from igrpo_lite.policy.heads import check_split, is_causal

_SMALL_MODEL = 50_000_000
_NO_FOLDER = "no folder of that name here, and as a hub id it could not be loaded"


@dataclass(slots=True)
class Policy:
    """A causal language model with a trainable adapter.

    Attributes:
        model: PEFT model; only adapter tensors have ``requires_grad``.
        stop_ids: token ids that end a completion.
        backend: what loaded it.
        engine: a vLLM engine on the same frozen weights, where the back end made one.
        notes: sentences for the user about how it was loaded.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    stop_ids: tuple[int, ...]
    backend: Name = "transformers"
    engine: Any = None
    notes: tuple[str, ...] = ()

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)


def load_policy(options: ModelOptions, seed: int, adapter: Path | None = None, context: int | None = None) -> Policy:
    """Load model and tokenizer and put a LoRA adapter on it: a fresh one made from ``seed`` alone, or a saved one.

    Args:
        options: a whole :class:`RunConfig` where the back end shall also start the engine that samples.
        context: tokens of the longest prompt and its completion together, for back ends that must know.

    Raises:
        ModelError: no such model, not a causal language model, no tokenizer, or not supported.
    """
    choice = enter(options)
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    if device.type == "cuda":
        # cuDNN's attention makes a plan for every new length; here lengths change with every update and sampled token.
        torch.backends.cuda.enable_cudnn_sdp(False)
    tokenizer = load_tokenizer(options)
    config = _read_config(options)
    _refuse_unsupported(config, options.model, dtype)
    loaded = choice.backend().load(LoadRequest(options, config, device, dtype, seed, adapter, context))
    model = loaded.model.get_base_model()
    _set_threads(model)
    notes = ((choice.why,) if choice.why else ()) + loaded.notes
    return Policy(loaded.model, tokenizer, device, stop_ids(model, tokenizer), choice.name, loaded.engine, notes)


def check_model(model: Any, name: str) -> None:
    """Raise :class:`ModelError` for a model that looks ahead, or that is more than its backbone and its head."""
    if not is_causal(model):
        raise ModelError(f"model {name!r} is not a causal language model ({type(model).__name__} looks ahead)")
    if not check_split(model):
        raise ModelError(
            f"model {name!r}: {type(model).__name__} does something between its last hidden state and its "
            "logits that igrpo-lite does not know; please report it with the model's name"
        )


def recompute_activations(model: Any) -> bool:
    """Turn on gradient checkpointing in a way that still ends the backward pass at the lowest adapter.

    ``False``: Unsloth's models are left alone, which were loaded with their own kind of it, or without.
    """
    if hasattr(model, "for_training"):
        return False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    # transformers also makes the embeddings ask for a gradient, which only the reentrant kind needs: every layer below
    # the lowest adapter would be run again and differentiated for nothing.
    model.disable_input_require_grads()
    return True


def fresh_adapter(model: Any, options: ModelOptions, seed: int) -> PeftModel:
    """A new adapter, drawn from ``seed`` alone. Raises :class:`ModelError` for targets that the model does not have."""
    # Seeded immediately before the adapter is drawn, so that nothing that happens while loading can shift it.
    torch.manual_seed(seed)
    targets: Any = list(options.lora_target_modules)
    layers = adapter_layers(options.lora_layers, model.config.get_text_config().num_hidden_layers)
    if targets == ["all-linear"]:  # PEFT's own word for it, which it does not take together with a choice of layers
        targets = "all-linear" if layers is None else linear_names(model)
    config = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha or options.lora_r,
        target_modules=targets,
        layers_to_transform=layers,
        task_type="CAUSAL_LM",
    )
    try:
        peft_model = get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"lora_target_modules: {first_line(error)}") from error
    assert isinstance(peft_model, PeftModel)
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        raise ModelError(
            "lora_target_modules: the output layer (lm_head) cannot have an adapter, because the loss runs over it in "
            "pieces, as a frozen matrix; leave it out"
        )
    return peft_model


def linear_names(model: Any) -> list[str]:
    """The names of the linear layers that ``all-linear`` means: all but the output layer."""
    head = model.get_output_embeddings()
    linear = [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]
    return sorted({name.rpartition(".")[2] for name in linear})


def adapter_layers(spec: str, num_layers: int) -> list[int] | None:
    """Indices of the layers that ``lora_layers`` names; ``None`` for all of them."""
    if spec == "all":
        return None
    return list(range(num_layers - adapted_layers(spec, num_layers), num_layers))


def saved_adapter(model: Any, folder: Path) -> PeftModel:
    """The adapter in ``folder``, frozen. Raises :class:`ModelError` if there is none, or not for this model."""
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder} holds no adapter (no adapter_config.json)")
    try:
        return PeftModel.from_pretrained(model, folder)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"adapter {folder} does not fit the model: {first_line(error)}") from error


def load_tokenizer(options: ModelOptions) -> PreTrainedTokenizerBase:
    """The model's fast tokenizer; raises :class:`ModelError` where there is none."""
    path = model_path(options.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=options.revision)
    except Exception as error:
        reason = "no usable tokenizer" if Path(path).is_dir() else _NO_FOLDER
        raise ModelError(f"model {options.model!r}: {reason}: {first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"model {options.model!r}: its tokenizer has no end-of-sequence token, so nothing would ever end"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def pick_device(name: str) -> torch.device:
    """``auto`` takes CUDA, then MPS, then the CPU. Raises :class:`ModelError` for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {name!r} cannot be used: {first_line(error)}; try device auto") from error
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto``: on CUDA what the GPU computes in (:func:`dtype_for`: bfloat16 from capability 8.0 on, float16 from 7.0
    on), float32 elsewhere.

    Raises:
        ModelError: the GPU is too old for any type.
    """
    if device.type != "cuda":
        return getattr(torch, "float32" if name == "auto" else name)
    best = dtype_for(torch.cuda.get_device_capability(device))
    if best.dtype is None:
        raise ModelError(f"device {device}: {best.reason}")
    return getattr(torch, best.dtype if name == "auto" else name)


def stop_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """End tokens of the generation config and of the tokenizer."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    return tuple(sorted({*listed, tokenizer.eos_token_id}))


def read_context_length(options: ModelOptions) -> int:
    """Tokens of prompt and completion together that the model was made for, from its configuration alone.

    Raises :class:`ModelError` where there is none.
    """
    text = _read_config(options).get_text_config()
    return int(getattr(text, "max_position_embeddings", 0) or 2**31)


def _read_config(options: ModelOptions) -> Any:
    path = model_path(options.model)
    try:
        return AutoConfig.from_pretrained(path, revision=options.revision)
    except Exception as error:
        where = "" if Path(path).is_dir() else f"{_NO_FOLDER}: "
        raise ModelError(f"model {options.model!r}: {where}{first_line(error)}") from error


def _refuse_unsupported(config: Any, name: str, dtype: torch.dtype) -> None:
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"model {name!r} is not a causal language model (its config.json says {config.model_type})")
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise ModelError(
            f"model {name!r}: layers of type {', '.join(sorted(kinds))} keep a recurrent state, which the plain "
            "sampler cannot share between rollouts; use a model with attention layers only"
        )
    unfit = weight_findings(config.to_dict(), repr(name), str(dtype).removeprefix("torch."))
    if unfit:
        raise ModelError(unfit)


def without_dropout(model: nn.Module) -> None:
    """The objective compares the policy with itself when it sampled; noise in between would be taken for change."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def _set_threads(model: nn.Module) -> None:
    """One thread for a small model: with more, waiting for each other costs more than its arithmetic."""
    if "OMP_NUM_THREADS" not in os.environ and sum(p.numel() for p in model.parameters()) < _SMALL_MODEL:
        torch.set_num_threads(1)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
