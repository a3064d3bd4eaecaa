"""The update against brute force: full logits, every token of every completion, the choice of tokens as factors at the
end."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from tiny_parts import tiny_parts
from update_parts import (
    Collect,
    Gradients,
    adapter_gradients,
    assert_same,
    by_hand,
    config_of,
    restored,
    rollouts_of,
    run_update,
    scored_in_full,
    watched,
    with_rewards,
)

from igrpo_lite.algorithms.learning import learning_sequences, totals
from igrpo_lite.algorithms.methods import method_of
from igrpo_lite.algorithms.rollout import Rollout
from igrpo_lite.algorithms.tokens.base import Learning
from igrpo_lite.config import RunConfig
from igrpo_lite.policy.loading import Policy
from igrpo_lite.training.update import PolicyUpdate
from igrpo_lite.types import Completion, Group
from igrpo_lite.workbench import Workbench

ALGORITHMS = ("grpo", "igrpo", "igrpo-joint")
TOKENS = ("all", "s-grpo", "t-spmo", "entropy")
LOSSES = ("grpo", "dr_grpo", "dapo", "gspo", "cispo")


@pytest.fixture(scope="module")
def parts() -> Iterator[Workbench]:
    made = tiny_parts(config_of("igrpo-joint"))
    yield made
    made.scorer.close()


@pytest.fixture(scope="module")
def collect(parts: Workbench) -> Collect:
    return rollouts_of(parts)


def hand_gradient(config: RunConfig, policy: Policy, rollouts: Sequence[Rollout], beta: float = 0.0) -> Gradients:
    """1/Z sum over all learning sequences of 1/T sum_t -A log pi (ratio 1), by nothing but the paper's formulas."""
    model = policy.model
    model.zero_grad()
    groups = [group for rollout in rollouts for group, _ in method_of(config).learning_groups(rollout, config)]
    total = sum(len(g.completions) for g in groups)
    for group in groups:
        rewards = [s.reward for s in group.scores]
        spread = statistics.stdev(rewards)
        for completion, reward in zip(group.completions, rewards, strict=True):
            advantage = 0.0 if max(rewards) == min(rewards) else (reward - statistics.mean(rewards)) / (spread + 1e-4)
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
    return adapter_gradients(policy)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "beta": 0.1, "update_tokens": 150}])
def test_the_papers_gradient(parts, collect, algorithm, settings):
    """With the sampler's weights off, since these rollouts were not sampled at every temperature tried here."""
    config = config_of(algorithm, importance_sampling_mode="none", **settings)
    rollouts = [dataclasses.replace(rollout, replays=()) for rollout in collect(algorithm)[:2]]
    (found,), stats = run_update(config, parts.policy, rollouts)
    expected = hand_gradient(config, parts.policy, rollouts, config.beta)
    norm = math.sqrt(sum(float((g**2).sum()) for g in expected.values()))
    assert stats.grad_norm == pytest.approx(norm, rel=1e-5)
    clip = min(1.0, config.max_grad_norm / (norm + 1e-6))
    assert_same(found, {name: g * clip for name, g in expected.items()})


SGRPO = {"tokens": "s-grpo", "sgrpo_alpha": 2, "sgrpo_p": 0.4, "sgrpo_k": 0}
METHODS: list[tuple[str, dict[str, Any]]] = [
    *(("igrpo", {"loss_type": loss, "beta": 0.05}) for loss in LOSSES),
    *(("igrpo-joint", {"loss_type": loss} | SGRPO) for loss in LOSSES),
    ("grpo", {"scale_rewards": "batch", "mask_truncated_completions": True}),
    ("grpo", SGRPO | {"beta": 0.05}),
    ("grpo", SGRPO | {"sgrpo_k": 8}),
    ("grpo", {"tokens": "t-spmo"}),
    ("igrpo", {"tokens": "t-spmo", "beta": 0.05}),
    ("igrpo-joint", {"tokens": "t-spmo", "temperature": 0.8}),
    ("igrpo-joint", {"temperature": 0.8}),
]


def off_policy(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The same rollouts from a sampler whose arithmetic is off by up to half a nat, so that its correction matters."""
    generator = torch.Generator().manual_seed(3)

    def shifted(group: Group) -> Group:
        completions = []
        for c in group.completions:
            shift = torch.rand(len(c.ids), generator=generator) - 0.5
            logprobs = tuple((torch.tensor(c.logprobs) + shift).tolist())
            completions.append(dataclasses.replace(c, logprobs=logprobs))
        return dataclasses.replace(group, completions=tuple(completions))

    return [
        dataclasses.replace(
            rollout,
            stage1=shifted(rollout.stage1),
            stage2=rollout.stage2 and shifted(rollout.stage2),
            replays=tuple(dataclasses.replace(replay, group=shifted(replay.group)) for replay in rollout.replays),
        )
        for rollout in rollouts
    ]


@pytest.mark.parametrize(("algorithm", "settings"), METHODS)
def test_pruned_and_packed_equals_everything_run(parts, collect, monkeypatch, algorithm, settings):
    monkeypatch.setattr("igrpo_lite.algorithms.objectives.SAMPLER_CAP", 1.3)
    config = config_of(algorithm, max_grad_norm=1e9, update_tokens=200, **settings)
    rollouts = off_policy(collect(algorithm)[: 1 if config.loss_type else 2])
    (found,), _ = run_update(config, parts.policy, rollouts)
    sequences = learning_sequences(rollouts, config, 0)
    assert_same(found, by_hand(config, parts.policy, sequences))


@pytest.mark.slow
@pytest.mark.parametrize("quantile", [0.2, 1.0])
@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_entropy_takes_the_tokens_of_trls_rule(parts, collect, monkeypatch, quantile, beta):
    """TRL's ``get_high_entropy_mask``: at or above the quantile ``1 - rho`` of all tokens' entropies. Without KL
    penalty, completions without an advantage, which could not learn anyhow, are not among them."""
    monkeypatch.setattr("igrpo_lite.algorithms.tokens.entropy.ENTROPY_SHARE", quantile)
    config = config_of("igrpo", max_grad_norm=1e9, tokens="entropy", beta=beta)
    rollouts = [dataclasses.replace(rollout, replays=()) for rollout in collect("igrpo")]
    rollouts = [with_rewards(rollouts[0], "stage2", lambda *_: 0.3), *rollouts[1:]]
    sequences = learning_sequences(rollouts, config, 0)
    with torch.no_grad():
        entropies = [entropy[0] for entropy in scored_in_full(parts.policy, sequences)[1]]
    matter = [beta > 0 or sequence.learning.advantages[0] != 0 for sequence in sequences]
    assert all(matter) == (beta > 0)
    candidates = torch.cat([e for e, may in zip(entropies, matter, strict=True) if may])
    threshold = float(torch.quantile(candidates, 1 - quantile)) - 1e-6  # the same state twice rounds differently
    chosen = []
    for sequence, entropy, may in zip(sequences, entropies, matter, strict=True):
        advantage, places = sequence.learning.advantages[0], torch.nonzero(entropy >= threshold)[:, 0].tolist()
        places = places if may else []
        learning = Learning(tuple(places), (1.0,) * len(places), (advantage,) * len(places), float(len(entropy)))
        chosen.append(sequence.with_learning(learning))
    (found,), stats = run_update(config, parts.policy, rollouts)
    tokens = sum(len(sequence.learning.indices) for sequence in chosen)
    assert stats.learning_tokens == tokens
    assert tokens == pytest.approx(quantile * len(candidates), abs=len(candidates) / 100)
    assert_same(found, by_hand(config, parts.policy, chosen))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"loss_type": "gspo"}, {"loss_type": "cispo"}, SGRPO, {"tokens": "t-spmo"}])
def test_the_second_pass_compares_with_the_policy_that_sampled(parts, collect, settings):
    """After a large first step ratios leave the clip range; the gradient there is that of the clipped objective."""
    config = config_of(
        "igrpo",
        num_iterations=2,
        max_grad_norm=1e9,
        epsilon_high=1.02 if settings.get("loss_type") == "cispo" else None,
        **settings,
    )
    rollouts, policy = collect("igrpo")[:2], parts.policy
    sequences = learning_sequences(rollouts, config, 0)
    with torch.no_grad():
        old = scored_in_full(policy, sequences)[0]
    update, caught, moved = PolicyUpdate(policy, config), [], {}

    def catch(*_: Any) -> None:
        caught.append(adapter_gradients(policy))
        moved.update({name: p.detach().clone() for name, p in policy.adapter_parameters()})

    update.optimizer.register_step_pre_hook(catch)
    with restored(policy):
        stats = update.step(rollouts, 0, 0.01)
        with torch.no_grad():
            for name, p in policy.adapter_parameters():
                p.copy_(moved[name])  # as it was in the second pass
        assert_same(caught[1], by_hand(config, policy, sequences, old), 2e-4)
    assert_same(caught[0], by_hand(config, policy, sequences))
    assert 0.005 < stats.clip_ratio < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_every_method_updates_the_adapter(parts, collect, algorithm, tokens):
    config, rollouts = config_of(algorithm, tokens=tokens, beta=0.01, num_iterations=2), collect(algorithm)[:2]
    update = PolicyUpdate(parts.policy, config)
    before = {name: p.detach().clone() for name, p in parts.policy.adapter_parameters()}
    with restored(parts.policy):
        stats = update.step(rollouts, 0, 1e-3)
        assert all(not torch.equal(p, before[name]) for name, p in parts.policy.adapter_parameters())
        again = update.step(rollouts, 0, 1e-3)
    assert stats.learning_tokens > 0
    assert stats.learning_tokens == again.learning_tokens or tokens == "entropy"
    assert 0.0 < stats.grad_norm < 100.0
    assert stats.sampler_gap is not None
    assert stats.sampler_gap < 1e-4  # the sampler's own numbers
    assert again.sampler_gap > 1e-3  # no longer those of this policy
    assert stats.kl is not None
    assert stats.kl > 0.0


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["igrpo", "igrpo-joint"])
@pytest.mark.parametrize("tokens", ["all", "s-grpo", "entropy"])
def test_every_loss_goes_with_two_stages(parts, collect, algorithm, tokens):
    norms = set()
    for loss in LOSSES:
        config = config_of(algorithm, tokens=tokens, loss_type=loss, max_completion_length=64)
        norms.add(run_update(config, parts.policy, collect(algorithm)[:1])[1].grad_norm)
    assert all(0.0 < norm < 100.0 for norm in norms)
    assert len(norms) >= 3  # at ratio 1 grpo and gspo, and dapo and cispo, agree


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_type": "dapo", "beta": 0.05},
        {"loss_type": "gspo"},
        SGRPO,
        {"tokens": "t-spmo"},
        {"tokens": "entropy"},
    ],
)
def test_the_memory_dial_does_not_change_the_gradient(parts, collect, settings):
    """From every branch alone to all in one pack; more packs run shared beginnings more often."""
    found = {}
    rollouts = collect("igrpo-joint")[:1]
    for budget in (1, 150, 10**9):
        config = config_of("igrpo-joint", update_tokens=budget, max_grad_norm=1e9, **settings)
        found[budget] = run_update(config, parts.policy, rollouts)
    for budget in (1, 150):
        assert_same(found[budget][0][0], found[10**9][0][0])
        assert found[budget][1].learning_tokens == found[10**9][1].learning_tokens
    assert found[1][1].backbone_tokens > found[150][1].backbone_tokens >= found[10**9][1].backbone_tokens


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_sgrpo_of_all_tokens_is_grpo_bit_for_bit(parts, collect, algorithm):
    everything = {"tokens": "s-grpo", "sgrpo_alpha": 0, "sgrpo_p": 1.0, "sgrpo_k": 0}
    found, expected = (
        run_update(config_of(algorithm, **settings), parts.policy, collect(algorithm)) for settings in (everything, {})
    )
    assert found[1] == expected[1]
    for name, gradient in expected[0][0].items():
        assert torch.equal(found[0][0][name], gradient)


def test_tokens_are_drawn_once_and_again_alike(parts, collect):
    config = config_of("igrpo", num_iterations=3, **SGRPO)
    rollouts = collect("igrpo")
    assert learning_sequences(rollouts, config, 5) == learning_sequences(rollouts, config, 5)
    other = (
        learning_sequences(rollouts, config, 6),
        learning_sequences(rollouts, config.model_copy(update={"seed": 1}), 5),
    )
    drawn = [
        [sequence.learning.indices for sequence in each] for each in (learning_sequences(rollouts, config, 5), *other)
    ]
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]
    with watched(parts.policy) as seen:
        run_update(config, parts.policy, rollouts, rate=1e-3)
    assert len(seen) == 3 + 2  # one pack in each of three passes, after the probe of the layout
    assert torch.equal(seen[-3], seen[-1])
    assert torch.equal(seen[-2], seen[-1])


def with_texts(rollout: Rollout, change: Callable[[int, tuple[int, ...]], tuple[int, ...]]) -> Rollout:
    """The rollout with its drafts' tokens changed by ``change(index, ids)``, scores and stage 2 as they were."""
    drafts = tuple(
        dataclasses.replace(c, ids=change(i, c.ids)) if isinstance(c, Completion) else c
        for i, c in enumerate(rollout.stage1.completions)
    )
    return dataclasses.replace(rollout, stage1=dataclasses.replace(rollout.stage1, completions=drafts))


def test_drafts_do_not_learn_in_igrpo(parts, collect):
    """Changing any draft's tokens changes nothing: they are context only, and the context is in the prompt."""
    config, rollouts = config_of("igrpo"), collect("igrpo")
    changed = [with_texts(r, lambda i, ids: ids[::-1]) for r in rollouts]
    found, stats = run_update(config, parts.policy, changed)
    expected, before = run_update(config, parts.policy, rollouts)
    assert stats == before
    assert all(torch.equal(found[0][name], expected[0][name]) for name in expected[0])
    joint = config_of("igrpo-joint")
    norms = [run_update(joint, parts.policy, variant)[1].grad_norm for variant in (changed, rollouts)]
    assert norms[0] != pytest.approx(norms[1], rel=0.05)


@pytest.mark.parametrize("tokens", TOKENS)
def test_groups_without_spread_change_nothing(parts, collect, tokens):
    flat = [with_rewards(rollout, "stage1", lambda *_: 0.3) for rollout in collect("grpo")]
    flat = [dataclasses.replace(rollout, replays=()) for rollout in flat]
    update = PolicyUpdate(parts.policy, config_of("grpo", tokens=tokens))
    before = {name: p.detach().clone() for name, p in parts.policy.adapter_parameters()}
    stats = update.step(flat, 0, 1.0)
    assert stats.learning_sequences == stats.backbone_tokens == 0
    assert all(torch.equal(p, before[name]) for name, p in parts.policy.adapter_parameters())


def test_a_gradient_that_is_not_finite_leaves_the_policy_clean(parts, collect):
    huge = [with_rewards(rollout, "stage1", lambda i, _: 3e38 * (i % 2)) for rollout in collect("grpo")]
    config = config_of("grpo", scale_rewards="none", num_iterations=2)
    update = PolicyUpdate(parts.policy, config)
    before = {name: p.detach().clone() for name, p in parts.policy.adapter_parameters()}
    stats = update.step(huge, 0, 1.0)
    assert not math.isfinite(stats.grad_norm)
    assert all(torch.equal(p, before[name]) for name, p in parts.policy.adapter_parameters())
    assert not update.optimizer.state


@pytest.mark.slow
@pytest.mark.parametrize("tokens", TOKENS)
def test_truncated_completions_can_be_left_out(parts, collect, tokens):
    """Every second one is said to be cut: it does not learn, but counts among the sequences of the mean."""
    rollouts = []
    for rollout in collect("grpo"):
        completions = tuple(
            dataclasses.replace(c, finish="length" if i % 2 else "stop")
            for i, c in enumerate(rollout.stage1.completions)
        )
        stage1 = dataclasses.replace(rollout.stage1, completions=completions)
        rollouts.append(dataclasses.replace(rollout, stage1=stage1, replays=()))
    config = config_of("grpo", tokens=tokens, mask_truncated_completions=True, max_grad_norm=1e9)
    sequences = learning_sequences(rollouts, config, 0)
    assert len(sequences) == totals(sequences).sequences == sum(len(r.stage1.completions) for r in rollouts)
    assert all(bool(s.learning.indices) <= (not s.completion.truncated) for s in sequences)
    (found,), stats = run_update(config, parts.policy, rollouts)
    assert 0 < stats.learning_sequences <= sum(not s.completion.truncated for s in sequences)
    if tokens != "entropy":
        assert_same(found, by_hand(config, parts.policy, sequences))
