"""``igrpo-lite eval``: held-out accuracy of a model, an adapter or a finished run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from igrpo_lite.cli.flags import COMMAND, Recipe, checked, settings_flags
from igrpo_lite.config import DataOptions, ModelOptions, PromptOptions, RewardOptions
from igrpo_lite.fields import FIELDS

RUN_CONFIG = "config.yaml"
"""A folder that holds this file is a run's."""

_ROLLOUT = ("temperature", "draft_temperature", "max_completion_length", "max_num_seqs", "seed", "progress")


def verb() -> Callable[..., None]:
    """The verb with the flags that matter to an evaluation."""
    sections = (ModelOptions, DataOptions, PromptOptions, RewardOptions)
    wanted = {name for section in sections for name in section.model_fields} | set(_ROLLOUT)
    wanted -= {"model", "lora_r", "lora_alpha", "lora_target_modules", "max_problems"}
    return settings_flags(evaluate, [name for name in FIELDS if name in wanted])


def evaluate(
    run_or_model: Annotated[str, Parameter(help="Run folder, model folder, `tiny` or hub id.")],
    /,
    *,
    config: Recipe = None,
    adapter: Annotated[Path | None, Parameter(help="Adapter folder; unset: a run's best.", group=COMMAND)] = None,
    output: Annotated[Path | None, Parameter(help="JSON file for the results.", group=COMMAND)] = None,
    **settings: Any,
) -> None:
    """Measure accuracy on held-out problems: one pass from the plain prompt, and refined with an own draft. A run is
    measured with its own settings, except for the flags given here."""
    run_folder = Path(run_or_model) if (Path(run_or_model) / RUN_CONFIG).is_file() else None
    if run_folder:
        config = config or str(run_folder / RUN_CONFIG)
    else:
        settings["model"] = run_or_model
    resolved = checked(config, settings)
    from igrpo_lite.evaluation import command

    command.run(resolved, run_folder=run_folder, adapter=adapter, output=output)
