"""Whole training steps at full size, ours against TRL's, and schedules of the rollout on the same engine."""

from __future__ import annotations

import json
import statistics
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import rollout_schedules
import rollout_trainers
import torch
from gpu_common import Found, measured
from rollout_common import Finding, Sizes
from rollout_training import settings_for

from igrpo_lite.config.resolve import resolve

if TYPE_CHECKING:
    from gpu_worker import Context

_PROMPTS = {False: 8, True: 4}
_STEPS = {
    False: Sizes(train_tokens=512, train_steps=3),
    True: Sizes(train_group=4, train_tokens=12, train_steps=2),
}
"""Rollouts of a step, which are as many as the engine has room for. The first step does not count."""
_SCHEDULES = {
    False: Sizes(prompts=8, equal=(256,), longest=256, live=(16, 64), turns=3),
    True: Sizes(prompts=4, drafts=2, refinements=2, equal=(12,), longest=12, live=(4, 16), turns=1),
}
"""As many rollouts a step on the same engine, whose size is the second of ``live``."""

_FASTER = 1.5  # completion tokens a second, against TRL


class Recorder:
    """A channel (:class:`rollout_trainers.Channel`) to nobody: steps are made at once, and their records kept."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.send = self.steps.append

    def wait(self) -> None: ...

    def loaded(self) -> None: ...


def trl(context: Context) -> None:
    """TRL's side, for ours to be compared with."""
    with context.importing():
        from trl import GRPOTrainer  # noqa: F401
    recorder = Recorder()
    rollout_trainers.trl(_settings(context) | {"folder": str(context.scratch / "trl")}, recorder)
    found = _report(context, recorder.steps, "TRL, vLLM colocate")
    (context.scratch / "trl.found.json").write_text(json.dumps(found))


def grpo(context: Context) -> None:
    """The same with our loop, as ``benchmarks/rollout.py --parts training``."""
    _against_trl(context, _trained(context, "grpo"), "GRPO", {"rate": _FASTER, "peak": 1.0})


def igrpo(context: Context) -> None:
    """As many rollouts, half of them drafts."""
    _against_trl(context, _trained(context, "igrpo"), "iGRPO", {})


def schedules(context: Context) -> None:
    """As ``benchmarks/rollout.py --parts schedules``, on the engine of the steps."""
    sizes, sampler = _SCHEDULES[context.tiny], context.engine(_our_settings).sampler
    sampler.stop_ids = []
    found: dict[str, Any] = {"findings": [], "runs": []}
    live, longest = sizes.live[-1], max(*sizes.equal, sizes.longest)
    rollout_schedules.on_engine("vllm", sampler, live, sizes, found, {"max_draft_length": longest})
    context.outcome.details |= {"runs": found["runs"], "report": rollout_schedules.report(found)}
    for run in found["runs"]:
        for name, side in run["sides"].items():
            rates = [n / s for n, s in zip(side["sampled_tokens"], side["seconds"]["wall"], strict=True)]
            context.outcome.found.append(measured(f"tokens a second, {run['lengths']}: {name}", rates, "/s"))
    context.outcome.found += [_converted(finding) for finding in found["findings"]]


def _settings(context: Context) -> dict[str, Any]:
    """What all sides are told. Rows are of one length, so all run the same tokens at once in their updates."""
    settings = settings_for(context.model(), context.scratch, _STEPS[context.tiny], _PROMPTS[context.tiny])
    if not context.on_gpu:
        return settings
    rows = 16
    half = torch.cuda.get_device_capability() < (8, 0)
    return settings | {
        "device": "cuda",
        "dtype": "float16" if half else "bfloat16",
        "kv_cache_gib": 3.0,
        "gradient_checkpointing": True,
        "rows": rows,
        "update_tokens": rows * settings["max_model_len"],
    }


def _our_settings(context: Context, algorithm: str = "igrpo") -> dict[str, Any]:
    """Of our side; the engine is started for iGRPO, whose prompts are the longer ones."""
    settings = _settings(context)
    own = {"algorithm": algorithm, "max_draft_length": settings["tokens"]}
    return rollout_trainers.our_settings(settings | {"folder": str(context.scratch / algorithm)}) | own


def _trained(context: Context, algorithm: str) -> list[dict[str, Any]]:
    prepared = context.engine(_our_settings).prepared
    if context.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    recorder = Recorder()
    rollout_trainers.train_ours(resolve(_our_settings(context, algorithm)), prepared, recorder)
    return recorder.steps


def _report(context: Context, steps: list[dict[str, Any]], name: str) -> dict[str, float]:
    """Completion tokens a second of whole steps, and the most memory, MiB."""
    wanted = _STEPS[context.tiny].train_tokens * _STEPS[context.tiny].train_group * _PROMPTS[context.tiny]
    made = [after["tokens"] - before["tokens"] for before, after in pairwise(steps)]
    if set(made) != {wanted}:
        raise RuntimeError(f"{name} sampled {made} tokens in its steps, not {wanted} in each")
    rates = [wanted / one["wall"] for one in steps[1:]]
    used = steps[-1]["memory"]
    peak = used.get("device_peak", used["peak"])
    context.outcome.details["steps"] = steps
    context.outcome.found += [
        measured(f"completion tokens a second, whole step: {name}", rates, "/s"),
        Found("peak memory", peak, "MiB"),
    ]
    return {"rate": statistics.median(rates), "peak": peak}


def _against_trl(context: Context, steps: list[dict[str, Any]], name: str, goals: dict[str, float]) -> None:
    """Ours, and the ratios where TRL's side has been measured."""
    ours, kept = _report(context, steps, f"our {name}"), context.scratch / "trl.found.json"
    if kept.is_file():
        theirs = json.loads(kept.read_text())
        context.outcome.found += [
            Found(f"{name} against TRL's GRPO", ours["rate"] / theirs["rate"], "x", goals.get("rate"), True),
            Found("peak memory, against TRL's", ours["peak"] / theirs["peak"], "x", goals.get("peak")),
        ]


def _converted(finding: Finding) -> Found:
    value = finding.value
    return Found(
        f"{finding.what}, against {finding.baseline}",
        value["median"],
        finding.unit,
        finding.goal,
        finding.at_least,
        value["min"],
        value["max"],
    )
