"""GRPO (arXiv 2402.03300): one stage, all rollouts of a problem in one group.

    O = o_1 ... o_G from pi(. | q),    A_j = (R_j - mean R) / std R,    all of O learns

``std`` is the sample standard deviation (ddof = 1), a group with equal rewards has advantage 0. Objective and
normaliser: algorithms/objectives.py.
"""

from __future__ import annotations

from igrpo_lite.algorithms.methods.base import Method

METHOD = Method()
