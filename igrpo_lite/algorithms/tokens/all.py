"""All tokens: every sampled token of a completion learns, with the completion's own advantage (GRPO, 2402.03300).

T_j = {1, ..., |o_j|},    A_jt = A_j,    w_jt = 1,    counted |o_j| in the normaliser
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from igrpo_lite.algorithms.tokens.base import Learning, Tokens, equal
from igrpo_lite.config import RunConfig
from igrpo_lite.types import Group


def all_tokens(length: int, advantage: float, start: int = 0) -> Learning:
    """Every token of a completion of ``length`` tokens from ``start`` on."""
    return equal(range(start, length), advantage, float(length - start))


class AllTokens(Tokens):
    """See the module."""

    def learn(
        self,
        group: Group,
        advantages: Sequence[float],
        start: int,
        config: RunConfig,
        rng: Callable[[int], random.Random],
    ) -> list[Learning]:
        pairs = zip(group.completions, advantages, strict=True)
        return [all_tokens(len(completion.ids), advantage, start) for completion, advantage in pairs]


CHOICE = AllTokens()
