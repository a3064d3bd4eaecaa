"""``igrpo-lite show-prompt``: exactly what the model reads, in both stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from cyclopts import Parameter

from igrpo_lite.cli.flags import COMMAND, Recipe, checked, settings_flags
from igrpo_lite.config import DataOptions, PromptOptions
from igrpo_lite.fields import FIELDS

_MODEL = ("model", "revision", "seed")


def verb() -> Callable[..., None]:
    """The verb with the flags of data and prompts."""
    wanted = {name for section in (DataOptions, PromptOptions) for name in section.model_fields} | set(_MODEL)
    wanted -= {"eval_data", "eval_split", "eval_size"}
    return settings_flags(show_prompt, [name for name in FIELDS if name in wanted])


def show_prompt(
    *,
    row: Annotated[int, Parameter(help="Number of the problem, from 0.", group=COMMAND)] = 0,
    config: Recipe = None,
    **settings: Any,
) -> None:
    """Print the prompts of both stages for one problem, as the tokenizer renders them, with their length in tokens."""
    resolved = checked(config, settings)
    from igrpo_lite import prompts_preview

    prompts_preview.run(resolved, row)
