"""Records of runs that never were, for tests of what is made of them."""

from __future__ import annotations

from typing import Any

from igrpo_lite.comparison.runs import Run, run_from

TOKENS = (50, 60, 70)
"""Sampled in each of three steps."""


def evaluation(accuracy: float) -> dict[str, Any]:
    return {"single": {"accuracy": accuracy}, "refined": {"accuracy": accuracy + 0.05}}


def summary(seed: int, accuracies: tuple[float, ...], stopped: str | None = None) -> dict[str, Any]:
    return {
        "seed": seed,
        "steps": 3,
        "evaluations": len(accuracies),
        "stopped": stopped,
        "stopped_by": stopped and "diagnosis",
        "rollouts": 640,
        "time": {"loading": 100.0, "rollout": 3.0, "update": 2.0, "evaluation": 50.0},
        "versions": {"torch": "2"},
    }


def records(accuracies: tuple[float, ...]) -> list[dict[str, Any]]:
    """Evaluations at even distances over the three steps, as many as there are accuracies."""
    steps: list[dict[str, Any]] = [
        {"kind": "step", "step": n, "tokens/sampled": tokens, "tokens/learning": 10 * n, "tokens/backbone": 30}
        for n, tokens in enumerate(TOKENS, 1)
    ]
    last = max(1, len(accuracies) - 1)
    found = [{"kind": "evaluation", "step": 3 * i // last} | evaluation(a) for i, a in enumerate(accuracies)]
    return [*found, *steps, {"kind": "parity", "step": 0}]


def a_run(
    method: str,
    seed: int,
    *accuracies: float,
    stopped: str | None = None,
    right: dict[str, dict[str, bool]] | None = None,
) -> Run:
    return run_from(method, summary(seed, accuracies, stopped), records(accuracies), right)
