"""A model with and without its adapter on the same held-out problems, pair by pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from igrpo_lite.answers.checker import AnswerChecker
from igrpo_lite.config import RunConfig
from igrpo_lite.errors import ConfigError
from igrpo_lite.evaluation.evaluate import Answered, Evaluation, Sampling, evaluate
from igrpo_lite.evaluation.few_shot import worked_examples
from igrpo_lite.evaluation.statistics import PairedChange, paired_change
from igrpo_lite.workbench import Workbench


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

    def measured(name: str) -> Evaluation:
        limit = config.max_completion_length
        progress = partial(on_progress, name)
        return evaluate(bench.held_out, bench.sampler, bench.prompts, limit, checker, sampling, progress)

    with Workbench(config) as bench, AnswerChecker() as checker:
        _fit(bench, shots)
        bench.notes = _data_notes(bench)
        bench.load(adapter)
        adapted = measured("with adapter") if adapter is not None else None
        plain = None
        if base or adapter is None:
            with bench.policy.model.disable_adapter():
                bench.sampler.load_adapter()
                plain = measured("base")
    return Comparison(plain, adapted, shots, tuple(bench.notes))


def _fit(bench: Workbench, shots: int) -> None:
    """Choose the held-out problems that fit, and put worked examples into every prompt."""
    config = bench.config
    examples = worked_examples(bench.sets.train, shots, config.answer_style, config.answer_column) if shots else ()
    bench.fit("held-out")  # without the examples, so that the problems are the same however many there are
    bench.prompts.shots = examples
    try:
        bench.check_lengths()
    except ConfigError as error:
        fewer = [f"--few-shot {shots}: the worked examples are part of every prompt; use fewer"] if shots else []
        raise ConfigError(error.problems + fewer) from None


def _data_notes(bench: Workbench) -> list[str]:
    config, sets, dropped = bench.config, bench.sets, bench.fits["held-out"].dropped
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
