"""``igrpo-lite plan``: whether a run fits a GPU, and about how long it takes, before anything is loaded."""

from __future__ import annotations

import json as json_module
import shlex
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from igrpo_lite.cli.flags import COMMAND, UNTRAINED, Recipe, checked, examined, settings_flags
from igrpo_lite.cli.models import Json
from igrpo_lite.cli.recipes import find
from igrpo_lite.config import RunConfig
from igrpo_lite.config.resolve import load_file
from igrpo_lite.errors import ConfigError, ModelError
from igrpo_lite.planning.gpus import GIB, Gpu, find_gpu, gpu_of
from igrpo_lite.planning.memory import PARTS
from igrpo_lite.planning.models import Model, find_model
from igrpo_lite.planning.plan import Change, Plan, changes, plan, prefers_four_bit
from igrpo_lite.planning.suggest import suggest
from igrpo_lite.planning.work import longest
from igrpo_lite.tiny import MODEL_DIR

DOES_NOT_FIT = 3

_GPU = Parameter(help="Name from igrpo-lite gpus; unset: the GPU of this machine.", group=COMMAND)
_COMPLETION = Parameter(
    help="Mean tokens of a completion, for the time; unset: half of what is allowed.",
    group=COMMAND,
    validator=Number(gt=0),
)


def verb() -> Callable[..., int | None]:
    """The verb with the flags of ``train``."""
    return settings_flags(plan_run)


def plan_run(
    *,
    gpu: Annotated[str | None, _GPU] = None,
    config: Recipe = None,
    mean_completion: Annotated[int | None, _COMPLETION] = None,
    json: Json = False,
    **settings: Any,
) -> int:
    """Say what a run takes on a GPU, by arithmetic alone: memory in each phase, about how long, and what helps if it
    does not fit. It takes the flags of train; settings of memory that neither a flag nor the recipe names are chosen
    so that the run fits. Exit code 3: it does not."""
    made, chosen = settled(gpu, config, settings, mean_completion)
    better = changes(made) if made.verdict != "fits" else []
    if json:
        found = made.to_json() | {"chosen": chosen, "changes": [_change(change) for change in better]}
        print(json_module.dumps(found, indent=2))
    else:
        print("\n".join([*_lines(made, chosen, better), *_times(made)]))
    return DOES_NOT_FIT if made.verdict == "no" else 0


def settled(
    gpu: str | None,
    config: str | None,
    settings: Mapping[str, Any],
    mean_completion: int | None = None,
) -> tuple[Plan, dict[str, Any]]:
    """The plan of a recipe and flags on a GPU, with the settings of memory that were left open and had to be chosen."""
    resolved = checked(config, {**settings, **UNTRAINED, **_judged(config, settings)}, files=False)
    named = {name for name, value in settings.items() if value is not None}
    if config is not None:
        named |= {str(key).replace("-", "_") for key in load_file(find(config))}
    card, model = _found(gpu, resolved)
    chosen: dict[str, Any] = {}
    if "load_in_4bit" not in named and not model.packed and prefers_four_bit(model, card):
        chosen["load_in_4bit"] = True
        resolved = resolved.model_copy(update=chosen)
    chosen |= suggest(resolved, model, card, keep=named, completion=mean_completion)
    made = plan(resolved.model_copy(update=chosen), model, card, completion=mean_completion)
    return made, chosen


def _judged(config: str | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The policy as its own judge needs memory; of rewards nothing else matters to a plan."""
    asked, _ = examined(config, settings)
    return {"reward_funcs": ["judge"]} if longest(asked).replies else {}


def _found(name: str | None, config: RunConfig) -> tuple[Gpu, Model]:
    """The GPU and the model; what is wrong with either is reported at once."""
    wrong: list[str] = []
    card: Gpu | None = None
    model: Model | None = None
    try:
        card = find_gpu(name) if name is not None else _here()
    except ConfigError as error:
        wrong += error.problems
    try:
        model = find_model(str(MODEL_DIR) if config.model == "tiny" else config.model, config.revision)
    except ModelError as error:
        wrong += error.problems
    if card is None or model is None:
        raise ConfigError(wrong)
    return card, model


def _here() -> Gpu:
    """The GPU that training on this machine would use."""
    import os

    from igrpo_lite.environment.facts import visible
    from igrpo_lite.environment.hardware import gpu_facts

    for gpu in visible(gpu_facts(), os.environ.get("CUDA_VISIBLE_DEVICES")):
        if gpu.total_bytes and gpu.capability:
            found = gpu_of(gpu.name, gpu.total_bytes, gpu.capability)
            if found.refusal:
                raise ConfigError(f"gpu: {found.refusal}")
            return found
    raise ConfigError("gpu: nvidia-smi shows no GPU here; name one with --gpu, see igrpo-lite gpus")


def _lines(made: Plan, chosen: Mapping[str, Any], better: list[Change]) -> Iterator[str]:
    setup, config = made.setup, made.setup.config
    gpu, total = setup.gpu, setup.gpu.memory_gib
    kind = {4: "float32"}.get(setup.item, "bfloat16" if gpu.bfloat16 else "float16")
    weights = f"{setup.shape.parameters / 1e9:.2f} B weights in " + ("4 bits" if setup.four_bit else kind)
    capability = "{}.{}".format(*gpu.capability)
    yield f"{made.model.hub_id}, {weights}, on {gpu.name} ({total:.1f} GiB, compute capability {capability})"
    yield _work(config)
    if chosen:
        yield f"chosen: {flags(chosen)}"
    yield ""
    yield f"{'GiB':20}" + "".join(f"{phase.name:>10}" for phase in made.phases)
    for part in PARTS:
        if not any(part in phase.parts for phase in made.phases):
            continue
        cells = (f"{phase.parts[part] / GIB:.2f}" if part in phase.parts else "" for phase in made.phases)
        yield (f"{part:20}" + "".join(f"{cell:>10}" for cell in cells)).rstrip()
    yield f"{'total':20}" + "".join(f"{phase.total / GIB:>10.2f}" for phase in made.phases)
    yield ""
    words = {"fits": "fits", "tight": "tight", "no": "does not fit"}[made.verdict]
    yield f"{words}: {made.peak / GIB:.2f} of {total:.2f} GiB ({made.share:.0%}), in the {made.fullest.name}"
    if better:
        yield "what would help, and the fullest phase then:"
        width = max(len(change.flags) for change in better)
        for change in better:
            yield f"  {change.flags:{width}}  {change.peak / GIB:6.2f} GiB  {change.verdict}"
    for note in made.notes:
        yield f"note: {note}"


def _work(config: RunConfig) -> str:
    first, second = config.n_drafts, config.n_refinements
    each = f"({first} drafts + {second} refinements)" if second else f"{first} completions"
    return (
        f"{config.algorithm}: {config.prompts_per_step} problems x {each} a step, at most {config.max_prompt_length} "
        f"prompt and {config.max_completion_length} completion tokens, {config.tokens} tokens learn"
    )


def _times(made: Plan) -> Iterator[str]:
    time = made.time
    if time is None:
        yield f"no time: the speed of {made.setup.gpu.name} is not known"
        return
    yield ""
    yield (
        f"about {time.step:.0f} s a step (rollout {time.rollout:.0f}, update {time.update:.0f}), "
        f"{time.total / 3600:.1f} h for {time.steps} steps, with completions of {time.completion} tokens on average"
    )
    yield "a rough estimate from the GPU's nominal speed: a run may take half or twice as long"


def flags(settings: Mapping[str, Any]) -> str:
    """Settings as they are given on the command line."""
    return " ".join(_flag(name, value) for name, value in settings.items())


def _flag(name: str, value: Any) -> str:
    flag = f"--{name.replace('_', '-')}"
    return flag if value is True else f"{flag} {shlex.quote(str(value))}"


def _change(change: Change) -> dict[str, Any]:
    return {"flags": change.flags, "peak_gib": round(change.peak / GIB, 3), "verdict": change.verdict}
