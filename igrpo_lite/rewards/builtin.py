r"""The built-in rewards that need no process and no network, each a plain function of one completion.

``accuracy`` and ``format`` are arXiv 2602.09000, equation 6 and appendix C; lengths are sampled tokens.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence

from igrpo_lite.answers.answers import Verdict, boxes, visible
from igrpo_lite.prompts import AnswerStyle

BUILTIN: tuple[str, ...] = ("accuracy", "format", "soft_overlong", "cosine", "repetition", "judge", "random")

DEFAULT_WEIGHTS: dict[str, float] = {"format": 0.1}
"""Weights other than 1. A format worth as much as a right answer is learned instead of it."""

COSINE_ENDS: dict[bool, tuple[float, float]] = {True: (1.0, 0.5), False: (-1.0, -0.5)}
"""Of ``cosine``, by whether the answer is right: the shortest completion's value and the longest one's (as in TRL)."""

REPETITION_NGRAM = 3
"""Of ``repetition``: words per n-gram."""

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


def soft_overlong(length: int, limit: int) -> float:
    """0 up to a fifth before ``limit`` tokens, from there falling linearly to -1 at ``limit`` (DAPO, arXiv 2503.14476,
    equation 13, with the paper's share)."""
    buffer = max(1, limit // 5)
    over = length - (limit - buffer)
    return max(-1.0, -over / buffer) if over > 0 else 0.0


def cosine_scaled(length: int, limit: int, right: bool) -> float:
    """Accuracy scaled by length (arXiv 2502.03373, appendix C.1; without its further penalty at the limit).

    A right answer earns 1 falling to 0.5, a wrong one -1 rising to -0.5, along half a cosine from no token to ``limit``
    tokens: short is better where it is right, and long is better where it is not (:data:`COSINE_ENDS`).
    """
    short, long = COSINE_ENDS[right]
    return long + 0.5 * (short - long) * (1.0 + math.cos(math.pi * min(length / limit, 1.0)))


def repetition_penalty(text: str, ngram: int = REPETITION_NGRAM) -> float:
    """Minus the share of word n-grams that occurred before in the text: 0 to almost -1 (arXiv 2502.03373, appendix C.2;
    over words, case ignored, as in open-r1)."""
    words = text.lower().split()
    total = len(words) - ngram + 1
    if total < 1:
        return 0.0
    return len({tuple(words[i : i + ngram]) for i in range(total)}) / total - 1.0


def random_reward(seed: int, problem_id: str, ids: Sequence[int]) -> float:
    """A control that knows nothing: uniform in [0, 1), the same for the same completion of the same problem."""
    digest = hashlib.sha256(f"{seed}\x1f{problem_id}\x1f{','.join(map(str, ids))}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
