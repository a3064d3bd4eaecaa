"""The shape of a causal language model: all that its memory and its arithmetic depend on, without its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from igrpo_lite.errors import ModelError

NEEDED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "tie_word_embeddings",
)
"""Entries of a ``config.json`` without which nothing can be said. transformers leaves out those that equal a class's
own defaults, so a missing one is looked up there."""

Biases = Literal["none", "qkv", "all"]

_QK_NORM = {"qwen3", "gemma3", "gemma3_text"}
_FOUR_NORMS = {"gemma2", "gemma3", "gemma3_text"}
_WINDOWS = {"gemma2", "gemma3", "gemma3_text", "mistral", "phi3"}
_KNOWN = {"llama", "qwen2", "smollm3", *_QK_NORM, *_WINDOWS}
FAST = ("gemma", "gemma2", "llama", "mistral", "qwen2", "qwen3")
"""Model types for which Unsloth has a forward pass of its own, whose hidden states can be had without logits."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer inside a block. Layers with the same ``reads`` get the very same tensor."""

    name: str
    inputs: int
    outputs: int
    reads: Literal["attention", "heads", "mlp", "product"]

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder of the Llama kind: grouped attention, gated MLP, RMS norms.

    Attributes:
        hidden, intermediate: widths of the residual stream and of the MLP.
        head_dim: width of one attention head.
        tied: embedding and output layer are one matrix.
        context: tokens it was made for.
        biases: linear layers of the attention that have one.
        mlp_bias: those of the MLP have one.
        qk_norm: queries and keys are normalised by head.
        norms: RMS norms per block over the residual stream.
        fused: ``qkv_proj`` and ``gate_up_proj`` instead of single layers (Phi).
        window: tokens that some layers see at most. Its attention takes no token trees then, so the update repeats
            prompts in rows.
        exact: whether its architecture is known; else it is counted as a Llama of this size.
        kind: its ``model_type``.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    context: int
    biases: Biases = "none"
    mlp_bias: bool = False
    qk_norm: bool = False
    norms: Literal[2, 4] = 2
    fused: bool = False
    window: int | None = None
    exact: bool = True
    kind: str = "llama"

    @property
    def queries(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads, and of all value heads."""
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linear layers of one block."""
        h, q, kv, f = self.hidden, self.queries, self.keys, self.intermediate
        output, down = Linear("o_proj", q, h, "heads"), Linear("down_proj", f, h, "product")
        if self.fused:
            qkv = Linear("qkv_proj", h, q + 2 * kv, "attention")
            return qkv, output, Linear("gate_up_proj", h, 2 * f, "mlp"), down
        return (
            Linear("q_proj", h, q, "attention"),
            Linear("k_proj", h, kv, "attention"),
            Linear("v_proj", h, kv, "attention"),
            output,
            Linear("gate_proj", h, f, "mlp"),
            Linear("up_proj", h, f, "mlp"),
            down,
        )

    @property
    def linear_parameters(self) -> int:
        """Weights of all blocks' linear layers: those that 4-bit loading packs."""
        return self.layers * sum(linear.weights for linear in self.linears)

    @property
    def parameters(self) -> int:
        """All weights, a tied matrix once."""
        attention = self.queries + 2 * self.keys if self.biases != "none" else 0
        attention += self.hidden if self.biases == "all" else 0
        mlp = 2 * self.intermediate + self.hidden if self.mlp_bias else 0
        norms = self.norms * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        rest = self.hidden + self.vocab * self.hidden * (1 if self.tied else 2)
        return self.linear_parameters + self.layers * (attention + mlp + norms) + rest

    def adapted(self, targets: Sequence[str]) -> tuple[Linear, ...]:
        """The linear layers of a block that get an adapter: ``all-linear``, or those whose name is among ``targets``.

        Raises:
            ModelError: none of them does.
        """
        if list(targets) == ["all-linear"]:
            return self.linears
        found = tuple(linear for linear in self.linears if linear.name in targets)
        if not found:
            raise ModelError(
                f"lora_target_modules: none of {', '.join(targets)} is in this model; it has "
                f"{', '.join(linear.name for linear in self.linears)}"
            )
        return found

    def lora_parameters(self, rank: int, targets: Sequence[str] = ("all-linear",), layers: int | None = None) -> int:
        """Trainable weights of an adapter in ``layers`` blocks; unset: in all."""
        per_block = sum(linear.inputs + linear.outputs for linear in self.adapted(targets))
        return rank * per_block * (self.layers if layers is None else layers)

    def kv_bytes(self, itemsize: int = 2) -> int:
        """Bytes of one token in the KV cache of all blocks. For sliding windows an upper bound."""
        return 2 * self.layers * self.keys * itemsize


def shape_of(config: Mapping[str, Any], name: str = "model") -> Shape:
    """The shape that a ``config.json`` describes; of a model with images, that of its text part.

    Raises:
        ModelError: it lacks an entry of :data:`NEEDED`, or is a mixture of experts.
    """
    text: Mapping[str, Any] = config.get("text_config") or config
    kind = str(text.get("model_type") or config.get("model_type") or "")
    missing = missing_entries(config)
    if missing:
        raise ModelError(
            f"{name}: its config.json says nothing about {', '.join(missing)}, so it cannot be planned for; train "
            "loads it all the same, if transformers can"
        )
    if any((text.get(key) or 0) > 1 for key in _EXPERTS):
        raise ModelError(f"{name}: a mixture of experts ({kind}) cannot be planned for")
    heads = int(text["num_attention_heads"])
    biases: Biases = "qkv" if kind == "qwen2" else "all" if text.get("attention_bias") else "none"
    return Shape(
        layers=int(text["num_hidden_layers"]),
        hidden=int(text["hidden_size"]),
        intermediate=int(text["intermediate_size"]),
        heads=heads,
        kv_heads=int(text.get("num_key_value_heads") or heads),
        head_dim=int(text.get("head_dim") or text["hidden_size"] // heads),
        vocab=int(text["vocab_size"]),
        tied=bool(_entry(config, "tie_word_embeddings")),
        context=int(text.get("max_position_embeddings") or 2**31),
        biases=biases,
        mlp_bias=bool(text.get("mlp_bias")),
        qk_norm=kind in _QK_NORM,
        norms=4 if kind in _FOUR_NORMS else 2,
        fused=kind == "phi3",
        window=_window(text, kind),
        exact=kind in _KNOWN,
        kind=kind,
    )


def missing_entries(config: Mapping[str, Any]) -> list[str]:
    """The entries of :data:`NEEDED` that a ``config.json`` does not have."""
    return [key for key in NEEDED if _entry(config, key) is None]


def read_shape(path: Path, name: str) -> Shape:
    """The shape in the ``config.json`` at ``path``; what that leaves out is asked of transformers.

    Raises:
        ModelError: not readable, or as :func:`shape_of`.
    """
    import json

    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{name}: {path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{name}: {path} holds no settings of a model")
    if missing_entries(config):
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(path.parent).to_dict()
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{name}: transformers cannot read {path}: {str(error).splitlines()[0]}") from error
    return shape_of(config, name)


def _entry(config: Mapping[str, Any], key: str) -> Any:
    """Of the text part, or of the whole model: where ``tie_word_embeddings`` stands differs."""
    text: Mapping[str, Any] = config.get("text_config") or config
    return text.get(key, config.get(key))


def _window(text: Mapping[str, Any], kind: str) -> int | None:
    """What the layers with a sliding window see, where there are any."""
    kinds = text.get("layer_types")
    if kinds:
        slides = any(layer != "full_attention" for layer in kinds)
    else:
        slides = kind in _WINDOWS or bool(text.get("use_sliding_window"))
    return (text.get("sliding_window") or None) if slides else None
