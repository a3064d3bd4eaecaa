"""A plan: the memory of every phase, the time, whether it fits, and which single change helps most."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from igrpo_lite.config import RunConfig
from igrpo_lite.planning.gpus import GIB, Gpu
from igrpo_lite.planning.memory import Phase, Setup, phases
from igrpo_lite.planning.models import MODELS, Model
from igrpo_lite.planning.shapes import FAST
from igrpo_lite.planning.time import Estimate, estimate
from igrpo_lite.planning.work import Lengths, longest, typical

TIGHT = 0.9
"""Share of the GPU's memory above which a plan is ``tight``."""

SHOWN = (
    "algorithm",
    "prompts_per_step",
    "num_generations",
    "max_prompt_length",
    "max_completion_length",
    "tokens",
    "sampler",
    "dtype",
    "lora_r",
    "update_tokens",
    "gradient_checkpointing",
    "max_num_seqs",
    "kv_cache_gib",
    "max_steps",
)
"""Settings that stand in a plan's JSON."""

Verdict = Literal["fits", "tight", "no"]


@dataclass(frozen=True, slots=True)
class Change:
    """Something else to try, and what the same arithmetic says about it.

    Attributes:
        flags: how it is asked for.
        peak: bytes of the fullest phase with it.
    """

    flags: str
    peak: int
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run takes on a GPU."""

    model: Model
    setup: Setup
    phases: tuple[Phase, ...]
    time: Estimate | None
    lengths: Lengths

    @property
    def fullest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> int:
        """Bytes of the fullest phase."""
        return self.fullest.total

    @property
    def share(self) -> float:
        """Of the GPU's memory."""
        return self.peak / self.setup.gpu.memory_bytes

    @property
    def verdict(self) -> Verdict:
        return "fits" if self.share <= TIGHT else "tight" if self.share <= 1 else "no"

    def to_json(self) -> dict[str, Any]:
        """As JSON types; sizes in GiB, times in seconds."""
        gpu, config = self.setup.gpu, self.setup.config
        phases = {p.name: {part: round(size / GIB, 3) for part, size in p.parts.items()} for p in self.phases}
        return {
            "model": self.model.hub_id,
            "parameters": self.setup.shape.parameters,
            "gpu": {"name": gpu.name, "memory_gib": gpu.memory_gib, "capability": list(gpu.capability)},
            "load_in_4bit": self.setup.four_bit,
            "settings": {name: getattr(config, name) for name in SHOWN},
            "phases": phases,
            "peak_gib": round(self.peak / GIB, 3),
            "fullest": self.fullest.name,
            "share": round(self.share, 4),
            "verdict": self.verdict,
            "time": None if self.time is None else self.time.to_json(),
            "notes": self.notes,
        }

    @property
    def notes(self) -> list[str]:
        """Sentences about what was assumed, and what will not work whatever the memory."""
        return list(_notes(self.setup, self.model))


def plan(
    config: RunConfig,
    model: Model,
    gpu: Gpu,
    *,
    four_bit: bool | None = None,
    unsloth: bool | None = None,
    releases_kv: bool | None = None,
    completion: int | None = None,
) -> Plan:
    """Memory and time of a run with exactly these settings.

    Args:
        config: as :func:`igrpo_lite.config.resolve.resolve` gives it.
        four_bit: unset: what ``load_in_4bit`` says, or the model's own weights.
        unsloth: whether it loads the model; unset: what ``backend`` says, and for ``auto`` :func:`suits_unsloth`.
        releases_kv: whether vLLM releases its KV cache during updates; unset: with Unsloth, else from capability 8.0
            on: vLLM can from 0.31 on, and older GPUs get an older one.
        completion: mean tokens, for the time; unset: :func:`typical`.
    """
    four_bit = config.load_in_4bit or model.packed if four_bit is None else four_bit
    unsloth = suits_unsloth(config, model) if unsloth is None else unsloth
    releases_kv = unsloth or gpu.capability >= (8, 0) if releases_kv is None else releases_kv
    setup = Setup(config, model.shape, gpu, four_bit, unsloth, releases_kv)
    return planned(setup, model, typical(config, completion))


def planned(setup: Setup, model: Model, lengths: Lengths) -> Plan:
    """The plan of a setup, with the time for sequences of these mean lengths."""
    return Plan(model, setup, phases(setup), estimate(setup, lengths), lengths)


def suits_unsloth(config: RunConfig, model: Model) -> bool:
    """Whether Unsloth is what loads the model on a GPU machine that has it and vLLM (``policy.backends``)."""
    if config.backend != "auto":
        return config.backend == "unsloth"
    return model.shape.kind in FAST and config.model != "tiny" and config.sampler != "transformers"


def prefers_four_bit(model: Model, gpu: Gpu) -> bool:
    """Whether 16-bit weights would take more than a third of the GPU."""
    return 2 * model.shape.parameters > gpu.memory_bytes / 3


def changes(made: Plan) -> list[Change]:
    """Single changes that take less memory: first those that make it fit, from the cheapest to the dearest; then the
    others by what they save. Of each setting the mildest value that fits is taken, else the one with the least
    memory."""
    found = []
    for flags, tries in _alternatives(made):
        best: tuple[Plan, str] | None = None
        for other, text in tries:
            if best is None or other.peak < best[0].peak:
                best = other, text
            if best[0].verdict == "fits":
                break
        if best is not None and best[0].peak < made.peak:
            found.append(Change(f"{flags} {best[1]}".strip(), best[0].peak, best[0].verdict))
    fitting = [change for change in found if change.verdict == "fits"]
    return fitting + sorted((c for c in found if c.verdict != "fits"), key=lambda change: change.peak)


def halved(value: int, least: int) -> Iterator[int]:
    """``value``, its half and so on, down to ``least``."""
    yield value
    while value // 2 >= least:
        value //= 2
        yield value


def _notes(setup: Setup, model: Model) -> Iterator[str]:
    config, shape = setup.config, setup.shape
    most = longest(config)
    if (needed := most.refined + most.completion) > shape.context:
        yield (
            f"the model's context is {shape.context} tokens, but prompt, draft and completion may need {needed}; lower "
            "max_completion_length, max_draft_length or max_prompt_length"
        )
    if most.replies:
        if most.judged > shape.context:
            yield (
                f"the model's context is {shape.context} tokens, but to judge, the policy may need {most.judged}; "
                "lower judge_max_tokens, max_completion_length or max_prompt_length"
            )
        yield f"the time leaves out the policy's grades as a judge, of up to {config.judge_max_tokens} tokens each"
    if setup.unsloth and config.backend == "auto":
        yield (
            "planned as with Unsloth and vLLM, where they are installed; --backend transformers plans without Unsloth, "
            "whose update repeats prompts in rows" + (", and with its own sampler" if setup.four_bit else "")
        )
    if setup.four_bit and not setup.vllm and config.sampler != "transformers":
        yield "4-bit weights without Unsloth: the transformers sampler, which is slower than vLLM"
    if setup.vllm and not setup.releases_kv:
        yield "vLLM is assumed to keep its KV cache during updates, as versions before 0.31 do"
    if not shape.exact:
        yield "counted as a Llama of its size: this architecture is not known here"
    if model.gated:
        yield f"{model.hub_id} asks for a licence to be accepted; {model.ungated} does not"


def _alternatives(made: Plan) -> Iterator[tuple[str, Iterable[tuple[Plan, str]]]]:
    """What to try, from the cheapest to the dearest: flags, and plans with the end of the flags."""
    setup, config = made.setup, made.setup.config

    def other(four_bit: bool = setup.four_bit, model: Model = made.model, **values: Any) -> Plan:
        changed = replace(setup, config=config.model_copy(update=values), shape=model.shape, four_bit=four_bit)
        return planned(changed, model, made.lengths)

    def smaller(name: str, least: int, **values: Any) -> Iterator[tuple[Plan, str]]:
        for value in list(halved(getattr(config, name), least))[1:]:
            settings: dict[str, Any] = {name: value, **values}
            yield other(**settings), str(value)

    yield "--update-tokens", smaller("update_tokens", 512)
    yield "--gradient-checkpointing", [(other(gradient_checkpointing=True), "")]
    # A KV cache of a fixed size would not shrink with the sequences.
    yield "--max-num-seqs", smaller("max_num_seqs", 4, kv_cache_gib=None)
    yield "--load-in-4bit", [(other(four_bit=True), "")]
    yield "--max-completion-length", smaller("max_completion_length", 64, kv_cache_gib=None)
    models = sorted((m for m in MODELS if _smaller(m, made.model)), key=lambda m: -m.shape.parameters)
    packed = setup.four_bit and (config.load_in_4bit or not made.model.packed)  # by the settings, which stay
    yield "--model", ((other(four_bit=packed, model=m, kv_cache_gib=None), m.alias) for m in models)


def _smaller(model: Model, than: Model) -> bool:
    """Of the same family, which has the same prompts."""
    return model.shape.parameters < than.shape.parameters and model.family == than.family != ""
