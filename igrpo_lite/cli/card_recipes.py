"""Recipes for one GPU: what ``igrpo-lite plan`` says of each, as a comment in it and as a table in docs/recipes.md.

``make docs`` writes both anew; a test compares them, so that no number outlives the arithmetic that it came from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from igrpo_lite.cli.plan import flags, settled
from igrpo_lite.cli.recipes import CARD, names, path_of
from igrpo_lite.planning.gpus import GIB, Gpu, find_gpu
from igrpo_lite.planning.plan import Plan
from igrpo_lite.planning.time import Estimate

_PLAIN = {"backend": "transformers", "sampler": "transformers"}
_OPENING = "# Planned for "
_BLOCK = re.compile(rf"^{_OPENING}.*\n(?:#.*\n)*\n?", re.MULTILINE)


class CardRecipe(NamedTuple):
    """A recipe's name taken apart, as ``igrpo-lite models`` and ``igrpo-lite gpus`` call its parts."""

    name: str
    model: str
    method: str
    card: str

    @property
    def gpu(self) -> Gpu:
        return find_gpu(self.card)

    def plan(self) -> Plan:
        """With what a run takes where Unsloth and vLLM are installed."""
        return settled(self.card, self.name, {})[0]


def card_recipes() -> list[CardRecipe]:
    """From the smallest GPU to the largest."""
    found = [CardRecipe(name, *match.groups()) for name in names() if (match := CARD.fullmatch(name))]
    return sorted(found, key=lambda recipe: (recipe.gpu.memory_gib, recipe.name))


def comment(recipe: CardRecipe) -> str:
    """What the plan says, as lines of YAML comment."""
    return "".join(f"# {line}\n" for line in _lines(recipe))


def with_comment(recipe: CardRecipe) -> str:
    """The recipe's text with what the plan says now, behind its opening comment."""
    text = _BLOCK.sub("", path_of(recipe.name).read_text(encoding="utf-8"))
    opening, blank, rest = text.partition("\n\n")
    return f"{opening}\n\n{comment(recipe)}\n{rest.lstrip()}" if blank else f"{opening.rstrip()}\n\n{comment(recipe)}"


def table() -> list[str]:
    """All of them as lines of Markdown."""
    lines = [
        "| GPU | recipe | rollouts a step | tokens a completion, at most | GiB planned, of | a step | all steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for recipe in card_recipes():
        made = recipe.plan()
        config, time = made.setup.config, _time(made)
        cells = (
            recipe.gpu.name,
            f"[`{recipe.name}`](../recipes/{recipe.name}.yaml)",
            f"{config.prompts_per_step} x {config.num_generations}",
            str(config.max_completion_length),
            f"{made.peak / GIB:.1f}, {recipe.gpu.memory_gib:.1f}",
            f"{time.step:.0f} s",
            f"{config.max_steps}: {time.total / 3600:.1f} h",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _lines(recipe: CardRecipe) -> Iterator[str]:
    made, chosen = settled(recipe.card, recipe.name, {})
    plain, _ = settled(recipe.card, recipe.name, _PLAIN)
    phases = ", ".join(f"{phase.name} {phase.total / GIB:.2f}" for phase in made.phases)
    time, slower = _time(made), _time(plain)
    room = f"of {recipe.gpu.memory_gib:.2f} GiB"
    yield f"{_OPENING[2:]}{recipe.gpu.name}, with Unsloth and vLLM; not measured (`make docs` plans anew):"
    yield f"  {phases} {room}: {_verdict(made)}"
    yield (
        f"  a step {time.step:.0f} s (rollout {time.rollout:.0f}, update {time.update:.0f}), an evaluation "
        f"{time.evaluation:.0f} s; {time.steps} steps: {time.total / 3600:.1f} h"
    )
    if chosen:
        yield f"  the run chooses {flags(chosen)}"
    yield f"Without both ({flags(_PLAIN)}):"
    yield (
        f"  at most {plain.peak / GIB:.2f} GiB: {_verdict(plain)}; a step {slower.step:.0f} s, "
        f"{slower.steps} steps: {slower.total / 3600:.1f} h"
    )
    yield f"Times are for completions of {time.lengths.completion} tokens on average, and a factor of two either way."


def _verdict(made: Plan) -> str:
    words = {"fits": "fits", "tight": "tight", "no": "does not fit"}[made.verdict]
    return f"{words} ({made.share:.0%})"


def _time(made: Plan) -> Estimate:
    if made.time is None:
        raise ValueError(f"the speed of {made.setup.gpu.name} is not known")  # only of GPUs that were detected
    return made.time
