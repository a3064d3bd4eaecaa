"""What the update does not compute: counted at the embedding layer, in saved tensors and in layers that run again."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from tiny_parts import tiny_parts
from torch import Tensor
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
    watched,
    with_rewards,
)

from igrpo_lite.algorithms.learning import learning_sequences
from igrpo_lite.algorithms.rollout import Rollout
from igrpo_lite.config import RunConfig
from igrpo_lite.policy.loading import Policy
from igrpo_lite.training.update import PolicyUpdate, UpdateStats
from igrpo_lite.workbench import Workbench


@pytest.fixture(scope="module")
def parts() -> Iterator[Workbench]:
    made = tiny_parts(config_of("igrpo-joint"))
    yield made
    made.scorer.close()


@pytest.fixture(scope="module")
def collect(parts: Workbench) -> Collect:
    return rollouts_of(parts)


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
    flat, *rest = (dataclasses.replace(rollout, replays=()) for rollout in collect("grpo"))
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
    assert stats.learning_tokens == 6 * len(sequences)
    assert run < nodes_of([(s.prompt.ids, s.completion.ids) for s in sequences])


def test_sgrpo_of_equal_completions_runs_the_prompt_and_tau_minus_one(parts, collect):
    """Two completions with the same tokens and different rewards, the others unscored: one branch, to the later one of
    their last chosen tokens."""
    rollout = with_rewards(collect("grpo")[0], "stage1", lambda i, _: {3: 0.0, 4: 1.0}.get(i))
    completions = list(rollout.stage1.completions)
    completions[3] = completions[4]
    stage1 = dataclasses.replace(rollout.stage1, completions=tuple(completions))
    rollout = dataclasses.replace(rollout, stage1=stage1, replays=())
    config = config_of("grpo", tokens="s-grpo", sgrpo_alpha=3, sgrpo_p=0.5, sgrpo_k=6)
    tau = [1 + max(s.learning.indices) for s in learning_sequences([rollout], config, 0)[3:5]]
    assert tau[0] != tau[1]
    run, stats = tokens_run(config, parts.policy, [rollout])
    assert run == len(rollout.stage1.prompt.ids) + max(tau) - 1
    assert stats.learning_tokens == 12


@pytest.mark.parametrize("replays", [False, True])
def test_tspmo_runs_the_trie_to_its_last_branchings_only(parts, collect, replays):
    config = config_of("igrpo", update_tokens=10**9, tokens="t-spmo")
    rollouts = [dataclasses.replace(r, replays=r.replays if replays else ()) for r in collect("igrpo")]
    needed = []
    for rollout in rollouts:
        groups = [rollout.stage2, *(replay.group for replay in rollout.replays)]
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
                values = [statistics.fmean(r for c, r in here if c[depth : depth + 1] == w) for w in ways if w]
                if len(ways) > 1 and any(abs(value - mean) > 1e-6 for value in values):
                    needed.append((group.prompt.ids, (*prefix, 0)))
    run, stats = tokens_run(config, parts.policy, rollouts)
    assert run == stats.backbone_tokens == nodes_of(needed)
    everything = nodes_of([(r.stage2.prompt.ids, c.ids) for r in rollouts for c in r.stage2.completions])
    assert replays or run < everything


def test_the_prompt_runs_once_per_group(parts, collect):
    rollouts = collect("igrpo")[:1]
    run, _ = tokens_run(config_of("igrpo"), parts.policy, rollouts)
    level = rollouts[0].stage2
    repeated = sum(len(level.prompt.ids) + len(c.ids) for c in level.completions)
    assert len(level.prompt.ids) < run < 0.5 * repeated


@pytest.fixture(scope="module")
def sliced() -> Iterator[Callable[[str, bool], Workbench]]:
    """Parts of a run with an adapter on some layers only, with or without recomputed activations."""
    made: dict[tuple[str, bool], Workbench] = {}

    def parts_with(layers: str, recomputed: bool) -> Workbench:
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


def traced(parts: Workbench, config: RunConfig, rollouts: Sequence[Rollout]) -> Trace:
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
        assert_same(trace.gradients, by_hand(config, parts.policy, learning_sequences(rollouts, config, 0)))
    if not recomputed:  # what is to be recomputed is not kept at all
        per_layer = traces[2].kept - traces[1].kept
        assert traces[4].kept - traces[2].kept == 2 * per_layer
        assert traces[1].kept < 0.4 * traces[4].kept
