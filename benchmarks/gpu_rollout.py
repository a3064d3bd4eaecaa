"""Rollouts at full size: schedules on one engine, and whole training steps against TRL's."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rollout_schedules
import rollout_training
import torch
from gpu_common import Found, measured
from measuring import spread
from rollout_common import Finding, Sizes, make_policy, make_sampler

if TYPE_CHECKING:
    from gpu_worker import Context

SCHEDULES = Sizes(prompts=16, equal=(256,), longest=256, live=(16,), turns=3)
SCHEDULES_TINY = Sizes(prompts=2, drafts=2, refinements=2, equal=(6,), longest=12, live=(4,), turns=1)
_ROOM = 512  # tokens of the prompt, the template and what a draft grows by when it is read anew

_FASTER = 1.5  # completion tokens a second, against TRL


def schedules(context: Context) -> None:
    """As ``benchmarks/rollout.py --parts schedules``, on the stage's model and with vLLM alone."""
    sizes = SCHEDULES_TINY if context.tiny else SCHEDULES
    found: dict[str, Any] = {"findings": [], "runs": []}
    model = context.model("qwen2-1.5b")
    longest = max(*sizes.equal, sizes.longest)
    for live in sorted({*sizes.live, rollout_schedules.rollouts(sizes)}):
        dtype = "auto" if context.on_gpu else "float32"
        policy, config = make_policy(model, dtype, device=context.device)
        sampler = make_sampler("vllm", policy, config, live, max_model_len=_ROOM + 2 * longest)
        rollout_schedules.on_engine("vllm", sampler, live, sizes, found, {"max_draft_length": longest})
        sampler.close()
        del policy, sampler
        if context.on_gpu:
            torch.cuda.empty_cache()
    context.outcome.details |= {"runs": found["runs"], "report": rollout_schedules.report(found)}
    context.outcome.found += [_converted(finding) for finding in found["findings"]]


def step(context: Context) -> None:
    """As ``benchmarks/rollout.py --parts training``, one side after the other, on the GPU."""
    folder = context.scratch / "step"
    folder.mkdir(exist_ok=True)
    settings = _step_settings(context, folder)
    found = rollout_training.compare(settings, folder, ("ours", "trl"), turns=False)
    context.outcome.details |= found | {"report": rollout_training.report(found)}
    rate: dict[str, list[float]] = {}
    for name, side in found["sides"].items():
        steps = side["steps"]
        made = [after["tokens"] - before["tokens"] for before, after in pairwise(steps)]
        rate[name] = [tokens / one["wall"] for tokens, one in zip(made, steps[1:], strict=True)]
    ratio = spread(rate["ours"])["median"] / spread(rate["trl"])["median"]
    peak = found["sides"]["ours"]["peak"] / found["sides"]["trl"]["peak"]
    context.outcome.found += [
        measured("completion tokens a second, whole step: ours", rate["ours"], "/s"),
        measured("the same: TRL, vLLM colocate", rate["trl"], "/s"),
        Found("ours against TRL", ratio, "x", _FASTER, at_least=True),
        Found("peak memory, ours against TRL", peak, "x", 1.0),
    ]


def _step_settings(context: Context, folder: Path) -> dict[str, Any]:
    """What both sides are told. Rows are of one length, so both run the same tokens at once in their updates."""
    sizes = Sizes(train_group=2, train_tokens=6, train_steps=2) if context.tiny else Sizes(train_tokens=512)
    prompts = 4 if context.tiny else 8
    settings = rollout_training.settings_for(context.model("qwen2-1.5b"), folder, sizes, prompts)
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
