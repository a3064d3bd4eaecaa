"""S-GRPO: a random part of the tokens, most of them early (the stochastic S-GRPO of arXiv 2504.20834, Lee and Tong).

    T_j = the first k of  {t < alpha}  and  {t >= alpha : u_jt < P},  u_jt uniform    (all of them for k = 0)
    A_jt = A_j,    w_jt = 1,    counted |T_j| in the normaliser

``k`` as "the first of those drawn" bounds the last index too, at about ``alpha + (k - alpha) / P``: the rest of the
completion need not be run at all. (Others read it as any ``k`` of them, or as all of them in shorter completions only.)
Leading tokens weigh more than in GRPO; that is the method. With P = 1 and no ``k``, or ``alpha`` beyond the end, it is
GRPO. Presets (ours; the paper's values could not be found): ``short`` alpha 0, P 0.4, no k; ``long`` alpha 100, P 0.5,
k 300.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from igrpo_lite.algorithms.tokens.base import Learning, Tokens, equal
from igrpo_lite.config import RunConfig, UpdateOptions
from igrpo_lite.types import Group


def sgrpo_indices(length: int, alpha: int, p: float, k: int, rng: random.Random) -> list[int]:
    """S-GRPO's random token set of a completion of ``length`` tokens, ascending.

    Draws from ``rng`` once for each token from ``alpha`` on, whatever ``k`` is.
    """
    chosen = [*range(min(alpha, length)), *(t for t in range(alpha, length) if rng.random() < p)]
    return chosen[:k] if k > 0 else chosen


def stochastic_tokens(
    length: int, advantage: float, options: UpdateOptions, rng: random.Random, start: int = 0
) -> Learning:
    """A random part of the tokens from ``start`` on, with the completion's own advantage.

    Args:
        options: ``sgrpo_alpha``, ``sgrpo_p`` and ``sgrpo_k`` must be set, as the settings do from the preset.
        rng: one per completion. A set is drawn once and kept, however often the completion is visited.
    """
    alpha, p, k = options.sgrpo_alpha, options.sgrpo_p, options.sgrpo_k
    assert alpha is not None
    assert p is not None
    assert k is not None
    indices = [start + index for index in sgrpo_indices(length - start, alpha, p, k, rng)]
    return equal(indices, advantage, float(len(indices)))


class StochasticTokens(Tokens):
    """See the module."""

    def learn(
        self,
        group: Group,
        advantages: Sequence[float],
        start: int,
        config: RunConfig,
        rng: Callable[[int], random.Random],
    ) -> list[Learning]:
        pairs = enumerate(zip(group.completions, advantages, strict=True))
        return [stochastic_tokens(len(c.ids), advantage, config, rng(index), start) for index, (c, advantage) in pairs]


CHOICE = StochasticTokens()
