"""``igrpo-lite show-prompt``: exactly what the model reads, in both stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from cyclopts import Parameter

from igrpo_lite.cli.flags import COMMAND, UNTRAINED, Recipe, checked, settings_flags
from igrpo_lite.config import DataOptions, PromptOptions
from igrpo_lite.config.fields import FIELDS
from igrpo_lite.errors import DataError

_MODEL = ("model", "revision", "seed")
_DRAFT = "(the chosen draft stands here)"


def verb() -> Callable[..., int | None]:
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
    resolved = checked(config, settings | UNTRAINED)
    from igrpo_lite.policy.prompting import prompt_builder
    from igrpo_lite.problems.loading import load_problems

    problems = load_problems(resolved, resolved.seed).train
    if not 0 <= row < len(problems):
        raise DataError(f"--row {row}: there are {len(problems)} problems, numbered from 0")
    prompts = prompt_builder(resolved)
    problem = problems[row]
    first = prompts.first(problem.question)
    draft = prompts.tokenizer.encode(_DRAFT, add_special_tokens=False)
    second = prompts.second(problem.question, first, draft)
    if prompts.plain_template:
        print("(no chat template: a plain one is used)")
    for name, prompt in (("stage 1: drafts and evaluation", first), ("stage 2: refinements", second)):
        print(f"===== {name}: {len(prompt.ids)} tokens =====\n{prompt.text}")
    print(f"===== gold answer of {problem.id} =====\n{problem.answer}")
