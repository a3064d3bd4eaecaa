"""Data order and learning rate as plain functions of the step: nothing to save, nothing to drift on resume."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from functools import lru_cache

import numpy as np

from igrpo_lite.config import UpdateOptions
from igrpo_lite.sampling.base import request_seed

MIN_RATE = 0.1
"""Lowest learning rate of the cosine, as a share of the peak."""


def batch_indices(num_problems: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Problem indices of one step (0-based): consecutive places of an endless sequence of shuffled epochs."""
    start = step * batch_size
    indices = []
    for place in range(start, start + batch_size):
        epoch, offset = divmod(place, num_problems)
        indices.append(int(_epoch_order(num_problems, epoch, seed)[offset]))
    return indices


def other_indices(num_problems: int, used: Collection[int], step: int, seed: int) -> Iterator[int]:
    """Every problem that is not ``used``, once, in a random order of this step's own: what dynamic sampling draws from.

    Its rounds read on where the one before ended, so that none draws a problem of another.
    """
    generator = np.random.Generator(np.random.Philox(key=request_seed(seed, "others", step)))
    taken = set(used)
    yield from (index for index in map(int, generator.permutation(num_problems)) if index not in taken)


def learning_rate(step: int, max_steps: int, options: UpdateOptions) -> float:
    """Learning rate of one step (0-based): linear warm-up, then the course that ``lr_scheduler_type`` names."""
    warmup = round(options.warmup_ratio * max_steps)
    if step < warmup:
        return options.learning_rate * (step + 1) / warmup
    if options.lr_scheduler_type == "constant":
        return options.learning_rate
    progress = min(1.0, (step - warmup) / max(1, max_steps - warmup))
    if options.lr_scheduler_type == "linear":
        return options.learning_rate * (1.0 - progress)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return options.learning_rate * (MIN_RATE + (1.0 - MIN_RATE) * cosine)


@lru_cache(maxsize=2)
def _epoch_order(num_problems: int, epoch: int, seed: int) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(key=request_seed(seed, "order", epoch)))
    return generator.permutation(num_problems)
