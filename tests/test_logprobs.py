"""Log-probabilities, entropies and gradients of the update against the plainest computation there is: full logits of
one unpadded sequence after the other."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers.integrations.flex_attention as flex_integration
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, VOCAB, make_model, make_policy
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTBigCodeConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    StableLmConfig,
)

from igrpo_lite.policy import logprobs as lp
from igrpo_lite.policy.attention import register
from igrpo_lite.policy.heads import split_heads
from igrpo_lite.policy.loading import recompute_activations
from igrpo_lite.policy.logprobs import Layout, RowLayout, TokenLogprobs, TreeLayout, best_layout, chosen_logprobs
from igrpo_lite.policy.tree import Branch, TokenTree, grow
from igrpo_lite.policy.tree_attention import FlexTrees, SdpaTrees

FULL_ATTENTION = ("qwen2", "qwen3", "llama", "smollm")
CASES: list[tuple[str, Layout]] = [(family, TreeLayout()) for family in FULL_ATTENTION]
CASES += [(family, RowLayout()) for family in FAMILIES]
Gradients = dict[str, Tensor]


def hard_branches() -> list[Branch]:
    """Three prompts, and below them all that makes trees differ from rows."""
    r = random.Random(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(r.randrange(VOCAB) for _ in range(count))

    def some(completion: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(r.sample(range(len(completion)), r.randint(1, len(completion)))))

    found = []
    for prompt in (tokens(12), tokens(1), tokens(7)):
        stem, long = tokens(5), tokens(14)
        completions = [long, long, long[:6], long[:1], stem + tokens(4), stem + tokens(9), stem, tokens(1), tokens(3)]
        found += [Branch(prompt, c, tuple(range(len(c)))) for c in completions]  # a duplicate, beginnings of others
        found += [Branch(prompt, c, some(c)) for c in completions]  # random parts of the same
        found += [Branch(prompt, c, some(c), 0.7) for c in completions[1:6]]  # another temperature
        found += [
            Branch(prompt, long, (0,), 0.7),
            Branch(prompt, tokens(8), (7,), 1.3),
        ]  # the first token, the last one
    return found


def one_by_one(policy: PeftModel, branch: Branch) -> tuple[Tensor, Tensor]:
    """Full logits of one unpadded sequence: the oracle. Log-probability and entropy of the chosen tokens."""
    logits = policy(input_ids=torch.tensor([[*branch.prompt, *branch.completion]])).logits[0].float()
    log_softmax = torch.log_softmax(logits[len(branch.prompt) - 1 : -1] / branch.temperature, dim=-1)
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    picked = log_softmax.gather(1, torch.tensor(branch.completion)[:, None])[:, 0]
    return picked[list(branch.indices)], entropy[list(branch.indices)]


def adapter_gradients(policy: PeftModel) -> Gradients:
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def expected(
    policy: PeftModel, branches: Sequence[Branch], weights: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], Gradients]:
    """Log-probabilities, entropies and the gradient of the weighted log-probabilities, one sequence at a time."""
    policy.zero_grad()
    rows = []
    for branch, weight in zip(branches, weights, strict=True):
        logprobs, entropies = one_by_one(policy, branch)
        (logprobs * weight).sum().backward()
        rows.append((logprobs.detach(), entropies.detach()))
    return [row[0] for row in rows], [row[1] for row in rows], adapter_gradients(policy)


def found(
    policy: PeftModel, branches: Sequence[Branch], weights: Sequence[Tensor], layout: Layout
) -> tuple[list[Tensor], list[Tensor], Gradients]:
    """The same by ours, in one pass."""
    policy.zero_grad()
    scored = chosen_logprobs(policy.get_base_model(), branches, layout)
    counts = [len(branch.indices) for branch in branches]
    assert scored.mask.sum(1).tolist() == counts
    assert all(row[:n].all() for row, n in zip(scored.mask, counts, strict=True))
    assert not scored.logprobs[~scored.mask].any()
    rows = [row[:n] for row, n in zip(scored.logprobs, counts, strict=True)]
    torch.stack([(row * weight).sum() for row, weight in zip(rows, weights, strict=True)]).sum().backward()
    entropies = [row[:n] for row, n in zip(scored.entropies, counts, strict=True)]
    return [row.detach() for row in rows], entropies, adapter_gradients(policy)


def assert_near(actual: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    """Largest difference relative to the largest value."""
    assert actual.shape == wanted.shape
    assert float((actual - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


def assert_same(actual: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    assert_near(torch.cat(actual[0]), torch.cat(wanted[0]), tolerance)
    assert_near(torch.cat(actual[1]), torch.cat(wanted[1]), tolerance)
    assert actual[2].keys() == wanted[2].keys()
    assert actual[2]
    for name, gradient in actual[2].items():
        assert_near(gradient, wanted[2][name], tolerance)


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_equal_to_separate_sequences(family: str, layout: Layout) -> None:
    policy, branches = make_policy(family), hard_branches()
    weights = [torch.randn(len(branch.indices)) for branch in branches]
    assert_same(found(policy, branches, weights, layout), expected(policy, branches, weights))


@pytest.mark.parametrize("layout", [TreeLayout(), RowLayout()])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_recomputed_activations_give_the_same(family: str, layout: Layout) -> None:
    policy, branches = make_policy(family), hard_branches()
    weights = [torch.randn(len(branch.indices)) for branch in branches]
    wanted = expected(policy, branches, weights)
    recompute_activations(policy.train())
    passes: list[nn.Module] = []
    for layer in policy.get_base_model().model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, _: passes.append(module))
    assert_same(found(policy, branches, weights, layout), wanted)
    assert len(passes) == 2 * 3  # each layer ran again in the backward pass


@st.composite
def random_branches(draw: st.DrawFn) -> list[Branch]:
    """Three tokens, so that beginnings are shared at every depth."""
    prompts = draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=3))
    branches = []
    for _ in range(draw(st.integers(1, 6))):
        completion = draw(st.lists(st.integers(0, 2), min_size=1, max_size=8))
        indices = draw(st.sets(st.integers(0, len(completion) - 1), min_size=1))
        temperature = draw(st.sampled_from([1.0, 0.6]))
        branches.append(
            Branch(tuple(draw(st.sampled_from(prompts))), tuple(completion), tuple(sorted(indices)), temperature)
        )
    return sorted(branches, key=lambda branch: branch.prompt)


@settings(max_examples=30, deadline=None)
@given(random_branches())
def test_any_tree_equals_separate_sequences(branches: list[Branch]) -> None:
    policy = one_policy("qwen3")
    weights = [torch.linspace(-1.0, 1.5, len(branch.indices)) for branch in branches]
    wanted = expected(policy, branches, weights)
    # Gradients of single tokens may cancel, and then rounding is large beside what is left.
    for layout in (TreeLayout(), RowLayout()):
        actual = found(policy, branches, weights, layout)
        assert_near(torch.cat(actual[0]), torch.cat(wanted[0]))
        assert_near(torch.cat(actual[1]), torch.cat(wanted[1]))
        largest = max(float(gradient.abs().max()) for gradient in wanted[2].values())
        for name, gradient in actual[2].items():
            assert float((gradient - wanted[2][name]).abs().max()) <= 1e-5 * largest


@pytest.mark.parametrize("family", FULL_ATTENTION)
def test_equal_to_a_dense_mask(family: str) -> None:
    """The definition given to transformers' own SDPA as a boolean mask, ``depth`` as positions, trees side by side."""
    branches = hard_branches()
    trees = grow(branches)
    mask = torch.block_diag(*(tree.mask() for tree in trees)).bool()
    ids, depth = (torch.from_numpy(np.concatenate([getattr(t, name) for t in trees])) for name in ("ids", "depth"))
    with torch.no_grad():
        dense = make_model(family, attention="sdpa").get_decoder()
        wanted = dense(input_ids=ids[None], position_ids=depth[None], attention_mask=mask[None, None], use_cache=False)
        states = TreeLayout().run(make_model(family).get_decoder(), branches)
    assert_near(states.hidden, wanted.last_hidden_state[0])


class Products(TorchDispatchMode):
    """Rows of all products whose result is as wide as the vocabulary."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default and made.shape[1] == VOCAB:
            self.rows += made.shape[0]
        return made


def run_counted(
    model: PreTrainedModel, branches: Sequence[Branch], layout: Layout, *chunk: Any
) -> tuple[TokenLogprobs, int, int]:
    """The result, the tokens that the embedding layer saw, and the rows that the head's weight was multiplied with."""
    seen: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].numel()))
    with Products() as products:
        scored = chosen_logprobs(model, branches, layout)
        scored.logprobs.sum().backward()
    hook.remove()
    return scored, sum(seen), products.rows


def test_only_distinct_nodes_and_distinct_choices_are_computed() -> None:
    branches, model = hard_branches(), make_policy("qwen2").get_base_model()
    routes = [branch.prompt + branch.completion[: max(branch.indices)] for branch in branches]
    nodes = {route[:length] for route in routes for length in range(1, len(route) + 1)}
    choices = {
        (branch.prompt + branch.completion[:t], branch.completion[t], branch.temperature)
        for branch in branches
        for t in branch.indices
    }
    scored, tokens, rows = run_counted(model, branches, TreeLayout())
    assert scored.backbone_tokens == tokens == len(nodes)
    assert scored.head_rows == rows == len(choices)
    scored, tokens, rows = run_counted(model, branches, RowLayout())
    assert scored.backbone_tokens == tokens == len(branches) * max(map(len, routes))
    assert rows == scored.head_rows > len(choices)


@settings(max_examples=20, deadline=None)
@given(random_branches(), st.integers(1, 60))
def test_micro_batches_do_not_change_the_numbers(branches: list[Branch], budget: int) -> None:
    model = one_policy("qwen3").get_base_model()
    with torch.no_grad():
        for layout in (TreeLayout(), RowLayout()):
            whole = chosen_logprobs(model, branches, layout)
            packs = list(layout.batches(branches, budget))
            assert sorted(row for rows in packs for row in rows) == list(range(len(branches)))
            for rows in packs:
                part = chosen_logprobs(model, [branches[row] for row in rows], layout)
                assert part.backbone_tokens <= budget or len(rows) == 1
                for row, logprobs, mask in zip(rows, part.logprobs, part.mask, strict=True):
                    assert_near(logprobs[mask], whole.logprobs[row][whole.mask[row]])


def test_rows_are_sorted_by_length_and_trimmed() -> None:
    branches, layout = hard_branches(), RowLayout()
    packs = list(layout.batches(branches, 60))
    lengths = [[len(branches[row].prompt) + max(branches[row].indices) for row in rows] for rows in packs]
    in_order = [length for pack in lengths for length in pack]
    assert in_order == sorted(in_order)
    model = one_policy("qwen2").get_base_model()
    with torch.no_grad():
        for rows, length in zip(packs, lengths, strict=True):
            scored = chosen_logprobs(model, [branches[row] for row in rows], layout)
            assert scored.backbone_tokens == len(rows) * max(length)


def test_bfloat16() -> None:
    policy, branches = make_policy("qwen2"), hard_branches()
    weights = [torch.randn(len(branch.indices)) for branch in branches]
    exact = expected(policy, branches, weights)
    policy.to(torch.bfloat16)
    trees, rows = (found(policy, branches, weights, layout) for layout in (TreeLayout(), RowLayout()))
    for number in (0, 1):
        errors = [(torch.cat(run[number]) - torch.cat(exact[number])).abs().mean() for run in (trees, rows)]
        assert float(errors[0]) < 1.5 * float(errors[1]) < 0.1
    for name, gradient in trees[2].items():
        assert gradient.dtype == torch.bfloat16
        assert float(torch.cosine_similarity(gradient.flatten().float(), exact[2][name].flatten(), dim=0)) > 0.99


class Layer(nn.Module):
    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


@pytest.fixture
def flex_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention as torch runs it without a compiler; its kernels need a GPU or minutes of compiling."""
    monkeypatch.setattr(flex_integration, "WrappedFlexAttention", lambda training: lambda: flex_attention)


@pytest.mark.usefixtures("flex_on_cpu")
@pytest.mark.parametrize(("heads", "groups"), [(4, 1), (4, 2), (6, 3)])
def test_flex_attention_equals_sdpa(heads: int, groups: int) -> None:
    trees = grow(hard_branches())
    nodes = sum(map(len, trees))
    size = nodes + -nodes % FlexTrees.pad
    assert size > nodes
    query = torch.randn(1, heads, size, 16)
    key, value = (torch.randn(1, heads // groups, size, 16) for _ in range(2))
    plans = FlexTrees(trees, query.device), SdpaTrees(trees, query.device, query.dtype)
    with torch.no_grad():
        flex = plans[0].attend(Layer(groups), query, key, value, 0.3)
        sdpa = plans[1].attend(Layer(groups), query[:, :, :nodes], key[:, :, :nodes], value[:, :, :nodes], 0.3)
    assert_near(flex[:, :nodes], sdpa)
    # Padding sees itself alone, so that its output is its own value: finite, and nobody else's.
    own = value.repeat_interleave(groups, dim=1).transpose(1, 2)
    assert_near(flex[:, nodes:], own[:, nodes:])


@pytest.mark.usefixtures("flex_on_cpu")
def test_padded_packs_give_the_same_states(monkeypatch: pytest.MonkeyPatch) -> None:
    branches, backbone = hard_branches(), make_model("qwen3").get_decoder()
    with torch.no_grad():
        wanted = TreeLayout().run(backbone, branches)
        monkeypatch.setattr(lp, "plan_trees", lambda trees, device, dtype, shape: FlexTrees(trees, device))
        padded = TreeLayout().run(backbone, branches)
    assert len(padded.hidden) % FlexTrees.pad == 0
    assert_near(padded.hidden[: len(wanted.hidden)], wanted.hidden)
    for before, after in zip(wanted.places, padded.places, strict=True):
        assert before.tolist() == after.tolist()


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_sdpa_of_a_tree_equals_a_dense_mask(groups: int) -> None:
    """Values and gradients, whatever number of query heads shares a key head."""
    tree = TokenTree(hard_branches()[:26])
    query = torch.randn(1, 4, len(tree), 8, requires_grad=True)
    key, value = (torch.randn(1, 4 // groups, len(tree), 8, requires_grad=True) for _ in range(2))
    repeated = [t.repeat_interleave(groups, dim=1) for t in (key, value)]
    dense = nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=tree.mask(), scale=0.3)
    output = SdpaTrees([tree], query.device, query.dtype).attend(Layer(groups), query, key, value, 0.3)
    weights = torch.randn_like(output)
    assert_near(output.detach(), dense.transpose(1, 2).detach())
    wanted = torch.autograd.grad((dense.transpose(1, 2) * weights).sum(), (query, key, value))
    for gradient, slope in zip(torch.autograd.grad((output * weights).sum(), (query, key, value)), wanted, strict=True):
        assert_near(gradient, slope)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_best_layout(family: str) -> None:
    layout = best_layout(make_policy(family).get_base_model())
    assert isinstance(layout, TreeLayout if family in FULL_ATTENTION else RowLayout)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_other_attention_functions_take_rows(attention: str) -> None:
    assert isinstance(best_layout(make_model("qwen2", attention=attention)), RowLayout)


_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        (MistralConfig(**_SHAPE, num_key_value_heads=2, sliding_window=None), TreeLayout),
        (MistralConfig(**_SHAPE, num_key_value_heads=2, sliding_window=32), RowLayout),
        (Qwen2Config(**_SHAPE, num_key_value_heads=2, use_sliding_window=False, sliding_window=32), TreeLayout),
        (
            Qwen2Config(
                **_SHAPE, num_key_value_heads=2, use_sliding_window=True, sliding_window=32, max_window_layers=1
            ),
            RowLayout,
        ),
        # Its scores are capped, which no tree plan does.
        (Gemma2Config(**_SHAPE, num_key_value_heads=2, head_dim=8, layer_types=["full_attention"] * 2), RowLayout),
        # Its layers do not hand on what they do not know, so the trees would never reach the attention.
        (StableLmConfig(**_SHAPE, num_key_value_heads=4), RowLayout),
        (StableLmConfig(**_SHAPE, num_key_value_heads=2), RowLayout),
        # One key head for all, which the configuration does not name as others do.
        (GPTBigCodeConfig(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4, n_inner=48), TreeLayout),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PretrainedConfig) else value.__name__,
)
def test_what_other_architectures_take(config: PretrainedConfig, layout: type) -> None:
    model = AutoModelForCausalLM.from_config(config, attn_implementation=register(config)).eval()
    chosen = best_layout(model)
    assert isinstance(chosen, layout)
    branches = [branch for branch in hard_branches() if len(branch.prompt) == 7]
    head = split_heads(model)[1]
    with torch.no_grad():
        scored = chosen_logprobs(model, branches, chosen)
        for row, branch in enumerate(branches):
            logits = model(input_ids=torch.tensor([[*branch.prompt, *branch.completion]])).logits[0].float()
            log_softmax = torch.log_softmax(logits[len(branch.prompt) - 1 : -1] / branch.temperature, -1)
            wanted = log_softmax[list(branch.indices), branch.targets]
            assert_near(scored.logprobs[row, : len(wanted)], wanted)
    assert head.weight.shape[0] == VOCAB


@cache
def one_policy(family: str) -> PeftModel:
    return make_policy(family)
