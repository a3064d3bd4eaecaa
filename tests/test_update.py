"""The update against brute force: full logits of separate sequences, every token of every completion, the choice of
tokens as factors at the end."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_parts import small_config, tiny_parts
from torch import Tensor

from igrpo_lite.algorithms.learning import LearningSequence, learning_sequences, totals
from igrpo_lite.algorithms.objectives import reduce_loss, sampler_weights, token_loss
from igrpo_lite.algorithms.rollout import Rollout, RolloutCollector, learning_groups
from igrpo_lite.algorithms.selection import Learning
from igrpo_lite.config import RunConfig
from igrpo_lite.policy.loading import Policy
from igrpo_lite.training.prepare import Prepared
from igrpo_lite.training.update import PolicyUpdate, UpdateStats
from igrpo_lite.types import Completion, Group

ALGORITHMS = ("grpo", "igrpo", "igrpo-joint")
TOKENS = ("all", "s-grpo", "t-spmo", "entropy")
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo")
Gradients = dict[str, Tensor]


def config_of(algorithm: str, **settings: Any) -> RunConfig:
    return small_config(algorithm=algorithm, num_generations=12, prompts_per_step=4, **settings)


@pytest.fixture(scope="module")
def parts() -> Iterator[Prepared]:
    made = tiny_parts(config_of("igrpo-joint"))
    yield made
    made.scorer.close()


@pytest.fixture(scope="module")
def collect(parts: Prepared) -> Callable[[str], list[Rollout]]:
    """Rollouts of four problems all of whose stages have rewards that differ, so that there is something to learn."""
    found: dict[str, list[Rollout]] = {}

    def collected(algorithm: str) -> list[Rollout]:
        if algorithm not in found:
            config = config_of("grpo" if algorithm == "grpo" else "igrpo-joint", tokens="t-spmo", tspmo_replay=2)
            collector = RolloutCollector(parts.sampler, parts.scorer, parts.prompts, config, 0)
            rollouts = collector.collect(parts.train[:32], 0)
            mixed = [r for r in rollouts if all(len({s.reward for s in group.scores}) > 1 for group in r.groups)]
            assert len(mixed) >= 4
            found[algorithm] = mixed[:4]
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


def scored_in_full(policy: Policy, sequence: LearningSequence, adapter: bool = True) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of every token of a completion, ``[1, T]``, by full logits of one sequence."""
    prompt, completion = sequence.prompt.ids, sequence.completion.ids
    with policy.model.disable_adapter() if not adapter else torch.enable_grad():
        logits = policy.model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    log_softmax = torch.log_softmax(logits / sequence.temperature, -1)
    entropies = -(log_softmax.exp() * log_softmax).sum(-1)
    return log_softmax.gather(1, torch.tensor(completion)[:, None]).T, entropies[None].detach()


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
    for number, sequence in enumerate(sequences):
        logprobs, _ = scored_in_full(policy, sequence)
        learning, chosen = sequence.learning, list(sequence.learning.indices)
        mask, weights, advantages = torch.zeros(logprobs.shape, dtype=torch.bool), *torch.zeros(2, *logprobs.shape)
        mask[0, chosen], weights[0, chosen] = True, torch.tensor(learning.weights)
        advantages[0, chosen] = torch.tensor(learning.advantages)
        before = logprobs.detach() if old is None else old[number]
        sampled = torch.tensor([sequence.completion.logprobs])
        reference = None
        if config.beta:
            with torch.no_grad():
                reference = scored_in_full(policy, sequence, adapter=False)[0]
        correction = sampler_weights(before if old is None else old[number], sampled, mask, config)
        loss = token_loss(logprobs, before, advantages, mask, config, reference, correction).loss
        reduce_loss(loss, weights, torch.tensor([learning.count]), totals(sequences), config).backward()
    found = adapter_gradients(policy)
    policy.model.zero_grad()
    return found


def assert_same(found: Gradients, expected: Gradients, tolerance: float = 1e-5) -> None:
    """Largest difference relative to the largest value, over all tensors: advantages cancel to much smaller sums."""
    assert found.keys() == expected.keys()
    assert found
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name in found:
        assert float((found[name] - expected[name]).abs().max()) <= tolerance * largest, name


def hand_gradient(config: RunConfig, policy: Policy, rollouts: Sequence[Rollout], beta: float = 0.0) -> Gradients:
    """1/Z sum over all learning sequences of 1/T sum_t -A log pi (ratio 1), by nothing but the paper's formulas."""
    model = policy.model
    model.zero_grad()
    groups = [group for rollout in rollouts for group in learning_groups(rollout, config.algorithm)]
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
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "update_tokens": 150}, {"beta": 0.1}])
def test_the_papers_gradient(parts, collect, algorithm, settings):
    """With the sampler's weights off, since these rollouts were not sampled at every temperature tried here."""
    config = config_of(algorithm, importance_sampling_mode="none", **settings)
    (found,), stats = run_update(config, parts.policy, collect(algorithm))
    expected = hand_gradient(config, parts.policy, collect(algorithm), config.beta)
    norm = math.sqrt(sum(float((g**2).sum()) for g in expected.values()))
    assert stats.grad_norm == pytest.approx(norm, rel=1e-5)
    clip = min(1.0, config.max_grad_norm / (norm + 1e-6))
    assert_same(found, {name: g * clip for name, g in expected.items()})


SGRPO = {"tokens": "s-grpo", "sgrpo_alpha": 2, "sgrpo_p": 0.4, "sgrpo_k": 0}
METHODS: list[tuple[str, dict[str, Any]]] = [
    *(("igrpo", {"loss_type": loss, "beta": 0.05}) for loss in LOSSES),
    *(("igrpo-joint", {"loss_type": loss} | SGRPO) for loss in LOSSES),
    ("grpo", {"scale_rewards": "batch", "mask_truncated_completions": True}),
    ("grpo", SGRPO | {"sgrpo_norm": "ht", "beta": 0.05}),
    ("grpo", SGRPO | {"sgrpo_k": 8}),
    ("igrpo", SGRPO | {"sgrpo_k": 8, "sgrpo_cap": "random"}),
    ("igrpo", SGRPO | {"sgrpo_k": 22, "sgrpo_cap": "length_gate"}),
    ("grpo", {"tokens": "t-spmo"}),
    ("igrpo", {"tokens": "t-spmo", "tspmo_weight": "count", "tspmo_baseline": "children", "beta": 0.05}),
    ("igrpo-joint", {"tokens": "t-spmo", "tspmo_min_visits": 3, "draft_temperature": 0.8}),
    ("igrpo-joint", {"draft_temperature": 0.8}),
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
def test_pruned_and_packed_equals_everything_run(parts, collect, algorithm, settings):
    config = config_of(algorithm, max_grad_norm=1e9, importance_sampling_clip_max=1.3, update_tokens=400, **settings)
    rollouts = off_policy(collect(algorithm))
    (found,), stats = run_update(config, parts.policy, rollouts)
    sequences = learning_sequences(rollouts, config, 0)
    assert_same(found, by_hand(config, parts.policy, sequences))
    assert stats.learning_tokens < sum(len(sequence.completion.ids) for sequence in sequences)


@pytest.mark.parametrize("quantile", [0.2, 1.0])
@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_entropy_takes_the_tokens_of_trls_rule(parts, collect, quantile, beta):
    """TRL's ``get_high_entropy_mask``: at or above the quantile ``1 - rho`` of all tokens' entropies. Without KL
    penalty, completions without an advantage, which could not learn anyhow, are not among them."""
    config = config_of("igrpo", max_grad_norm=1e9, tokens="entropy", top_entropy_quantile=quantile, beta=beta)
    rollouts = collect("igrpo")
    rollouts = [with_rewards(rollouts[0], "stage2", lambda i, _: float(i > 2) * (i - 4) ** 2), *rollouts[1:]]
    sequences = learning_sequences(rollouts, config, 0)
    with torch.no_grad():
        entropies = [scored_in_full(parts.policy, sequence)[1][0] for sequence in sequences]
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
    rollouts, policy = collect("igrpo"), parts.policy
    sequences = learning_sequences(rollouts, config, 0)
    with torch.no_grad():
        old = [scored_in_full(policy, sequence)[0] for sequence in sequences]
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
        assert_same(caught[1], by_hand(config, policy, sequences, old), 1e-4)
    assert_same(caught[0], by_hand(config, policy, sequences))
    assert 0.02 < stats.clip_ratio < 0.5


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_every_method_updates_the_adapter(parts, collect, algorithm, tokens):
    config = config_of(algorithm, tokens=tokens, beta=0.01, num_iterations=2)
    update = PolicyUpdate(parts.policy, config)
    before = {name: p.detach().clone() for name, p in parts.policy.adapter_parameters()}
    with restored(parts.policy):
        stats = update.step(collect(algorithm), 0, 1e-3)
        assert all(not torch.equal(p, before[name]) for name, p in parts.policy.adapter_parameters())
        again = update.step(collect(algorithm), 0, 1e-3)
    assert stats.learning_tokens > 0
    assert stats.learning_tokens == again.learning_tokens or tokens == "entropy"
    assert 0.0 < stats.grad_norm < 100.0
    assert stats.sampler_gap is not None
    assert stats.sampler_gap < 1e-4  # the sampler's own numbers
    assert again.sampler_gap > 1e-3  # no longer those of this policy
    assert stats.kl is not None
    assert stats.kl > 0.0


@pytest.mark.parametrize("algorithm", ["igrpo", "igrpo-joint"])
@pytest.mark.parametrize("tokens", ["all", "s-grpo", "entropy"])
def test_every_loss_goes_with_two_stages(parts, collect, algorithm, tokens):
    norms = set()
    for loss in LOSSES:
        config = config_of(algorithm, tokens=tokens, loss_type=loss, max_completion_length=64)
        norms.add(run_update(config, parts.policy, collect(algorithm))[1].grad_norm)
    assert all(0.0 < norm < 100.0 for norm in norms)
    assert len(norms) >= 3  # at ratio 1 grpo and gspo, and bnpo, dapo and cispo, agree


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
    for budget in (1, 110, 10**9):
        config = config_of("igrpo-joint", update_tokens=budget, max_grad_norm=1e9, **settings)
        found[budget] = run_update(config, parts.policy, collect("igrpo-joint"))
    for budget in (1, 110):
        assert_same(found[budget][0][0], found[10**9][0][0])
        assert found[budget][1].learning_tokens == found[10**9][1].learning_tokens
    assert found[1][1].backbone_tokens > found[110][1].backbone_tokens > found[10**9][1].backbone_tokens


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("norm", ["selected", "ht"])
def test_sgrpo_of_all_tokens_is_grpo_bit_for_bit(parts, collect, algorithm, norm):
    everything = {"tokens": "s-grpo", "sgrpo_alpha": 0, "sgrpo_p": 1.0, "sgrpo_k": 0, "sgrpo_norm": norm}
    found, expected = (
        run_update(config_of(algorithm, **settings), parts.policy, collect(algorithm)) for settings in (everything, {})
    )
    assert found[1] == expected[1]
    for name, gradient in expected[0][0].items():
        assert torch.equal(found[0][0][name], gradient)


@contextmanager
def watched(policy: Policy) -> Iterator[list[Tensor]]:
    """The token ids that the embedding layer gets, one tensor for each pass."""
    seen: list[Tensor] = []
    embedding = policy.model.get_base_model().get_input_embeddings()
    hook = embedding.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    yield seen
    hook.remove()


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


def with_rewards(rollout: Rollout, stage: str, change: Callable[[int, float], float]) -> Rollout:
    """The rollout with a stage's rewards changed by ``change(index, reward)``."""
    group = getattr(rollout, stage)
    scores = tuple(dataclasses.replace(s, reward=change(i, s.reward)) for i, s in enumerate(group.scores))
    return dataclasses.replace(rollout, **{stage: dataclasses.replace(group, scores=scores)})


def nodes_of(sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> int:
    """Each prompt once, and the distinct beginnings of its completions but for their last tokens, which predict
    nothing."""
    below = {(prompt, completion[:n]) for prompt, completion in sequences for n in range(1, len(completion))}
    return sum(map(len, {prompt for prompt, _ in sequences})) + len(below)


def tokens_run(config: RunConfig, policy: Policy, rollouts: Sequence[Rollout]) -> tuple[int, UpdateStats]:
    """Tokens through the embedding layer in one update, without the small probe of the layout."""
    update = PolicyUpdate(policy, config)
    with restored(policy), watched(policy) as seen:
        stats = update.step(rollouts, 0, 1e-9)
    return sum(ids.numel() for ids in seen), stats


def test_without_advantage_nothing_is_run(parts, collect):
    """A group of equal rewards and, in the others, two completions at the mean."""
    flat, *rest = collect("grpo")
    rollouts = [with_rewards(flat, "stage1", lambda *_: 0.3)]
    rollouts += [with_rewards(r, "stage1", lambda i, _: (0.5, 0.5, 0.0, 1.0)[i % 4]) for r in rest]
    learn = [
        (r.stage1.prompt.ids, c.ids) for r in rollouts[1:] for i, c in enumerate(r.stage1.completions) if i % 4 > 1
    ]
    every = [(r.stage1.prompt.ids, c.ids) for r in rollouts for c in r.stage1.completions]
    config = config_of("grpo", update_tokens=10**9, max_grad_norm=1e9)
    run, stats = tokens_run(config, parts.policy, rollouts)
    assert run == stats.backbone_tokens == nodes_of(learn) < nodes_of(every)
    assert stats.learning_sequences == len(learn)
    assert stats.learning_tokens == sum(len(completion) for _, completion in learn)
    penalty = config.model_copy(update={"beta": 0.1})
    run, stats = tokens_run(penalty, parts.policy, rollouts)
    assert stats.backbone_tokens == nodes_of(every)
    assert run == 2 * nodes_of(every)  # once with the adapter and once without
    assert stats.learning_sequences == len(every)
    for each in (config, penalty):
        (found,), _ = run_update(each, parts.policy, rollouts)
        assert_same(found, by_hand(each, parts.policy, learning_sequences(rollouts, each, 0)))


def test_sgrpo_runs_no_further_than_the_last_chosen_token(parts, collect):
    config = config_of("igrpo", update_tokens=10**9, tokens="s-grpo", sgrpo_alpha=3, sgrpo_p=0.5, sgrpo_k=6)
    rollouts = collect("igrpo")
    run, stats = tokens_run(config, parts.policy, rollouts)
    sequences = [s for s in learning_sequences(rollouts, config, 0) if s.learning.advantages[0]]
    last = [max(sequence.learning.indices) + 1 for sequence in sequences]  # tau, counted from 1
    cut = [(s.prompt.ids, s.completion.ids[:tau]) for s, tau in zip(sequences, last, strict=True)]
    assert run == stats.backbone_tokens == nodes_of(cut)
    for rollout in rollouts:  # one group: the prompt, and at most tau - 1 nodes of each completion
        one, _ = tokens_run(config, parts.policy, [rollout])
        prompt = rollout.stage2.prompt.ids
        below = {c[:n] for p, c in cut if p == prompt for n in range(1, len(c))}
        assert one <= len(prompt) + len(below)
    assert stats.learning_tokens == 6 * len(sequences)
    assert run < nodes_of([(s.prompt.ids, s.completion.ids) for s in sequences])


def test_sgrpo_of_a_single_completion_runs_prompt_and_tau_minus_one(parts, collect):
    """One completion with an advantage: exactly its prompt and the tokens before the last chosen one."""
    rollout = with_rewards(collect("grpo")[0], "stage1", lambda i, _: 1.0 if i == 4 else None)
    rollout = with_rewards(rollout, "stage1", lambda i, r: {3: 0.0}.get(i, r))
    config = config_of("grpo", tokens="s-grpo", sgrpo_alpha=3, sgrpo_p=0.5, sgrpo_k=6)
    sequences = [s for s in learning_sequences([rollout], config, 0) if s.learning.advantages[0]]
    assert len(sequences) == 2
    longest = max(max(s.learning.indices) for s in sequences)
    run, _ = tokens_run(config, parts.policy, [rollout])
    assert len(rollout.stage1.prompt.ids) + longest <= run
    assert run == nodes_of([(s.prompt.ids, s.completion.ids[: max(s.learning.indices) + 1]) for s in sequences])


@pytest.mark.parametrize("replays", [False, True])
def test_tspmo_runs_the_trie_to_its_last_branchings_only(parts, collect, replays):
    config = config_of("igrpo", update_tokens=10**9, tokens="t-spmo")
    rollouts = [dataclasses.replace(r, replays=r.replays if replays else ()) for r in collect("igrpo")]
    needed = []
    for rollout in rollouts:
        groups = [rollout.stage2, *(r.group for r in rollout.replays if r.group.stage == "stage2")]
        assert len(groups) > 1 or not replays
        for group in groups:
            ids = [c.ids for c in group.completions]
            prefixes = {c[:n] for c in ids for n in range(len(c))}
            for prefix in prefixes:
                # A branching: other completions go on otherwise, and with other mean rewards.
                depth = len(prefix)
                here = [(c, s.reward) for c, s in zip(ids, group.scores, strict=True) if c[:depth] == prefix]
                ways = {c[depth : depth + 1] for c, _ in here}
                mean = statistics.fmean(reward for _, reward in here)
                parts_ = {w: statistics.fmean(r for c, r in here if c[depth : depth + 1] == w) for w in ways if w}
                if len(ways) > 1 and any(abs(value - mean) > 1e-6 for value in parts_.values()):
                    needed.append((group.prompt.ids, (*prefix, 0)))
    run, stats = tokens_run(config, parts.policy, rollouts)
    assert run == stats.backbone_tokens == nodes_of(needed)
    everything = nodes_of([(r.stage2.prompt.ids, c.ids) for r in rollouts for c in r.stage2.completions])
    assert replays or run < everything


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


def test_the_prompt_runs_once_per_group(parts, collect):
    rollouts = collect("igrpo")[:1]
    run, _ = tokens_run(config_of("igrpo"), parts.policy, rollouts)
    level = rollouts[0].stage2
    repeated = sum(len(level.prompt.ids) + len(c.ids) for c in level.completions)
    assert len(level.prompt.ids) < run < 0.5 * repeated


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


@pytest.fixture(scope="module")
def sliced() -> Iterator[Callable[[str, bool], Prepared]]:
    """Parts of a run with an adapter on some layers only, with or without recomputed activations."""
    made: dict[tuple[str, bool], Prepared] = {}

    def parts_with(layers: str, recomputed: bool) -> Prepared:
        key = layers, recomputed
        if key not in made:
            made[key] = tiny_parts(config_of("igrpo", lora_layers=layers, gradient_checkpointing=recomputed))
        return made[key]

    yield parts_with
    for parts in made.values():
        parts.scorer.close()


@dataclasses.dataclass
class Trace:
    """What one update left behind: kept bytes, gradients, and how often each layer ran and wanted a gradient."""

    kept: int
    gradients: Gradients
    runs: list[int]
    graphs: list[bool]


def traced(parts: Prepared, config: RunConfig, rollouts: Sequence[Rollout]) -> Trace:
    layers = parts.policy.model.get_base_model().model.layers
    runs, graphs, kept = [0] * len(layers), [False] * len(layers), {}
    frozen = {p.untyped_storage().data_ptr() for p in parts.policy.model.parameters()}
    config = config.model_copy(update={"update_tokens": 10**9, "max_grad_norm": 1e9})
    update, caught = PolicyUpdate(parts.policy, config), []
    update.optimizer.register_step_pre_hook(lambda *_: caught.append(adapter_gradients(parts.policy)))

    def count(number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            runs[number] += 1

        return hook

    def look(number: int) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            graphs[number] |= states.requires_grad

        return hook

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in frozen:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
        return tensor

    hooks = [layer.mlp.register_forward_pre_hook(count(number)) for number, layer in enumerate(layers)]
    hooks += [layer.register_forward_hook(look(number)) for number, layer in enumerate(layers)]
    with restored(parts.policy), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        update.step(rollouts, 0, 1e-9)
    for hook in hooks:
        hook.remove()
    return Trace(sum(t.untyped_storage().nbytes() for t in kept.values()), caught[0], runs, graphs)


@pytest.mark.parametrize("recomputed", [False, True])
def test_backward_stops_below_the_lowest_adapter(sliced, collect, recomputed):
    """The bundled model has four layers; a third of them is one."""
    rollouts, traces = collect("igrpo"), {}
    for layers, count in (("all", 4), ("last half", 2), ("last third", 1)):
        parts = sliced(layers, recomputed)
        config = config_of("igrpo", lora_layers=layers, gradient_checkpointing=recomputed)
        traces[count] = trace = traced(parts, config, rollouts)
        adapted = [number >= 4 - count for number in range(4)]
        assert trace.graphs == adapted  # nothing below asks for a gradient
        assert trace.runs == [1 + (recomputed and above) for above in adapted]  # nor is run again
        assert {int(name.split(".layers.")[1].split(".")[0]) for name in trace.gradients} == {*range(4 - count, 4)}
        parts.policy.model.eval()
        assert_same(trace.gradients, by_hand(config, parts.policy, learning_sequences(rollouts, config, 0)))
    per_layer = traces[2].kept - traces[1].kept
    assert per_layer > 0
    assert traces[4].kept - traces[2].kept == 2 * per_layer
    if not recomputed:
        assert traces[1].kept < 0.4 * traces[4].kept


def test_recomputing_keeps_less(sliced, collect):
    kept = [
        traced(sliced("all", recomputed), config_of("igrpo", gradient_checkpointing=recomputed), collect("igrpo")).kept
        for recomputed in (False, True)
    ]
    assert kept[1] < 0.3 * kept[0]
