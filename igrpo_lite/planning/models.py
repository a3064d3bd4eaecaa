"""Models by short name: hub id, 4-bit and ungated copies, exact shape, and what is special about their prompts.

Any hub id or local folder works beside them (:func:`find_model`): a shape is read from its ``config.json`` alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from igrpo_lite.errors import ModelError
from igrpo_lite.planning.shapes import Shape, read_shape

_LITGPT = "https://github.com/Lightning-AI/litgpt/blob/main/litgpt/config.py"
_MLC = "https://github.com/mlc-ai/mlc-llm/blob/main/python/mlc_llm/model/model_preset.py"
MIRRORS = "https://github.com/unslothai/unsloth/blob/main/unsloth/models/mapper.py"
"""Source of the 4-bit and ungated copies."""

_CHATML = "ChatML; without a system message it adds one of its own."
_QWEN25 = "ChatML; without a system message it adds 'You are Qwen, created by Alibaba Cloud ...'."
_MATH = "ChatML; without a system message it asks for step by step and \\boxed{} itself."
_QWEN3 = "ChatML; thinks first unless the template is called with enable_thinking=False; Base has no thinking, the "
_QWEN3 += "2507 models think either always or never."
_LLAMA = "Adds a system turn with dates of its own; <|eot_id|> ends a turn."
_R1 = "Opens <think> in the prompt, so the tag never stands in the answer; made to be used without a system message."
_GEMMA = "No system turn: it is put before the user's text. Needs bfloat16 or float32: float16 overflows."
_PHI = "<|system|>, <|user|>, <|assistant|>, each ended by <|end|>."
_SMOL2 = "ChatML; without a system message it adds one that names SmolLM."
_SMOL3 = "ChatML; thinks first unless the system message says /no_think."


@dataclass(frozen=True)
class Model:
    """A model that can be planned for.

    Attributes:
        alias: short name; empty for a model that is not in :data:`MODELS`.
        hub_id: what to load, or a folder.
        shape: its ``context`` is that of ``hub_id``.
        source: where the shape is from.
        also: other hub ids of the same shape, and their context.
        mirror: 4-bit copies at Unsloth: ``plain`` bitsandbytes, or that and their larger ``dynamic`` one.
        gated: its hub page asks for a licence to be accepted; :attr:`ungated` does not.
        template: what its chat template does that matters here.
        packed: the weights of ``hub_id`` are in 4 bits already.
    """

    alias: str
    hub_id: str
    shape: Shape
    source: str
    also: Mapping[str, int] = field(default_factory=dict)
    mirror: str = ""
    gated: bool = False
    template: str = ""
    packed: bool = False

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


def _qwen2(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, context: int = 32768) -> Shape:
    large = hidden == 3584
    return Shape(
        layers,
        hidden,
        intermediate,
        heads,
        kv_heads,
        hidden // heads,
        vocab=152064 if large else 151936,
        tied=not large,
        context=context,
        biases="qkv",
        kind="qwen2",
    )


def _qwen3(layers: int, hidden: int, intermediate: int, heads: int, tied: bool = True) -> Shape:
    return Shape(layers, hidden, intermediate, heads, 8, 128, 151936, tied, 40960, qk_norm=True, kind="qwen3")


def _llama(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, tied: bool = True) -> Shape:
    return Shape(layers, hidden, intermediate, heads, kv_heads, hidden // heads, 128256, tied, 131072)


def _gemma3(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int, window: int) -> Shape:
    context = 32768 if window == 512 else 131072
    return Shape(
        *(layers, hidden, intermediate, heads, kv_heads, 256, vocab, True, context),
        qk_norm=True,
        norms=4,
        window=window,
        kind="gemma3_text",
    )


def _smol2(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int) -> Shape:
    return Shape(layers, hidden, intermediate, heads, kv_heads, 64, 49152, True, 8192)


_QWEN2_05, _QWEN2_15 = _qwen2(24, 896, 4864, 14, 2), _qwen2(28, 1536, 8960, 12, 2)
_QWEN2_3, _QWEN2_7 = _qwen2(36, 2048, 11008, 16, 2), _qwen2(28, 3584, 18944, 28, 4)


def _qwen25(size: str, shape: Shape, base: int) -> Model:
    name = f"Qwen/Qwen2.5-{size}B"
    alias = f"qwen2.5-{size}b"
    return Model(alias, f"{name}-Instruct", shape, _LITGPT, {name: base}, "dynamic", template=_QWEN25)


def _math(size: str, shape: Shape) -> Model:
    name = f"Qwen/Qwen2.5-Math-{size}B"
    shape = replace(shape, context=4096)
    return Model(f"qwen2.5-math-{size}b", f"{name}-Instruct", shape, _LITGPT, {name: 4096}, "plain", template=_MATH)


def _r1(size: str, shape: Shape) -> Model:
    name = f"deepseek-ai/DeepSeek-R1-Distill-Qwen-{size}B"
    shape = replace(shape, tied=False, context=131072)
    return Model(f"r1-{size}b", name, shape, _LITGPT, mirror="dynamic", template=_R1)


def _qwen3_model(size: str, shape: Shape) -> Model:
    name = f"Qwen/Qwen3-{size}B"
    also = {f"{name}-Base": 32768}
    if size == "4":
        also |= {f"{name}-{kind}-2507": 262144 for kind in ("Instruct", "Thinking")}
    return Model(f"qwen3-{size}b", name, shape, _LITGPT, also, "dynamic", template=_QWEN3)


def _llama_model(alias: str, name: str, shape: Shape) -> Model:
    also = {f"meta-llama/{name}": 131072}
    return Model(alias, f"meta-llama/{name}-Instruct", shape, _LITGPT, also, "dynamic", gated=True, template=_LLAMA)


def _gemma(size: str, shape: Shape) -> Model:
    name = f"google/gemma-3-{size}b"
    also = {f"{name}-pt": shape.context}
    return Model(f"gemma3-{size}b", f"{name}-it", shape, _LITGPT, also, "dynamic", gated=True, template=_GEMMA)


def _smol(size: str, shape: Shape) -> Model:
    name = f"HuggingFaceTB/SmolLM2-{size}"
    return Model(f"smollm2-{size.lower()}", f"{name}-Instruct", shape, _LITGPT, {name: 8192}, template=_SMOL2)


_PHI4 = Shape(32, 3072, 8192, 24, 8, 128, 200064, True, 131072, fused=True, window=262144, kind="phi3")
_SMOL3_SHAPE = Shape(36, 2048, 11008, 16, 4, 128, 128256, True, 65536, kind="smollm3")
_SMOL3_DOC = "https://github.com/huggingface/transformers/blob/main/docs/source/en/model_doc/smollm3.md"
_QWEN2_ALSO = {"Qwen/Qwen2-0.5B": 131072}, {"Qwen/Qwen2-1.5B": 131072}

MODELS: tuple[Model, ...] = (
    Model("qwen2-0.5b", "Qwen/Qwen2-0.5B-Instruct", _QWEN2_05, _MLC, _QWEN2_ALSO[0], "plain", template=_CHATML),
    Model("qwen2-1.5b", "Qwen/Qwen2-1.5B-Instruct", _QWEN2_15, _MLC, _QWEN2_ALSO[1], "plain", template=_CHATML),
    _qwen25("0.5", _QWEN2_05, 32768),
    _qwen25("1.5", _QWEN2_15, 131072),
    _qwen25("3", _QWEN2_3, 32768),
    _qwen25("7", _QWEN2_7, 131072),
    _math("1.5", _QWEN2_15),
    _math("7", _QWEN2_7),
    _r1("1.5", _QWEN2_15),
    _r1("7", _QWEN2_7),
    _qwen3_model("0.6", _qwen3(28, 1024, 3072, 16)),
    _qwen3_model("1.7", _qwen3(28, 2048, 6144, 16)),
    _qwen3_model("4", _qwen3(36, 2560, 9728, 32)),
    _qwen3_model("8", _qwen3(36, 4096, 12288, 32, tied=False)),
    _llama_model("llama3.2-1b", "Llama-3.2-1B", _llama(16, 2048, 8192, 32, 8)),
    _llama_model("llama3.2-3b", "Llama-3.2-3B", _llama(28, 3072, 8192, 24, 8)),
    _llama_model("llama3.1-8b", "Llama-3.1-8B", _llama(32, 4096, 14336, 32, 8, tied=False)),
    _gemma("1", _gemma3(26, 1152, 6912, 4, 1, 262144, 512)),
    _gemma("4", _gemma3(34, 2560, 10240, 8, 4, 262208, 1024)),
    Model("phi4-mini", "microsoft/Phi-4-mini-instruct", _PHI4, _LITGPT, mirror="dynamic", template=_PHI),
    _smol("135M", _smol2(30, 576, 1536, 9, 3)),
    _smol("360M", _smol2(32, 960, 2560, 15, 5)),
    _smol("1.7B", _smol2(24, 2048, 8192, 32, 32)),
    Model(
        "smollm3-3b",
        "HuggingFaceTB/SmolLM3-3B",
        _SMOL3_SHAPE,
        _SMOL3_DOC,
        {"HuggingFaceTB/SmolLM3-3B-Base": 65536},
        template=_SMOL3,
    ),
)
"""Every model with a short name. Shapes without images: of Gemma 3 4B the text part."""

_BY_ALIAS = {model.alias: model for model in MODELS}
_BY_ID = {name.lower(): (model, name) for model in MODELS for name in model.ids}


def hub_id(name: str) -> str:
    """What to load for a name: the hub id of an alias, anything else as it is."""
    model = _BY_ALIAS.get(name.lower())
    return name if model is None or Path(name).is_dir() else model.hub_id


def find_model(name: str, revision: str | None = None) -> Model:
    """The model of a short name, a hub id or a folder with a ``config.json``; no weights are looked at.

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
    return Model("", name, read_shape(path, name), str(path), packed='"quantization_config"' in path.read_text("utf-8"))


def _cached_config(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
