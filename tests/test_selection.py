"""S-GRPO's random token sets and the entropy rule: against their definitions, by enumeration and by frequency."""

from __future__ import annotations

import math
import random
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from igrpo_lite.algorithms.tokens import entropy
from igrpo_lite.algorithms.tokens.all import all_tokens
from igrpo_lite.algorithms.tokens.base import Learning
from igrpo_lite.algorithms.tokens.entropy import entropy_threshold, uncertain_tokens
from igrpo_lite.algorithms.tokens.s_grpo import sgrpo_indices, stochastic_tokens
from igrpo_lite.config import UpdateOptions

lengths, alphas, budgets = st.integers(0, 40), st.integers(0, 50), st.integers(0, 50)
seeds = st.integers(0, 2**32)


def sgrpo(alpha, p, k=0):
    return UpdateOptions(sgrpo_alpha=alpha, sgrpo_p=p, sgrpo_k=k)


def test_all_tokens():
    assert all_tokens(3, -0.5) == Learning((0, 1, 2), (1.0, 1.0, 1.0), (-0.5, -0.5, -0.5), 3.0)
    assert all_tokens(0, 1.0) == Learning((), (), (), 0.0)


@settings(deadline=None)
@given(lengths, st.floats(-3, 3), st.integers(0, 50), seeds)
def test_everything_chosen_is_grpo(length, advantage, alpha, seed):
    """P = 1, or alpha beyond the end: equal, not merely close."""
    rng = random.Random(seed)
    expected = all_tokens(length, advantage)
    assert stochastic_tokens(length, advantage, sgrpo(alpha, 1.0), rng) == expected
    assert stochastic_tokens(length, advantage, sgrpo(length + alpha, 0.3), rng) == expected


@settings(max_examples=300, deadline=None)
@given(lengths, alphas, st.floats(0, 1), budgets, seeds)
def test_the_definition_token_by_token(length, alpha, p, k, seed):
    rng = random.Random(seed)
    chosen = []
    for t in range(length):
        wanted = t < alpha or rng.random() < p
        if wanted and (k == 0 or len(chosen) < k):
            chosen.append(t)
    assert sgrpo_indices(length, alpha, p, k, random.Random(seed)) == chosen


@settings(deadline=None)
@given(lengths, alphas, st.floats(0, 1), st.integers(1, 50), seeds)
def test_never_more_than_k(length, alpha, p, k, seed):
    found = sgrpo_indices(length, alpha, p, k, random.Random(seed))
    assert len(found) <= k
    assert all(0 <= t < length for t in found)


def binomial(n, p, at):
    return math.comb(n, at) * p**at * (1 - p) ** (n - at) if 0 <= at <= n else 0.0


def inclusion(alpha, p, k, t):
    """The exact probability that token t is chosen."""
    if t < alpha or not k:
        return (1.0 if t < alpha else p) if not k or t < k else 0.0
    return p * sum(binomial(t - alpha, p, before) for before in range(max(0, k - alpha)))


@pytest.mark.parametrize(("alpha", "p", "k"), [(0, 0.4, 0), (7, 0.5, 0), (7, 0.5, 15), (20, 0.5, 15)])
def test_frequency_of_every_token(alpha, p, k):
    length, draws = 40, 4000
    counts = [0] * length
    for seed in range(draws):
        for t in sgrpo_indices(length, alpha, p, k, random.Random(seed)):
            counts[t] += 1
    expected = [inclusion(alpha, p, k, t) for t in range(length)]
    for count, chance in zip(counts, expected, strict=True):
        # Out of 40 places one beyond 3 sigma is to be expected now and then; beyond 4.5 none is.
        assert abs(count - draws * chance) <= 4.5 * math.sqrt(draws * chance * (1 - chance)) + 1e-9
    if not k:
        sigma = math.sqrt(draws * (length - alpha) * p * (1 - p))
        assert abs(sum(counts[alpha:]) - draws * (length - alpha) * p) <= 3 * sigma


def test_reproducible():
    drawn = [stochastic_tokens(200, 1.0, sgrpo(3, 0.5, 40), random.Random(seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_nothing_chosen():
    assert stochastic_tokens(9, 1.0, sgrpo(0, 0.0), random.Random(0)) == Learning((), (), (), 0.0)


def test_nothing_there():
    assert stochastic_tokens(0, 1.0, sgrpo(2, 0.5), random.Random(0)) == all_tokens(0, 1.0)


def test_weights_and_count():
    chosen = sgrpo_indices(30, 4, 0.25, 0, random.Random(5))
    assert 4 < len(chosen) < 30
    found = stochastic_tokens(30, 0.5, sgrpo(4, 0.25), random.Random(5))
    assert found == Learning(tuple(chosen), (1.0,) * len(chosen), (0.5,) * len(chosen), float(len(chosen)))


class Script(random.Random):
    """Draws that were written down before."""

    def __init__(self, draws):
        super().__init__(0)
        self.draws = iter(draws)

    def random(self):
        return next(self.draws)


def expected_estimate(values, alpha, p):
    """Exact expectation, over all subsets, of what a completion contributes: ``1/T sum_t w_t A_t x_t``."""
    total = mass = 0.0
    for taken in product([True, False], repeat=len(values) - alpha):
        # Just below p, and p itself: the edge of the comparison.
        draws = [math.nextafter(p, 0.0) if take else p for take in taken]
        learning = stochastic_tokens(len(values), 1.5, sgrpo(alpha, p), Script(draws))
        chance = math.prod(p if take else 1.0 - p for take in taken)
        terms = zip(learning.indices, learning.weights, learning.advantages, strict=True)
        total += chance * sum(w * a * values[t] for t, w, a in terms) / max(learning.count, 1.0)
        mass += chance
    assert mass == pytest.approx(1.0, abs=1e-12)
    return total


def test_mean_over_the_chosen_favours_the_beginning():
    """The bias that is part of S-GRPO."""
    values = [1.0] * 3 + [0.0] * 6  # what the leading tokens contribute
    share = expected_estimate(values, 3, 0.5) / 1.5
    assert share == pytest.approx(sum(binomial(6, 0.5, n) * 3 / (3 + n) for n in range(7)))
    assert share > 3 / 9 + 0.1


@settings(deadline=None)
@given(st.lists(st.floats(0, 8, width=32), min_size=1, max_size=200), st.floats(0.01, 1.0))
def test_threshold_is_the_quantile(entropies, share):
    values = torch.tensor(entropies)
    assert entropy_threshold(values, share) == float(torch.quantile(values, 1 - share))


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_the_uncertain_share_of_a_step(share):
    """The mask of TRL's ``get_high_entropy_mask`` over a padded batch, written out, row by row."""
    torch.manual_seed(0)
    rows = [torch.rand(length) * 3 for length in (50, 7, 0, 43)]
    padded, mask = torch.zeros(4, 50), torch.zeros(4, 50, dtype=torch.bool)
    for place, row in enumerate(rows):
        padded[place, : len(row)], mask[place, : len(row)] = row, True
    expected = (padded >= torch.quantile(padded[mask], 1 - share)) & mask
    threshold = entropy_threshold(torch.cat(rows), share)
    found = [uncertain_tokens(row.tolist(), threshold, all_tokens(len(row), -0.5)) for row in rows]
    assert [list(f.indices) for f in found] == [row.nonzero().flatten().tolist() for row in expected]
    assert sum(len(f.indices) for f in found) == 100 * share
    for row, learning in zip(rows, found, strict=True):
        chosen = len(learning.indices)
        assert learning == Learning(learning.indices, (1.0,) * chosen, (-0.5,) * chosen, float(len(row)))


def test_ties_at_the_threshold_all_learn():
    entropies = [0.5, 2.0, 2.0, 2.0, 0.1, 2.0]
    threshold = entropy_threshold(torch.tensor(entropies), 0.2)
    assert uncertain_tokens(entropies, threshold, all_tokens(len(entropies), 1.0)).indices == (1, 2, 3, 5)


def test_no_tokens_no_threshold():
    threshold = entropy_threshold(torch.zeros(0), 0.2)
    assert threshold == math.inf
    assert uncertain_tokens([], threshold, all_tokens(0, 1.0)) == all_tokens(0, 1.0)


def test_a_threshold_keeps_no_gradient_and_any_shape_and_type():
    values = torch.rand(3, 5, requires_grad=True)
    assert entropy_threshold(values, 0.4) == float(torch.quantile(values.detach().flatten(), 0.6))
    half = values.detach().bfloat16()
    assert entropy_threshold(half, 0.4) == float(torch.quantile(half.flatten().float(), 0.6))


@settings(deadline=None)
@given(st.lists(st.floats(0, 8, width=32), min_size=1, max_size=60), st.floats(0.01, 1.0))
def test_the_way_without_limit_agrees_with_torch(entropies, share):
    values = torch.tensor(entropies)
    exact = torch.quantile(values.double(), 1 - share)
    assert entropy._quantile_by_rank(values, 1 - share) == pytest.approx(float(exact.float()), rel=1e-6, abs=1e-30)


def test_more_tokens_than_torch_takes():
    values = torch.arange(2**24 + 1, dtype=torch.int32).float()  # exact up to 2**24
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(values, 0.8)
    threshold = entropy_threshold(values, 0.2)
    assert int((values >= threshold).sum()) == pytest.approx(0.2 * 2**24, abs=1)
