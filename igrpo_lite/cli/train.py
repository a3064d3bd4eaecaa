"""``igrpo-lite train``: the main job."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Annotated, Any

from cyclopts import Parameter

from igrpo_lite.cli.flags import COMMAND, Recipe, checked, settings_flags
from igrpo_lite.config.resolve import dump

_DUMP = Parameter(
    help="Print the resolved configuration as a recipe and stop.", negative=(), group=COMMAND, show_default=False
)


DIAGNOSED = 3
"""Exit code of a run that was stopped because it could not learn; a signal's is 128 and its number, as in a shell."""


def verb() -> Callable[..., int | None]:
    """The verb with a flag for every setting."""
    return settings_flags(train)


def train(
    *,
    config: Recipe = None,
    dump_config: Annotated[bool, _DUMP] = False,
    **settings: Any,
) -> int:
    """Train a model. Settings come from flags, then the recipe, then the model's defaults. Running the same command
    again continues the run."""
    resolved = checked(config, settings, files=not dump_config)  # it may be meant for another machine
    if dump_config:
        print(dump(resolved))
        return 0
    from igrpo_lite.training import train as start

    stopped_by = start(resolved)["stopped_by"]
    if stopped_by == "diagnosis":
        return DIAGNOSED
    return 128 + signal.Signals[stopped_by] if stopped_by in signal.Signals.__members__ else 0
