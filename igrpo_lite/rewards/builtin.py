r"""The built-in rewards, 1.0 or 0.0 each: ``accuracy`` and ``format`` (arXiv 2602.09000, equation 6 and appendix C)."""

from __future__ import annotations

import re

from igrpo_lite.prompts import AnswerStyle
from igrpo_lite.rewards.answers import Verdict, boxes, visible

BUILTIN: tuple[str, ...] = ("accuracy", "format")

DEFAULT_WEIGHTS: dict[str, float] = {"format": 0.1}
"""Weights other than 1. A format worth as much as a right answer is learned instead of it."""

_BOXED = re.compile(r"\\boxed\s*\{")
# DOTALL: without it a thought of two lines never matches, and the reward is silently 0 for the whole run.
_TAGS = re.compile(r"\s*<think>.*</think>\s*<answer>(?P<answer>.*)</answer>\s*", re.DOTALL)
_TAGS_OPENED = re.compile(r"(?:.*)</think>\s*<answer>(?P<answer>.*)</answer>\s*", re.DOTALL)


def accuracy(judged: Verdict) -> float:
    """1.0 for the gold answer, 0.0 for anything else."""
    return 1.0 if judged.reason == "correct" else 0.0


def format_reward(text: str, truncated: bool, style: AnswerStyle, think_opened: bool = False) -> float:
    r"""1.0 when a completion has the form that was asked for and ended by itself.

    Args:
        text: the completion's text.
        truncated: whether it was cut at the token limit; a cut one is never well-formed.
        style: ``boxed``: exactly one ``\boxed{}`` (outside the thinking, where there is any), closed and not empty.
            ``tags``: one ``<think>`` part, one non-empty ``<answer>`` part, nothing else.
        think_opened: the prompt already ended with ``<think>``; the completion has only the closing tag.
    """
    if truncated:
        return 0.0
    if style == "boxed":
        contents = boxes(visible(text), _BOXED)
        return 1.0 if len(contents) == 1 and contents[0] is not None and contents[0].strip() else 0.0
    counts = [text.count(tag) for tag in ("<think>", "</think>", "<answer>", "</answer>")]
    if counts != [0 if think_opened else 1, 1, 1, 1]:
        return 0.0
    match = (_TAGS_OPENED if think_opened else _TAGS).fullmatch(text)
    return 1.0 if match and match["answer"].strip() else 0.0


def opens_thinking(prompt: str) -> bool:
    """Whether a prompt ends inside an opened ``<think>``."""
    return prompt[-40:].rstrip().endswith("<think>")
