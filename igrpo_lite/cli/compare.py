"""``igrpo-lite compare``: methods or recipes at equal cost, over several seeds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from igrpo_lite.cli.flags import COMMAND, Recipe, settings_flags
from igrpo_lite.config.fields import FIELDS
from igrpo_lite.config.resolve import suggestion
from igrpo_lite.errors import ConfigError

INCOMPLETE = 3
"""Exit code when some of the runs failed or are not there."""

_METHODS = Parameter(
    name="METHOD",
    help="`grpo`, `igrpo` or `igrpo-joint`, with tokens and settings as in `igrpo/s-grpo+draft_selection=random`; or a "
    "recipe; `NAME=` before it names it. The first one is what the others are compared with.",
    allow_leading_hyphen=True,  # or cyclopts would speak of unknown flags itself, and not say which were meant
)
_SEEDS = Parameter(help="How many: 5 is seeds 0 to 4; or which: 0,3,7.", group=COMMAND)
_OUTPUT = Parameter(help="Folder of the runs and results.", group=COMMAND)
_JOBS = Parameter(help="Runs at a time.", group=COMMAND)
_UNEQUAL = Parameter(help="Compare methods with other numbers of rollouts all the same.", negative=(), group=COMMAND)
_NO_RUN = Parameter(help="Start nothing: tables of what is there.", negative=(), group=COMMAND, show_default=False)


def verb() -> Callable[..., int | None]:
    """The verb with a flag for every setting that methods can share."""
    return settings_flags(compare, _shared())


def _shared() -> list[str]:
    from igrpo_lite.comparison.methods import RESERVED

    return [name for name in FIELDS if name not in RESERVED]


def compare(
    *methods: Annotated[str, _METHODS],
    seeds: Annotated[str, _SEEDS] = "5",
    config: Recipe = None,
    output_dir: Annotated[Path, _OUTPUT] = Path("runs/compare"),
    jobs: Annotated[int, _JOBS] = 1,
    allow_unequal: Annotated[bool, _UNEQUAL] = False,
    no_run: Annotated[bool, _NO_RUN] = False,
    **settings: Any,
) -> int:
    """Train with several methods and seeds and compare them at equal rollouts: held-out accuracy with intervals, paired
    differences, costs. Settings are for all methods. Running the same command again goes on, with more methods or seeds
    if wanted."""
    from rich.console import Console

    from igrpo_lite.cli.recipes import find
    from igrpo_lite.comparison import compare as run_all
    from igrpo_lite.comparison.markdown import by_reason, show
    from igrpo_lite.comparison.methods import read_methods

    if unknown := [word for word in methods if word.startswith("-")]:
        named = list(takewhile(lambda word: not word.startswith("-"), methods))  # a later one may be a flag's value
        others = read_methods(named, settings, config, allow_unequal, find)[1] if named else []
        raise ConfigError([_unknown(word.partition("=")[0]) for word in unknown] + others)
    result = run_all(
        methods,
        seeds=seeds,
        config=config,
        output_dir=output_dir,
        jobs=jobs,
        allow_unequal=allow_unequal,
        run=not no_run,
        find_recipe=find,
        **settings,
    )
    if result["runs"]:
        show(result, Console())
        print(f"\nwritten: comparison.md, comparison.json and comparison.png in {output_dir}")
    for note in result["notes"]:
        print(f"note: {note}", file=sys.stderr)
    for reason, names in by_reason(result["missing"]).items():
        print(f"missing, {reason}: {', '.join(names)}", file=sys.stderr)
    return INCOMPLETE if result["missing"] else 0


def _unknown(flag: str) -> str:
    from igrpo_lite.comparison.methods import RESERVED, reserved

    name = flag.lstrip("-").replace("-", "_")
    if name in RESERVED:
        return reserved(name)
    near = suggestion(name, [*_shared(), "seeds", "jobs", "output_dir", "allow_unequal", "no_run"])
    advice = f"did you mean --{near.replace('_', '-')}?" if near else "see igrpo-lite compare --help"
    return f"unknown flag {flag}; {advice}"
