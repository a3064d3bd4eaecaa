"""What a step runs, as the planner counts it, against the code that runs it."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_parts import group, transformers_config
from transformers import DynamicCache

from igrpo_lite.algorithms.tokens.s_grpo import sgrpo_indices
from igrpo_lite.config.resolve import resolve
from igrpo_lite.planning import memory
from igrpo_lite.planning.gpus import find_gpu
from igrpo_lite.planning.memory import CONTEXT, Setup, captured_graphs
from igrpo_lite.planning.models import find_model
from igrpo_lite.planning.work import (
    STAGE2_WORDS,
    Tree,
    fullest,
    last_index,
    learning_trees,
    longest,
    typical,
)
from igrpo_lite.policy.logprobs import RowLayout
from igrpo_lite.policy.prompting import check_context, prompt_builder
from igrpo_lite.policy.tree import TokenTree, grow, pack
from igrpo_lite.sampling import slots, vllm_engine
from igrpo_lite.sampling.transformers import _PREFILL_TOKENS
from igrpo_lite.types import Problem

sizes = st.tuples(st.integers(1, 4), st.integers(1, 30), st.integers(1, 5), st.integers(1, 20), st.integers(1, 120))


@settings(max_examples=60, deadline=None)
@given(sizes=sizes)
def test_packs_are_the_updates(sizes):
    """Equal trees, packed by the update's own code: the fullest micro-batch is at least as large as any of these."""
    trees, prompt, leaves, leaf, budget = sizes
    branches = group(trees, prompt, leaves, leaf)
    real = Counter(sum(map(len, grow([branches[row] for row in rows]))) for rows in pack(branches, budget))
    mine = fullest(Counter({Tree(prompt, leaves, leaf, leaf): trees}), budget, in_rows=False)
    assert max(real) <= mine.tokens <= max(budget, prompt + leaf, max(real))
    assert mine.leaves * leaf + mine.causal[0] * prompt == pytest.approx(mine.tokens, abs=1)


@settings(max_examples=60, deadline=None)
@given(sizes=sizes)
def test_rows_are_the_updates(sizes):
    trees, prompt, leaves, leaf, budget = sizes
    branches = group(trees, prompt, leaves, leaf)
    real = Counter(len(rows) * (prompt + leaf) for rows in RowLayout().batches(branches, budget))
    mine = fullest(Counter({Tree(prompt, leaves, leaf, leaf): trees}), budget, in_rows=True)
    assert max(real) <= mine.tokens <= max(budget, prompt + leaf)
    assert mine.causal[0] * (prompt + leaf) == pytest.approx(mine.tokens, abs=1)


def test_a_tree_counts_as_the_real_one():
    branches = group(1, 12, 3, 5)
    tree = Tree(12, 3, 5, 6)
    real = TokenTree(branches)
    assert len(real) == tree.nodes
    assert real.trunk == tree.trunk
    assert [len(nodes) for nodes in real.leaves] == [tree.leaf] * tree.leaves


@pytest.mark.parametrize("given", [{}, {"algorithm": "grpo"}, {"algorithm": "igrpo-joint", "num_generations": 9}])
def test_stages_are_the_rollouts(given):
    config = resolve(given | {"prompts_per_step": 3})
    lengths = longest(config)
    expected = {"grpo": {lengths.prompt}, "igrpo": {lengths.refined}, "igrpo-joint": {lengths.prompt, lengths.refined}}
    trees = learning_trees(config, lengths)
    assert {tree.trunk for tree in trees} == expected[config.algorithm]
    assert sum(trees.values()) == 3 * len(expected[config.algorithm])


@pytest.mark.parametrize("placement", ["plain", "multi-turn"])
def test_what_stage_2_puts_around_a_draft(placement):
    prompts = prompt_builder(resolve({"draft_placement": placement}))
    question = "What is 12 plus 30?"
    first = prompts.first(question)
    assert len(prompts.second(question, first, ()).ids) - len(first.ids) <= STAGE2_WORDS


def test_lengths():
    config = resolve({"max_prompt_length": 400, "max_completion_length": 600, "max_draft_length": 200})
    assert longest(config).refined == 400 + STAGE2_WORDS + 200
    assert longest(config).sequence == 400 + STAGE2_WORDS + 250 + 600
    assert typical(config) == replace(longest(config), prompt=100, completion=300)
    assert typical(config, completion=9000) == replace(longest(config), prompt=100)
    assert typical(config, completion=50).draft == 50


@pytest.mark.parametrize(("alpha", "p", "k"), [(0, 0.4, 0), (100, 0.5, 300), (20, 0.3, 50), (50, 0.5, 30)])
@pytest.mark.parametrize("length", [40, 600])
def test_s_grpo_ends_where_the_selection_ends(alpha, p, k, length):
    """Against many draws of the selection itself: nearly all end by the place that is reckoned with, and not long
    before it."""
    values = {"tokens": "s-grpo", "sgrpo_alpha": alpha, "sgrpo_p": p, "sgrpo_k": k}
    end, chosen = last_index(resolve(values), length)
    draws = [sgrpo_indices(length, alpha, p, k, random.Random(seed)) for seed in range(400)]
    last = sorted(draw[-1] + 1 for draw in draws if draw)
    assert sum(place <= end for place in last) >= 0.95 * len(last)
    assert end <= last[-1] * 1.1 + 1
    assert chosen == pytest.approx(sum(map(len, draws)) / len(draws), rel=0.1)


@pytest.mark.parametrize("tokens", ["all", "s-grpo", "t-spmo", "entropy"])
def test_selections_run_no_more_than_all_tokens(tokens):
    config = resolve({"tokens": tokens, "max_completion_length": 900})
    (tree,) = learning_trees(config, longest(config))
    (everything,) = learning_trees(resolve({"max_completion_length": 900}), longest(config))
    assert tree.nodes <= everything.nodes
    assert tree.rows <= everything.rows
    assert (tree.nodes < everything.nodes) == (tokens in ("s-grpo", "t-spmo"))


def test_replays_add_trees():
    config = resolve({"tokens": "t-spmo", "tspmo_replay": 3, "prompts_per_step": 2})
    assert sorted(learning_trees(config, longest(config)).values()) == [2, 4]


@pytest.mark.parametrize("alias", ["qwen2-1.5b", "qwen3-0.6b", "llama3.2-1b", "smollm2-1.7b"])
def test_kv_cache_of_a_token(alias):
    shape = find_model(alias).shape
    config = transformers_config(alias, shape)
    assert shape.kv_bytes() == vllm_engine.kv_bytes_per_token(config, torch.bfloat16)


def setup_of(alias: str, gpu: str, releases_kv: bool = True, **values: object) -> Setup:
    return Setup(resolve({"model": alias, **values}), find_model(alias).shape, find_gpu(gpu), False, False, releases_kv)


@pytest.mark.parametrize("releases_kv", [True, False])
@pytest.mark.parametrize("max_num_seqs", [1, 16, 128])
@pytest.mark.parametrize("alias", ["qwen2-1.5b", "qwen3-4b"])
def test_the_kv_cache_is_the_engines(alias, max_num_seqs, releases_kv, monkeypatch):
    setup = setup_of(alias, "4090", releases_kv, max_num_seqs=max_num_seqs)
    total = setup.gpu.memory_bytes
    free = total - CONTEXT - 4 * setup.adapter.parameters
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free, total))
    options = vllm_engine.EngineOptions(
        model=alias,
        revision=None,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
        lora_rank=16,
        max_model_len=setup.sequence_tokens + 1,
        max_num_seqs=max_num_seqs,
        weight_bytes=setup.weight_bytes,
    )
    room = vllm_engine.kv_cache_bytes(options, transformers_config(alias, setup.shape), releases_kv)
    assert setup.kv_cache_bytes == pytest.approx(room, rel=1e-6)


def test_room_of_the_plain_sampler_is_its_slots():
    """The slots' own tensors, for the longest sequence that may come."""
    setup = setup_of("qwen2-0.5b", "t4", sampler="transformers", max_num_seqs=3, eval_size=1, prompts_per_step=2)
    shape = setup.shape
    cache = slots.SlotCache(3, torch.device("meta"))
    prompt = DynamicCache()
    for layer in range(shape.layers):
        part = torch.empty(1, shape.kv_heads, 1, shape.head_dim, dtype=torch.float16, device="meta")
        prompt.update(part, part, layer)
    cache.reserve(slots.PrefixKV(prompt, 0, 1, setup.sequence_tokens))
    taken = sum(block.nbytes for block in (*cache.keys, *cache.values))
    prompts = 2 * longest(setup.config).refined * shape.kv_bytes()
    assert setup.kv_cache_bytes == taken + prompts


def test_constants_are_the_codes_own():
    assert _PREFILL_TOKENS == memory.PREFILL
    assert slots._CAPACITY_STEP == memory.SLOT_STEP
    assert captured_graphs(256) == 172  # vLLM's log with LoRA: 102 pieces and 70 whole (vllm pull request 40044)


def test_the_policy_as_judge_needs_room_for_what_it_reads_and_writes():
    """The engine's length is what the run itself finds for the bundled model's prompts."""
    settings = {"reward_funcs": ["accuracy", "judge"], "judge_max_tokens": 200, "max_prompt_length": 120}
    config = resolve(settings | {"judge_by": "policy", "model": "tiny"})
    prompts = prompt_builder(config)
    problem = Problem("0", "How many apples are left? " * 3, "3")
    real = check_context(config, prompts, problem)
    spare = config.max_prompt_length - len(prompts.first(problem.question).ids)
    assert longest(config).sequence == pytest.approx(real + spare, rel=0.2)  # its tokens are shorter
    assert longest(resolve(settings | {"model": "tiny", "judge_url": "http://localhost:1/v1"})).replies == 0
