"""What is kept of each rollout, and which samples are worth a look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from igrpo_lite.algorithms.replay import Replay
from igrpo_lite.algorithms.rollout import Rollout
from igrpo_lite.report.screen import Sample
from igrpo_lite.types import Completion, Group, Score


def rollout_record(step: int, rollout: Rollout) -> dict[str, Any]:
    """One line of ``samples.jsonl``: a problem's drafts, the chosen one, its refinements, replays, with all scores."""
    problem = rollout.stage1.problem
    record: dict[str, Any] = {
        "step": step,
        "id": problem.id,
        "question": problem.question,
        "gold": problem.answer,
        "drafts": _completions(rollout.stage1),
    }
    if rollout.choice is not None and rollout.stage2 is not None:
        record |= {
            "chosen": rollout.choice.index,
            "tied": rollout.choice.tied,
            "refinements": _completions(rollout.stage2),
        }
    if rollout.replays:
        record["replays"] = [_replay(rollout, replay) for replay in rollout.replays]
    return record


def shown_samples(rollouts: Sequence[Rollout]) -> tuple[Sample | None, Sample | None]:
    """A right and a wrong completion of the last stage; the wrong one from a problem that also has a right one."""
    good, bad = None, None
    for rollout in rollouts:
        group = rollout.groups[-1]
        right = [i for i, score in enumerate(group.scores) if score.reason == "correct"]
        wrong = [i for i, score in enumerate(group.scores) if score.reason != "correct"]
        if right and good is None:
            good = _sample(rollout, right[0])
        if wrong and (bad is None or right):
            bad = _sample(rollout, wrong[0])
            if right and good is not None:
                break
    return good, bad


def _replay(rollout: Rollout, replay: Replay) -> dict[str, Any]:
    """Which completion was continued from which token on; the source itself stands with its stage."""
    (group,) = (group for group in rollout.groups if group.stage == replay.group.stage)
    source = next(i for i, completion in enumerate(group.completions) if completion is replay.source)
    where = {"stage": group.stage, "source": source, "start": replay.start}
    return where | {"completions": _completions(replay.group)[1:]}


def _completions(group: Group) -> list[dict[str, Any]]:
    return [_completion(c, s) for c, s in zip(group.completions, group.scores, strict=True)]


def _completion(completion: Completion, score: Score) -> dict[str, Any]:
    record = {
        "text": completion.text,
        "tokens": len(completion.ids),
        "finish": completion.finish,
        "reward": score.reward,
        "rewards": dict(score.parts),
        "reason": score.reason,
        "answer": score.answer,
    }
    return record | {"extras": dict(score.extras)} if score.extras else record


def _sample(rollout: Rollout, index: int) -> Sample:
    group = rollout.groups[-1]
    draft = rollout.draft.text if rollout.draft is not None else None
    completion, score = group.completions[index], group.scores[index]
    return Sample(group.problem.question, draft, completion.text, group.problem.answer, score.reason, score.reward)
