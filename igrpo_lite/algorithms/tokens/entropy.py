"""The most uncertain tokens of a step (arXiv 2506.01939).

    H_jt = entropy of pi(. | ..., o_j<t) in nats,    tau = the (1 - rho) quantile of H over the step's tokens
    T_j = {t : H_jt >= tau},    A_jt = A_j,    w_jt = 1,    counted |o_j| in the normaliser

The candidates are the tokens of completions that have an advantage. As in TRL, a completion with few uncertain tokens
learns little: it is divided by all its tokens. ``rho`` is 0.2 (the paper's).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from igrpo_lite.algorithms.tokens.all import AllTokens
from igrpo_lite.algorithms.tokens.base import Learning, LearningSequence, Measure
from igrpo_lite.config import RunConfig
from igrpo_lite.config.defaults import ENTROPY_SHARE

_QUANTILE_LIMIT = 2**24  # torch.quantile takes no more elements


def entropy_threshold(entropies: Tensor, quantile: float) -> float:
    """The entropy from which on a token belongs to the most uncertain ones of a step.

    The rule and the rounding are those of TRL's ``get_high_entropy_mask``: the ``1 - quantile`` quantile with linear
    interpolation, in float32; tokens at the threshold belong to those above, so with many ties more than the asked
    share learn.

    Args:
        entropies: ``[N]``, finite, in nats, of all candidate tokens of the step, any number of them.
        quantile: share of the tokens that learn, in (0, 1]; 1 keeps all.

    Returns:
        Infinity if there are no tokens.
    """
    values = entropies.detach().flatten().float()
    if not values.numel():
        return math.inf
    if values.numel() <= _QUANTILE_LIMIT:
        return float(torch.quantile(values, 1.0 - quantile))
    return _quantile_by_rank(values, 1.0 - quantile)


def uncertain_tokens(entropies: Sequence[float], threshold: float, candidates: Learning) -> Learning:
    """Those of the candidate tokens of one completion whose entropy reaches the threshold; the count stays.

    Args:
        entropies: one per candidate, in the precision that the threshold was computed from.
        threshold: from :func:`entropy_threshold`.
    """
    kept = [place for place, entropy in enumerate(entropies) if entropy >= threshold]
    weights, advantages = (tuple(row[place] for place in kept) for row in (candidates.weights, candidates.advantages))
    return Learning(tuple(candidates.indices[place] for place in kept), weights, advantages, candidates.count)


class UncertainTokens(AllTokens):
    """See the module."""

    uncertain = True

    def measured(
        self, sequences: Sequence[LearningSequence], measure: Measure, config: RunConfig
    ) -> list[LearningSequence]:
        rows = [found.entropies for found in measure(sequences)]
        every = torch.tensor([entropy for row in rows for entropy in row])
        threshold = entropy_threshold(every, ENTROPY_SHARE)
        return [
            sequence.with_learning(uncertain_tokens(row, threshold, sequence.learning))
            for sequence, row in zip(sequences, rows, strict=True)
        ]


def _quantile_by_rank(values: Tensor, share: float) -> float:
    """``torch.quantile`` for any number of float32 values: two order statistics, interpolated in float64."""
    values = values.cpu()  # kthvalue on CUDA is not deterministic
    rank = share * (values.numel() - 1)
    below = math.floor(rank)
    low, high = (float(values.kthvalue(1 + place).values) for place in (below, math.ceil(rank)))
    return float(torch.tensor(low + (rank - below) * (high - low), dtype=values.dtype))


CHOICE = UncertainTokens()
