"""What a run remembers between steps besides tensors: the JSON part of a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from igrpo_lite.algorithms.dynamic import Batch
from igrpo_lite.errors import RunFolderError
from igrpo_lite.rewards.scorer import Calls


@dataclass(frozen=True, slots=True)
class Stop:
    """Why a run ended before its last step: ``by`` is ``SIGINT``, ``SIGTERM``, ``time`` or ``diagnosis``."""

    by: str
    text: str


@dataclass(slots=True)
class Progress:
    """Where a run is.

    Attributes:
        fingerprint: hash of the problems in use.
        step: optimizer steps done; data order, seeds and learning rate follow from it.
        evaluations: results of all held-out evaluations, in order; the first is before any step.
        positions: bytes of each record file that belong to this point.
        health: state of the diagnosis.
        reward_failures: how calls of users' rewards went so far, by function.
        seconds: time spent so far, by phase.
        base: fingerprint of the frozen weights, of type ``dtype``.
        drafted: drafts that the ``ahead`` schedule has sampled for the next step.
        rollouts: completions sampled in all steps.
        update: state of the update beside the optimizer's: tokens at a time, scale of the loss.
    """

    fingerprint: str
    step: int = 0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    positions: dict[str, int] = field(default_factory=dict)
    health: dict[str, Any] = field(default_factory=dict)
    reward_failures: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    base: str = ""
    dtype: str = ""
    drafted: list[dict[str, Any]] = field(default_factory=list)
    rollouts: int = 0
    update: dict[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> dict[str, Any] | None:
        """The evaluation with the highest single-pass accuracy, the earlier of equals."""
        return max(self.evaluations, key=lambda result: result["single"]["accuracy"], default=None)

    def add_evaluation(self, result: dict[str, Any]) -> bool:
        """Remember an evaluation; returns whether it is the best so far."""
        self.evaluations.append(result)
        return self.best is result

    def clock(self, **phases: float) -> dict[str, float]:
        """Add seconds to the phases named, and give them back as a record."""
        for phase, seconds in phases.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        return dict(phases)

    def finish_step(self, batch: Batch, drafted: list[dict[str, Any]], failures: Mapping[str, Calls]) -> None:
        """One more step is complete."""
        self.step += 1
        self.rollouts += sum(rollout.sampled for rollout in batch.sampled)
        self.drafted = drafted
        self.reward_failures = {name: asdict(calls) for name, calls in failures.items()}

    def forgive_rewards(self, failures: Mapping[str, Calls]) -> None:
        """Once a reward is mended, its failures must not count against it; what a judge has cost stays spent."""
        spent = {name: calls.tokens for name, calls in failures.items() if calls.tokens}
        self.reward_failures = {name: asdict(Calls(tokens=count)) for name, count in spent.items()}

    def check_continues(self, now: Progress, folder: object, model: str) -> None:
        """What was loaded must be what the run began with.

        Raises:
            RunFolderError: other problems, other weights, or weights of another type.
        """
        if self.fingerprint != now.fingerprint:
            raise RunFolderError(
                f"the problems are not those that {folder} was started with (a changed data file?); restore them, or "
                "use --fresh to start over"
            )
        self.base = self.base or now.base  # a checkpoint of an earlier version has none
        if self.dtype not in ("", now.dtype):
            raise RunFolderError(
                f"{folder} was started with weights in {self.dtype}, and here they are {now.dtype} (another kind of "
                f"GPU?); go on with --dtype {self.dtype}, or use --fresh to start over"
            )
        if self.base != now.base:
            raise RunFolderError(
                f"the weights of {model} are not those that {folder} was started with (a new revision?); restore "
                "them, or use --fresh to start over"
            )

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds of a block to a phase."""
        started = time.perf_counter()
        yield
        self.clock(**{phase: time.perf_counter() - started})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> Progress:
        return cls(**state)
