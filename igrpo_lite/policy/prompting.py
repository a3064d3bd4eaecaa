"""Prompts for one model: its tokenizer in the prompt builder, and what fits into its context."""

from __future__ import annotations

from collections.abc import Sequence

from igrpo_lite.config import PromptOptions, RunConfig
from igrpo_lite.errors import ConfigError
from igrpo_lite.policy.loading import Policy, load_tokenizer, read_context_length
from igrpo_lite.prompts import STAGE2_TEMPLATES, SYSTEM_PROMPTS, PromptBuilder, read_text_or_file
from igrpo_lite.types import Problem


def prompt_builder(config: RunConfig) -> PromptBuilder:
    """The prompt builder that ``config`` describes, with the model's own tokenizer."""
    return PromptBuilder(
        load_tokenizer(config),
        system_prompt(config),
        stage2_template(config),
        config.draft_placement,
        config.max_draft_length,
    )


def stop_ids(policy: Policy, prompts: PromptBuilder) -> tuple[int, ...]:
    """Token ids that end a completion: the model's own, and the one that ends a turn in its chat template."""
    end = prompts.end_of_turn()
    return policy.stop_ids if end is None else tuple(sorted({*policy.stop_ids, end}))


def system_prompt(options: PromptOptions) -> str:
    return (
        SYSTEM_PROMPTS[options.answer_style]
        if options.system_prompt is None
        else read_text_or_file(options.system_prompt)
    )


def stage2_template(options: PromptOptions) -> str:
    """The user's turn of stage 2: the user's text or file, or ours for the placement."""
    if options.stage2_template is None:
        return STAGE2_TEMPLATES[options.draft_placement]
    return read_text_or_file(options.stage2_template)


def fitting(problems: Sequence[Problem], prompts: PromptBuilder, limit: int) -> tuple[list[Problem], int]:
    """Problems whose prompt has at most ``limit`` tokens, and how many have more."""
    kept = [problem for problem in problems if len(prompts.first(problem.question).ids) <= limit]
    return kept, len(problems) - len(kept)


def check_context(config: RunConfig, prompts: PromptBuilder, problems: Sequence[Problem]) -> None:
    """Refuse a run whose longest prompt, draft and completion together exceed the model's context.

    Raises:
        ConfigError: with the sum, and the setting to lower.
    """
    context = read_context_length(config)
    question = max((problem.question for problem in problems), key=lambda q: len(prompts.first(q).ids))
    first = prompts.first(question)
    # Evaluation refines with its own draft whatever the algorithm, so the draft counts for GRPO too.
    prompt = len(prompts.second(question, first, ()).ids)
    draft = min(config.max_completion_length, config.max_draft_length or config.max_completion_length)
    needed = prompt + draft + config.max_completion_length
    if needed > context:
        room = context - prompt
        fits = max(room // 2, room - (config.max_draft_length or room))
        advice = f"set --max-completion-length {fits}, or " if fits > 0 else ""
        raise ConfigError(
            f"the model's context is {context} tokens, but prompt {prompt} + draft {draft} + completion "
            f"{config.max_completion_length} may need {needed}; {advice}lower --max-draft-length or "
            "--max-prompt-length (longer problems are left out)"
        )
