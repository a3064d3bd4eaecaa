"""Data order and learning rate."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from igrpo_lite.config import UpdateOptions
from igrpo_lite.sampling.base import request_seed
from igrpo_lite.training.schedule import batch_indices, learning_rate, other_indices


def test_every_epoch_is_a_permutation_and_batches_cross_its_end():
    places = [index for step in range(21) for index in batch_indices(10, 4, step, seed=0)]
    for epoch in range(8):
        assert sorted(places[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert places[:10] != places[10:20]


def test_order_depends_on_the_seed_only():
    assert batch_indices(1000, 8, 5, 0) == batch_indices(1000, 8, 5, 0)
    assert batch_indices(1000, 8, 5, 0) != batch_indices(1000, 8, 5, 1)


def test_a_batch_larger_than_the_data_repeats_it():
    assert sorted(batch_indices(3, 7, 0, 0)).count(0) >= 2


def test_other_problems_are_all_that_are_not_used_in_an_order_of_the_steps_own():
    used = batch_indices(50, 8, 3, seed=0)
    order = list(other_indices(50, used, 3, seed=0))
    assert sorted(order + used) == list(range(50))
    assert list(other_indices(50, used, 3, seed=0)) == order
    assert list(other_indices(50, used, 4, seed=0)) != order != list(other_indices(50, used, 3, seed=1))


def test_what_is_drawn_first_of_others_is_uniform():
    first = Counter(next(other_indices(6, [2, 4], step, seed=0)) for step in range(4000))
    assert first.keys() == {0, 1, 3, 5}
    # Five standard deviations of a binomial count.
    assert all(abs(count - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5 for count in first.values())


def test_data_no_larger_than_a_batch_leaves_no_others():
    for size in (3, 7):
        assert list(other_indices(3, batch_indices(3, size, 0, 0), 0, 0)) == []


def test_cosine_with_warmup_and_floor():
    options = UpdateOptions(learning_rate=1.0, warmup_ratio=0.1)
    rates = [learning_rate(step, 100, options) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(rates) == pytest.approx(1.0)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert rates[55] == pytest.approx(0.55, abs=1e-9)
    assert 0.1 < rates[99] < 0.11


def test_constant_and_linear():
    constant = UpdateOptions(learning_rate=2.0, lr_scheduler_type="constant", warmup_ratio=0.0)
    assert {learning_rate(step, 10, constant) for step in range(10)} == {2.0}
    linear = UpdateOptions(learning_rate=2.0, lr_scheduler_type="linear", warmup_ratio=0.0)
    assert [learning_rate(step, 4, linear) for step in range(4)] == [2.0, 1.5, 1.0, 0.5]


def test_request_seeds_are_stable_and_distinct():
    assert request_seed(0, 3, "two-step/train/7", "stage1", 2) == 4869680709072444965
    seeds = {request_seed(run, step, index) for run in range(10) for step in range(30) for index in range(30)}
    assert len(seeds) == 9000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert request_seed(1, 23) != request_seed(12, 3)
