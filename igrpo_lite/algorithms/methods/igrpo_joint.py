"""igrpo-joint (ours, not in the paper): iGRPO whose drafts learn too.

    D, d, O as in igrpo.py
    A_i = (R_i - mean R) / std R over D for drafts, over O for refinements: two groups, D and O learn

What is sampled is iGRPO's; the difference is the line in ``config.ALGORITHMS``: both stages learn. Each completion
counts once in the normaliser, whichever stage it is of. Drafts learn under the plain prompt, so they must come from the
policy that is updated: no ``ahead`` schedule.
"""

from __future__ import annotations

from igrpo_lite.algorithms.methods.igrpo import Igrpo

METHOD = Igrpo()
