"""Load the model that learns: frozen weights, a LoRA adapter, a tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from igrpo_lite.config import ModelOptions
from igrpo_lite.errors import ModelError
from igrpo_lite.policy.attention import register
from igrpo_lite.policy.heads import check_split, is_causal
from igrpo_lite.tiny import MODEL_DIR

_SMALL_MODEL = 50_000_000
_NO_FOLDER = "no folder of that name here, and as a hub id it could not be loaded"


@dataclass(slots=True)
class Policy:
    """A causal language model with a trainable adapter.

    Attributes:
        model: PEFT model; only adapter tensors have ``requires_grad``.
        stop_ids: token ids that end a completion.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    stop_ids: tuple[int, ...]

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)


def model_path(name: str) -> str:
    """The folder of the bundled model for ``tiny``, anything else as it is."""
    return str(MODEL_DIR) if name == "tiny" else name


def load_policy(options: ModelOptions, seed: int, adapter: Path | None = None) -> Policy:
    """Load model and tokenizer and put a LoRA adapter on it: a fresh one made from ``seed`` alone, or a saved one.

    Raises:
        ModelError: no such model, not a causal language model, no tokenizer, or not supported.
    """
    device = pick_device(options.device)
    path = model_path(options.model)
    tokenizer = load_tokenizer(options)
    model = _load_model(path, options, pick_dtype(options.dtype, device)).to(device)
    if not is_causal(model):
        raise ModelError(f"model {options.model!r} is not a causal language model ({type(model).__name__} looks ahead)")
    if not check_split(model):
        raise ModelError(
            f"model {options.model!r}: {type(model).__name__} does something between its last hidden state and its "
            "logits that igrpo-lite does not know; please report it with the model's name"
        )
    _set_threads(options, model)
    _without_dropout(model)
    peft_model = _fresh_adapter(model, options, seed) if adapter is None else _saved_adapter(model, adapter)
    return Policy(peft_model, tokenizer, device, stop_ids(model, tokenizer))


def recompute_activations(model: Any) -> None:
    """Turn on gradient checkpointing in a way that still ends the backward pass at the lowest adapter."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    # transformers also makes the embeddings ask for a gradient, which only the reentrant kind needs: every layer below
    # the lowest adapter would be run again and differentiated for nothing.
    model.disable_input_require_grads()


def _fresh_adapter(model: Any, options: ModelOptions, seed: int) -> PeftModel:
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
        raise ModelError(f"lora_target_modules: {_first_line(error)}") from error
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
    part = re.split("[ -]", spec)[-1]
    if part == "all":
        return None
    shares = {"half": 2, "third": 3, "quarter": 4}
    count = round(num_layers / shares[part]) if part in shares else int(part)
    return list(range(max(0, num_layers - max(1, count)), num_layers))


def _saved_adapter(model: Any, folder: Path) -> PeftModel:
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder} holds no adapter (no adapter_config.json)")
    try:
        return PeftModel.from_pretrained(model, folder)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"adapter {folder} does not fit the model: {_first_line(error)}") from error


def load_tokenizer(options: ModelOptions) -> PreTrainedTokenizerBase:
    """The model's fast tokenizer; raises :class:`ModelError` where there is none."""
    path = model_path(options.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=options.revision)
    except Exception as error:
        reason = "no usable tokenizer" if Path(path).is_dir() else _NO_FOLDER
        raise ModelError(f"model {options.model!r}: {reason}: {_first_line(error)}") from error
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
        raise ModelError(f"device {name!r} cannot be used: {_first_line(error)}; try device auto") from error
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto``: bfloat16 on GPUs that compute in it (capability 8.0 and up), float32 elsewhere.

    ``torch.cuda.is_bf16_supported()`` is no guide: it also answers yes where bfloat16 is only emulated.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    return torch.float32


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


def _load_model(path: str, options: ModelOptions, dtype: torch.dtype) -> Any:
    config = _read_config(options)
    _refuse_unsupported(config, options.model)
    try:
        with _quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                path,
                revision=options.revision,
                config=config,
                dtype=dtype,
                attn_implementation=register(),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they are in the report; see below
            )
    except Exception as error:
        raise ModelError(f"model {options.model!r} could not be loaded: {_first_line(error)}") from error
    _refuse_incomplete(report, options.model)
    return model


def _read_config(options: ModelOptions) -> Any:
    path = model_path(options.model)
    try:
        return AutoConfig.from_pretrained(path, revision=options.revision)
    except Exception as error:
        where = "" if Path(path).is_dir() else f"{_NO_FOLDER}: "
        raise ModelError(f"model {options.model!r}: {where}{_first_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from writing across our own screen; what is wrong is raised, in our words."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _refuse_incomplete(report: Mapping[str, Any], name: str) -> None:
    """transformers only warns of weights that it had to draw at random: a run would train on noise."""
    missing = sorted(report["missing_keys"])
    other = sorted(str(entry[0]) for entry in report["mismatched_keys"])
    for keys, what in ((missing, "lacks"), (other, "does not have the shapes that config.json says for")):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ModelError(
                f"model {name!r}: its weights file {what} {keys[0]}{more}; get the whole model again (an interrupted "
                "download, or a config.json of another model?)"
            )


def _refuse_unsupported(config: Any, name: str) -> None:
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"model {name!r} is not a causal language model (its config.json says {config.model_type})")
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise ModelError(
            f"model {name!r}: layers of type {', '.join(sorted(kinds))} keep a recurrent state, which the plain "
            "sampler cannot share between rollouts; use a model with attention layers only"
        )


def _without_dropout(model: nn.Module) -> None:
    """The objective compares the policy with itself when it sampled; noise in between would be taken for change."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def _set_threads(options: ModelOptions, model: nn.Module) -> None:
    threads = options.torch_threads
    if threads is None and sum(p.numel() for p in model.parameters()) < _SMALL_MODEL:
        threads = 1  # with more, waiting for each other costs more than the arithmetic of so small a model
    if threads is not None:
        torch.set_num_threads(threads)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
