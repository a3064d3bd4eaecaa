"""Real rollouts of the bundled model, one update on them, and the same gradient with nothing left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from tiny_parts import small_config
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from igrpo_lite.algorithms.learning import totals
from igrpo_lite.algorithms.objectives import reduce_loss, sampler_weights, token_loss
from igrpo_lite.algorithms.rollout import Rollout, RolloutCollector
from igrpo_lite.algorithms.tokens.base import LearningSequence
from igrpo_lite.config import RunConfig
from igrpo_lite.policy.loading import Policy
from igrpo_lite.training.update import PolicyUpdate, UpdateStats
from igrpo_lite.workbench import Workbench

Gradients = dict[str, Tensor]
Collect = Callable[[str], list[Rollout]]


def config_of(algorithm: str, **settings: Any) -> RunConfig:
    return small_config(algorithm=algorithm, num_generations=8, prompts_per_step=3, **settings)


def rollouts_of(parts: Workbench) -> Collect:
    """Rollouts of three problems all of whose stages have rewards that differ, so that there is something to learn."""
    found: dict[str, list[Rollout]] = {}

    def collected(algorithm: str) -> list[Rollout]:
        if algorithm not in found:
            config = config_of("grpo" if algorithm == "grpo" else "igrpo-joint", tokens="t-spmo", tspmo_replay=2)
            collector = RolloutCollector(parts.sampler, parts.scorer, parts.prompts, config, 0)
            rollouts = collector.collect(parts.train[:24], 0)
            mixed = [r for r in rollouts if all(len({s.reward for s in group.scores}) > 1 for group in r.groups)]
            assert len(mixed) >= 3
            stages = config_of(algorithm).learning_stages
            found[algorithm] = [
                dataclasses.replace(r, replays=tuple(x for x in r.replays if x.group.stage in stages))
                for r in mixed[:3]
            ]
        return found[algorithm]

    return collected


@contextmanager
def restored(policy: Policy) -> Iterator[None]:
    """The adapter is put back afterwards."""
    state = {name: p.detach().clone() for name, p in policy.adapter_parameters()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, p in policy.adapter_parameters():
                p.copy_(state[name])


def adapter_gradients(policy: Policy) -> Gradients:
    return {name: p.grad.clone() for name, p in policy.adapter_parameters() if p.grad is not None}


def run_update(
    config: RunConfig, policy: Policy, rollouts: Sequence[Rollout], rate: float = 1e-9
) -> tuple[list[Gradients], UpdateStats]:
    """The gradients that the optimizer got in each pass of one update, and its statistics."""
    update, caught = PolicyUpdate(policy, config), []
    update.optimizer.register_step_pre_hook(lambda *_: caught.append(adapter_gradients(policy)))
    with restored(policy):
        stats = update.step(rollouts, 0, rate)
    return caught, stats


def scored_in_full(
    policy: Policy, sequences: Sequence[LearningSequence], adapter: bool = True
) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probability and entropy of every token of every completion, ``[1, T]`` each: full logits of padded rows."""
    rows = [torch.tensor(s.prompt.ids + s.completion.ids) for s in sequences]
    with nullcontext() if adapter else policy.model.disable_adapter():
        logits = policy.model(input_ids=pad_sequence(rows, batch_first=True)).logits
    logprobs, entropies = [], []
    for row, s in zip(logits, sequences, strict=True):
        start, length = len(s.prompt.ids), len(s.completion.ids)
        log_softmax = torch.log_softmax(row[start - 1 : start - 1 + length] / s.temperature, -1)
        logprobs.append(log_softmax.gather(1, torch.tensor(s.completion.ids)[:, None]).T)
        entropies.append(-(log_softmax.exp() * log_softmax).sum(-1)[None].detach())
    return logprobs, entropies


def by_hand(
    config: RunConfig,
    policy: Policy,
    sequences: Sequence[LearningSequence],
    old: Sequence[Tensor] | None = None,
) -> Gradients:
    """The objective's gradient when nothing is left out: all tokens of all completions are run, those that do not learn
    have weight 0. ``old``: log-probabilities of an earlier policy; unset: the present one's."""
    policy.model.eval()
    policy.model.zero_grad()
    scored, references, total = scored_in_full(policy, sequences)[0], [None] * len(sequences), 0.0
    if config.beta:
        with torch.no_grad():
            references = scored_in_full(policy, sequences, adapter=False)[0]
    for number, (sequence, logprobs) in enumerate(zip(sequences, scored, strict=True)):
        learning, chosen = sequence.learning, list(sequence.learning.indices)
        mask, weights, advantages = torch.zeros(logprobs.shape, dtype=torch.bool), *torch.zeros(2, *logprobs.shape)
        mask[0, chosen], weights[0, chosen] = True, torch.tensor(learning.weights)
        advantages[0, chosen] = torch.tensor(learning.advantages)
        before = logprobs.detach() if old is None else old[number]
        correction = sampler_weights(before, torch.tensor([sequence.completion.logprobs]), mask, config)
        loss = token_loss(logprobs, before, advantages, mask, config, references[number], correction).loss
        total += reduce_loss(loss, weights, torch.tensor([learning.count]), totals(sequences), config)
    total.backward()
    found = adapter_gradients(policy)
    policy.model.zero_grad()
    return found


def assert_same(found: Gradients, expected: Gradients, tolerance: float = 5e-5) -> None:
    """Largest difference relative to the largest value, over all tensors. The advantages of a group cancel, so float32
    alone is that far from float64 here; single log-probabilities are held to 1e-5 in ``test_logprobs.py``."""
    assert found.keys() == expected.keys()
    assert found
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name in found:
        assert float((found[name] - expected[name]).abs().max()) <= tolerance * largest, name


@contextmanager
def watched(policy: Policy) -> Iterator[list[Tensor]]:
    """The token ids that the embedding layer gets, one tensor for each pass."""
    seen: list[Tensor] = []
    embedding = policy.model.get_base_model().get_input_embeddings()
    hook = embedding.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    yield seen
    hook.remove()


def with_rewards(rollout: Rollout, stage: str, change: Callable[[int, float], float]) -> Rollout:
    """The rollout with a stage's rewards changed by ``change(index, reward)``."""
    group = getattr(rollout, stage)
    scores = tuple(dataclasses.replace(s, reward=change(i, s.reward)) for i, s in enumerate(group.scores))
    return dataclasses.replace(rollout, **{stage: dataclasses.replace(group, scores=scores)})
