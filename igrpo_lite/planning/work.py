"""What one training step runs: sequences sampled, contexts, and the token trees or rows of the update."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

from igrpo_lite.config import RunConfig
from igrpo_lite.config.defaults import ENTROPY_SHARE, SGRPO_PRESETS

STAGE2_WORDS = 64
"""Tokens that stage 2 puts around a draft: its template, and turns of the chat template."""

JUDGE_WORDS = 320
"""Tokens of the judge's own prompt, without question and completion, and of the reminder."""

PARTING = 32
"""T-SPMO: tokens below the prompt within which a completion has parted from the others for good. A guess: at
temperature 1 completions part early, and a tree holds nothing beyond."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a question's prompt, of the draft that stage 2 shows, and of a completion.

    Attributes:
        replies: what the policy writes as a judge, its second try included; 0 where it is none.
    """

    prompt: int
    draft: int
    completion: int
    replies: int = 0

    @property
    def refined(self) -> int:
        """The prompt of stage 2."""
        return self.prompt + STAGE2_WORDS + self.draft

    @property
    def sequence(self) -> int:
        """The longest sequence; what is tokenised anew may grow by a quarter. Evaluation refines too, so this holds for
        one stage as well."""
        rollout = self.refined + self.draft // 4 + self.completion
        return max(rollout, self.judged + self.completion // 4) if self.replies else rollout

    @property
    def judged(self) -> int:
        """What the policy reads and writes as a judge."""
        return self.prompt + JUDGE_WORDS + self.completion + self.replies


@dataclass(frozen=True, slots=True)
class Tree:
    """Completions of one prompt in the update: ``leaves`` branches of ``leaf`` tokens below ``trunk`` shared ones.

    Attributes:
        rows: tokens of each branch that learn.
    """

    trunk: int
    leaves: int
    leaf: int
    rows: int

    @property
    def nodes(self) -> int:
        return self.trunk + self.leaves * self.leaf

    @property
    def row(self) -> int:
        """Tokens of one branch with the trunk repeated."""
        return self.trunk + self.leaf


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch through the model, counted in trees, of which the last may be a part.

    Attributes:
        tokens: places, padding included.
        rows: states that go through the head.
        causal: runs of plain causal attention, as (how many, length): trunks, or whole rows.
        leaves: branches that attend to a trunk of ``trunk`` tokens and to their own ``leaf``; none in rows.
    """

    tokens: int
    rows: int
    causal: tuple[float, int]
    leaves: float = 0.0
    trunk: int = 0
    leaf: int = 0


def longest(config: RunConfig) -> Lengths:
    """What a run's settings allow at most."""
    draft = min(config.max_draft_length or config.max_completion_length, config.max_completion_length)
    judges = "judge" in config.reward_funcs and config.judge_by == "policy"
    replies = 2 * config.judge_max_tokens if judges else 0
    return Lengths(config.max_prompt_length, draft, config.max_completion_length, replies)


def typical(config: RunConfig, completion: int | None = None) -> Lengths:
    """What to expect on average: a quarter of ``max_prompt_length``, and if unset half of ``max_completion_length``."""
    most = longest(config)
    completion = min(completion or most.completion // 2, most.completion)
    return Lengths(max(1, most.prompt // 4), min(most.draft, completion), completion)


def learning_trees(config: RunConfig, lengths: Lengths) -> Counter[Tree]:
    """The trees of one step's update, and how many of each: one for every group that learns, as if all had an
    advantage."""
    first, second = config.n_drafts, config.n_refinements
    stages = {"stage1": (lengths.prompt, first), "stage2": (lengths.refined, second)}
    found: Counter[Tree] = Counter()
    for trunk, size in (stages[stage] for stage in config.learning_stages):
        leaf, rows = _chosen(config, lengths.completion, size)
        found[Tree(trunk, size, leaf, rows)] += config.prompts_per_step
        if config.tokens == "t-spmo" and config.tspmo_replay:
            replay = Tree(trunk + lengths.completion, config.tspmo_replay + 1, min(PARTING, lengths.completion), 2)
            found[replay] += 2 * config.prompts_per_step
    return found


def fullest(trees: Counter[Tree], budget: int, in_rows: bool) -> Batch:
    """The largest micro-batch of at most ``budget`` tokens. Real lengths differ, so packs fill ``budget`` better than
    equal trees do, and every term is scaled up to it, as far as the step has as many tokens."""
    found = []
    for tree, count in trees.items():
        batch = _rows(tree, count, budget) if in_rows else _pack(tree, count, budget)
        step = count * (tree.leaves * tree.row if in_rows else tree.nodes)
        found.append(_scaled(batch, max(1.0, min(budget, step) / batch.tokens)))
    return max(found, key=lambda batch: batch.tokens)


def last_index(config: RunConfig, completion: int) -> tuple[float, float]:
    """S-GRPO: tokens of a completion up to its last chosen one, and how many are chosen: expectations.

    With ``k`` the ``k``-th chosen one is at about ``alpha + (k - alpha) / p``.
    """
    preset = SGRPO_PRESETS["long"]
    alpha, p, k = (
        preset[name] if getattr(config, name) is None else getattr(config, name)
        for name in ("sgrpo_alpha", "sgrpo_p", "sgrpo_k")
    )
    leading = min(alpha, completion)
    end, chosen = float(completion if p else leading), leading + p * (completion - leading)
    if not k:
        return end, chosen
    if k <= leading:
        return k, k
    if p:
        # Two standard deviations late, since the longest branch of a group sets the memory.
        end = min(end, leading + (k - leading) / p + 2 * math.sqrt((k - leading) * (1 - p)) / p)
    return end, min(k, chosen)


def _chosen(config: RunConfig, completion: int, size: int) -> tuple[int, int]:
    """Tokens of a branch that must be run, and those that learn."""
    if config.tokens == "s-grpo":
        end, rows = last_index(config, completion)
        return max(1, math.ceil(end)), max(1, math.ceil(rows))
    if config.tokens == "t-spmo":
        return min(PARTING, completion), max(1, 2 * (size - 1) // size)
    if config.tokens == "entropy":
        return completion, math.ceil(completion * ENTROPY_SHARE)
    return completion, completion


def _pack(tree: Tree, count: int, budget: int) -> Batch:
    """As many whole trees as fit, or as many branches of a tree that is larger than the budget."""
    trees = min(count, budget // tree.nodes)
    leaves = trees * tree.leaves if trees else max(1, (budget - tree.trunk) // tree.leaf)
    trees = max(1, trees)
    return Batch(
        trees * tree.trunk + leaves * tree.leaf, leaves * tree.rows, (trees, tree.trunk), leaves, tree.trunk, tree.leaf
    )


def _rows(tree: Tree, count: int, budget: int) -> Batch:
    number = min(count * tree.leaves, max(1, budget // tree.row))
    return Batch(number * tree.row, number * tree.rows, (number, tree.row))


def _scaled(batch: Batch, factor: float) -> Batch:
    runs, length = batch.causal
    return replace(
        batch,
        tokens=round(batch.tokens * factor),
        rows=round(batch.rows * factor),
        causal=(runs * factor, length),
        leaves=batch.leaves * factor,
    )
