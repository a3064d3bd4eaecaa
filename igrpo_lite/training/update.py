"""One policy update from the rollouts of a step: advantages, log-probabilities, loss, optimizer step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from igrpo_lite.algorithms.advantages import group_advantages, reward_tensor
from igrpo_lite.algorithms.objectives import clipped_token_loss, sequence_mean
from igrpo_lite.algorithms.rollout import Rollout, stage_temperature
from igrpo_lite.config import RunConfig
from igrpo_lite.policy.loading import Policy
from igrpo_lite.policy.logprobs import best_layout, completion_logprobs, shared_prefix
from igrpo_lite.types import Completion, Group


@dataclass(slots=True)
class MicroBatch:
    """Completions of one prompt that go through the model together, with one advantage each."""

    prompt: tuple[int, ...]
    completions: list[Completion]
    advantages: list[float]
    temperature: float
    old_logprobs: Tensor | None = None  # kept from the first pass when the rollouts are used again
    reference_logprobs: Tensor | None = None


@dataclass(slots=True)
class UpdateStats:
    """What one update did; token counts are of its first pass."""

    loss: float = 0.0
    grad_norm: float = 0.0
    entropy: float | None = None
    clip_ratio: float = 0.0
    kl: float | None = None
    learning_sequences: int = 0
    learning_tokens: int = 0
    backbone_tokens: int = 0
    head_tokens: int = 0
    _sums: dict[str, float] = field(default_factory=lambda: {"entropy": 0.0, "clipped": 0.0, "kl": 0.0})


def learning_groups(rollouts: Sequence[Rollout], algorithm: str) -> list[Group]:
    """The groups whose tokens learn: GRPO's only stage, iGRPO's refinements, or with ``igrpo-joint`` both stages."""
    if algorithm == "igrpo":
        return [r.stage2 for r in rollouts if r.stage2 is not None]
    return [group for r in rollouts for group in r.groups]


class PolicyUpdate:
    """Applies the clipped group-relative objective (arXiv 2602.09000, equations 4 and 5) with AdamW.

    Every sequence of the learning groups counts in the normaliser; those with zero advantage have a zero gradient
    without KL penalty and are not run. The draft and the question stand in the prompt and never learn.
    """

    def __init__(self, policy: Policy, config: RunConfig) -> None:
        self.policy = policy
        self.config = config
        self.prompt_once = best_layout(policy.model.get_base_model()) is shared_prefix
        self.parameters = [p for _, p in policy.adapter_parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
        )

    def step(self, rollouts: Sequence[Rollout], learning_rate: float) -> UpdateStats:
        """Update the adapter; with nothing to learn from, parameters and optimizer state stay as they are."""
        groups = learning_groups(rollouts, self.config.algorithm)
        num_sequences = sum(len(group.completions) for group in groups)
        batches = list(self._micro_batches(groups))
        stats = UpdateStats()
        if not batches:
            return stats
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        # Dropout, where a model has any, must be off: the sampling policy had none. Recomputing activations is the one
        # thing that asks for training mode; loading takes the dropout out for it.
        self.policy.model.train(self.config.gradient_checkpointing)
        passes = 0
        for iteration in range(self.config.num_iterations):
            passes += 1
            self.optimizer.zero_grad(set_to_none=True)
            loss = sum(self._backward(batch, num_sequences, stats, iteration) for batch in batches)
            norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm))
            if iteration == 0:
                stats.loss, stats.grad_norm = loss, norm
            if not math.isfinite(norm):
                stats.grad_norm = norm  # the parameters stay clean; health reports it and stops the run
                break
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        tokens = max(1, stats.learning_tokens)
        stats.entropy = stats._sums["entropy"] / tokens
        stats.clip_ratio = stats._sums["clipped"] / (tokens * passes)
        stats.kl = stats._sums["kl"] / (tokens * passes) if self.config.beta else None
        return stats

    def _backward(self, batch: MicroBatch, num_sequences: int, stats: UpdateStats, iteration: int) -> float:
        config, model = self.config, self.policy.model
        ids = [completion.ids for completion in batch.completions]
        if config.beta and batch.reference_logprobs is None:
            with torch.no_grad(), model.disable_adapter():  # the reference is the model as it came
                reference = completion_logprobs(model.get_base_model(), batch.prompt, ids, batch.temperature)
            batch.reference_logprobs = reference.logprobs
        scored = completion_logprobs(model.get_base_model(), batch.prompt, ids, batch.temperature)
        if batch.old_logprobs is None:
            # The first pass is on-policy: the sampling policy's log-probabilities are these, without the sampler's
            # different rounding.
            batch.old_logprobs = scored.logprobs.detach()
        advantages = torch.tensor(batch.advantages, device=scored.logprobs.device)
        token = clipped_token_loss(
            scored.logprobs,
            batch.old_logprobs,
            advantages,
            config.epsilon,
            config.epsilon_high,
            batch.reference_logprobs,
            config.beta,
        )
        loss = sequence_mean(token.loss, scored.mask, num_sequences)
        loss.backward()
        stats._sums["clipped"] += float((token.clipped & scored.mask).sum())
        stats._sums["kl"] += float((token.kl.detach() * scored.mask).sum())
        if iteration == 0:
            self._count(batch, scored.mask, stats)
            stats._sums["entropy"] += float(scored.entropies.sum())
        return float(loss.detach())

    def _count(self, batch: MicroBatch, mask: Tensor, stats: UpdateStats) -> None:
        tokens = int(mask.sum())
        stats.learning_sequences += len(batch.completions)
        stats.learning_tokens += tokens
        stats.head_tokens += tokens
        padded = mask.shape[0] * (mask.shape[1] - 1)
        copies = 1 if self.prompt_once else len(batch.completions)
        stats.backbone_tokens += padded + copies * len(batch.prompt)

    def _micro_batches(self, groups: Sequence[Group]) -> Iterator[MicroBatch]:
        config = self.config
        for group in groups:
            advantages = group_advantages(reward_tensor(group.scores)).tolist()
            rows = [
                (completion, advantage)
                for completion, advantage in zip(group.completions, advantages, strict=True)
                if (advantage or config.beta) and not (config.mask_truncated_completions and completion.truncated)
            ]
            temperature = stage_temperature(config, group.stage)
            rows.sort(key=lambda row: len(row[0].ids))  # similar lengths together: little padding
            while rows:
                count = self._fitting(len(group.prompt.ids), [len(c.ids) for c, _ in rows])
                taken, rows = rows[:count], rows[count:]
                yield MicroBatch(group.prompt.ids, [c for c, _ in taken], [a for _, a in taken], temperature)

    def _fitting(self, prompt: int, lengths: Sequence[int]) -> int:
        """How many of the rows (ascending lengths) fit the token budget; at least one."""
        count = 1
        for number, length in enumerate(lengths, start=1):
            tokens = prompt + number * length if self.prompt_once else number * (prompt + length)
            if tokens > self.config.update_tokens:
                break
            count = number
        return count
