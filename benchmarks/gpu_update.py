"""The update at full size: against TRL's, FlexAttention against SDPA on token trees, and a step in float16."""

from __future__ import annotations

import functools
import math
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from gpu_common import Found, NotHere, measured
from gpu_models import NAME
from torch import Tensor

if TYPE_CHECKING:
    from gpu_worker import Context

    from igrpo_lite.policy.loading import Policy
    from igrpo_lite.policy.tree import Branch

_TREE = {False: (1024, 8, 768), True: (24, 4, 16)}  # prompt, completions and their length
_REPEATS = 5


def shape_a(context: Context) -> None:
    """Prompts of 256 and answers of 768 tokens; in stage 2 a draft of 768 more in the prompt."""
    _compare(context, "grpo-a", "stage2-a")


def shape_b(context: Context) -> None:
    """Prompts of 1,024 and answers of 3,072 tokens."""
    _compare(context, "grpo-b", "s-grpo-b")


def _compare(context: Context, *cases: str) -> None:
    """As ``benchmarks/update.py``, on random weights of its own in the model's shape."""
    context.close()  # an engine's memory
    with context.importing():
        import update

    arguments = ["--cases", *cases, "--repeats", "3"]
    if context.on_gpu:
        arguments += ["--device", "cuda", "--models", NAME]
        if torch.cuda.get_device_capability() < (8, 0):
            arguments += ["--dtype", "float32"]
    if context.tiny:
        arguments += ["--quick"] if not context.on_gpu else ["--scale", "0.03125"]
    result = update.main(arguments)
    context.outcome.details |= {"settings": result["settings"], "cases": result["cases"]}
    context.outcome.details["table"] = update.table(result["cases"])
    for name, case in result["cases"].items():
        for ratio in case["ratios"]:
            what = f"{name}: {ratio['side']} against {ratio['baseline']}"
            peak, goals = ratio["memory"]["peak"], ratio["goals"]
            context.outcome.found += [
                measured(f"time, {what}", ratio["time"]["wall"], "x", goal=goals["time"]),
                Found(f"peak memory, {what}", peak, "x", goals["peak"]),
            ]


def flex(context: Context) -> None:
    """The same branches, forward and backward through the whole model, by both ways to compute attention on trees."""
    from igrpo_lite.policy.loading import recompute_activations
    from igrpo_lite.policy.logprobs import _attention_shape
    from igrpo_lite.policy.tree_attention import flex_runs

    if context.on_gpu and torch.cuda.get_device_capability() < (8, 0):
        raise NotHere("FlexAttention is used from compute capability 8.0 on")
    policy = _policy(context, "auto")
    recompute_activations(policy.model)  # so that it fits on small cards
    policy.model.train()
    model: Any = policy.model.get_base_model()
    shape, vocab = _attention_shape(model.config), model.config.vocab_size
    used = flex_runs(policy.device, model.dtype, shape)
    context.outcome.found.append(Found("FlexAttention compiles and agrees on the spot", used, "", 1, True, cost=False))
    prompt, count, length = _TREE[context.tiny]
    branches = _branches(prompt, count, length, vocab)
    # Every step of a run has trees of other sizes, for each of which something may be compiled anew.
    others = [_branches(prompt + 41 * n, count, length - 7 * n if length > 99 else 9, vocab) for n in range(1, 13)]
    sides = {name: _tree_side(policy, name, branches, others) for name in ("sdpa", "flex")}
    plain, other = sides["sdpa"], sides["flex"]
    off = float((other.gradient - plain.gradient).norm() / plain.gradient.norm())
    ratios = [a / b for a, b in zip(other.seconds, plain.seconds, strict=True)]
    late = [a / b for a, b in zip(other.late, plain.late, strict=True)]
    # Both round to 16 bits in every layer, in another order.
    context.outcome.found += [
        Found(
            "log-probabilities, mean difference",
            float((other.scores - plain.scores).abs().mean()),
            "",
            0.05,
            cost=False,
        ),
        Found("gradients, relative difference", off, "", 0.05, cost=False),
        measured("time, forward and backward: FlexAttention against SDPA", ratios, "x", goal=1.0),
        measured("the same at the last 4 of 12 further sizes, each seen once", late[-4:], "x", goal=1.0),
        Found("peak memory of the same", other.peak / plain.peak, "x"),
    ]
    context.outcome.details |= {name: side.record() for name, side in sides.items()} | {"heads": shape}


@dataclass(frozen=True, slots=True)
class TreeSide:
    """What one way gives: log-probabilities, their gradient, seconds of repeats and of sizes seen once, peak bytes."""

    scores: Tensor
    gradient: Tensor
    seconds: list[float]
    late: list[float]
    peak: int

    def record(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "seconds_of_other_sizes": self.late, "peak_bytes": self.peak}


def _tree_side(policy: Policy, name: str, branches: list[Branch], others: list[list[Branch]]) -> TreeSide:
    from igrpo_lite.policy import logprobs
    from igrpo_lite.policy.tree_attention import FlexTrees, SdpaTrees

    def plan(trees: Any, device: Any, dtype: Any, shape: Any) -> Any:
        return FlexTrees(trees, device) if name == "flex" else SdpaTrees(trees, device, dtype)

    with patch.object(logprobs, "plan_trees", plan):
        scores, gradient = _scored(policy, branches)  # compiles, too
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        seconds = [_timed(lambda: _scored(policy, branches)) for _ in range(_REPEATS)]
        peak = torch.cuda.max_memory_allocated()
        late = [_timed(functools.partial(_scored, policy, other)) for other in others]
    return TreeSide(scores, gradient, seconds, late, peak)


def half(context: Context) -> None:
    """One update in float16 whose loss is scaled, against the same one in float32."""
    from update_cases import make_rollout

    from igrpo_lite.config import RunConfig
    from igrpo_lite.policy.loading import recompute_activations
    from igrpo_lite.training.update import PolicyUpdate

    norms: dict[str, float] = {}
    for dtype in ("float32", "float16"):
        policy = _policy(context, dtype)
        vocab = policy.model.get_base_model().config.vocab_size
        rollout = make_rollout(*((16, 8, 4) if context.tiny else (256, 512, 8)), "equal", vocab)
        config = RunConfig(algorithm="grpo", importance_sampling_mode="none", gradient_checkpointing=True)
        recompute_activations(policy.model)
        update = PolicyUpdate(policy, config)
        before = [p.detach().clone() for _, p in policy.adapter_parameters()]
        stats = update.step([rollout], 0, 1e-4)
        moved = any(not torch.equal(a, b) for a, (_, b) in zip(before, policy.adapter_parameters(), strict=True))
        norms[dtype] = stats.grad_norm if stats.grad_norm is not None else math.nan
        context.outcome.details[dtype] = {
            "loss": stats.loss,
            "grad_norm": stats.grad_norm,
            "skipped": stats.skipped,
            "scale": update.scaler.get_scale() if update.scaler.is_enabled() else None,
            "moved": moved,
        }
        if dtype == "float16":
            good = moved and not stats.skipped and update.scaler.is_enabled()
            context.outcome.found.append(Found("a scaled step that moved the adapter", good, "", 1, True, cost=False))
        del policy, update, before
        if context.on_gpu:
            torch.cuda.empty_cache()
    off = abs(norms["float16"] / norms["float32"] - 1)
    context.outcome.found.append(Found("norm of the gradient, off from float32's", off, "", 0.05, cost=False))


def _policy(context: Context, dtype: str) -> Policy:
    """The small model with an adapter that is not zero."""
    from rollout_common import make_policy

    return make_policy(context.model(), dtype, device=context.device)[0]


def _branches(prompt: int, count: int, length: int, vocab: int) -> list[Branch]:
    from igrpo_lite.policy.tree import Branch

    rng = random.Random(0)
    trunk = tuple(rng.randrange(vocab) for _ in range(prompt))
    paths = [tuple(rng.randrange(vocab) for _ in range(length)) for _ in range(count)]
    return [Branch(trunk, path, tuple(range(length))) for path in paths]


def _scored(policy: Policy, branches: list[Branch]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of all chosen tokens, and the gradient of their mean by the adapter, flat."""
    from igrpo_lite.policy.logprobs import TreeLayout, chosen_logprobs

    model: Any = policy.model.get_base_model()
    parameters = [p for _, p in policy.adapter_parameters()]
    scored = chosen_logprobs(model, branches, TreeLayout())
    gradients = torch.autograd.grad(scored.logprobs.sum() / scored.mask.sum(), parameters)
    return scored.logprobs[scored.mask].detach(), torch.cat([gradient.flatten() for gradient in gradients])


def _timed(call: Any) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - started
