"""Whether an export is what was trained: its greedy tokens and log-probabilities beside those of base and adapter.

The reference answers held-out questions greedily, in the run's own precision. Base, reference and export then read
these very answers. Three things are asked of the export: that its log-probabilities are near the reference's, as near
as its precision allows; which tokens it would have chosen itself after the same text; and how much of what the adapter
changes is still there. The last finds what a tolerance cannot: an adapter that was lost in rounding, or never applied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from igrpo_lite.errors import ModelError
from igrpo_lite.export.source import Source
from igrpo_lite.policy.loading import Policy, load_policy
from igrpo_lite.prompts import PromptBuilder
from igrpo_lite.sampling.base import Request
from igrpo_lite.sampling.replica import Replica
from igrpo_lite.sampling.transformers import TransformersSampler
from igrpo_lite.workbench import Workbench

MAX_TOKENS = 256
"""Tokens of an answer that are compared at most."""


class Tolerance(NamedTuple):
    """Difference of log-probability that is allowed, in nats: mean over the tokens, and of any one token."""

    mean: float
    max: float


TOLERANCES: dict[str, Tolerance] = {
    "exact": Tolerance(1e-4, 1e-2),
    "float32": Tolerance(1e-3, 5e-2),
    "float16": Tolerance(1e-2, 0.5),
    "bfloat16": Tolerance(3e-2, 1.0),
    "8-bit": Tolerance(3e-2, 2.0),
    "6-bit": Tolerance(6e-2, 5.0),
    "5-bit": Tolerance(0.1, 8.0),
    "4-bit": Tolerance(0.25, 10.0),
    "3-bit": Tolerance(0.6, 15.0),
    "2-bit": Tolerance(1.5, 20.0),
    "1-bit": Tolerance(3.0, 20.0),
}
"""By the coarser precision of reference and export, finest first; ``exact``: the same weights and arithmetic."""

_KEPT = 0.5
"""Share of the adapter's effect below which it counts as lost."""


class Answer(NamedTuple):
    """A prompt and its greedy continuation by the reference, as token ids."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a model says of all tokens of the answers, one after the other, each after the text before it.

    Attributes:
        logprobs: [tokens] of the answers' tokens.
        chosen: [tokens] ids that the model itself would have chosen.
    """

    logprobs: Tensor
    chosen: Tensor


@dataclass(frozen=True, slots=True)
class Reference:
    """The run's model on held-out questions.

    Attributes:
        adapted, base: its reading with and without the adapter.
        precision: of the weights: a type, or ``4-bit``.
        dtype: that it computes in.
    """

    answers: tuple[Answer, ...]
    adapted: Reading
    base: Reading
    precision: str
    dtype: str
    device: str


@dataclass(frozen=True, slots=True)
class Verification:
    """How an export compares with the reference.

    Attributes:
        agreeing: tokens that the export would have chosen too.
        divergence: for each answer the first place where it would have chosen otherwise; ``None``: nowhere.
        mean, max: absolute difference of log-probability, in nats.
        effect: mean absolute change of log-probability by the adapter.
        kept: share of that change which the export has (least squares over the tokens); ``None`` where the adapter
            changes nothing.
        kept_error: its standard error.
        precision: the key of :data:`TOLERANCES` that was applied.
        reasons: why it failed; empty: it passed.
    """

    tokens: int
    agreeing: int
    divergence: tuple[int | None, ...]
    mean: float
    max: float
    effect: float
    kept: float | None
    kept_error: float | None
    precision: str
    reference: dict[str, str]
    reasons: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.reasons

    @property
    def identical(self) -> int:
        """Answers that the export would have given token by token."""
        return sum(place is None for place in self.divergence)

    def to_json(self) -> dict[str, Any]:
        """With the tolerance that was applied; what is not finite becomes null."""
        numbers = {
            name: None if isinstance(n, float) and not math.isfinite(n) else n for name, n in asdict(self).items()
        }
        return {"passed": self.passed, **numbers, "tolerance": TOLERANCES[self.precision]._asdict()}


def held_out_questions(source: Source, prompts: PromptBuilder, count: int) -> list[str]:
    """The first questions of the run's last evaluation; of its held-out data where it made none."""
    if source.questions:
        return list(source.questions[:count])
    bench = Workbench(source.config)
    bench.fit("held-out", prompts=prompts)
    bench.longest()
    return [problem.question for problem in bench.held_out[:count]]


def load_reference(source: Source, device: str | None, adapter: Path) -> Policy:
    """The run's base with an adapter, in the run's precision."""
    changes = {"dtype": source.dtype, "device": device or source.config.device}
    policy = load_policy(source.config.model_copy(update=changes), source.config.seed, adapter)
    policy.model.eval()
    return policy


def answer(
    policy: Policy, prompts: PromptBuilder, stop_ids: Sequence[int], questions: Sequence[str], limit: int
) -> tuple[Answer, ...]:
    """Greedy answers of at most ``limit`` tokens, decoded by base and unmerged adapter."""
    sampler = TransformersSampler(Replica(policy.model, "shared"), policy.tokenizer, stop_ids, len(questions))
    requests = [Request(prompts.first(question), 0, limit, 0.0) for question in questions]
    completions = sampler.run(requests)
    return tuple(Answer(r.prompt.ids, c.ids) for r, c in zip(requests, completions, strict=True))


@torch.no_grad()
def read(model: Any, answers: Sequence[Answer]) -> Reading:
    """Put every answer through a causal language model, one whole sequence at a time, without a cache."""
    device = next(model.parameters()).device
    logprobs, chosen = [], []
    for prompt, completion in answers:
        ids = torch.tensor([prompt + completion], device=device)
        logits = model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=len(completion)).logits[0].float()
        tokens = ids[0, -len(completion) :, None]
        logprobs.append(torch.log_softmax(logits, dim=-1).gather(1, tokens)[:, 0].cpu())
        chosen.append(logits.argmax(dim=-1).cpu())
    return Reading(torch.cat(logprobs), torch.cat(chosen))


def reference(policy: Policy, answers: Sequence[Answer]) -> Reference:
    """What base and adapter say of their own answers."""
    if not answers:
        raise ModelError("there is no held-out question to verify the export on; use --no-verify")
    adapted = read(policy.model, answers)
    with policy.model.disable_adapter():
        base = read(policy.model, answers)
    model = policy.model.get_base_model()
    dtype = str(model.dtype).removeprefix("torch.")
    precision = "4-bit" if getattr(model, "is_loaded_in_4bit", False) else dtype
    return Reference(tuple(answers), adapted, base, precision, dtype, policy.device.type)


def coarser(*precisions: str) -> str:
    """The coarsest of these keys of :data:`TOLERANCES`."""
    return max(precisions, key=list(TOLERANCES).index)


def compare(found: Reference, export: Reading, precision: str, base: Reading | None = None) -> Verification:
    """Judge an export by what it says of the reference's answers.

    Args:
        precision: a key of :data:`TOLERANCES`.
        base: what the weights that the export was merged onto said without the adapter; unset: those of the reference.
    """
    tokens = torch.cat([torch.tensor(answer.completion) for answer in found.answers])
    differs = export.chosen != tokens
    lengths = [len(answer.completion) for answer in found.answers]
    divergence = tuple(int(part.nonzero()[0]) if bool(part.any()) else None for part in differs.split(lengths))
    gap = (export.logprobs - found.adapted.logprobs).abs()
    change = found.adapted.logprobs - found.base.logprobs
    kept, error = _share(export.logprobs - (base or found.base).logprobs, change)
    mean, largest = float(gap.mean()), float(gap.max())
    return Verification(
        tokens=len(tokens),
        agreeing=int((~differs).sum()),
        divergence=divergence,
        mean=mean,
        max=largest,
        effect=float(change.abs().mean()),
        kept=kept,
        kept_error=error,
        precision=precision,
        reference={"weights": found.precision, "dtype": found.dtype, "device": found.device},
        reasons=tuple(_reasons(mean, largest, kept, error, precision)),
    )


def _share(there: Tensor, change: Tensor) -> tuple[float | None, float | None]:
    """Slope of the line through the origin by which ``there`` follows ``change``, and its standard error."""
    power = float(change.square().sum())
    if power < 1e-10 * len(change):
        return None, None
    slope = float((there * change).sum()) / power
    rest = float((there - slope * change).square().sum())
    return slope, math.sqrt(rest / max(1, len(change) - 1) / power)


def _reasons(mean: float, largest: float, kept: float | None, error: float | None, precision: str) -> list[str]:
    allowed = TOLERANCES[precision]
    found = []
    if not (mean <= allowed.mean and largest <= allowed.max):  # not by comparing with > : NaN must fail
        found.append(
            f"log-probabilities differ by {mean:.2g} on average and {largest:.2g} at most; {allowed.mean:g} and "
            f"{allowed.max:g} are allowed for {precision}"
        )
    if kept is not None and error is not None and kept + 2 * error < _KEPT:
        found.append(
            f"only {100 * kept:.0f} % (+/- {200 * error:.0f}) of what the adapter changed is left: the export is "
            "nearer to the base model than to the trained one"
        )
    return found
