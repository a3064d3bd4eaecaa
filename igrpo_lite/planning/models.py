"""Models by short name: hub id, exact shape, and the copies in 4 bits or without a licence page.

Any hub id or local folder works beside them (:func:`find_model`): a shape is read from its ``config.json`` alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from igrpo_lite.errors import ModelError
from igrpo_lite.planning.shapes import Shape, read_shape


@dataclass(frozen=True)
class Model:
    """A model that can be planned for.

    Attributes:
        alias: short name; empty for a model that is not in :data:`MODELS`.
        hub_id: what to load, or a folder.
        shape: its ``context`` is that of ``hub_id``.
        also: other hub ids of the same shape, and their context.
        mirror: 4-bit copies at Unsloth: ``plain`` bitsandbytes, or that and their larger ``dynamic`` one.
        gated: its hub page asks for a licence to be accepted; :attr:`ungated` does not.
        packed: the weights of ``hub_id`` are in 4 bits already.
    """

    alias: str
    hub_id: str
    shape: Shape
    also: Mapping[str, int] = field(default_factory=dict)
    mirror: str = ""
    gated: bool = False
    packed: bool = False

    @property
    def family(self) -> str:
        """What its alias begins with; models of a family have the same prompts."""
        return self.alias.rpartition("-")[0]

    @property
    def four_bit(self) -> str:
        """Hub id of the plain 4-bit copy; empty without one."""
        return f"{self._copy}-bnb-4bit" if self.mirror else ""

    @property
    def four_bit_dynamic(self) -> str:
        """Hub id of the copy that leaves some layers in 16 bits."""
        return f"{self._copy}-unsloth-bnb-4bit" if self.mirror == "dynamic" else ""

    @property
    def ungated(self) -> str:
        """Hub id of a 16-bit copy without a licence page, where the original has one."""
        return self._copy if self.gated else ""

    @property
    def targets(self) -> tuple[str, ...]:
        """The linear layers that can get an adapter."""
        return tuple(linear.name for linear in self.shape.linears)

    @cached_property
    def ids(self) -> dict[str, int]:
        """Every hub id of this shape, copies included, and its context."""
        copies = [name for name in (self.four_bit, self.four_bit_dynamic, self.ungated) if name]
        return {self.hub_id: self.shape.context, **self.also, **dict.fromkeys(copies, self.shape.context)}

    @property
    def _copy(self) -> str:
        return f"unsloth/{self.hub_id.partition('/')[2]}"


def _qwen2(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, **values: Any) -> Shape:
    known: dict[str, Any] = {"vocab": 151936, "tied": True, "context": 32768, "biases": "qkv", "kind": "qwen2"}
    if hidden == 3584:
        known |= {"vocab": 152064, "tied": False}
    return Shape(layers, hidden, intermediate, heads, kv_heads, hidden // heads, **(known | values))


def _qwen3(layers: int, hidden: int, intermediate: int, heads: int, tied: bool = True) -> Shape:
    return Shape(layers, hidden, intermediate, heads, 8, 128, 151936, tied, 40960, qk_norm=True, kind="qwen3")


def _llama(layers: int, hidden: int, intermediate: int, heads: int, tied: bool = True) -> Shape:
    return Shape(layers, hidden, intermediate, heads, 8, hidden // heads, 128256, tied, 131072)


def _gemma3(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, **values: Any) -> Shape:
    known: dict[str, Any] = {"tied": True, "qk_norm": True, "norms": 4, "kind": "gemma3_text"}
    return Shape(layers, hidden, intermediate, heads, kv_heads, 256, **known, **values)


def _smol2(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int) -> Shape:
    return Shape(layers, hidden, intermediate, heads, kv_heads, 64, 49152, True, 8192)


def _instruct(alias: str, name: str, shape: Shape, base_context: int, mirror: str = "", gated: bool = False) -> Model:
    return Model(alias, f"{name}-Instruct", shape, {name: base_context}, mirror, gated)


_SMALL, _MEDIUM = (24, 896, 4864, 14, 2), (28, 1536, 8960, 12, 2)
_LARGE, _SEVEN = (36, 2048, 11008, 16, 2), (28, 3584, 18944, 28, 4)
_R1, _MATH = "deepseek-ai/DeepSeek-R1-Distill-Qwen", "Qwen/Qwen2.5-Math"
_R1_SHAPE: dict[str, Any] = {"tied": False, "context": 131072}
_QWEN3_4_ALSO = {f"Qwen/Qwen3-4B-{kind}-2507": 262144 for kind in ("Instruct", "Thinking")}
_PHI4 = Shape(32, 3072, 8192, 24, 8, 128, 200064, True, 131072, fused=True, window=262144, kind="phi3")
_SMOL3 = Shape(36, 2048, 11008, 16, 4, 128, 128256, True, 65536, kind="smollm3")
_GEMMA1 = _gemma3(26, 1152, 6912, 4, 1, vocab=262144, context=32768, window=512)
_GEMMA4 = _gemma3(34, 2560, 10240, 8, 4, vocab=262208, context=131072, window=1024)

MODELS: tuple[Model, ...] = (
    _instruct("qwen2-0.5b", "Qwen/Qwen2-0.5B", _qwen2(*_SMALL), 131072, "plain"),
    _instruct("qwen2-1.5b", "Qwen/Qwen2-1.5B", _qwen2(*_MEDIUM), 131072, "plain"),
    _instruct("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B", _qwen2(*_SMALL), 32768, "dynamic"),
    _instruct("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B", _qwen2(*_MEDIUM), 131072, "dynamic"),
    _instruct("qwen2.5-3b", "Qwen/Qwen2.5-3B", _qwen2(*_LARGE), 32768, "dynamic"),
    _instruct("qwen2.5-7b", "Qwen/Qwen2.5-7B", _qwen2(*_SEVEN), 131072, "dynamic"),
    _instruct("qwen2.5-math-1.5b", f"{_MATH}-1.5B", _qwen2(*_MEDIUM, context=4096), 4096, "plain"),
    _instruct("qwen2.5-math-7b", f"{_MATH}-7B", _qwen2(*_SEVEN, context=4096), 4096, "plain"),
    Model("r1-1.5b", f"{_R1}-1.5B", _qwen2(*_MEDIUM, **_R1_SHAPE), mirror="dynamic"),
    Model("r1-7b", f"{_R1}-7B", _qwen2(*_SEVEN, **_R1_SHAPE), mirror="dynamic"),
    Model("qwen3-0.6b", "Qwen/Qwen3-0.6B", _qwen3(28, 1024, 3072, 16), {"Qwen/Qwen3-0.6B-Base": 32768}, "dynamic"),
    Model("qwen3-1.7b", "Qwen/Qwen3-1.7B", _qwen3(28, 2048, 6144, 16), {"Qwen/Qwen3-1.7B-Base": 32768}, "dynamic"),
    Model(
        *("qwen3-4b", "Qwen/Qwen3-4B", _qwen3(36, 2560, 9728, 32)),
        {"Qwen/Qwen3-4B-Base": 32768, **_QWEN3_4_ALSO},
        "dynamic",
    ),
    Model("qwen3-8b", "Qwen/Qwen3-8B", _qwen3(36, 4096, 12288, 32, False), {"Qwen/Qwen3-8B-Base": 32768}, "dynamic"),
    _instruct("llama3.2-1b", "meta-llama/Llama-3.2-1B", _llama(16, 2048, 8192, 32), 131072, "dynamic", gated=True),
    _instruct("llama3.2-3b", "meta-llama/Llama-3.2-3B", _llama(28, 3072, 8192, 24), 131072, "dynamic", gated=True),
    _instruct("llama3.1-8b", "meta-llama/Llama-3.1-8B", _llama(32, 4096, 14336, 32, False), 131072, "dynamic", True),
    Model("gemma3-1b", "google/gemma-3-1b-it", _GEMMA1, {"google/gemma-3-1b-pt": 32768}, "dynamic", True),
    Model("gemma3-4b", "google/gemma-3-4b-it", _GEMMA4, {"google/gemma-3-4b-pt": 131072}, "dynamic", True),
    Model("phi4-mini", "microsoft/Phi-4-mini-instruct", _PHI4, mirror="dynamic"),
    _instruct("smollm2-135m", "HuggingFaceTB/SmolLM2-135M", _smol2(30, 576, 1536, 9, 3), 8192),
    _instruct("smollm2-360m", "HuggingFaceTB/SmolLM2-360M", _smol2(32, 960, 2560, 15, 5), 8192),
    _instruct("smollm2-1.7b", "HuggingFaceTB/SmolLM2-1.7B", _smol2(24, 2048, 8192, 32, 32), 8192),
    Model("smollm3-3b", "HuggingFaceTB/SmolLM3-3B", _SMOL3, {"HuggingFaceTB/SmolLM3-3B-Base": 65536}),
)
"""Every model with a short name; of Gemma 3 4B the text part. Shapes are from litgpt's ``config.py`` and mlc-llm's
``model_preset.py``, copies from Unsloth's ``models/mapper.py``."""

_BY_ALIAS = {model.alias: model for model in MODELS}
_BY_ID = {name.lower(): (model, name) for model in MODELS for name in model.ids}


def hub_id(name: str) -> str:
    """What to load for a name: the hub id of an alias, anything else as it is."""
    model = _BY_ALIAS.get(name.lower())
    return name if model is None or Path(name).is_dir() else model.hub_id


def find_model(name: str, revision: str | None = None) -> Model:
    """The model of a short name, a hub id or a folder with a ``config.json``; no weights are read.

    A hub id that is not in :data:`MODELS` must be in the local Hugging Face cache: nothing is downloaded.

    Raises:
        ModelError: none of these, or a configuration that cannot be planned for.
    """
    folder = Path(name)
    if (folder / "config.json").is_file():
        return _read(folder / "config.json", name)
    if folder.is_dir():
        raise ModelError(f"model {name!r}: that folder holds no config.json")
    if name.lower() in _BY_ALIAS:
        return _BY_ALIAS[name.lower()]
    if name.lower() in _BY_ID:
        model, exact = _BY_ID[name.lower()]
        return model if exact == model.hub_id else _named(model, exact)
    cached = _cached_config(name, revision)
    if cached is not None:
        return _read(cached, name)
    near = difflib.get_close_matches(name.lower(), [*_BY_ALIAS, *_BY_ID], n=1, cutoff=0.65)
    advice = f"did you mean {_BY_ID[near[0]][1] if near[0] in _BY_ID else near[0]}?" if near else ""
    if "/" in name and not near:
        advice = f"if it is on the hub, get its shape by: hf download {name} config.json"
    raise ModelError(
        f"model {name!r}: no folder of that name with a config.json, and neither among igrpo-lite models nor in the "
        f"local Hugging Face cache; {advice or 'see igrpo-lite models'}"
    )


def _named(model: Model, name: str) -> Model:
    """The same model under another of its hub ids, with that one's context."""
    shape = replace(model.shape, context=model.ids[name])
    packed = name in (model.four_bit, model.four_bit_dynamic)
    return replace(model, hub_id=name, shape=shape, also={}, mirror="", packed=packed)


def _read(path: Path, name: str) -> Model:
    """A model by its ``config.json``."""
    return Model("", name, read_shape(path, name), packed='"quantization_config"' in path.read_text("utf-8"))


def _cached_config(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
