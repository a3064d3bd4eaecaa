"""Bytes on the GPU in each phase of a run, part by part."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from igrpo_lite.config import RunConfig
from igrpo_lite.planning.activations import Adapter, activations
from igrpo_lite.planning.gpus import GIB, Gpu
from igrpo_lite.planning.shapes import Shape
from igrpo_lite.planning.work import Batch, fullest, learning_trees, longest

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A weight in NF4 with double quantisation: 4 bits, an 8-bit scale for each 64, a float32 for each 256 of those."""

CONTEXT = int(0.6 * GIB)
"""CUDA's own memory and the libraries' workspaces: 0.4 to 0.8 GiB."""

GRAPH = 16 * 2**20
"""One CUDA graph of vLLM. 1.68 GiB for 172 (https://github.com/vllm-project/vllm/pull/40044), 1.62 for 86 (pull/39559),
0.36 for 16 (https://github.com/gpustack/runner/pull/251): 10 to 23 MiB each."""

FRAGMENTED = 0.05
"""What torch's allocator takes beyond what is used, as a share of everything that comes and goes."""

LOGITS = {"vllm": 18, "transformers": 22}
"""Bytes for each sequence and vocabulary entry while tokens are drawn: logits, scaled, log-probabilities, their
exponentials, and noise or their sums."""

PREFILL = 8192
"""Prompt tokens that are run at once: ``sampling.transformers``' number and vLLM's default below 70 GiB."""

KV_BLOCK = 16
SLOT_STEP = 64
KV_SHARES = {True: 0.6, False: 0.3}
"""vLLM's KV cache as a share of the memory that weights leave free, by whether it is released during updates."""

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM holds; an adapter's is rounded up to one of them (``vllm/config/lora.py``)."""

PARTS = (
    "weights",
    "LoRA, AdamW",
    "vLLM's LoRA",
    "graphs",
    "KV cache",
    "working memory",
    "activations",
    "head",
    "CUDA context",
    "idle",
)
"""What memory goes to, in the order of a table. ``idle`` is what torch's allocator holds and does not use."""

PhaseName = Literal["load", "rollout", "update"]


@dataclass(frozen=True)
class Setup:
    """What is planned.

    Attributes:
        four_bit: the frozen linear layers are in NF4.
        unsloth: it loads the model, and shares its weights with vLLM in 4 bits too.
        releases_kv: vLLM releases its KV cache during the update.
    """

    config: RunConfig
    shape: Shape
    gpu: Gpu
    four_bit: bool
    unsloth: bool
    releases_kv: bool

    @property
    def item(self) -> int:
        """Bytes a value in computation: 16 bits unless float32 is asked for."""
        return 4 if self.config.dtype == "float32" else 2

    @property
    def vllm(self) -> bool:
        """vLLM samples; ``auto`` means it on a GPU. Without Unsloth it would pack 4-bit weights anew."""
        return self.config.sampler != "transformers" and (self.unsloth or not self.four_bit)

    @property
    def rows(self) -> bool:
        """The update runs rows, not trees."""
        return self.shape.window is not None or self.unsloth

    @property
    def copied_keys(self) -> bool:
        """Attention without a mask copies the keys that query heads share (``policy.causal_attention``)."""
        return self.gpu.capability < (8, 0) and self.shape.heads != self.shape.kv_heads

    @cached_property
    def adapter(self) -> Adapter:
        config, shape = self.config, self.shape
        linears = shape.adapted(config.lora_target_modules)
        return Adapter(linears, config.lora_r, adapted_layers(config.lora_layers, shape.layers))

    @cached_property
    def weight_bytes(self) -> int:
        """One copy of the frozen weights."""
        return weight_bytes(self.shape, self.item, self.four_bit)

    @property
    def sequence_tokens(self) -> int:
        """The longest sequence that is sampled."""
        return min(longest(self.config).sequence, self.shape.context)

    @cached_property
    def kv_cache_bytes(self) -> int:
        """The KV cache while sampling, as the samplers size it."""
        config, each = self.config, self.shape.kv_bytes(self.item)
        if not self.vllm:
            slots = config.max_num_seqs * -(-self.sequence_tokens // SLOT_STEP) * SLOT_STEP
            evaluated = min(config.max_num_seqs, config.eval_size)
            return each * (slots + max(config.prompts_per_step, evaluated) * longest(config).refined)
        if config.kv_cache_gib is not None:
            return int(config.kv_cache_gib * GIB)
        free = self.gpu.memory_bytes - CONTEXT - 4 * self.adapter.parameters - self.weight_bytes
        limit = int(KV_SHARES[self.releases_kv] * max(0, free))
        return max(self.sequence_bytes, min(config.max_num_seqs * self.sequence_bytes, limit))

    @property
    def sequence_bytes(self) -> int:
        """KV cache of one sequence of full length, in vLLM's blocks."""
        blocks = -(-(self.sequence_tokens + 1) // KV_BLOCK) + 2
        return blocks * KV_BLOCK * self.shape.kv_bytes(self.item)

    def concurrent(self, tokens: int) -> int:
        """Sequences that are decoded at the same time, if they take ``tokens`` each."""
        if not self.vllm:
            return self.config.max_num_seqs
        return max(1, min(self.config.max_num_seqs, self.kv_cache_bytes // (tokens * self.shape.kv_bytes(self.item))))


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase's memory by part, in bytes; parts of 0 are left out."""

    name: PhaseName
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def allocated(self) -> int:
        """What ``torch.cuda.max_memory_allocated`` would show: without what the driver takes and what lies idle."""
        return sum(size for part, size in self.parts.items() if part not in ("CUDA context", "graphs", "idle"))


def phases(setup: Setup) -> tuple[Phase, ...]:
    """Load, rollout and update, each at its fullest moment."""
    adapter, weights, kv = setup.adapter.parameters, setup.weight_bytes, setup.kv_cache_bytes
    unpacked = _unpacked(setup.shape, setup.item, setup.four_bit)
    engine = _engine(setup) if setup.vllm else {}
    working = engine.pop("working memory") if setup.vllm else _sampling(setup) + unpacked
    asleep = {"KV cache": kv} if setup.vllm and not setup.releases_kv else {}
    found = activations(
        setup.shape,
        setup.adapter,
        update_batch(setup),
        item=setup.item,
        checkpointing=setup.config.gradient_checkpointing,
        copies=setup.copied_keys,
    )
    block = max(found.blocks, found.head - found.tile)
    loading, loaded = (working, kv) if setup.vllm else (unpacked, 0)
    return (
        _phase("load", weights, 4 * adapter, {**engine, "KV cache": loaded}, loading),
        _phase("rollout", weights, 12 * adapter, {**engine, "KV cache": kv}, working),
        _phase(
            "update",
            weights,
            16 * adapter,
            {**engine, **asleep, "head": found.peak - block},
            block + unpacked,
            "activations",
        ),
    )


def update_batch(setup: Setup) -> Batch:
    """The update's fullest micro-batch."""
    config = setup.config
    return fullest(learning_trees(config, longest(config)), config.update_tokens, setup.rows)


def weight_bytes(shape: Shape, item: int, four_bit: bool) -> int:
    """The frozen weights: in 4 bits the blocks' linear layers only, embeddings and head stay."""
    linear = shape.linear_parameters
    return round(linear * (NF4_BYTES if four_bit else item)) + (shape.parameters - linear) * item


def adapted_layers(spec: str, layers: int) -> int:
    """Blocks with an adapter, from the top, that ``lora_layers`` names."""
    part = re.split("[ -]", spec)[-1]
    if part == "all":
        return layers
    shares = {"half": 2, "third": 3, "quarter": 4}
    return min(layers, max(1, round(layers / shares[part]) if part in shares else int(part)))


def captured_graphs(max_num_seqs: int) -> int:
    """Graphs that vLLM captures: whole decode steps for up to ``max_num_seqs`` tokens, pieces for up to twice that (and
    512), at 1, 2, 4, every 8 and from 256 on every 16; all of it with and without an adapter."""

    def sizes(most: int) -> int:
        return len([n for n in (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)) if n <= most])

    return 2 * (sizes(max_num_seqs) + sizes(2 * max_num_seqs))


def prompt_working(shape: Shape, item: int) -> int:
    """Bytes for each prompt token of a forward pass without gradients through the adapted model.

    Beside its KV cache: four versions of the residual stream, and inside the MLP the activated gate, the other
    factor, LoRA's twice in float32 and the cast input. Attention needs less, also where it copies shared keys.
    """
    h, f = shape.hidden, shape.intermediate
    streams = 4 * item * h
    mlp = (item + 8) * 2 * f if shape.fused else (2 * item + 8) * f
    mlp += 4 * h if item < 4 else 0
    return streams + mlp


def _phase(
    name: PhaseName, weights: int, adapter: int, others: dict[str, int], working: int, what: str = "working memory"
) -> Phase:
    parts = {"weights": weights, "LoRA, AdamW": adapter, **others, what: working, "CUDA context": CONTEXT}
    parts["idle"] = round(FRAGMENTED * (adapter + working + others.get("head", 0)))
    return Phase(name, {part: size for part, size in parts.items() if size})


def engine_memory(
    shape: Shape,
    item: int,
    four_bit: bool,
    *,
    rank: int,
    max_num_seqs: int,
    sequences: int | None = None,
    prompt_tokens: int = PREFILL,
) -> dict[str, int]:
    """Bytes that vLLM takes beside weights and KV cache: its copy of the adapter, for every layer that could have one,
    its CUDA graphs, and working memory for the prompts' forward pass or for drawing tokens, whichever is more.

    Args:
        sequences: decoded at once; unset: ``max_num_seqs``.
    """
    slot = next((known for known in LORA_RANKS if known >= rank), LORA_RANKS[-1])
    prompts = prompt_tokens * item * (4 * shape.hidden + 3 * shape.intermediate)
    drawing = (sequences or max_num_seqs) * shape.vocab * LOGITS["vllm"]
    return {
        "vLLM's LoRA": shape.lora_parameters(slot) * item,
        "graphs": captured_graphs(max_num_seqs) * GRAPH,
        "working memory": max(prompts, drawing) + _unpacked(shape, item, four_bit),
    }


def _engine(setup: Setup) -> dict[str, int]:
    """:func:`engine_memory` of a plan; vLLM runs more prompt tokens at once on the largest GPUs."""
    large = setup.gpu.memory_gib >= 70 and "a100" not in setup.gpu.name.lower()
    return engine_memory(
        setup.shape,
        setup.item,
        setup.four_bit,
        rank=setup.config.lora_r,
        max_num_seqs=setup.config.max_num_seqs,
        sequences=_sequences(setup),
        prompt_tokens=(2 if large else 1) * PREFILL,
    )


def _sampling(setup: Setup) -> int:
    """Working memory of the transformers sampler: the prompts' forward pass, or drawing tokens, whichever is more."""
    width = min(longest(setup.config).refined, setup.sequence_tokens)
    prompts = max(PREFILL, width) * prompt_working(setup.shape, setup.item)
    return max(prompts, _sequences(setup) * setup.shape.vocab * LOGITS["transformers"])


def _sequences(setup: Setup) -> int:
    config = setup.config
    return min(config.max_num_seqs, max(config.eval_size, config.prompts_per_step * config.num_generations))


def _unpacked(shape: Shape, item: int, four_bit: bool) -> int:
    """The largest linear layer in 16 bits, which a packed one is turned into whenever it is used."""
    return item * max(linear.weights for linear in shape.linears) if four_bit else 0
