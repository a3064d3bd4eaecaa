"""T-SPMO: token-level advantages where the completions of a group part (arXiv 2504.20834, Lee and Tong).

The completions of one prompt form a trie on token ids. For a prefix p and a next token v,

    n(p)     completions with prefix p
    V(p)     mean reward of these
    A(p, v)  V(p + v) - V(p)                raw reward units, not divided by a standard deviation

and J = mean over (p, v) of A(p, v) log pi(v | p). Only prefixes that are continued in at least two ways have
advantages other than 0; D distinct completions have at most 2 (D - 1) such transitions. This is our reading of the
paper's idea; each transition counts once, however many completions took it, and the mean is over the whole step.

**A completion that ends inside another one** (cut at a length limit, or without end token) counts in n and V of its
prefixes, and its end is one more way to continue the last of them, though one without a token: others that go on there
are compared with it, even if they all go on with the same token. So the advantages along any completion that goes on
still sum to its reward minus V of the root, and the count-weighted sum remains REINFORCE with the prefix's value as
baseline. What is left of the ended completion, its reward minus V where it ends, falls on no token.

In the common form of the objectives: T_j = the transitions that completion j is the first to take, A_jt = A(p, v),
w_jt = 1, counted |T_j|, and one mean over all of the step whatever ``loss_type`` is. The clip stays.

**Replay** (algorithms/replay.py, ``tspmo_replay``, off): fresh continuations from inside one success and one failure of
the group, a trie of their own rooted where they restart.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from igrpo_lite.algorithms.groups import Groups, Place
from igrpo_lite.algorithms.plans import Barrier, Plan
from igrpo_lite.algorithms.replay import Replay, choose_restarts, replay
from igrpo_lite.algorithms.tokens.base import Learning, Tokens
from igrpo_lite.config import RunConfig
from igrpo_lite.types import Group

_NOISE = 2.0**-21
"""Share of the largest reward below which an advantage is the rounding of float32 rewards: means that are equal differ
in the last digits, and as learning transitions they would only swell the normaliser."""


@dataclass(frozen=True, slots=True)
class Transition:
    """A (prefix, next token) pair that learns.

    Attributes:
        row: the first completion that owns the pair; its loss is attached there, once for all owners.
        index: token position in that completion.
        advantage: of the pair, in reward units; never 0.
        visits: completions that share the prefix, n(p).
    """

    row: int
    index: int
    advantage: float
    visits: int


@dataclass(frozen=True, slots=True)
class _Node:
    """A prefix of ``depth`` tokens that is continued in at least two ways; places among the sorted completions: of all
    with this prefix, and of those with each next token."""

    depth: int
    group: range
    children: list[range]


def transitions(completions: Sequence[Sequence[int]], rewards: Sequence[float], start: int = 0) -> list[Transition]:
    """All transitions of a group that learn, ordered by row and index.

    Args:
        completions: token ids of the completions of one prompt.
        rewards: one per completion; ``nan`` marks one that no reward scored, which is left out altogether.
        start: leading tokens that all completions have in common because they were given, not sampled (T-SPMO's
            replay): the trie is rooted behind them and nothing above learns.

    Raises:
        ValueError: if the completions are not as many as the rewards, or differ before ``start``.
    """
    scored = [row for row, reward in zip(range(len(completions)), rewards, strict=True) if not math.isnan(reward)]
    rows = sorted(scored, key=lambda row: tuple(completions[row]))
    ids = [tuple(completions[row]) for row in rows]
    sorted_rewards = [rewards[row] for row in rows]
    common = [_common_prefix(a, b) for a, b in pairwise(ids)]
    if any(len(row) < start for row in ids) or any(length < start for length in common):
        raise ValueError(f"completions that are replayed from token {start} must share the tokens before it")
    noise = _NOISE * max(map(abs, sorted_rewards), default=0.0)
    found = []
    for node in _branchings(ids, common):
        for child in node.children:
            advantage = _mean(sorted_rewards, child) - _mean(sorted_rewards, node.group)
            if abs(advantage) > noise:
                owner = min(rows[place] for place in child)
                found.append(Transition(owner, node.depth, advantage, len(node.group)))
    return sorted(found, key=lambda pair: (pair.row, pair.index))


def prefix_matching(completions: Sequence[Sequence[int]], rewards: Sequence[float], start: int = 0) -> list[Learning]:
    """The same as :func:`transitions`, as what each completion contributes to the loss, one per completion.

    A pair that several completions share is in the first of them only. The counts add up to the normaliser of the
    objective; they are 0 for completions without a pair of their own and for those no reward scored.
    """
    owned: list[list[Transition]] = [[] for _ in completions]
    for pair in transitions(completions, rewards, start):
        owned[pair.row].append(pair)
    return [
        Learning(
            indices=tuple(pair.index for pair in pairs),
            weights=(1.0,) * len(pairs),
            advantages=tuple(pair.advantage for pair in pairs),
            count=float(len(pairs)),
        )
        for pairs in owned
    ]


def _branchings(ids: Sequence[tuple[int, ...]], common: Sequence[int]) -> Iterator[_Node]:
    """The branching nodes. In sorted order the completions of a prefix stand together, and they part
    where neighbours have the least in common, so no node is made for the tokens between."""
    pending = [range(len(ids))]
    while pending:
        group = pending.pop()
        if len(group) < 2:
            continue
        first, stop = group.start, group.stop
        depth = min(common[first : stop - 1])
        going_on = first  # those that end here sort first
        while going_on < stop and len(ids[going_on]) == depth:
            going_on += 1
        if going_on == stop:
            continue
        cuts = [going_on, *(i + 1 for i in range(going_on, stop - 1) if common[i] == depth), stop]
        children = [range(a, b) for a, b in pairwise(cuts)]
        pending.extend(children)
        yield _Node(depth, group, children)


def _mean(rewards: Sequence[float], places: range) -> float:
    return math.fsum(rewards[place] for place in places) / len(places)


def _common_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Length of the longest common prefix, by comparing slices: a growing window first, as completions part early."""
    end = min(len(a), len(b))
    low, high = 0, min(16, end)
    while high < end and a[low:high] == b[low:high]:
        low, high = high, min(2 * high, end)
    while low < high:  # all before low is equal, and not all before high + 1
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class PrefixMatching(Tokens):
    """See the module."""

    raw_rewards = True
    one_mean = True
    uncertain = True

    def learn(
        self,
        group: Group,
        advantages: Sequence[float],
        start: int,
        config: RunConfig,
        rng: Callable[[int], random.Random],
    ) -> list[Learning]:
        return prefix_matching([completion.ids for completion in group.completions], advantages, start)

    def replays(self, groups: Groups, p: Place, group: Group) -> Plan[tuple[Replay, ...]]:
        count = groups.config.tspmo_replay
        if not count:
            return ()
        restarts = choose_restarts(group, random.Random(p.seed(groups.seed, group.stage, "replay")))
        groups.expected += len(restarts) * count
        yield Barrier()
        return (yield from replay(groups, p, group, restarts, count))


CHOICE = PrefixMatching()
