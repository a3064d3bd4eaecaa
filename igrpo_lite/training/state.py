"""What a run remembers between steps besides tensors: the JSON part of a checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


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

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> Progress:
        return cls(**state)
