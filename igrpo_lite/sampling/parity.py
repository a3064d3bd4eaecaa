"""Does the sampler sample from the policy that learns? The parity probe answers by experiment.

A few prompts are sampled and the policy scores the same tokens. Then the adapter is moved by a known step, pushed, and
the same prompts are sampled again: the sampler must have moved as far as the policy has. That shows, without knowing
the engine, a missing or stale adapter, a wrong scale, keys and values kept from older weights, and a temperature that
was not applied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

from igrpo_lite.policy.loading import Policy
from igrpo_lite.policy.logprobs import chosen_logprobs
from igrpo_lite.policy.tree import Branch
from igrpo_lite.sampling.base import Request, Sampler, request_seed
from igrpo_lite.types import Completion, Prompt

MAX_TOKENS = 16
"""Of each probing completion."""

TOLERANCE = {torch.float32: 1e-3}
"""Mean |difference| of log-probabilities that two ways to compute the same model may show, by type of the weights."""

LOW_PRECISION_TOLERANCE = 0.1

_MOVED = 0.5  # nats by which the test step must change the policy's own log-probabilities, on average
_FIRST_STEP, _GROWTH, _TRIES = 4e-3, 3.0, 10


@dataclass(frozen=True, slots=True)
class Parity:
    """What the probe found, in nats.

    Attributes:
        mean, largest: |difference| between the log-probabilities of sampler and policy, per token.
        moved: how far the test step moved the policy's log-probabilities, on average.
        mean_moved: as ``mean``, after the test step was pushed.
        tolerance: what ``mean`` may be.
    """

    mean: float
    largest: float
    moved: float
    mean_moved: float
    tolerance: float

    def failure(self) -> str | None:
        """What is wrong, for a person; ``None`` if nothing is."""
        if self.mean > self.tolerance:
            return (
                f"the sampler's log-probabilities differ from the policy's by {self.mean:.3g} nats a token on average "
                f"(allowed: {self.tolerance:g}), so it samples from another model: an adapter that is missing or "
                "scaled wrongly, a temperature that is not applied, or other base weights"
            )
        if self.mean_moved > max(self.tolerance, 0.2 * self.moved):
            return (
                f"the sampler did not follow a change of the adapter: the policy moved by {self.moved:.3g} nats a "
                f"token, and {self.mean_moved:.3g} of them are missing in the sampler: the adapter is not pushed, or "
                "the engine answers from keys and values of older weights"
            )
        return None

    def record(self) -> dict[str, float]:
        return asdict(self)


def probe(policy: Policy, sampler: Sampler, prompts: Sequence[Prompt], temperature: float) -> Parity:
    """Compare sampler and policy on ``prompts``; the adapter is what it was before, in both, when this returns."""
    requests = [
        Request(prompt, request_seed("parity", index), MAX_TOKENS, temperature) for index, prompt in enumerate(prompts)
    ]
    before = sampler.run(requests)
    gaps = _gaps(policy, requests, before)
    with _moved_adapter(policy, requests, before) as moved:
        sampler.load_adapter()
        after = sampler.run(requests)
        gaps_moved = _gaps(policy, requests, after)
    sampler.load_adapter()
    dtype = policy.model.get_base_model().dtype
    tolerance = TOLERANCE.get(dtype, LOW_PRECISION_TOLERANCE)
    return Parity(float(gaps.mean()), float(gaps.max()), moved, float(gaps_moved.mean()), tolerance)


def _gaps(policy: Policy, requests: Sequence[Request], completions: Sequence[Completion]) -> torch.Tensor:
    sampled = torch.cat([torch.tensor(completion.logprobs) for completion in completions])
    return (_scores(policy, requests, completions) - sampled).abs()


@torch.no_grad()
def _scores(policy: Policy, requests: Sequence[Request], completions: Sequence[Completion]) -> torch.Tensor:
    branches = [
        Branch(request.prompt.ids, completion.ids, tuple(range(len(completion.ids))), request.temperature)
        for request, completion in zip(requests, completions, strict=True)
    ]
    scored = chosen_logprobs(policy.model.get_base_model(), branches)
    return scored.logprobs[scored.mask].cpu()


@contextmanager
def _moved_adapter(policy: Policy, requests: Sequence[Request], completions: Sequence[Completion]) -> Iterator[float]:
    """Move the adapter until the policy's own log-probabilities show it; gives how far, and takes the step back."""
    tensors = [p for _, p in policy.adapter_parameters()]
    kept = [p.detach().clone() for p in tensors]
    start = _scores(policy, requests, completions)
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(p.shape, generator=generator).to(p.device, p.dtype) for p in tensors]
    size, moved = _FIRST_STEP, 0.0
    try:
        for _ in range(_TRIES):
            for p, step in zip(tensors, steps, strict=True):
                p.data.add_(step, alpha=size)
            moved = float((_scores(policy, requests, completions) - start).abs().mean())
            if moved >= _MOVED:
                break
            size *= _GROWTH
        yield moved
    finally:
        for p, old in zip(tensors, kept, strict=True):
            p.data.copy_(old)
