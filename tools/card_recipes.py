"""What ``igrpo-lite plan`` says of each recipe for one GPU: a comment in it, and a table in docs/recipes.md.

``make docs`` writes both anew (``python tools/card_recipes.py docs``); a test compares them with the planner.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from make_docs import filled

from igrpo_lite.cli.plan import flags, settled
from igrpo_lite.cli.recipes import CARD, names, path_of
from igrpo_lite.planning.gpus import GIB, Gpu, find_gpu
from igrpo_lite.planning.plan import Plan

TITLE = "recipes for one GPU"
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
        "| GPU | recipe | rollouts a step | tokens a completion, at most | GiB planned, of | all steps, about |",
        "|---|---|---|---|---|---|",
    ]
    for recipe in card_recipes():
        made = recipe.plan()
        config = made.setup.config
        cells = (
            recipe.gpu.name,
            f"[`{recipe.name}`](../recipes/{recipe.name}.yaml)",
            f"{config.prompts_per_step} x {config.num_generations}",
            str(config.max_completion_length),
            f"{made.peak / GIB:.1f}, {recipe.gpu.memory_gib:.1f}",
            f"{config.max_steps}: {_hours(made)}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _lines(recipe: CardRecipe) -> Iterator[str]:
    made, chosen = settled(recipe.card, recipe.name, {})
    plain, _ = settled(recipe.card, recipe.name, _PLAIN)
    phases = ", ".join(f"{phase.name} {phase.total / GIB:.2f}" for phase in made.phases)
    yield f"{_OPENING[2:]}{recipe.gpu.name}, with Unsloth and vLLM; not measured (`make docs` plans anew):"
    yield f"  {phases} of {recipe.gpu.memory_gib:.2f} GiB: {_verdict(made)}"
    yield f"  {made.setup.config.max_steps} steps: about {_hours(made)}, or half or twice that"
    if chosen:
        yield f"  the run chooses {flags(chosen)}"
    yield f"Without both ({flags(_PLAIN)}):"
    yield f"  at most {plain.peak / GIB:.2f} GiB: {_verdict(plain)}; about {_hours(plain)}"


def _verdict(made: Plan) -> str:
    words = {"fits": "fits", "tight": "tight", "no": "does not fit"}[made.verdict]
    return f"{words} ({made.share:.0%})"


def _hours(made: Plan) -> str:
    assert made.time is not None  # GPUs in the table have a known speed
    return f"{made.time.total / 3600:.1f} h"


if __name__ == "__main__":
    for recipe in card_recipes():
        path_of(recipe.name).write_text(with_comment(recipe), encoding="utf-8")
    page = Path(sys.argv[1] if len(sys.argv) > 1 else "docs") / "recipes.md"
    page.write_text(filled(page.read_text(encoding="utf-8"), TITLE, table()), encoding="utf-8")
