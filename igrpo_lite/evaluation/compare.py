"""A model with and without its adapter on the same held-out problems, pair by pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from igrpo_lite.answers.checker import AnswerChecker
from igrpo_lite.config import RunConfig
from igrpo_lite.errors import ConfigError, DataError
from igrpo_lite.evaluation.evaluate import Answered, Evaluation, Sampling, evaluate
from igrpo_lite.evaluation.few_shot import worked_examples
from igrpo_lite.evaluation.statistics import PairedChange, paired_change
from igrpo_lite.policy.loading import load_policy
from igrpo_lite.policy.prompting import check_context, fitting, prompt_builder
from igrpo_lite.problems.loading import ProblemSets, load_problems
from igrpo_lite.prompts import PromptBuilder
from igrpo_lite.sampling.choice import make_sampler
from igrpo_lite.types import Problem


@dataclass(frozen=True, slots=True)
class Comparison:
    """Evaluations of the model as it came and with its adapter, one of them at least.

    Attributes:
        shots: worked examples in every prompt.
        notes: sentences for the user about problems and engine.
    """

    base: Evaluation | None
    adapted: Evaluation | None
    shots: int = 0
    notes: tuple[str, ...] = ()

    @property
    def evaluations(self) -> dict[str, Evaluation]:
        """By name, the base first."""
        return {name: found for name in ("base", "adapted") if (found := getattr(self, name)) is not None}

    def changes(self) -> dict[str, PairedChange]:
        """Paired change of every measure from base to adapter; nothing where one of them was not measured."""
        if self.base is None or self.adapted is None:
            return {}
        before = self.base.greedy() | self.base.sampled()
        after = self.adapted.greedy() | self.adapted.sampled()
        return {name: paired_change(before[name], after[name]) for name in before}

    def flips(self) -> list[tuple[Answered, Answered]]:
        """Problems whose single pass is right with one of base and adapter only, as (base, adapter)."""
        if self.base is None or self.adapted is None:
            return []
        pairs = zip(self.base.answered, self.adapted.answered, strict=True)
        return [(base, adapted) for base, adapted in pairs if base.single.right != adapted.single.right]

    def to_json(self) -> dict[str, Any]:
        first, *_ = self.evaluations.values()
        found: dict[str, Any] = {"n": len(first.answered), "shots": self.shots, "sampling": asdict(first.sampling)}
        found |= {name: one.result() | {"seconds": one.seconds} for name, one in self.evaluations.items()}
        return found | {"change": {name: asdict(change) for name, change in self.changes().items()}}


def compare(
    config: RunConfig,
    adapter: Path | None,
    sampling: Sampling | None = None,
    shots: int = 0,
    base: bool = True,
    on_progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Comparison:
    """Evaluate the model of ``config`` on its held-out problems, without and with ``adapter``, in one engine and with
    the same prompts, limits and random numbers.

    Args:
        adapter: the adapter's folder; ``None``: only the base is evaluated.
        sampling: what is sampled beside the greedy passes; unset: nothing.
        shots: worked examples from the training problems that every prompt begins with.
        base: whether the base is evaluated beside an adapter.
        on_progress: called with the name of the evaluation and (finished, expected) completions.

    Raises:
        UserError: no such data, model or adapter, too few worked examples, or the problems do not fit the model's
            context.
    """
    problems, prompts, needed, data_notes = _held_out(config, shots)
    policy = load_policy(config, config.seed, adapter, context=needed)
    sampler, notes = make_sampler(config, policy, prompts, needed)

    def measured(name: str) -> Evaluation:
        limit = config.max_completion_length
        return evaluate(
            problems, sampler, prompts, limit, checker, sampling, lambda done, total: on_progress(name, done, total)
        )

    with AnswerChecker(config.math_verify) as checker:
        try:
            adapted = measured("with adapter") if adapter is not None else None
            plain = None
            if base or adapter is None:
                with policy.model.disable_adapter():
                    sampler.load_adapter()
                    plain = measured("base")
        finally:
            sampler.close()
    return Comparison(plain, adapted, shots, (*data_notes, *notes))


def _held_out(config: RunConfig, shots: int) -> tuple[list[Problem], PromptBuilder, int, list[str]]:
    """The problems, their prompts, the longest prompt, draft and completion together, and notes for the user."""
    sets = load_problems(config, config.seed)
    examples = worked_examples(sets.train, shots, config.answer_style, config.answer_column) if shots else ()
    prompts = prompt_builder(config)
    # Without the examples, so that the problems are the same however many there are.
    problems, dropped, longest = fitting(sets.held_out, prompts, config.max_prompt_length)
    if longest is None:
        raise DataError(
            f"all {dropped} held-out prompts are longer than max_prompt_length = {config.max_prompt_length} tokens; "
            "raise --max-prompt-length"
        )
    prompts.shots = examples
    try:
        needed = check_context(config, prompts, longest)
    except ConfigError as error:
        fewer = [f"--few-shot {shots}: the worked examples are part of every prompt; use fewer"] if shots else []
        raise ConfigError(error.problems + fewer) from None
    return problems, prompts, needed, _data_notes(config, sets, dropped)


def _data_notes(config: RunConfig, sets: ProblemSets, dropped: int) -> list[str]:
    notes = []
    there = len(sets.held_out)
    if there < config.eval_size and not sets.report.held_out_parts:
        notes.append(
            f"{there} held-out problems, not {config.eval_size}: at most a tenth of what training may use is held out; "
            "name a file or set with --eval-data to measure on all of it"
        )
    if dropped:
        notes.append(f"left out {dropped} held-out problems longer than {config.max_prompt_length} prompt tokens")
    return notes + sets.report.notes
