"""Data types shared by all packages: frozen, without behaviour, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length"]
"""``stop``: the model ended its turn. ``length``: it was cut at the token limit (a truncated completion)."""

Stage = Literal["stage1", "stage2"]
"""Sampling stage of iGRPO (paper section 3.2): drafts, then refinements. GRPO has the first only."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One question with its gold answer.

    Attributes:
        id: stable name within its problem set; seeds and records refer to it.
        question: the question as plain text.
        answer: the gold answer as text, already cut out of a longer solution.
        columns: further columns of the source row; user rewards receive them by name.
    """

    id: str
    question: str
    answer: str
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered prompt: exactly the text and token ids that the model sees."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """What the model wrote for one request.

    Attributes:
        ids: sampled token ids, including the end-of-turn token when there is one.
        text: the ids decoded without special tokens.
        logprobs: natural log-probability of each sampled token under the sampling distribution
            (after temperature), one per id.
        finish: why it ended.
    """

    ids: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]
    finish: FinishReason

    @property
    def truncated(self) -> bool:
        return self.finish == "length"


@dataclass(frozen=True, slots=True)
class Score:
    """A completion's reward.

    Attributes:
        reward: weighted sum of the parts; the one scalar that chooses drafts and makes advantages.
            ``None`` when no part applied (the completion is then left out of its group).
        parts: reward of each function by name, before weighting; ``None`` where it abstained.
        reason: verdict on the answer, see :class:`igrpo_lite.answers.answers.Verdict`: ``correct``, ``wrong``,
            ``no_answer``, ``unparsed``, ``several_answers``, ``truncated`` (cut off before any answer) or ``timeout``.
        answer: the answer that was found, as text, if any.
        extras: what rewards logged of the completion, JSON values by ``REWARD/COLUMN``.
    """

    reward: float | None
    parts: Mapping[str, float | None]
    reason: str
    answer: str | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Group:
    """The completions of one prompt in one stage: the unit of GRPO.

    ``completions`` and ``scores`` have the group's size; ``prompt`` is what they were conditioned on (in the
    refinement stage it contains the chosen draft).
    """

    problem: Problem
    stage: Stage
    prompt: Prompt
    completions: tuple[Completion, ...]
    scores: tuple[Score, ...]
