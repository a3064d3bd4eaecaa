"""The Unsloth back end: its model, its adapter, and on a GPU a vLLM engine on the same frozen weights.

Written against Unsloth 2026.10 (docs/backends.md says what was run). Every hyper-parameter is passed: Unsloth's
defaults are others than ours.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftConfig, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import Tensor, nn

from igrpo_lite.config import ModelOptions
from igrpo_lite.errors import ModelError
from igrpo_lite.planning.memory import KV_SHARES, engine_memory, weight_bytes
from igrpo_lite.planning.shapes import shape_of
from igrpo_lite.policy.backends import Loaded, LoadRequest, model_path
from igrpo_lite.policy.four_bit import is_packed
from igrpo_lite.policy.heads import BACKBONE
from igrpo_lite.policy.loading import adapter_layers, check_model, first_line, linear_names, without_dropout
from igrpo_lite.policy.plain import quiet as quiet_transformers
from igrpo_lite.policy.quiet import quiet
from igrpo_lite.policy.relief import forget, make_room, speaks_of_memory
from igrpo_lite.policy.unsloth_import import prepare, vllm_samples

_HIDDEN = "UNSLOTH_RETURN_HIDDEN_STATES"
_MOST = 0.9  # share of the free memory


class UnslothBackend:
    """Implements :class:`igrpo_lite.policy.backends.Backend`."""

    has_engine = False  # a second one would corrupt the first: vLLM's sleeping memory has one manager for a process

    def load(self, request: LoadRequest) -> Loaded:
        unsloth = prepare(request.options)
        if request.device.type != unsloth.DEVICE_TYPE:
            raise ModelError(
                f"backend: Unsloth works on {unsloth.DEVICE_TYPE} here, not on {request.device.type}; set --device, or "
                "use --backend transformers"
            )
        fast = vllm_samples(request.options)
        if fast and request.options.revision:
            raise ModelError(
                "revision: Unsloth's vLLM takes the newest one; download that revision and give its folder as --model"
            )
        if fast and self.has_engine:
            raise ModelError(
                "backend: this process has an Unsloth model with vLLM already, and it can have one only; start a new "
                "one (in a notebook: restart the kernel)"
            )
        model, notes = _load(unsloth.FastLanguageModel, request, fast)
        self.has_engine = self.has_engine or fast
        if request.adapter is not None:
            _fill(model, request.adapter)
        inner = model.get_base_model()
        if unsloth.DEVICE_TYPE == "cuda":  # on a CPU it is transformers' own class, which has a backbone
            setattr(inner, BACKBONE, HiddenStates(inner))
        model.for_training()
        without_dropout(inner)
        check_model(inner, request.options.model)
        return Loaded(model, getattr(model, "vllm_engine", None), notes)


backend = UnslothBackend()


def _load(loader: Any, request: LoadRequest, fast: bool) -> tuple[Any, tuple[str, ...]]:
    """The adapted model, and what there is to say about it.

    Where vLLM does not start for want of memory, it is tried once more: with a larger share where it says that its
    share is too small for any KV cache, else with a quarter of the KV cache. Unsloth itself tries no second time when
    its engine can sleep, as vLLM may refuse that while anything of the first is left.
    """
    arguments = loading_arguments(request, fast)
    model, error = _try(loader, request, arguments)
    if error is None:
        return model, ()
    said = f"model {request.options.model!r} could not be loaded with Unsloth: {first_line(error)}"
    if not (fast and speaks_of_memory(error)):
        raise ModelError(f"{said}; --backend transformers may") from error
    forget(error)
    make_room(request.device)
    keys, share = keys_and_values(request), arguments["gpu_memory_utilization"]
    if asks_for_more(error):
        again, change = memory_share(request, keys, 2 * beside(request)), "a larger share of it"
        note = "it needs more beside its KV cache than planned"
    else:
        keys //= 4
        again, change = memory_share(request, keys, beside(request)), f"--kv-cache-gib {keys / 2**30:.2f}"
        note = "the planned KV cache did not fit, and with a smaller one fewer sequences decode at the same time"
    fewer = max(1, arguments["max_num_seqs"] // 4)
    advice = f"lower --max-num-seqs (now {arguments['max_num_seqs']}) to {fewer}"
    if again != share:
        model, second = _try(loader, request, arguments | {"gpu_memory_utilization": again})
        if second is None:
            return model, (f"vLLM runs with {change} ({share:.0%} of the free memory before, {again:.0%} now): {note}",)
        if not speaks_of_memory(second):
            flags = f"--max-num-seqs {fewer}" if asks_for_more(error) else change
            raise ModelError(
                f"{said}; no second try was possible in the same process ({first_line(second)}): start again with "
                f"{flags}"
            ) from error
        said += f"; nor with {change}"
    raise ModelError(
        f"{said}: {advice} and --max-completion-length to half, or see igrpo-lite plan for a model that fits; "
        "--sampler transformers does without vLLM"
    ) from error


def asks_for_more(error: BaseException) -> bool:
    """Whether vLLM found no room for a KV cache in its share of the memory: then a smaller KV cache is no cure."""
    return "Try increasing `gpu_memory_utilization`" in str(error)


def _try(loader: Any, request: LoadRequest, arguments: dict[str, Any]) -> tuple[Any, Exception | None]:
    """A model, or why there is none."""
    try:
        with quiet(stdout=True), quiet_transformers():
            base, _ = loader.from_pretrained(**arguments)
            return loader.get_peft_model(base, **adapter_arguments(request, base)), None
    except Exception as error:
        return None, error


def loading_arguments(request: LoadRequest, fast: bool) -> dict[str, Any]:
    """Keywords of ``FastLanguageModel.from_pretrained``; ``fast``: with vLLM."""
    options = request.options
    path = model_path(options.model)
    arguments: dict[str, Any] = {
        "model_name": str(Path(path).resolve()) if Path(path).is_dir() else path,
        "max_seq_length": _context(request),  # longer rows would be cut
        "dtype": request.dtype,
        "load_in_4bit": _is_four_bit(request),
        "load_in_8bit": False,
        "load_in_16bit": False,
        "full_finetuning": False,
        "trust_remote_code": False,
        "use_gradient_checkpointing": _checkpointing(options),
        "revision": options.revision,
        "use_exact_model_name": True,  # not its own copy of it
        "fast_inference": fast,
        "random_state": request.seed,
        "max_lora_rank": options.lora_r,
        "float8_kv_cache": False,
        "offload_embedding": False,
    }
    if fast:
        arguments |= {
            "gpu_memory_utilization": memory_share(request, keys_and_values(request), beside(request)),
            "disable_log_stats": True,
            "max_num_seqs": getattr(options, "max_num_seqs", 128),
        }
    return arguments


def adapter_arguments(request: LoadRequest, model: Any) -> dict[str, Any]:
    """Keywords of ``FastLanguageModel.get_peft_model``: of a fresh adapter, or of one like a saved one."""
    options = request.options
    layers = adapter_layers(options.lora_layers, model.config.get_text_config().num_hidden_layers)
    targets: Any = list(options.lora_target_modules)
    rank, alpha = options.lora_r, options.lora_alpha or options.lora_r
    if request.adapter is not None:
        saved = PeftConfig.from_pretrained(str(request.adapter))
        rank, alpha, layers = saved.r, saved.lora_alpha, saved.layers_to_transform
        targets = saved.target_modules if isinstance(saved.target_modules, str) else sorted(saved.target_modules)
    return {
        "r": rank,
        "target_modules": linear_names(model) if targets == ["all-linear"] else targets,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "layers_to_transform": layers,
        "layers_pattern": None,
        "use_gradient_checkpointing": _checkpointing(options),
        "random_state": request.seed,
        "max_seq_length": _context(request),
        "use_rslora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }


class HiddenStates:
    """An Unsloth model on a GPU as the backbone that :func:`igrpo_lite.policy.heads.split_heads` gives.

    Its causal language model is called, not the module inside, which relies on what the outer one sets; an environment
    variable makes it put its last hidden states where logits would be. Rows are padded on the right: in training mode
    masks are not looked at.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model

    @property
    def config(self) -> Any:
        return self._model.config.get_text_config()

    def parameters(self) -> Iterator[nn.Parameter]:
        return self._model.parameters()

    def __call__(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        """``last_hidden_state [B, T, H]`` of ``input_ids [B, T]``."""
        with _hidden_states():
            states = self._model(input_ids=input_ids, use_cache=False).logits
        expected = (*input_ids.shape, self.config.hidden_size)
        if states.shape != expected:
            raise ModelError(
                f"Unsloth gave numbers of shape {list(states.shape)} instead of hidden states {list(expected)}: this "
                "version of it, or this model, cannot be used; try --backend transformers"
            )
        return SimpleNamespace(last_hidden_state=states)


@contextmanager
def _hidden_states() -> Iterator[None]:
    before = os.environ.get(_HIDDEN)
    os.environ[_HIDDEN] = "1"
    try:
        yield
    finally:
        os.environ.pop(_HIDDEN)
        if before is not None:
            os.environ[_HIDDEN] = before


def _fill(model: Any, folder: Path) -> None:
    """A saved adapter's weights, into one of the same form."""
    try:
        missed = set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise ModelError(f"adapter {folder} does not fit the model: {first_line(error)}") from error
    lacking = [name for name in missed.missing_keys if "lora_" in name] + list(missed.unexpected_keys)
    if lacking:
        raise ModelError(f"adapter {folder} does not fit the model: {lacking[0]}")
    model.requires_grad_(False)


def _checkpointing(options: ModelOptions) -> bool:
    return bool(getattr(options, "gradient_checkpointing", False))


def _context(request: LoadRequest) -> int:
    text = request.config.get_text_config()
    return request.context or int(getattr(text, "max_position_embeddings", 0) or 4096)


def free_memory(request: LoadRequest) -> int:
    return torch.cuda.mem_get_info(request.device)[0]


def keys_and_values(request: LoadRequest) -> int:
    """Bytes for vLLM's KV cache: what was asked for, or a share of what the weights leave free."""
    asked = getattr(request.options, "kv_cache_gib", None)
    if asked is not None:
        return int(asked * 2**30)
    return int(KV_SHARES[True] * max(0, free_memory(request) - _weights(request)))


def beside(request: LoadRequest) -> int:
    """Bytes that vLLM takes beside weights and KV cache, as a plan counts them."""
    options, shape = request.options, shape_of(request.config.to_dict())
    sequences = getattr(options, "max_num_seqs", 128)
    item, packed = request.dtype.itemsize, _is_four_bit(request)
    return sum(engine_memory(shape, item, packed, rank=options.lora_r, max_num_seqs=sequences).values())


def memory_share(request: LoadRequest, keys: int, others: int) -> float:
    """Share of the free memory for vLLM: the policy's weights, which it uses too, the KV cache, and ``others``."""
    return min(_MOST, max(0.1, (_weights(request) + keys + others) / free_memory(request)))


def _weights(request: LoadRequest) -> int:
    return weight_bytes(shape_of(request.config.to_dict()), request.dtype.itemsize, _is_four_bit(request))


def _is_four_bit(request: LoadRequest) -> bool:
    return request.options.load_in_4bit or is_packed(request.config)
