"""The settings of memory that a run can choose for itself, by trying them in the planner's arithmetic."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

from igrpo_lite.config import RunConfig
from igrpo_lite.planning.gpus import GIB, Gpu
from igrpo_lite.planning.models import Model
from igrpo_lite.planning.plan import Plan, halved, plan, planned
from igrpo_lite.planning.time import estimate

CHOSEN = ("update_tokens", "gradient_checkpointing", "max_num_seqs", "kv_cache_gib")
"""What :func:`suggest` chooses."""

SAFE = 0.8
"""Share of the GPU up to which is chosen from, if that can be: a margin for what the plan does not know."""

WORTH = 1.05
"""How much longer a run may take to need less memory."""

_SHARES = (1.0, 0.5)
"""Of the KV cache that ``max_num_seqs`` sequences of full length would need: most are shorter, and where that is not
enough, vLLM lets some wait."""


def suggest(
    config: RunConfig,
    model: Model,
    gpu: Gpu,
    *,
    keep: Collection[str] = (),
    four_bit: bool | None = None,
    unsloth: bool | None = None,
    releases_kv: bool | None = None,
    completion: int | None = None,
) -> dict[str, Any]:
    """Settings with which the run fits and is about as fast as it can be, else those with the least memory.

    Of :data:`CHOSEN`, those that should differ from ``config``; none is raised above it but ``kv_cache_gib``, which is
    vLLM's and gets a value.

    Args:
        keep: settings that must stay, because the user set them.
        four_bit, unsloth, releases_kv, completion: as for :func:`igrpo_lite.planning.plan.plan`.
    """
    given = plan(config, model, gpu, four_bit=four_bit, unsloth=unsloth, releases_kv=releases_kv, completion=completion)
    knobs = dict(_knobs(given, keep))
    tries = [_attempt(given, dict(zip(knobs, values, strict=True))) for values in product(*knobs.values())]
    fitting = [made for made in tries if made.share <= SAFE] or [made for made in tries if made.verdict == "fits"]
    seconds = {id(made): _seconds(made) for made in fitting}
    fastest = min(seconds.values(), default=0.0)
    enough = [made for made in fitting if seconds[id(made)] <= WORTH * fastest] or tries
    chosen = min(enough, key=lambda made: made.peak).setup.config
    return {name: getattr(chosen, name) for name in CHOSEN if getattr(chosen, name) != getattr(config, name)}


def _attempt(given: Plan, values: Mapping[str, Any]) -> Plan:
    """The plan with other settings; ``share`` stands for the size of the KV cache."""
    setup = given.setup
    share = values.get("share")
    config = setup.config.model_copy(update={name: value for name, value in values.items() if name != "share"})
    if share is not None:
        size = max(1.0, share * config.max_num_seqs) * setup.sequence_bytes
        config = config.model_copy(update={"kv_cache_gib": -(-size * 100 // GIB) / 100})  # up to 0.01 GiB
    return planned(replace(setup, config=config), given.model, given.lengths)


def _knobs(given: Plan, keep: Collection[str]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    config = given.setup.config
    if "update_tokens" not in keep:
        yield "update_tokens", tuple(halved(config.update_tokens, 512))
    if "gradient_checkpointing" not in keep and not config.gradient_checkpointing:
        yield "gradient_checkpointing", (False, True)
    if "max_num_seqs" not in keep:
        group = config.prompts_per_step * max(config.n_drafts, config.n_refinements)
        most = min(config.max_num_seqs, max(group, config.eval_size))
        yield "max_num_seqs", tuple(halved(most, min(most, 4)))
    if given.setup.vllm and "kv_cache_gib" not in keep:
        yield "share", _SHARES


def _seconds(made: Plan) -> float:
    """Time of the run; a GPU of unknown speed is compared as one of a middling speed."""
    setup = made.setup
    gpu = replace(setup.gpu, bandwidth=setup.gpu.bandwidth or 600, tflops=setup.gpu.tflops or 70)
    found = estimate(replace(setup, gpu=gpu), made.lengths)
    return found.total if found is not None else 0.0
