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
from igrpo_lite.planning.work import waves

CHOSEN = ("update_tokens", "gradient_checkpointing", "max_num_seqs", "kv_cache_gib")
"""What :func:`suggest` chooses."""

WORTH = 1.05
"""How much longer a run may take for a margin of memory."""

ROOM = 0.6
"""Share of the GPU below which no margin is worth anything."""

SAFE = 0.8
"""Share up to which is chosen from, if that can be: no plan has been compared with a card yet, and a desktop
wants some of it."""

_SHARES = (1.0, 0.5)
"""Of the keys and values that ``max_num_seqs`` sequences of full length would need: most are shorter, and where that is
not enough, vLLM lets some wait."""


def suggest(
    config: RunConfig,
    model: Model,
    gpu: Gpu,
    *,
    keep: Collection[str] = (),
    four_bit: bool | None = None,
    unsloth: bool | None = None,
    given_back: bool | None = None,
    completion: int | None = None,
    prompt: int | None = None,
) -> dict[str, Any]:
    """Settings with which the run fits and is about as fast as it can be, else those with the least memory.

    Of those that fit, with a fifth of the GPU to spare if possible, it is the ones with the most room among the fastest
    and what is up to 5 % slower.

    Of :data:`CHOSEN`, those that should differ from ``config``; none is raised above it but ``kv_cache_gib``, which is
    vLLM's and gets a value.

    Args:
        keep: settings that must stay, because the user set them.
        four_bit, unsloth, given_back, completion, prompt: as for :func:`igrpo_lite.planning.plan.plan`.
    """
    assumed: dict[str, Any] = {"four_bit": four_bit, "unsloth": unsloth, "given_back": given_back}
    given = plan(config, model, gpu, **assumed, completion=completion, prompt=prompt)
    knobs = dict(_knobs(given, keep))
    tries = [_attempt(given, dict(zip(knobs, values, strict=True))) for values in product(*knobs.values())]
    fitting = [made for made in tries if made.share <= SAFE] or [made for made in tries if made.verdict == "fits"]
    fastest = min(map(_seconds, fitting), default=0.0)
    enough = [made for made in fitting if _seconds(made) <= WORTH * fastest] or tries
    chosen = min(enough, key=lambda made: (max(made.share, ROOM), _seconds(made), made.peak)).setup.config
    return {name: getattr(chosen, name) for name in CHOSEN if getattr(chosen, name) != getattr(config, name)}


def _attempt(given: Plan, values: Mapping[str, Any]) -> Plan:
    """The plan with other settings; ``share`` stands for the size of the keys and values."""
    setup = given.setup
    share = values.get("share")
    config = setup.config.model_copy(update={name: value for name, value in values.items() if name != "share"})
    if share is not None:
        room = max(1.0, share * config.max_num_seqs) * setup.sequence_bytes
        config = config.model_copy(update={"kv_cache_gib": -(-room * 100 // GIB) / 100})  # up to 0.01 GiB
    return planned(replace(setup, config=config), given.model, given.lengths)


def _knobs(given: Plan, keep: Collection[str]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    config = given.setup.config
    if "update_tokens" not in keep:
        yield "update_tokens", tuple(halved(config.update_tokens, 512))
    if "gradient_checkpointing" not in keep and not config.gradient_checkpointing:
        yield "gradient_checkpointing", (False, True)
    if "max_num_seqs" not in keep:
        most = min(config.max_num_seqs, max(*waves(config), config.eval_size))
        yield "max_num_seqs", tuple(halved(most, min(most, 4)))
    if given.setup.vllm and "kv_cache_gib" not in keep:
        yield "share", _SHARES


def _seconds(made: Plan) -> float:
    """Time of the run; where a GPU's speed is not known, what checkpointing, small passes and few sequences cost."""
    if made.time is not None:
        return made.time.total
    config = made.setup.config
    return (1.2 if config.gradient_checkpointing else 1.0) + 500 / config.update_tokens + 2 / config.max_num_seqs
