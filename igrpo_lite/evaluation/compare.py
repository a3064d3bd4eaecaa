"""A model with and without its adapter on the same held-out problems, pair by pair."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from igrpo_lite.config import RunConfig
from igrpo_lite.errors import DataError
from igrpo_lite.evaluation.evaluate import Evaluation, evaluate
from igrpo_lite.evaluation.intervals import PairedChange, paired_change
from igrpo_lite.policy.loading import load_policy
from igrpo_lite.policy.prompting import check_context, fitting, prompt_builder
from igrpo_lite.problems.loading import load_problems
from igrpo_lite.rewards.answers import gold_answer
from igrpo_lite.sampling.choice import make_sampler


@dataclass(frozen=True, slots=True)
class Comparison:
    """Evaluations of the model as it came and, where there is an adapter, with it; what to say of the engine used."""

    base: Evaluation
    adapted: Evaluation | None
    notes: tuple[str, ...] = ()

    def change(self, refined: bool = False) -> PairedChange | None:
        """Paired change of single-pass accuracy, or of refined accuracy."""
        if self.adapted is None:
            return None
        return paired_change(self.base.right(refined), self.adapted.right(refined))

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"base": self.base.result()}
        if self.adapted is not None:
            found["adapted"] = self.adapted.result()
            for name, refined in (("single_change", False), ("refined_change", True)):
                change = self.change(refined)
                assert change is not None
                found[name] = asdict(change)
        return found


def compare(config: RunConfig, adapter: Path | None) -> Comparison:
    """Evaluate the model of ``config`` on its held-out problems, and again with ``adapter`` if one is given.

    Raises:
        UserError: no such data, model or adapter, or the problems do not fit the model's context.
    """
    problems = load_problems(config, config.seed, gold_answer).held_out
    prompts = prompt_builder(config)
    problems, dropped, longest = fitting(problems, prompts, config.max_prompt_length)
    if longest is None:
        raise DataError(
            f"all {dropped} held-out prompts are longer than max_prompt_length = {config.max_prompt_length} tokens; "
            "raise --max-prompt-length"
        )
    needed = check_context(config, prompts, longest)
    prompts.max_length = needed - config.max_completion_length
    policy = load_policy(config, config.seed, adapter)
    sampler, notes = make_sampler(config, policy, prompts, needed)
    limit = config.max_completion_length
    try:
        adapted = evaluate(problems, sampler, prompts, limit) if adapter is not None else None
        with policy.model.disable_adapter():
            sampler.load_adapter()
            base = evaluate(problems, sampler, prompts, limit)
    finally:
        sampler.close()
    return Comparison(base, adapted, tuple(notes))
