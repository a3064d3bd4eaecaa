"""Prompts for one model: its tokenizer in the prompt builder, and what fits into its context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from igrpo_lite.config import PromptOptions, RunConfig
from igrpo_lite.errors import ConfigError
from igrpo_lite.policy.loading import load_tokenizer, read_context_length
from igrpo_lite.prompts import STAGE2_TEMPLATES, SYSTEM_PROMPTS, PromptBuilder, read_text_or_file
from igrpo_lite.rewards.hiding import hide_answer
from igrpo_lite.types import Problem


def prompt_builder(config: RunConfig) -> PromptBuilder:
    """The prompt builder that ``config`` describes, with the model's own tokenizer."""
    prompts = PromptBuilder(
        load_tokenizer(config),
        system_prompt(config),
        stage2_template(config),
        config.draft_placement,
        config.max_draft_length,
    )
    prompts.hide_answer = hide_answer if config.draft_answer == "hidden" else None
    return prompts


def system_prompt(options: PromptOptions) -> str:
    """The instruction in every prompt: the user's text or file, or ours for the answer style."""
    if options.system_prompt is None:
        return SYSTEM_PROMPTS[options.answer_style]
    return read_text_or_file(options.system_prompt)


def stage2_template(options: PromptOptions) -> str:
    """The user's turn of stage 2: the user's text or file, or ours for the placement."""
    if options.stage2_template is None:
        return STAGE2_TEMPLATES[options.draft_placement]
    return read_text_or_file(options.stage2_template)


class Fitting(NamedTuple):
    """Problems whose prompt is within the limit, how many have a longer one, and the kept one with the longest."""

    kept: list[Problem]
    dropped: int
    longest: Problem | None


def fitting(problems: Sequence[Problem], prompts: PromptBuilder, limit: int) -> Fitting:
    """Sort out the problems whose prompt has more than ``limit`` tokens."""
    lengths = [len(prompts.first(problem.question).ids) for problem in problems]
    kept = [(length, problem) for length, problem in zip(lengths, problems, strict=True) if length <= limit]
    longest = max(kept, key=lambda pair: pair[0], default=(0, None))[1]
    return Fitting([problem for _, problem in kept], len(problems) - len(kept), longest)


def check_context(config: RunConfig, prompts: PromptBuilder, longest: Problem) -> int:
    """The longest prompt, draft and completion together, in tokens; refuses a run in which they exceed the context.

    A draft is tokenised anew in its prompt and may then be longer: the sum has a quarter of a draft more, as far as the
    context goes, and whoever builds prompts must keep to it (:attr:`PromptBuilder.max_length`).

    Raises:
        ConfigError: with the sum, and the setting to lower.
    """
    context = read_context_length(config)
    first = prompts.first(longest.question)
    # Evaluation refines with its own draft whatever the algorithm, so the draft counts for GRPO too.
    prompt = len(prompts.second(longest.question, first, ()).ids)
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
    return min(context, needed + draft // 4)
