"""Seconds of a step, from a GPU's nominal bandwidth and arithmetic: right within a factor of two or so.

``tests/test_planning.py`` holds the estimate against recorded runs. Decoding reads all weights for every token of the
batch, and every sequence's KV cache; a 4-bit layer is first unpacked into memory and read again from there. The update
runs every token forward and backward (2 operations a weight each way: the weights are frozen), with checkpointing once
more forward.
"""

from __future__ import annotations

from dataclasses import dataclass

from igrpo_lite.planning.memory import NF4_BYTES, Setup
from igrpo_lite.planning.work import Lengths, learning_trees, longest

BANDWIDTH_SHARE = 0.6
"""Of the nominal bandwidth."""

MFU = {True: 0.35, False: 0.25}
"""Of the nominal arithmetic, from capability 8.0 on and below."""

FLOAT32 = 1 / 8
"""Rate of float32 outside of tensor cores, against 16-bit ones."""

VLLM_STEP = 0.005
LAYER_STEP = 0.0015
"""Seconds that the host takes for a decode step: of vLLM with graphs; and for each layer of a pass whose kernels are
started one by one, as transformers does."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds of one step's two halves and of one evaluation, for completions of ``completion`` tokens on average."""

    rollout: float
    update: float
    evaluation: float
    completion: int
    steps: int
    eval_steps: int

    @property
    def step(self) -> float:
        return self.rollout + self.update

    @property
    def total(self) -> float:
        """Seconds of the whole run: all steps, and evaluations before, in between and after."""
        return self.steps * self.step + (1 + -(-self.steps // self.eval_steps)) * self.evaluation

    def to_json(self) -> dict[str, float]:
        """As JSON types."""
        names = ("rollout", "update", "evaluation", "total", "completion", "steps")
        return {name: round(getattr(self, name), 1) for name in names}


def estimate(setup: Setup, lengths: Lengths) -> Estimate | None:
    """Times of a run whose prompts, drafts and completions are ``lengths`` tokens on average; ``None`` for a GPU whose
    speed is not known."""
    gpu, config = setup.gpu, setup.config
    if gpu.bandwidth is None or gpu.tflops is None:
        return None
    rate = 1e12 * gpu.tflops * MFU[gpu.bfloat16] * (FLOAT32 if setup.item == 4 else 1.0)
    speed = _Speed(setup, lengths, rate, 1e9 * gpu.bandwidth * BANDWIDTH_SHARE)
    per_step = [count * config.prompts_per_step for count in (config.n_drafts, config.n_refinements) if count]
    return Estimate(
        sum(map(speed.sample, per_step)),
        speed.update(),
        2 * speed.sample(config.eval_size),
        lengths.completion,
        config.max_steps,
        config.eval_steps,
    )


@dataclass(frozen=True, slots=True)
class _Speed:
    """``rate``: operations a second; ``bandwidth``: bytes a second."""

    setup: Setup
    lengths: Lengths
    rate: float
    bandwidth: float

    @property
    def traffic(self) -> float:
        """Seconds to read all weights once; packed ones are then written and read unpacked."""
        setup, shape = self.setup, self.setup.shape
        each = NF4_BYTES + 2 * setup.item if setup.four_bit else setup.item
        return (shape.linear_parameters * each + shape.vocab * shape.hidden * setup.item) / self.bandwidth

    def sample(self, size: int) -> float:
        """Seconds for ``size`` completions; the longest is taken to be twice the mean."""
        setup, shape, mean = self.setup, self.setup.shape, self.lengths.completion
        context = self.lengths.refined + mean
        live = min(size, setup.concurrent(context))
        steps = size * mean / live + min(longest(setup.config).completion, 2 * mean) - mean
        cache = live * (context - mean / 2) * shape.kv_bytes(setup.item) / self.bandwidth
        arithmetic = 2 * (shape.linear_parameters + shape.vocab * shape.hidden) * live / self.rate
        host = VLLM_STEP if setup.vllm else LAYER_STEP * shape.layers
        return steps * (max(self.traffic + cache, arithmetic) + host)

    def update(self) -> float:
        """Seconds of all passes over a step's micro-batches."""
        setup, shape, config = self.setup, self.setup.shape, self.setup.config
        share = setup.adapter.layers / shape.layers  # nothing goes back below the lowest adapter
        back = share * (2 if config.gradient_checkpointing else 1)
        total = 0.0
        for tree, count in learning_trees(config, self.lengths).items():
            tokens = count * (tree.leaves * tree.row if setup.rows else tree.nodes)
            attention = 2 * shape.queries * shape.layers * tree.row
            once = tokens * (2 * shape.linear_parameters + attention) / self.rate
            head = 2 * count * tree.leaves * tree.rows * shape.hidden * shape.vocab / self.rate
            least = -(-tokens // config.update_tokens) * max(self.traffic, LAYER_STEP * shape.layers)
            passes = max(once, least) + max(back * once, least) + 2 * head
            scoring = bool(config.beta) + (config.tokens == "entropy")  # a pass without gradients each
            total += config.num_iterations * passes + scoring * (max(once, least) + head)
        return total
