"""Token trees and their packing against sets of prefixes: all that a tree says about a node follows from its prefix."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import groupby, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from igrpo_lite.policy.tree import Branch, TokenTree, grow, pack
from igrpo_lite.policy.tree_attention import FlexTrees

PROMPTS = ((7,), (7, 1), (7, 1, 1), (2, 2, 2, 2, 2))
Prefix = tuple[int, ...]


@st.composite
def branches_of(draw: st.DrawFn, prompts: Sequence[Prefix] = PROMPTS, most: int = 8) -> list[Branch]:
    """Branches over an alphabet of two tokens, so that beginnings are often shared, and whole completions as well."""
    found = []
    for _ in range(draw(st.integers(1, most))):
        completion = tuple(draw(st.lists(st.integers(1, 2), min_size=1, max_size=7)))
        indices = draw(st.sets(st.integers(0, len(completion) - 1), min_size=1))
        temperature = draw(st.sampled_from([1.0, 0.7]))
        found.append(Branch(draw(st.sampled_from(prompts)), completion, tuple(sorted(indices)), temperature))
    return found


def route(branch: Branch) -> Prefix:
    """What the model must read to score a branch: its prompt and its completion before the last chosen token."""
    return branch.prompt + branch.completion[: max(branch.indices)]


def needed(branches: Sequence[Branch]) -> set[Prefix]:
    """The prefixes that some branch needs a state of, and those before them in the prompt."""
    return {route(branch)[:length] for branch in branches for length in range(1, len(route(branch)) + 1)}


def prefixes(tree: TokenTree) -> list[Prefix]:
    """The token ids that each node sees, by the tree's mask."""
    return [tuple(tree.ids[row.numpy()].tolist()) for row in tree.mask()]


@settings(deadline=None)
@given(branches_of(prompts=PROMPTS[1:2]))
def test_nodes_are_the_distinct_prefixes_and_see_what_stands_before_them(branches: list[Branch]) -> None:
    tree = TokenTree(branches)
    found = prefixes(tree)
    assert len(found) == len(tree) == len(set(found))
    assert set(found) == needed(branches)
    assert tree.depth.tolist() == [len(prefix) - 1 for prefix in found]
    for i, (prefix, end) in enumerate(zip(found, tree.end, strict=True)):
        below = [j for j, other in enumerate(found) if other[: len(prefix)] == prefix]
        assert below == list(range(i, end))  # depth-first: a node's descendants are the nodes up to ``end``
        assert [bool(seen) for seen in tree.mask()[i]] == [prefix[: len(other)] == other for other in found]


@settings(deadline=None)
@given(branches_of(prompts=PROMPTS[2:3]))
def test_each_chosen_token_is_predicted_by_what_stands_before_it(branches: list[Branch]) -> None:
    tree = TokenTree(branches)
    found = prefixes(tree)
    for branch, nodes in zip(branches, tree.predictors, strict=True):
        assert [found[node] for node in nodes] == [branch.prompt + branch.completion[:t] for t in branch.indices]
        assert branch.targets == [branch.completion[t] for t in branch.indices]


@settings(deadline=None)
@given(branches_of(prompts=PROMPTS[:1]))
def test_trunk_and_leaves_cover_the_tree(branches: list[Branch]) -> None:
    tree = TokenTree(branches)
    found, routes = prefixes(tree), {route(branch) for branch in branches}
    shared = [p for p in found if all(r[: len(p)] == p for r in routes)]
    assert found[: tree.trunk] == shared
    ends = {r for r in routes if not any(other != r and other[: len(r)] == r for other in routes)}
    if ends == {found[tree.trunk - 1]}:
        assert tree.leaves == []  # nothing stands below the trunk
    else:
        assert sorted(found[leaf[-1]] for leaf in tree.leaves) == sorted(ends)
    for leaf in tree.leaves:
        assert [found[node] for node in leaf] == [
            found[leaf[-1]][:n] for n in range(tree.trunk + 1, len(leaf) + tree.trunk + 1)
        ]
    assert set(range(tree.trunk)).union(*map(set, tree.leaves)) == set(range(len(tree)))


def test_an_example() -> None:
    """By hand: one completion the beginning of another, then three that part. The last tokens predict nothing."""
    prompt = (9, 8)
    branches = [Branch(prompt, (5, 6, 7), (0, 1, 2)), Branch(prompt, (5, 6, 4, 3), (0, 3)), Branch(prompt, (5,), (0,))]
    tree = TokenTree(branches)
    assert tree.ids.tolist() == [9, 8, 5, 6, 4]
    assert tree.depth.tolist() == [0, 1, 2, 3, 4]
    assert tree.end.tolist() == [5] * 5
    assert tree.trunk == 2
    assert [nodes.tolist() for nodes in tree.predictors] == [[1, 2, 3], [1, 4], [1]]
    assert [leaf.tolist() for leaf in tree.leaves] == [[2, 3, 4]]
    parted = TokenTree([Branch(prompt, (5, 6, 7), (2,)), Branch(prompt, (4, 1), (1,)), Branch(prompt, (5, 3, 1), (2,))])
    assert parted.ids.tolist() == [9, 8, 4, 5, 3, 6]
    assert parted.depth.tolist() == [0, 1, 2, 2, 3, 3]
    assert parted.end.tolist() == [6, 6, 3, 6, 5, 6]


@settings(deadline=None)
@given(branches_of(), st.integers(1, 40))
def test_packs_keep_to_the_budget_and_hold_every_branch_once(branches: list[Branch], budget: int) -> None:
    packs = list(pack(branches, budget))
    assert sorted(row for rows in packs for row in rows) == list(range(len(branches)))
    for rows in packs:
        trees = grow([branches[row] for row in rows])
        assert len(trees) == len({branches[row].prompt for row in rows})  # equal prompts stand together
        assert sum(map(len, trees)) == sum(len(needed(same)) for same in by_prompt([branches[row] for row in rows]))
        assert sum(map(len, trees)) <= budget or len(rows) == 1


@settings(deadline=None)
@given(branches_of(), st.integers(1, 40))
def test_a_split_repeats_no_more_than_it_must(branches: list[Branch], budget: int) -> None:
    packs = [[branches[row] for row in rows] for rows in pack(branches, budget)]
    whole = [len(needed(same)) for same in by_prompt(branches)]
    repeated = 0
    for before, after in pairwise(packs):
        last, first = before[-1], after[0]
        size = sum(len(tree) for tree in grow(before))
        if last.prompt == first.prompt:
            repeated += len({*prefixes_of(last)} & {*prefixes_of(first)})
            assert sum(len(tree) for tree in grow([*before, first])) > budget
        else:  # the next tree is kept whole where a pack can hold it
            tree = len(needed([branch for branch in branches if branch.prompt == first.prompt]))
            assert size + len(route(first)) > budget or size + tree > budget >= tree
    assert sum(len(tree) for rows in packs for tree in grow(rows)) == sum(whole) + repeated
    if max(whole) <= budget:
        assert repeated == 0


@pytest.mark.parametrize("budget", [10, 25, 10**9])
def test_a_group_in_any_order_packs_alike(budget: int) -> None:
    """Four groups of three: neighbours in the tree share a pack, whatever order they come in."""
    branches = [Branch((g, g), (t, t, 1, 2), (0, 3)) for t in (1, 2, 1) for g in range(4)]
    counts = [sum(len(t) for t in grow([branches[row] for row in rows])) for rows in pack(branches, budget)]
    assert sum(counts) == 4 * 8
    assert len(counts) == {10: 4, 25: 2, 10**9: 1}[budget]


def by_prompt(branches: Sequence[Branch]) -> list[list[Branch]]:
    return [list(same) for _, same in groupby(sorted(branches, key=lambda b: b.prompt), key=lambda b: b.prompt)]


def prefixes_of(branch: Branch) -> list[Prefix]:
    return [route(branch)[:length] for length in range(1, len(route(branch)) + 1)]


@pytest.mark.parametrize("seed", range(4))
def test_flex_blocks_are_those_of_the_formula(seed):
    """Made from ``end`` alone; torch makes them from every pair of nodes."""
    r = random.Random(seed)
    trees = []
    for _ in range(3):
        prompt = tuple(r.randrange(9) for _ in range(r.randint(5, 300)))
        rows = [tuple(r.randrange(9) for _ in range(r.randint(2, 250))) for _ in range(5)]
        trees.append(TokenTree([Branch(prompt, row, (len(row) - 1,)) for row in rows]))
    found = FlexTrees(trees, torch.device("cpu")).block_mask
    nodes = sum(map(len, trees))
    size = nodes + -nodes % FlexTrees.pad
    wanted = create_block_mask(found.mask_mod, None, None, size, size, device="cpu")
    assert torch.equal(found.to_dense(), wanted.to_dense())
    for counts in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(found, counts), getattr(wanted, counts)), counts
