"""Prompts for one model: its tokenizer in the prompt builder, and what fits into its context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from igrpo_lite.config import PromptOptions, RunConfig
from igrpo_lite.errors import ConfigError
from igrpo_lite.policy.loading import load_tokenizer, read_context_length
from igrpo_lite.prompts import STAGE2_TEMPLATES, SYSTEM_PROMPTS, PromptBuilder, read_text_or_file
from igrpo_lite.rewards.judge_prompt import REMINDER, asks_policy, judge_prompt, judge_template
from igrpo_lite.types import Problem, Prompt


def prompt_builder(config: RunConfig) -> PromptBuilder:
    """The prompt builder that ``config`` describes, with the model's own tokenizer."""
    prompts = PromptBuilder(
        load_tokenizer(config),
        system_prompt(config),
        stage2_template(config),
        config.draft_placement,
        config.max_draft_length,
    )
    if asks_policy(config):  # without the instruction, which asks for solutions
        prompts.judge = PromptBuilder(prompts.tokenizer, "", REMINDER, "multi-turn", heading="Grade:")
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
    """Problems whose prompt is within the limit, how many have a longer one, the kept one with the longest, and the
    tokens of each prompt, also of those left out."""

    kept: list[Problem]
    dropped: int
    longest: Problem | None
    lengths: list[int]


def fitting(problems: Sequence[Problem], prompts: PromptBuilder, limit: int) -> Fitting:
    """Sort out the problems whose prompt has more than ``limit`` tokens."""
    lengths = [len(prompts.first(problem.question).ids) for problem in problems]
    kept = [(length, problem) for length, problem in zip(lengths, problems, strict=True) if length <= limit]
    longest = max(kept, key=lambda pair: pair[0], default=(0, None))[1]
    return Fitting([problem for _, problem in kept], len(problems) - len(kept), longest, lengths)


def check_context(config: RunConfig, prompts: PromptBuilder, *longest: Problem) -> int:
    """The tokens that an engine must have room for; refuses a run in which they exceed the model's context.

    That is the longest prompt, draft and completion together, or what the policy reads and writes as a judge. What was
    sampled is tokenised anew in a prompt and may then be longer: there is room for a quarter more, as far as the
    context goes, and ``prompts`` are told to keep to it (:attr:`PromptBuilder.max_length`).

    Args:
        longest: the problems with the longest prompts.

    Raises:
        ConfigError: with the sums, and the settings to lower.
    """
    needed, findings = _rollout_length(config, prompts, longest)
    if prompts.judge is not None:
        judged, more = _judge_length(config, prompts.judge, longest)
        needed, findings = max(needed, judged), findings + more
    if findings:
        raise ConfigError(findings)
    return needed


def _rollout_length(config: RunConfig, prompts: PromptBuilder, longest: Sequence[Problem]) -> tuple[int, list[str]]:
    context, completion = read_context_length(config), config.max_completion_length
    # Evaluation refines with its own draft whatever the algorithm, so the draft counts for GRPO too.
    prompt = max(len(prompts.second(p.question, prompts.first(p.question), ()).ids) for p in longest)
    draft = min(completion, config.max_draft_length or completion)
    needed = prompt + draft + completion
    if needed > context:
        room = context - prompt
        fits = max(room // 2, room - (config.max_draft_length or room))
        advice = f"set --max-completion-length {fits}, or " if fits > 0 else ""
        return needed, [
            f"the model's context is {context} tokens, but prompt {prompt} + draft {draft} + completion {completion} "
            f"may need {needed}; {advice}lower --max-draft-length or --max-prompt-length (longer problems are left out)"
        ]
    needed = min(context, needed + draft // 4)
    prompts.max_length = needed - completion
    return needed, []


def _judge_length(config: RunConfig, judge: PromptBuilder, longest: Sequence[Problem]) -> tuple[int, list[str]]:
    """Of the conversation in which the policy grades a completion and is reminded of the score."""
    context, completion, reply = read_context_length(config), config.max_completion_length, config.judge_max_tokens
    template = judge_template(config)
    prompt = max(len(judge.first(judge_prompt(template, problem, "")).ids) for problem in longest)
    reminder = len(judge.second("", Prompt("", ()), ()).ids)
    needed = prompt + completion + 2 * reply + reminder
    if needed > context:
        fits = (context - prompt - completion - reminder) // 2
        advice = f"set --judge-max-tokens {fits}, or " if fits > 0 else ""
        return needed, [
            f"the model's context is {context} tokens, but to judge, the policy may need {needed}: judge's prompt "
            f"{prompt} + completion {completion} + its reply {reply} + reminder {reminder} + its reply {reply}; "
            f"{advice}give a shorter --judge-prompt, or lower --max-completion-length or --max-prompt-length"
        ]
    needed = min(context, needed + completion // 4)
    judge.max_length = needed - 2 * reply - reminder
    return needed, []
