"""Seconds of a step, from bandwidth and arithmetic of the GPU. Priors, not measurements: right within a factor of two
or three (``tests/test_planning.py`` holds them against recorded runs), and better at comparing settings.

* Decoding reads all weights for every token of the batch, and the keys and values of every sequence: bytes over
  bandwidth, or the batch's arithmetic where that takes longer. A packed layer is first unpacked into memory and read
  again from there, so 4 bits are *slower* than 16 (vLLM's and bitsandbytes' own path for batches).
* A wave of sequences takes as many steps as its tokens over the sequences that decode at once, and then the longest
  one's rest. Completions are taken to be half as long as allowed, the longest twice the mean.
* The update runs every node of the trees forward and backward (2 operations for each weight, each way: the weights are
  frozen), with checkpointing once more forward; the head twice forward, since its gradient is made on the way.
"""

from __future__ import annotations

from dataclasses import dataclass

from igrpo_lite.planning.gpus import Gpu
from igrpo_lite.planning.memory import NF4_BYTES, Setup
from igrpo_lite.planning.work import Batch, Lengths, batches, learning_trees, longest, waves

BANDWIDTH_SHARE = 0.6
"""Of the nominal bandwidth."""

MFU = {True: 0.35, False: 0.25}
"""Of the nominal arithmetic, from capability 8.0 on and below."""

FLOAT32 = 1 / 8
"""Rate of float32 outside of tensor cores, against 16-bit ones."""

OVERLAP = 0.82
"""Decode steps of ``overlap`` against ``barrier``: docs/rollouts.md."""

VLLM_STEP = 0.005
LAYER_STEP = 0.0015
"""Seconds that the host takes for a decode step: of vLLM with graphs; and for each layer of a pass whose kernels are
started one by one, as transformers does (without an adapter about 1.1 ms on Kaggle:
https://github.com/huggingface/transformers/pull/45776)."""

LONGEST = 2.0
"""The longest completion of a wave against the mean."""

BASIS = (
    f"decoding at {BANDWIDTH_SHARE:.0%} of the memory's bandwidth, prompts and update at {MFU[True]:.0%} of the "
    f"arithmetic ({MFU[False]:.0%} below capability 8.0): assumed, a factor of two either way"
)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds of one step and of one evaluation, and what they add up to.

    Attributes:
        tokens: sampled in a step.
        lengths: what was assumed of prompts, drafts and completions.
    """

    rollout: float
    update: float
    evaluation: float
    tokens: int
    steps: int
    eval_steps: int
    lengths: Lengths

    @property
    def step(self) -> float:
        return self.rollout + self.update

    @property
    def total(self) -> float:
        """Seconds of the whole run: all steps, and evaluations before, in between and after."""
        return self.steps * self.step + (1 + -(-self.steps // self.eval_steps)) * self.evaluation

    def to_json(self) -> dict[str, float]:
        """As JSON types, with the tokens sampled each second of a step."""
        parts = {name: round(getattr(self, name), 1) for name in ("rollout", "update", "evaluation", "total")}
        return parts | {"steps": self.steps, "tokens_per_second": round(self.tokens / self.step, 1)}

    def affordable(self, minutes: float) -> int:
        """Steps that fit into ``minutes``, evaluations included."""
        each = self.step + self.evaluation / self.eval_steps
        return max(0, int((60 * minutes - self.evaluation) / each))


def estimate(setup: Setup, lengths: Lengths) -> Estimate | None:
    """Times of a run whose prompts, drafts and completions are ``lengths`` tokens on average.

    ``None`` for a GPU whose speed is not known.
    """
    gpu, config = setup.gpu, setup.config
    if gpu.bandwidth is None or gpu.tflops is None:
        return None
    speed = _Speed(setup, gpu, gpu.bandwidth, gpu.tflops)
    first, second = (size * config.prompts_per_step for size in (config.n_drafts, config.n_refinements))
    rollout = speed.decode(waves(config), lengths) * (OVERLAP if second and config.schedule == "overlap" else 1.0)
    rollout += speed.prefill(config.prompts_per_step * lengths.prompt)
    rollout += speed.prefill(config.prompts_per_step * lengths.refined) if second else 0.0
    evaluation = speed.decode((config.eval_size,) * 2, lengths)
    evaluation += speed.prefill(config.eval_size * (lengths.prompt + lengths.refined))
    return Estimate(
        rollout,
        speed.update(lengths),
        evaluation,
        (first + second) * lengths.completion,
        config.max_steps,
        config.eval_steps,
        lengths,
    )


@dataclass(frozen=True, slots=True)
class _Speed:
    setup: Setup
    gpu: Gpu
    bandwidth: float
    tflops: float

    @property
    def operations(self) -> float:
        """A second."""
        rate = 1e12 * self.tflops * MFU[self.gpu.bfloat16]
        return rate * FLOAT32 if self.setup.item == 4 else rate

    @property
    def traffic(self) -> float:
        """Seconds to read all weights once: packed ones, then written and read unpacked."""
        setup, shape = self.setup, self.setup.shape
        each = NF4_BYTES + 2 * setup.item if setup.four_bit else setup.item
        size = shape.linear_parameters * each + shape.vocab * shape.hidden * setup.item
        return size / (1e9 * self.bandwidth * BANDWIDTH_SHARE)

    def decode(self, sizes: tuple[int, ...], lengths: Lengths) -> float:
        """Seconds of waves of sequences."""
        setup, shape = self.setup, self.setup.shape
        mean = lengths.completion
        rest = min(longest(setup.config).completion, LONGEST * mean) - mean
        total = 0.0
        for size in sizes:
            live = min(size, setup.concurrent(lengths.refined + mean))
            steps = size * mean / live + rest
            context = lengths.refined + mean / 2
            cache = live * context * shape.kv_bytes(setup.item) / (1e9 * self.bandwidth * BANDWIDTH_SHARE)
            weights = shape.linear_parameters + shape.vocab * shape.hidden
            busy = max(self.traffic + cache, 2 * weights * live / self.operations)
            total += steps * (busy + (VLLM_STEP if setup.vllm else LAYER_STEP * shape.layers))
        return total

    def prefill(self, tokens: int) -> float:
        return 2 * self.setup.shape.linear_parameters * tokens / self.operations

    def update(self, lengths: Lengths) -> float:
        """Seconds of all passes over a step's micro-batches."""
        config = self.setup.config
        packs = batches(learning_trees(config, lengths), config.update_tokens, self.setup.rows)
        share = self.setup.adapter.layers / self.setup.shape.layers  # nothing goes back below the lowest adapter
        again = share if config.gradient_checkpointing else 0.0
        unscored = (1 if config.beta else 0) + (1 if config.tokens == "entropy" else 0)
        total = 0.0
        for batch, count in packs.items():
            forward, attention, head = self._operations(batch)
            least = max(self.traffic, LAYER_STEP * self.setup.shape.layers)
            once = max((forward + attention) / self.operations, least)
            back = max((forward * (share + again) + attention * (2.5 * share + again)) / self.operations, least)
            total += count * config.num_iterations * (once + back + 2 * head / self.operations)
            total += count * unscored * (once + head / self.operations)
        return total

    def _operations(self, batch: Batch) -> tuple[float, float, float]:
        """Of one forward pass: linear layers, attention, head."""
        shape = self.setup.shape
        runs, length = batch.causal
        pairs = runs * length**2 / 2 + batch.leaves * (batch.leaf * batch.trunk + batch.leaf**2 / 2)
        head = 2 * batch.rows * shape.hidden * shape.vocab
        return 2 * shape.linear_parameters * batch.tokens, 4 * shape.queries * pairs * shape.layers, head
