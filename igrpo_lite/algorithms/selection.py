"""Which tokens of a completion learn: all, a random part (S-GRPO) or the uncertain ones.

S-GRPO is the stochastic method of Lee and Tong (arXiv 2504.20834), not one of the others of that name. The choice by
entropy is that of arXiv 2506.01939. The third selective method, T-SPMO, is in ``tspmo.py``. Nothing here needs a model.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from igrpo_lite.config import UpdateOptions

_QUANTILE_LIMIT = 2**24  # torch.quantile takes no more elements


@dataclass(frozen=True, slots=True)
class Learning:
    """What one completion contributes to the loss.

    Attributes:
        indices: token positions in the completion, ascending; may be empty.
        weights: factor of each token's loss, one per index.
        advantages: one per index.
        count: what the completion counts in the normalisers (``T_j``): ``|o_j|`` where all tokens are meant, the
            chosen tokens for S-GRPO, the sum of the weights for T-SPMO. It may be 0.
    """

    indices: tuple[int, ...]
    weights: tuple[float, ...]
    advantages: tuple[float, ...]
    count: float


def all_tokens(length: int, advantage: float) -> Learning:
    """Every token of a completion of ``length`` tokens, with the completion's own advantage: GRPO."""
    return _equal(range(length), advantage, float(length))


def sgrpo_indices(length: int, alpha: int, p: float, k: int, rng: random.Random) -> list[int]:
    """S-GRPO's random token set ``T_i`` of a completion of ``length`` tokens, ascending.

    The first ``alpha`` tokens are always in it, each later one with probability ``p``. With ``k > 0`` only the first
    ``k`` of these are. That bounds the last index too, at about ``alpha + (k - alpha) / p``: the rest of the completion
    need not be run at all. (Others read the paper's ``k`` as any ``k`` of them, or as all of them in shorter
    completions only.)

    Draws from ``rng`` once for each token from ``alpha`` on, whatever ``k`` is.
    """
    chosen = [*range(min(alpha, length)), *(t for t in range(alpha, length) if rng.random() < p)]
    return chosen[:k] if k > 0 else chosen


def stochastic_tokens(length: int, advantage: float, options: UpdateOptions, rng: random.Random) -> Learning:
    """S-GRPO (arXiv 2504.20834): a random part of the tokens, with the completion's own advantage.

    Args:
        options: ``sgrpo_alpha``, ``sgrpo_p`` and ``sgrpo_k`` must be set, as the settings do from the preset.
        rng: one per completion. A set is drawn once and kept, however often the completion is visited.

    Each chosen token has weight 1, normalised by ``|T|``. Leading tokens then weigh more than in GRPO; that is the
    method. With ``p = 1`` and no ``k``, or ``alpha`` beyond the end, the result equals :func:`all_tokens`.
    """
    alpha, p, k = options.sgrpo_alpha, options.sgrpo_p, options.sgrpo_k
    assert alpha is not None
    assert p is not None
    assert k is not None
    indices = sgrpo_indices(length, alpha, p, k, rng)
    return _equal(indices, advantage, float(len(indices)))


def entropy_threshold(entropies: Tensor, quantile: float) -> float:
    """The entropy from which on a token belongs to the most uncertain ones of a step.

    The rule and the rounding are those of TRL's ``get_high_entropy_mask``: the ``1 - quantile`` quantile with linear
    interpolation, in float32; tokens at the threshold belong to those above, so with many ties more than the asked
    share learn.

    Args:
        entropies: ``[N]``, finite, in nats, of all candidate tokens of the step, any number of them.
        quantile: share of the tokens that learn, in (0, 1]: ``top_entropy_quantile``. 1 keeps all.

    Returns:
        Infinity if there are no tokens.
    """
    values = entropies.detach().flatten().float()
    if not values.numel():
        return math.inf
    if values.numel() <= _QUANTILE_LIMIT:
        return float(torch.quantile(values, 1.0 - quantile))
    return _quantile_by_rank(values, 1.0 - quantile)


def uncertain_tokens(entropies: Sequence[float], threshold: float, advantage: float) -> Learning:
    """The tokens of one completion whose entropy reaches the threshold (arXiv 2506.01939), with its own advantage.

    Args:
        entropies: one per token, in the precision that the threshold was computed from.
        threshold: from :func:`entropy_threshold`.

    The count stays that of all tokens, as in TRL: a completion with few uncertain tokens learns little.
    """
    return _equal([t for t, entropy in enumerate(entropies) if entropy >= threshold], advantage, float(len(entropies)))


def _equal(indices: Sequence[int], advantage: float, count: float) -> Learning:
    return Learning(tuple(indices), (1.0,) * len(indices), (advantage,) * len(indices), count)


def _quantile_by_rank(values: Tensor, share: float) -> float:
    """``torch.quantile`` for any number of float32 values: two order statistics, interpolated in float64."""
    values = values.cpu()  # kthvalue on CUDA is not deterministic
    rank = share * (values.numel() - 1)
    below = math.floor(rank)
    low, high = (float(values.kthvalue(1 + place).values) for place in (below, math.ceil(rank)))
    return float(torch.tensor(low + (rank - below) * (high - low), dtype=values.dtype))
