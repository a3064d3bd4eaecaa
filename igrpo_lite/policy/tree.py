"""Token trees: the completions of one prompt with everything they share stored once.

The root is the prompt (in stage 2 with the draft in it), below it stand the completions, equal beginnings merged.
Nodes lie in depth-first order; ``depth`` is a node's position id and ``end`` is one past its last descendant, so node
``i`` sees node ``j`` exactly when ``j <= i < end[j]``. A tree holds only what the chosen tokens need: a branch ends
before its last chosen token, since a token's own state predicts nothing that is asked for (exact, by causality).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Branch:
    """A completion and which of its tokens are to be scored.

    Attributes:
        prompt: token ids before it, at least one.
        completion: its token ids.
        indices: places in ``completion``, ascending, at least one.
        temperature: what the logits are divided by.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    indices: tuple[int, ...]
    temperature: float = 1.0

    @property
    def path(self) -> tuple[int, ...]:
        """The completion's tokens that the model must run over: those before the last chosen one."""
        return self.completion[: self.indices[-1]]

    @property
    def targets(self) -> list[int]:
        """The token ids to be scored."""
        return [self.completion[index] for index in self.indices]


class TokenTree:
    """The tree of branches that share one prompt.

    Attributes:
        ids, depth, end: of each node, ``[N]``.
        trunk: nodes at the front that every branch passes through.
        leaves: for each branch that is no other's beginning, its nodes below the trunk.
        predictors: for each branch, in the order given, the node whose state predicts each of its chosen tokens.
    """

    def __init__(self, branches: Sequence[Branch]) -> None:
        prompt = branches[0].prompt
        paths = [branch.path for branch in branches]
        order = sorted(range(len(branches)), key=lambda row: paths[row])
        nodes = np.arange(len(prompt))  # of the path last added, from the root
        ids: list[int] = list(prompt)
        depths, end = [nodes], np.empty(len(prompt) + sum(map(len, paths)), dtype=np.int64)
        routes: dict[int, np.ndarray] = {}
        self.trunk = len(prompt)
        whole: list[np.ndarray] = []
        for place, row in enumerate(order):
            path, before = paths[row], paths[order[place - 1]] if place else ()
            shared = len(prompt) + (_common(before, path) if place else 0)
            end[nodes[shared:]] = len(ids)
            self.trunk = len(prompt) + len(path) if not place else min(self.trunk, shared)
            if place and shared == len(nodes):
                whole.pop()  # the branch before is the beginning of this one
            new = np.arange(len(ids), len(ids) + len(prompt) + len(path) - shared)
            ids.extend(path[shared - len(prompt) :])
            depths.append(np.arange(shared, shared + len(new)))
            nodes = np.concatenate([nodes[:shared], new])
            routes[row] = nodes
            whole.append(nodes)
        end[nodes] = len(ids)
        self.ids, self.depth, self.end = np.array(ids), np.concatenate(depths), end[: len(ids)]
        self.leaves = [route[self.trunk :] for route in whole if len(route) > self.trunk]
        self.predictors = [
            routes[row][len(prompt) - 1 + np.array(branch.indices)] for row, branch in enumerate(branches)
        ]

    def __len__(self) -> int:
        return len(self.ids)

    def mask(self) -> Tensor:
        """Which node (row) sees which (column), bool ``[N, N]``: the definition that faster forms are tested with."""
        place, end = torch.arange(len(self)), torch.from_numpy(self.end)
        return (place[None, :] <= place[:, None]) & (place[:, None] < end[None, :])


def grow(branches: Sequence[Branch]) -> list[TokenTree]:
    """One tree for each run of equal prompts."""
    return [TokenTree(list(group)) for _, group in groupby(branches, key=lambda branch: branch.prompt)]


def pack(branches: Sequence[Branch], budget: int) -> Iterator[list[int]]:
    """Split branches into packs of at most ``budget`` tree nodes; indices into ``branches``.

    A single branch that is larger goes alone. A tree that fits one pack is never split, so that nothing is repeated;
    a larger one is split between neighbours, and repeats no more than the prompt and one shared beginning each time.
    """
    first: dict[tuple[int, ...], int] = {}
    for place, branch in enumerate(branches):
        first.setdefault(branch.prompt, place)
    order = sorted(range(len(branches)), key=lambda row: (first[branches[row].prompt], branches[row].path))
    taken: list[int] = []
    nodes = 0
    for prompt, group in groupby(order, key=lambda row: branches[row].prompt):
        rows = list(group)
        paths = [branches[row].path for row in rows]
        more = [len(path) - _common(before, path) for before, path in zip([(), *paths], paths, strict=False)]
        more[0] += len(prompt)
        if taken and nodes + sum(more) > budget >= sum(more):
            yield taken
            taken, nodes = [], 0
        for row, path, new in zip(rows, paths, more, strict=True):
            if taken and nodes + new > budget:
                yield taken
                taken, nodes, new = [], 0, len(prompt) + len(path)
            taken.append(row)
            nodes += new
    if taken:
        yield taken


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning."""
    length = min(len(first), len(second))
    differ = np.flatnonzero(np.asarray(first[:length]) != np.asarray(second[:length]))
    return int(differ[0]) if len(differ) else length
