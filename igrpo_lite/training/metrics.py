"""The numbers of one step, from its rollouts and its update; keys are described in docs/metrics.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from igrpo_lite.algorithms.advantages import has_signal, reward_tensor
from igrpo_lite.algorithms.dynamic import Batch
from igrpo_lite.algorithms.replay import Replay
from igrpo_lite.algorithms.rollout import Rollout
from igrpo_lite.prompts import PromptBuilder
from igrpo_lite.training.update import UpdateStats
from igrpo_lite.types import Group


def step_metrics(batch: Batch, update: UpdateStats, prompts: PromptBuilder) -> dict[str, Any]:
    """One flat, JSON-able record of a step, without its step number and times.

    Rewards and verdicts are over all that was sampled: over what dynamic sampling kept, they would be biased.
    """
    rollouts = batch.sampled
    metrics: dict[str, Any] = _stage("stage1", [r.stage1 for r in rollouts])
    refined = [r for r in rollouts if r.stage2 is not None]
    if refined:
        metrics |= _choice(rollouts, prompts)
        metrics |= _stage("stage2", [r.stage2 for r in refined if r.stage2 is not None])
        metrics |= _refinement(refined)
    replays = [replay for r in rollouts for replay in r.replays]
    if replays:
        metrics |= _replay(replays)
    if batch.rounds is not None:
        metrics |= {
            "dynamic/rounds": batch.rounds,
            "dynamic/problems": len(batch.sampled),
            "dynamic/kept": batch.informative,
        }
    metrics |= {
        "loss": update.loss,
        "grad_norm": update.grad_norm,
        "entropy": update.entropy,
        "clip_ratio": update.clip_ratio,
        "advantage": update.advantage,
        "place": update.place,
        "sampler_gap": update.sampler_gap,
        "learning_sequences": update.learning_sequences,
        "tokens/sampled": sum(len(c.ids) for r in rollouts for g in r.groups for c in g.completions)
        + sum(replay.sampled_tokens for replay in replays),
        "tokens/learning": update.learning_tokens,
        "tokens/backbone": update.backbone_tokens,
        "tokens/head": update.head_tokens,
    }
    if update.skipped:
        metrics["update_skipped"] = 1
    if update.kl is not None:
        metrics["kl"] = update.kl
    return metrics


def _stage(stage: str, groups: Sequence[Group]) -> dict[str, Any]:
    scores = [score for group in groups for score in group.scores]
    completions = [completion for group in groups for completion in group.completions]
    right = [[score.reason == "correct" for score in group.scores] for group in groups]
    metrics = {
        "reward": _mean([s.reward for s in scores if s.reward is not None]),
        "accuracy": _mean([score.reason == "correct" for score in scores]),
        "truncated": _mean([completion.truncated for completion in completions]),
        "length": _mean([len(completion.ids) for completion in completions]),
        "informative": _mean([has_signal(reward_tensor(group.scores)) for group in groups]),
        "all_right": _mean([all(row) for row in right]),
        "all_wrong": _mean([not any(row) for row in right]),
        "reasons": dict(sorted(Counter(score.reason for score in scores).items())),
    }
    for name in scores[0].parts:
        metrics[f"rewards/{name}"] = _mean([s.parts[name] for s in scores if s.parts[name] is not None])
    return {f"{stage}/{key}": value for key, value in metrics.items()}


def _choice(rollouts: Sequence[Rollout], prompts: PromptBuilder) -> dict[str, Any]:
    drafts = [r.draft for r in rollouts if r.draft is not None]
    best = [max((s.reward for s in r.stage1.scores if s.reward is not None), default=None) for r in rollouts]
    return {
        "stage1/best_reward": _mean([reward for reward in best if reward is not None]),
        "stage1/solved": _mean([any(s.reason == "correct" for s in r.stage1.scores) for r in rollouts]),
        "stage1/tie_rate": _mean([r.choice.tied for r in rollouts if r.choice is not None]),
        "stage1/drafts_truncated": _mean([draft.truncated for draft in drafts]),
        "stage1/drafts_shortened": _mean([len(prompts.shown(draft.ids)) < len(draft.ids) for draft in drafts]),
    }


def _refinement(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    copied, fixed, broke = [], [], []
    for rollout in rollouts:
        if rollout.choice is None:
            continue
        draft, score, group = rollout.draft, rollout.draft_score, rollout.stage2
        assert draft is not None
        assert score is not None
        assert group is not None
        copied += [completion.text.strip() == draft.text.strip() for completion in group.completions]
        right = [s.reason == "correct" for s in group.scores]
        if score.reason == "correct":
            broke += [not r for r in right]
        else:
            fixed += right
    return {"stage2/copied": _mean(copied), "stage2/fixed": _mean(fixed), "stage2/broke": _mean(broke)}


def _replay(replays: Sequence[Replay]) -> dict[str, Any]:
    continued = [score for replay in replays for score in replay.group.scores[1:]]
    return {
        "replay/count": len(replays),
        "replay/start": _mean([replay.start / len(replay.source.ids) for replay in replays]),
        "replay/informative": _mean([has_signal(reward_tensor(replay.group.scores)) for replay in replays]),
        "replay/accuracy": _mean([score.reason == "correct" for score in continued]),
    }


def _mean(values: Sequence[Any]) -> float | None:
    return sum(values) / len(values) if values else None
