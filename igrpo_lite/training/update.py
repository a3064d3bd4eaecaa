"""One policy update from the rollouts of a step: chosen tokens, log-probabilities, loss, optimizer step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from igrpo_lite.algorithms.learning import learning_sequences, teaching, totals
from igrpo_lite.algorithms.methods.base import Rollout
from igrpo_lite.algorithms.objectives import Totals, reduce_loss, sampler_weights, token_loss
from igrpo_lite.algorithms.tokens import tokens_of
from igrpo_lite.algorithms.tokens.base import LearningSequence, Measured
from igrpo_lite.config import RunConfig
from igrpo_lite.errors import UpdateError
from igrpo_lite.policy.loading import Policy, recompute_activations
from igrpo_lite.policy.logprobs import TokenLogprobs, best_layout, chosen_logprobs
from igrpo_lite.policy.relief import is_out_of_memory, make_room

ADAM_BETAS = (0.9, 0.99)
_FIRST_SCALE = 2.0**12
MAX_OVERFLOWS = 5
"""Steps in a row that float16 may lose to overflow before the run stops."""


@dataclass(slots=True)
class MicroBatch:
    """Sequences that go through the model together."""

    sequences: list[LearningSequence]
    old_logprobs: Tensor | None = None  # kept from the first pass when the rollouts are used again
    reference_logprobs: Tensor | None = None
    sampler_weights: Tensor | None = None

    def padded(self, rows: Sequence[Sequence[float]], like: TokenLogprobs) -> Tensor:
        """One value for each chosen token as ``[B, K]``, 0 where padded."""
        values = torch.tensor([value for row in rows for value in row], device=like.mask.device)
        return torch.zeros_like(like.entropies).masked_scatter(like.mask, values)


@dataclass(slots=True)
class UpdateStats:
    """What one update did; token counts are of its first pass.

    Attributes:
        sampler_gap: mean |difference| between the log-probabilities of policy and sampler, over the learning tokens.
        advantage: mean |advantage| of the learning tokens.
        place: mean place of the learning tokens in their completions.
        backbone_tokens: through the layers, the pass that measures entropies included.
        skipped: float16 overflowed, and the step was left out; what could not be measured is ``None``.
        passes: over the rollouts that ended with an optimizer step.
    """

    loss: float | None = 0.0
    grad_norm: float | None = 0.0
    entropy: float | None = None
    clip_ratio: float = 0.0
    kl: float | None = None
    sampler_gap: float | None = None
    advantage: float | None = None
    place: float | None = None
    learning_sequences: int = 0
    learning_tokens: int = 0
    backbone_tokens: int = 0
    head_tokens: int = 0
    passes: int = 0
    skipped: bool = False
    _sums: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("entropy", "clipped", "kl", "gap", "advantage", "place"), 0.0)
    )

    def finish(self, passes: int, beta: float) -> None:
        """Turn sums into means over ``passes``, complete or not."""
        tokens = max(1, self.learning_tokens)
        self.entropy, self.sampler_gap = self._sums["entropy"] / tokens, self._sums["gap"] / tokens
        self.advantage, self.place = self._sums["advantage"] / tokens, self._sums["place"] / tokens
        self.clip_ratio = self._sums["clipped"] / (tokens * passes)
        self.kl = self._sums["kl"] / (tokens * passes) if beta else None
        if self.skipped:
            for name in ("loss", "grad_norm", "entropy", "kl", "sampler_gap"):
                value = getattr(self, name)
                setattr(self, name, value if value is not None and math.isfinite(value) else None)


class PolicyUpdate:
    """Applies the configured objective (default: arXiv 2602.09000, equations 4 and 5) with AdamW.

    Every sequence of the learning groups counts in the normaliser; tokens without a gradient are not run. The draft and
    the question stand in the prompt and never learn.

    When memory is full, ``update_tokens`` is halved, and in the end activations are recomputed, which leaves room for
    more tokens again; the same rollouts are gone over again: nothing is lost, and the next steps start from there.
    Weights in float16 learn with a scaled loss; a step whose gradient overflows is skipped, with the scale halved.

    Attributes:
        update_tokens: in use now; never more than the configuration's.
        checkpointing: activations are recomputed in the backward pass.
        overflows: steps in a row that were skipped.
        scaler: of the loss; does nothing unless the weights are float16.
    """

    def __init__(self, policy: Policy, config: RunConfig) -> None:
        self.policy = policy
        self.config = config
        self.layout = best_layout(policy.model.get_base_model())
        self.parameters = [p for _, p in policy.adapter_parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=ADAM_BETAS,
            weight_decay=0.0,
        )
        self.update_tokens = config.update_tokens
        self.checkpointing = config.gradient_checkpointing
        self.overflows = 0
        half = policy.model.get_base_model().dtype == torch.float16
        self.scaler = torch.amp.GradScaler(policy.device.type, _FIRST_SCALE, growth_interval=100, enabled=half)
        self._smallest = False

    def step(self, rollouts: Sequence[Rollout], step: int, learning_rate: float) -> UpdateStats:
        """Update the adapter; with nothing to learn from, parameters and optimizer state stay as they are.

        Args:
            step: of the run; with the run's seed it fixes which tokens S-GRPO draws.

        Raises:
            UpdateError: one completion alone does not fit into memory, or float16 overflowed too often in a row. The
                adapter is as it was before the step.
        """
        while True:
            stats = UpdateStats()
            try:
                self._step(rollouts, step, learning_rate, stats)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            else:
                return stats
            self._relieve()
            if stats.passes:  # the remaining iterations would use stale old log-probabilities
                stats.finish(stats.passes, self.config.beta)
                return stats

    def _relieve(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        make_room(self.policy.device)
        if not self._smallest:
            self.update_tokens = max(1, self.update_tokens // 2)
        elif not self.checkpointing and recompute_activations(self.policy.model):
            self.checkpointing, self.update_tokens = True, self.config.update_tokens
        else:
            advice = "" if self.checkpointing else "set --gradient-checkpointing, "
            raise UpdateError(
                f"out of memory in the update, with a single completion at a time; {advice}halve "
                f"--max-completion-length (now {self.config.max_completion_length}), or choose --tokens s-grpo, which "
                "runs only the beginning of completions"
            )

    def _step(self, rollouts: Sequence[Rollout], step: int, learning_rate: float, stats: UpdateStats) -> None:
        # Dropout, where a model has any, must be off: the sampling policy had none. Recomputing activations is the one
        # thing that asks for training mode; loading takes the dropout out for it.
        self.policy.model.train(self.checkpointing)
        sequences = self._measured(learning_sequences(rollouts, self.config, step), stats)
        sums = totals(sequences)
        batches = self._micro_batches(teaching(sequences, self.config.beta))
        if not batches:
            return
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        for iteration in range(self.config.num_iterations):
            self.optimizer.zero_grad(set_to_none=True)
            loss = sum(self._backward(batch, sums, stats) for batch in batches)
            self.scaler.unscale_(self.optimizer)
            norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm))
            if iteration == 0:
                stats.loss, stats.grad_norm = loss, norm
            if not math.isfinite(norm):  # the parameters stay clean
                stats.grad_norm = norm  # without a scaled loss, health reports it and stops the run
                stats.skipped = self.scaler.is_enabled()
                self._overflow()
                break
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.overflows = 0
            stats.passes += 1
        self.optimizer.zero_grad(set_to_none=True)
        stats.finish(iteration + 1, self.config.beta)

    def _overflow(self) -> None:
        """Halve the scale of the loss, which may mend a gradient that is not finite."""
        if not self.scaler.is_enabled():
            return
        self.scaler.update()
        self.overflows += 1
        if self.overflows >= MAX_OVERFLOWS:
            self.optimizer.zero_grad(set_to_none=True)
            raise UpdateError(
                f"float16 overflowed in {self.overflows} steps in a row, down to a loss scale of "
                f"{self.scaler.get_scale():g}; use --dtype float32, a GPU that computes in bfloat16 (capability 8.0 "
                "and up), or another model (Gemma's activations do not fit float16)"
            )

    def state(self) -> dict[str, Any]:
        """What a resumed run must know, besides the optimizer: JSON types."""
        return {
            "update_tokens": self.update_tokens,
            "checkpointing": self.checkpointing and not self.config.gradient_checkpointing,  # settings may change
            "overflows": self.overflows,
            "scaler": self.scaler.state_dict(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state`. A smaller ``update_tokens`` of the configuration wins."""
        self.update_tokens = min(self.update_tokens, state.get("update_tokens", self.update_tokens))
        if state.get("checkpointing") and not self.checkpointing:
            self.checkpointing = recompute_activations(self.policy.model)
        self.overflows = state.get("overflows", 0)
        if self.scaler.is_enabled() and state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])

    def _backward(self, batch: MicroBatch, sums: Totals, stats: UpdateStats) -> float:
        config, learning = self.config, [sequence.learning for sequence in batch.sequences]
        if config.beta and batch.reference_logprobs is None:
            with torch.no_grad(), self.policy.model.disable_adapter():
                batch.reference_logprobs = self._score(batch).logprobs
        scored = self._score(batch)
        advantages = batch.padded([row.advantages for row in learning], scored)
        if batch.old_logprobs is None:
            # The policy has not moved since it sampled: its own log-probabilities are these, without the sampler's
            # different rounding.
            batch.old_logprobs = scored.logprobs.detach()
            sampled = [[s.completion.logprobs[i] for i in s.learning.indices] for s in batch.sequences]
            sampler_logprobs = batch.padded(sampled, scored)
            batch.sampler_weights = sampler_weights(batch.old_logprobs, sampler_logprobs, scored.mask, config)
            self._count(batch, scored, advantages, batch.old_logprobs - sampler_logprobs, stats)
        token = token_loss(
            scored.logprobs,
            batch.old_logprobs,
            advantages,
            scored.mask,
            config,
            batch.reference_logprobs,
            batch.sampler_weights,
        )
        weights = batch.padded([row.weights for row in learning], scored)
        counts = torch.tensor([row.count for row in learning], device=weights.device)
        loss = reduce_loss(token.loss, weights, counts, sums, config)
        self.scaler.scale(loss).backward()
        stats._sums["clipped"] += float((token.clipped & scored.mask).sum())
        stats._sums["kl"] += float((token.kl.detach() * scored.mask).sum())
        return float(loss.detach())

    def _score(self, batch: MicroBatch) -> TokenLogprobs:
        branches = [sequence.branch for sequence in batch.sequences]
        return chosen_logprobs(self.policy.model.get_base_model(), branches, self.layout)

    def _micro_batches(self, sequences: Sequence[LearningSequence]) -> list[MicroBatch]:
        branches = [sequence.branch for sequence in sequences]
        rows = list(self.layout.batches(branches, self.update_tokens))
        self._smallest = all(len(batch) == 1 for batch in rows)
        return [MicroBatch([sequences[row] for row in batch]) for batch in rows]

    def _measured(self, sequences: list[LearningSequence], stats: UpdateStats) -> list[LearningSequence]:
        """The sequences of a step once the choice of tokens has asked the policy what it wants to know."""
        candidates = teaching(sequences, self.config.beta)
        chosen = tokens_of(self.config).measured(candidates, lambda asked: self._measure(asked, stats), self.config)
        changed = {id(old): new for old, new in zip(candidates, chosen, strict=True)}
        return [changed.get(id(sequence), sequence) for sequence in sequences]

    @torch.no_grad()
    def _measure(self, sequences: Sequence[LearningSequence], stats: UpdateStats) -> list[Measured]:
        found: dict[int, Measured] = {}
        for batch in self._micro_batches(sequences):
            scored = self._score(batch)
            stats.backbone_tokens += scored.backbone_tokens
            stats.head_tokens += scored.head_rows
            rows = zip(batch.sequences, scored.logprobs, scored.entropies, scored.mask, strict=True)
            for sequence, logprobs, entropies, mask in rows:
                found[id(sequence)] = Measured(tuple(logprobs[mask].tolist()), tuple(entropies[mask].tolist()))
        return [found[id(sequence)] for sequence in sequences]

    def _count(
        self, batch: MicroBatch, scored: TokenLogprobs, advantages: Tensor, gap: Tensor, stats: UpdateStats
    ) -> None:
        stats.learning_sequences += len(batch.sequences)
        stats.learning_tokens += int(scored.mask.sum())
        stats.backbone_tokens += scored.backbone_tokens
        stats.head_tokens += scored.head_rows
        stats._sums["entropy"] += float(scored.entropies.sum())
        stats._sums["gap"] += float(gap.abs().sum())
        stats._sums["advantage"] += float(advantages.abs().sum())
        stats._sums["place"] += sum(sum(sequence.learning.indices) for sequence in batch.sequences)
