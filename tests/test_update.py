"""The update against a brute-force oracle: full logits of separate sequences, the loss written out in plain Python."""

from __future__ import annotations

import dataclasses
import math
import statistics

import pytest
import torch
from tiny_parts import small_config, tiny_parts

from igrpo_lite.algorithms.rollout import RolloutCollector
from igrpo_lite.training.update import PolicyUpdate, learning_groups
from igrpo_lite.types import Completion


@pytest.fixture(scope="module")
def parts():
    made = tiny_parts(small_config(num_generations=12, prompts_per_step=4))
    yield made
    made.scorer.close()


def collect(config, parts):
    """Rollouts of four problems whose last stage has rewards that differ, so that there is something to learn."""
    rollouts = RolloutCollector(parts.sampler, parts.scorer, parts.prompts, config, 0).collect(parts.train[:32], 0)
    mixed = [r for r in rollouts if len({score.reward for score in r.groups[-1].scores}) > 1]
    assert len(mixed) >= 4
    return mixed[:4]


def gradients_of_update(config, parts, rollouts):
    """The gradient that one update hands to the optimizer, before clipping."""
    update = PolicyUpdate(parts.policy, config)
    caught = {}

    def catch(*_, **__):
        caught.update({n: p.grad.clone() for n, p in parts.policy.adapter_parameters() if p.grad is not None})

    update.optimizer.register_step_pre_hook(catch)
    state = {name: p.detach().clone() for name, p in parts.policy.adapter_parameters()}
    stats = update.step(rollouts, 1e-9)
    with torch.no_grad():
        for name, p in parts.policy.adapter_parameters():
            p.copy_(state[name])
    return caught, stats


def gradients_by_hand(config, parts, rollouts, beta=0.0):
    """1/Z sum over all learning sequences of 1/T sum_t -A log pi (ratio 1), one unpadded sequence at a time."""
    model = parts.policy.model
    model.zero_grad()
    groups = learning_groups(rollouts, config.algorithm)
    total = sum(len(g.completions) for g in groups)
    for group in groups:
        rewards = [s.reward for s in group.scores]
        spread = statistics.stdev(rewards)
        for completion, reward in zip(group.completions, rewards, strict=True):
            advantage = 0.0 if max(rewards) == min(rewards) else (reward - statistics.mean(rewards)) / (spread + 1e-4)
            if advantage == 0.0 and not beta:
                continue
            ids = torch.tensor([group.prompt.ids + completion.ids])
            logits = model(input_ids=ids).logits[0, len(group.prompt.ids) - 1 : -1] / config.temperature
            picked = torch.log_softmax(logits, -1).gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
            loss = -advantage * torch.exp(picked - picked.detach())
            if beta:
                with torch.no_grad(), model.disable_adapter():
                    logits = model(input_ids=ids).logits[0, len(group.prompt.ids) - 1 : -1] / config.temperature
                    reference = torch.log_softmax(logits, -1).gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
                rho = reference - picked
                loss = loss + beta * (torch.exp(rho) - rho - 1)
            (loss.mean() / total).backward()
    return {name: p.grad.clone() for name, p in parts.policy.adapter_parameters() if p.grad is not None}


def assert_equal_gradients(found, expected):
    assert found.keys() == expected.keys()
    assert found
    for name in found:
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("algorithm", ["grpo", "igrpo", "igrpo-joint"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"beta": 0.1}, {"update_tokens": 150}])
def test_gradient_equals_brute_force(parts, algorithm, settings):
    config = small_config(algorithm=algorithm, num_generations=12, **settings)
    rollouts = collect(config, parts)
    found, stats = gradients_of_update(config, parts, rollouts)
    expected = gradients_by_hand(config, parts, rollouts, config.beta)
    norm = math.sqrt(sum(float((g**2).sum()) for g in expected.values()))
    assert stats.grad_norm == pytest.approx(norm, rel=1e-3)
    clip = min(1.0, config.max_grad_norm / (norm + 1e-6))
    assert_equal_gradients(found, {name: g * clip for name, g in expected.items()})


def with_texts(rollout, change):
    """The rollout with its drafts' tokens changed by ``change(index, ids)``, scores and stage 2 as they were."""
    drafts = tuple(
        dataclasses.replace(c, ids=change(i, c.ids)) if isinstance(c, Completion) else c
        for i, c in enumerate(rollout.stage1.completions)
    )
    return dataclasses.replace(rollout, stage1=dataclasses.replace(rollout.stage1, completions=drafts))


def test_drafts_do_not_learn_in_igrpo(parts):
    """Changing any draft's tokens changes nothing: they are context only, and the context is in the prompt."""
    config = small_config(algorithm="igrpo", num_generations=12)
    rollouts = collect(config, parts)
    changed = [with_texts(r, lambda i, ids: ids[::-1]) for r in rollouts]
    found, stats = gradients_of_update(config, parts, changed)
    expected, before = gradients_of_update(config, parts, rollouts)
    assert stats == before
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    joint = small_config(algorithm="igrpo-joint", num_generations=12)
    norms = [gradients_of_update(joint, parts, variant)[1].grad_norm for variant in (changed, rollouts)]
    assert norms[0] != pytest.approx(norms[1], rel=0.05)


def test_only_completion_tokens_learn(parts):
    """Counted: as many learning positions as completion tokens of sequences with an advantage."""
    config = small_config(algorithm="igrpo", num_generations=12)
    rollouts = collect(config, parts)
    level = rollouts[0].stage2
    same = tuple(dataclasses.replace(score, reward=0.3) for score in level.scores)
    rollouts[0] = dataclasses.replace(rollouts[0], stage2=dataclasses.replace(level, scores=same))
    _, stats = gradients_of_update(config, parts, rollouts)
    tokens = sequences = 0
    for rollout in rollouts:
        rewards = [s.reward for s in rollout.stage2.scores]
        mean = statistics.mean(rewards)
        for completion, reward in zip(rollout.stage2.completions, rewards, strict=True):
            if max(rewards) != min(rewards) and not math.isclose(reward, mean, abs_tol=1e-7):
                tokens += len(completion.ids)
                sequences += 1
    assert (stats.learning_tokens, stats.head_tokens, stats.learning_sequences) == (tokens, tokens, sequences)
    assert 0 < sequences < sum(len(r.stage2.completions) for r in rollouts)


def test_prompt_runs_once_per_group(parts):
    config = small_config(algorithm="igrpo", num_generations=12)
    rollouts = collect(config, parts)[:1]
    _, stats = gradients_of_update(config, parts, rollouts)
    repeated = sum(len(rollouts[0].stage2.prompt.ids) + len(c.ids) for c in rollouts[0].stage2.completions)
    assert len(rollouts[0].stage2.prompt.ids) < stats.backbone_tokens < 0.5 * repeated


def test_groups_without_spread_change_nothing(parts):
    config = small_config(algorithm="grpo", num_generations=12)
    rollouts = collect(config, parts)
    flat = []
    for rollout in rollouts:
        scores = tuple(dataclasses.replace(s, reward=0.3) for s in rollout.stage1.scores)
        flat.append(dataclasses.replace(rollout, stage1=dataclasses.replace(rollout.stage1, scores=scores)))
    update = PolicyUpdate(parts.policy, config)
    before = {name: p.detach().clone() for name, p in parts.policy.adapter_parameters()}
    stats = update.step(flat, 1.0)
    assert stats.learning_sequences == stats.backbone_tokens == 0
    assert all(torch.equal(p, before[name]) for name, p in parts.policy.adapter_parameters())


def test_truncated_completions_can_be_left_out(parts):
    config = small_config(algorithm="grpo", num_generations=12, max_completion_length=21)
    rollouts = collect(config, parts)
    cut = sum(c.truncated for r in rollouts for c in r.stage1.completions)
    assert cut
    masked = config.model_copy(update={"mask_truncated_completions": True})
    full, kept = gradients_of_update(config, parts, rollouts)[1], gradients_of_update(masked, parts, rollouts)[1]
    assert kept.learning_sequences < full.learning_sequences


def test_second_iteration_uses_the_first_ones_logprobs(parts):
    """With a huge first step the ratio leaves the clip range; old log-probabilities must be those before it."""
    config = small_config(algorithm="grpo", num_generations=12, num_iterations=2, max_grad_norm=1e9)
    rollouts = collect(config, parts)
    state = {name: p.detach().clone() for name, p in parts.policy.adapter_parameters()}
    stats = PolicyUpdate(parts.policy, config).step(rollouts, 0.02)
    assert stats.clip_ratio > 0.02
    still = PolicyUpdate(parts.policy, config.model_copy(update={"num_iterations": 1})).step(rollouts, 1e-9)
    assert still.clip_ratio == 0.0
    with torch.no_grad():
        for name, p in parts.policy.adapter_parameters():
            p.copy_(state[name])
