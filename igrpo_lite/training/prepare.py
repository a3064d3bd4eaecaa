"""Everything a run works with, made in the order of cost: data, rewards, prompts, and only then the model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from igrpo_lite.config import RunConfig
from igrpo_lite.errors import DataError
from igrpo_lite.policy.loading import Policy, load_policy, recompute_activations
from igrpo_lite.policy.logprobs import RowLayout, best_layout
from igrpo_lite.policy.prompting import check_context, fitting, prompt_builder
from igrpo_lite.problems.loading import load_problems
from igrpo_lite.prompts import PromptBuilder
from igrpo_lite.rewards.scorer import Scorer
from igrpo_lite.sampling.base import Sampler
from igrpo_lite.sampling.choice import make_sampler
from igrpo_lite.types import Problem


@dataclass(slots=True)
class Prepared:
    """The parts of a run. ``notes`` are lines for the screen about what was loaded, counted and left out."""

    train: list[Problem]
    held_out: list[Problem]
    scorer: Scorer
    prompts: PromptBuilder
    policy: Policy
    sampler: Sampler
    notes: list[str]

    def close(self) -> None:
        """End the processes and free the engine that belong to the run."""
        self.scorer.close()
        self.sampler.close()

    def fingerprint(self) -> str:
        """Hash of the problems in use: a resumed run must see the same ones."""
        digest = hashlib.sha256()
        for problem in (*self.train, *self.held_out):
            columns = json.dumps(dict(problem.columns), sort_keys=True, default=str)  # users' rewards read them
            digest.update(f"{problem.id}\x1f{problem.question}\x1f{problem.answer}\x1f{columns}\x1e".encode())
        return digest.hexdigest()


def prepare(config: RunConfig) -> Prepared:
    """Load data, check rewards on one row, filter prompts, check lengths, then load the model.

    Raises:
        UserError: whatever of this cannot work, before the next, more expensive part is tried.
    """
    sets = load_problems(config, config.seed)
    scorer = Scorer(config, config.answer_style)
    try:
        scorer.check(sets.train[0])
        prompts = prompt_builder(config)
        train = fitting(sets.train, prompts, config.max_prompt_length)
        held_out = fitting(sets.held_out, prompts, config.max_prompt_length)
        notes = sets.report.lines() + _prompt_notes(config, prompts, train.dropped, held_out.dropped)
        if train.longest is None or held_out.longest is None:
            which = "training" if train.longest is None else "held-out"
            raise DataError(
                f"every {which} prompt is longer than max_prompt_length = {config.max_prompt_length} tokens; raise "
                "--max-prompt-length"
            )
        needed = check_context(config, prompts, train.longest, held_out.longest)
        policy = load_policy(config, config.seed, context=needed)
        if config.gradient_checkpointing:
            recompute_activations(policy.model)
        if isinstance(best_layout(policy.model.get_base_model()), RowLayout):
            notes.append("the update repeats prompts in padded rows: this model's attention cannot take token trees")
        sampler, more = make_sampler(config, policy, prompts, needed)
    except BaseException:
        scorer.close()
        raise
    return Prepared(train.kept, held_out.kept, scorer, prompts, policy, sampler, notes + more)


def _prompt_notes(config: RunConfig, prompts: PromptBuilder, dropped: int, dropped_held_out: int) -> list[str]:
    notes = []
    if prompts.plain_template:
        notes.append(f"{config.model} has no chat template (a base model?): prompts use a plain one")
    if dropped or dropped_held_out:
        notes.append(
            f"left out as longer than {config.max_prompt_length} prompt tokens: {dropped} training and "
            f"{dropped_held_out} held-out problems"
        )
    if prompts.judge is not None:
        notes.append(
            "the policy is its own judge, as it is at each step: it may learn to please itself; watch the accuracy"
        )
    if config.n_refinements and config.draft_placement == "multi-turn":
        notes.append("stage 2 continues the draft as a conversation (draft_placement multi-turn)")
    return notes
