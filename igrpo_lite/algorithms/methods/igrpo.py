"""iGRPO (arXiv 2602.09000, algorithm 1): refinements of the best draft learn.

    D = d_1 ... d_N from pi(. | q)                     stage 1
    d = the first d_i with the highest R(d_i)          equation 2, algorithms/drafts.py
    O = o_1 ... o_G from pi(. | Concat(q, d))          stage 2, from the same policy
    A_j = (R_j - mean R) / std R over O;  O learns, under the prompt with the draft in it; D does not

N + G = ``num_generations``, half each unless ``num_drafts`` is set (the paper: 4 + 4). The question and the draft are
context: no gradient goes through them, nor through the choice.
"""

from __future__ import annotations

import random

from igrpo_lite.algorithms.drafts import DraftChoice, choose_draft
from igrpo_lite.algorithms.groups import Groups, Place
from igrpo_lite.algorithms.methods.base import Method, Stage2
from igrpo_lite.algorithms.plans import Barrier, Plan
from igrpo_lite.config import RunConfig
from igrpo_lite.types import Group


class Igrpo(Method):
    """See the module."""

    def stage2(self, groups: Groups, p: Place, drafts: Group) -> Plan[Stage2]:
        yield Barrier()
        choice = self.choose(drafts, groups.config, random.Random(p.seed(groups.seed, "choice")))
        draft = drafts.completions[choice.index]
        prompt = groups.prompts.second(p.problem.question, drafts.prompt, draft.ids)
        refinements = yield from groups.group(p, "stage2", prompt, groups.config.n_refinements)
        return choice, refinements, (yield from self.replays(groups, p, refinements))

    def choose(self, drafts: Group, config: RunConfig, rng: random.Random) -> DraftChoice:
        """The draft that stage 2 sees."""
        return choose_draft(drafts.completions, drafts.scores, config, rng)


METHOD = Igrpo()
