"""What of a step is under way: the problems, what has come back of each, and the rewards that are being computed."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

from igrpo_lite.algorithms.drafts import DraftChoice
from igrpo_lite.algorithms.judging import Judging
from igrpo_lite.algorithms.replay import Replay, Restart
from igrpo_lite.sampling.base import Request, request_seed
from igrpo_lite.types import Completion, Group, Problem, Prompt, Score, Stage

Part = tuple[Stage, int]
"""What is completed together: a stage's own completions (0), or one of its replays (1, 2)."""


@dataclass(frozen=True, slots=True, order=True)
class Tag:
    """Which of a step's requests it is; in their order."""

    step: int
    slot: int  # the problem's place in the step
    part: Part
    index: int
    turn: int = 0  # 0: a completion; else the policy is asked to judge it, see algorithms/judging.py


@dataclass(slots=True)
class Pending:
    """One problem under way: what has come back so far, in request order.

    ``single``: it gets one stage with all rollouts, whatever the algorithm (``single_stage_share``).
    """

    problem: Problem
    step: int
    slot: int
    prompts: dict[Stage, Prompt]
    single: bool
    finished: dict[Part, list[Completion | None]] = field(default_factory=dict)
    groups: dict[Stage, Group] = field(default_factory=dict)
    restarts: dict[Part, Restart] = field(default_factory=dict)
    replays: dict[Part, Replay] = field(default_factory=dict)
    judging: dict[Part, Judging] = field(default_factory=dict)
    choice: DraftChoice | None = None

    def seed(self, seed: int, *path: object) -> int:
        """Of a request or a choice in this place, in a run with ``seed``."""
        return request_seed(seed, self.step, self.slot, self.problem.id, *path)


@dataclass(frozen=True, slots=True)
class Scoring:
    """A complete part whose rewards are being computed; ``due`` is the decoding step that waits for them."""

    pending: Pending
    part: Part
    completions: tuple[Completion, ...]
    scores: Future[list[Score]]
    due: float


def tag_of(request: Request) -> Tag:
    """The tag of one of the collector's own requests."""
    assert isinstance(request.tag, Tag)
    return request.tag
