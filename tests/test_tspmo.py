"""T-SPMO's trie against a dictionary of all prefixes, its algebra, and its gradient against REINFORCE."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import igrpo_lite.tiny
from igrpo_lite.algorithms.tokens.base import Learning
from igrpo_lite.algorithms.tokens.t_spmo import prefix_matching, transitions

END = 7  # never drawn inside a completion
VOCAB = 3
NOTHING = Learning((), (), (), 0.0)

tokens = st.lists(st.integers(0, VOCAB - 1), max_size=6)
# Quarters are exact in binary, and so are their sums.
reward = st.integers(-4, 4).map(lambda n: n / 4)
any_group = st.lists(st.tuples(tokens, reward), min_size=1, max_size=12)  # some end inside others
ended_group = st.lists(st.tuples(tokens.map(lambda ids: [*ids, END]), reward), min_size=1, max_size=12)
many = settings(max_examples=300, deadline=None)


def split(group):
    return [tuple(ids) for ids, _ in group], [value for _, value in group]


def through(completions):
    """Rows by prefix, for every prefix of every completion."""
    rows = defaultdict(list)
    for row, ids in enumerate(completions):
        for depth in range(len(ids) + 1):
            rows[ids[:depth]].append(row)
    return rows


def mean(values):
    return sum(map(Fraction, values)) / len(values)


def oracle(completions, rewards, start=0):
    """The definition, prefix by prefix: (row, index, advantage, visits) of every pair that learns."""
    rows = through(completions)
    found = []
    for prefix, members in rows.items():
        if len(prefix) < start or len(members) < 2:
            continue
        ways = defaultdict(list)  # next token, or None where the completion ends
        for row in members:
            ways[completions[row][len(prefix)] if len(completions[row]) > len(prefix) else None].append(row)
        for token, takers in ways.items():
            if token is None:
                continue
            advantage = mean([rewards[row] for row in takers]) - mean([rewards[row] for row in members])
            if advantage:
                found.append((takers[0], len(prefix), advantage, len(members)))
    return sorted(found)


def assert_same(found, expected):
    assert [(p.row, p.index, p.visits) for p in found] == [(r, t, n) for r, t, _, n in expected]
    assert [p.advantage for p in found] == pytest.approx([float(a) for _, _, a, _ in expected], abs=1e-12)


def by_pair(completions, pairs):
    """Advantage by the tokens up to and with the one that learns."""
    table = {completions[p.row][: p.index + 1]: p.advantage for p in pairs}
    assert len(table) == len(pairs)  # no pair twice
    return table


@many
@given(any_group)
def test_every_trie_equals_the_dictionary_of_all_prefixes(group):
    completions, rewards = split(group)
    assert_same(transitions(completions, rewards), oracle(completions, rewards))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 90))
def test_long_completions_equal_it_too(seed, start):
    """Long common parts that end anywhere, which the short ones do not have."""
    rng = random.Random(seed)
    completions = [tuple(rng.randrange(10**6) for _ in range(rng.randint(start, 300)))]
    for _ in range(rng.randrange(9)):
        source = rng.choice(completions)
        cut = rng.randint(start, len(source))
        completions.append(source[:cut] + tuple(rng.randrange(2) for _ in range(rng.choice([0, 1, 40]))))
    rewards = [rng.randrange(5) / 4 for _ in completions]
    assert_same(transitions(completions, rewards, start), oracle(completions, rewards, start))


def test_by_hand():
    completions, rewards = [(1, 2, 9), (1, 3, 9), (1, 2, 4, 9), (5, 9)], [1.0, 0.0, 0.0, 1.0]
    # V: root 1/2; (1) 1/3; (1,2) 1/2
    pairs = transitions(completions, rewards)
    assert_same(
        pairs,
        [
            (0, 0, Fraction(-1, 6), 4),
            (0, 1, Fraction(1, 6), 3),
            (0, 2, Fraction(1, 2), 2),
            (1, 1, Fraction(-1, 3), 3),
            (2, 2, Fraction(-1, 2), 2),
            (3, 0, Fraction(1, 2), 4),
        ],
    )
    learning = prefix_matching(completions, rewards)
    assert learning[0].indices == (0, 1, 2)
    assert learning[0].weights == (1.0, 1.0, 1.0)
    assert learning[0].advantages == pytest.approx((-1 / 6, 1 / 6, 1 / 2))
    assert [row.count for row in learning] == [3.0, 1.0, 1.0, 1.0]


@many
@given(any_group)
def test_advantages_of_a_node_sum_to_zero_by_count(group):
    """An end is a continuation too; only it has no token to show its share on."""
    completions, rewards = split(group)
    rows = through(completions)
    table = by_pair(completions, transitions(completions, rewards))
    for prefix, members in rows.items():
        ended = [rewards[row] for row in members if completions[row] == prefix]
        if len(ended) == len(members):
            continue
        following = {completions[row][: len(prefix) + 1] for row in members if completions[row] != prefix}
        total = sum(len(rows[longer]) * table.get(longer, 0.0) for longer in following)
        share = sum(Fraction(r) - mean([rewards[row] for row in members]) for r in ended)
        assert total + float(share) == pytest.approx(0.0, abs=1e-9)


@many
@given(any_group)
def test_advantages_along_a_completion_telescope(group):
    completions, rewards = split(group)
    rows = through(completions)
    table = by_pair(completions, transitions(completions, rewards))
    root = mean(rewards)
    for ids in completions:
        total = sum(table.get(ids[:depth], 0.0) for depth in range(1, len(ids) + 1))
        assert total == pytest.approx(float(mean([rewards[row] for row in rows[ids]]) - root), abs=1e-9)


@many
@given(ended_group)
def test_at_most_two_per_distinct_completion_but_one(group):
    completions, rewards = split(group)
    assert len(transitions(completions, rewards)) <= max(0, 2 * (len(set(completions)) - 1))


def test_the_bound_is_reached():
    """Each completion parts from the rest at its own place, far down: as deep a trie as there are completions."""
    rng = random.Random(0)
    trunk = tuple(rng.randrange(50_000) for _ in range(4096))
    cuts = sorted(rng.sample(range(4000), 63))
    completions = [(*trunk[:cut], 50000, *trunk[cut:4095]) for cut in cuts] + [trunk]
    rewards = [rng.random() for _ in completions]
    order = rng.sample(range(64), 64)
    learning = prefix_matching([completions[i] for i in order], [rewards[i] for i in order])
    assert sum(row.count for row in learning) == 2 * 63
    assert sorted({index for row in learning for index in row.indices}) == cuts


@many
@given(any_group, st.integers(2, 4))
def test_duplicates_collapse(group, copies):
    """Sampling everything ``copies`` times changes no value, and nothing is counted twice."""
    completions, rewards = split(group)
    once = transitions(completions, rewards)
    again = transitions(completions * copies, rewards * copies)
    assert [(p.row, p.index, p.visits * copies) for p in once] == [(p.row, p.index, p.visits) for p in again]
    assert [p.advantage for p in again] == pytest.approx([p.advantage for p in once], abs=1e-12)


def test_one_text_with_several_rewards_teaches_nothing():
    """A reward that is not a function of the tokens: there is no choice to credit."""
    assert transitions([(1, 2)] * 4, [0.0, 1.0, 1.0, 0.0]) == []


@settings(deadline=None)
@given(st.lists(tokens, min_size=1, max_size=12), st.floats(-10, 10, width=32))
def test_equal_rewards_teach_nothing(completions, value):
    learning = prefix_matching(completions, [value] * len(completions))
    assert learning == [NOTHING] * len(completions)


def test_means_that_differ_by_rounding_only_are_equal():
    """Accuracy 1 and format 0.1, in one completion or spread over two: 0.55 either way, but not in float32."""
    rewards = torch.tensor([1.1, 0.0, 1.0, 0.1]).tolist()
    assert sum(rewards[:2]) != sum(rewards[2:])
    pairs = transitions([(1, 8), (1, 9), (2, 8), (2, 9)], rewards)
    assert {p.index for p in pairs} == {1}
    assert len(transitions([(1,), (2,)], [0.7, 0.701])) == 2


def test_completions_that_differ_at_once():
    learning = prefix_matching([(4, 1, 9), (5, 1, 9)], [1.0, 0.0])
    assert learning == [Learning((0,), (1.0,), (0.5,), 1.0), Learning((0,), (1.0,), (-0.5,), 1.0)]


def test_end_token_against_going_on():
    learning = prefix_matching([(4, END), (4, 5, END)], [1.0, 0.0])
    assert learning == [Learning((1,), (1.0,), (0.5,), 1.0), Learning((1,), (1.0,), (-0.5,), 1.0)]


def test_a_completion_cut_inside_another():
    """Ending is one of the continuations of (4,), without a token; going on is judged against it."""
    learning = prefix_matching([(4,), (4, 5, END), (4,)], [1.0, 0.0, 1.0])
    assert learning[0] == learning[2] == NOTHING
    assert learning[1].indices == (1,)
    assert learning[1].advantages == pytest.approx((-2 / 3,))


def test_an_empty_completion_ends_at_the_root():
    assert prefix_matching([(), (4, 5)], [0.0, 1.0])[1] == Learning((0,), (1.0,), (0.5,), 1.0)


@many
@given(any_group, st.lists(st.integers(0, 50), min_size=1, max_size=20))
def test_replay_is_the_trie_of_the_continuations(group, prefix):
    """Below the restart all is as if the continuations were the whole; above it nothing learns."""
    completions, rewards = split(group)
    replayed = [(*prefix, *ids) for ids in completions]
    found = transitions(replayed, rewards, start=len(prefix))
    assert [(p.row, p.index - len(prefix), p.advantage, p.visits) for p in found] == [
        (p.row, p.index, p.advantage, p.visits) for p in transitions(completions, rewards)
    ]


def test_replay_leaves_the_values_above_it_alone():
    """The forced visits of a replay would move the values of the restart's ancestors, were they merged."""
    main, rewards = [(1, 2, 9), (1, 3, 9), (5, 6, 9)], [1.0, 0.0, 0.0]
    before = transitions(main, rewards)
    fresh, earned = [(1, 2, 4, 9), (1, 2, 8, 9)], [0.0, 1.0]
    sub = transitions([main[0], *fresh], [rewards[0], *earned], start=2)
    assert all(pair.index >= 2 for pair in sub)
    assert transitions(main, rewards) == before
    merged = by_pair(main + fresh, transitions(main + fresh, rewards + earned))
    assert merged[(1,)] != pytest.approx(by_pair(main, before)[(1,)])


@pytest.mark.parametrize("completions", [[(1, 2, 3), (1, 4, 3)], [(1, 2, 3), (1,)], [(1,)]])
def test_replay_needs_a_common_beginning(completions):
    with pytest.raises(ValueError, match="share the tokens"):
        transitions(completions, [1.0] * len(completions), start=2)


def test_one_reward_per_completion():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        transitions([(1,), (2,)], [1.0])


@settings(deadline=None)
@given(any_group, st.data())
def test_unscored_completions_are_left_out(group, data):
    completions, rewards = split(group)
    scored = [data.draw(st.booleans()) for _ in group]
    found = prefix_matching(completions, [r if keep else math.nan for r, keep in zip(rewards, scored, strict=True)])
    kept = [row for row, keep in enumerate(scored) if keep]
    alone = prefix_matching([completions[row] for row in kept], [rewards[row] for row in kept])
    assert [found[row] for row in kept] == alone
    assert all(found[row] == NOTHING for row in range(len(group)) if not scored[row])


@settings(deadline=None)
@given(any_group, st.randoms(use_true_random=False))
def test_order_of_the_completions_changes_the_owners_only(group, rng):
    shuffled = rng.sample(group, len(group))
    tables = []
    for some in (group, shuffled):
        completions, rewards = split(some)
        tables.append(by_pair(completions, transitions(completions, rewards)))
        for pair in transitions(completions, rewards):
            owned = completions[pair.row][: pair.index + 1]
            assert pair.row == min(row for row, ids in enumerate(completions) if ids[: pair.index + 1] == owned)
    assert tables[0] == tables[1]


@settings(deadline=None)
@given(any_group)
def test_contributions_are_the_transitions_by_row(group):
    completions, rewards = split(group)
    pairs = transitions(completions, rewards)
    learning = prefix_matching([list(ids) for ids in completions], rewards)
    assert len(learning) == len(group)
    for row, found in enumerate(learning):
        own = [pair for pair in pairs if pair.row == row]
        assert found.indices == tuple(pair.index for pair in own) == tuple(sorted(set(found.indices)))
        assert found.weights == (1.0,) * len(own)
        assert found.advantages == tuple(pair.advantage for pair in own)
        assert found.count == sum(found.weights)


def test_token_ids_part_where_the_text_does_not():
    """The same text in other tokens is another choice of the policy's."""
    path = Path(igrpo_lite.tiny.__file__).parent / "model" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    whole, letters = [tokenizer.token_to_id("on")], [tokenizer.token_to_id("o"), tokenizer.token_to_id("n")]
    assert tokenizer.decode(whole) == tokenizer.decode(letters)
    assert len(transitions([whole, letters], [1.0, 0.0])) == 2
    # Halves of characters: each alone is shown as the same replacement sign.
    halves = tokenizer.encode("é").ids[:1], tokenizer.encode("ż").ids[:1]
    assert halves[0] != halves[1]
    assert tokenizer.decode(halves[0]) == tokenizer.decode(halves[1])
    assert len(transitions(halves, [1.0, 0.0])) == 2


def log_policy(completions):
    """A softmax policy with its own logits for every prefix, so that no two transitions share a parameter."""
    prefixes = {prefix: place for place, prefix in enumerate(through(completions))}
    logits = torch.randn(len(prefixes), END + 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    logits.requires_grad_()
    table = torch.log_softmax(logits, dim=1)
    return logits, lambda ids, index: table[prefixes[ids[:index]], ids[index]]


@settings(max_examples=60, deadline=None)
@given(any_group.filter(lambda group: len(group) > 1))
def test_each_transition_once_for_every_taker_is_reinforce_with_the_prefix_baseline(group):
    """``sum_i sum_t (r_i - b(p_it)) grad log pi``, over every token of every completion; b is the mean reward of the
    completions through the prefix."""
    completions, rewards = split(group)
    rows = through(completions)
    logits, log_pi = log_policy(completions)
    reinforce = logits.sum() * 0.0
    for row, ids in enumerate(completions):
        for index in range(len(ids)):
            baseline = mean([rewards[r] for r in rows[ids[:index]]])
            reinforce += float(rewards[row] - baseline) * log_pi(ids, index)
    (expected,) = torch.autograd.grad(reinforce, logits)

    logits, log_pi = log_policy(completions)
    objective = logits.sum() * 0.0
    for ids, learning in zip(completions, prefix_matching(completions, rewards), strict=True):
        for index, advantage in zip(learning.indices, learning.advantages, strict=True):
            objective += len(rows[ids[: index + 1]]) * advantage * log_pi(ids, index)
    (found,) = torch.autograd.grad(objective, logits)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
