"""Does the sampler sample from the policy that learns? The parity probe answers by experiment.

A few prompts are sampled and the policy scores the same tokens. Then the adapter is moved by a known step, pushed, and
the same prompts are sampled again: the sampler must have moved as far as the policy has. That shows, without knowing
the engine, a missing or stale adapter, a wrong scale, a KV cache kept from older weights, and a temperature that
was not applied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

import torch

from igrpo_lite.policy.loading import Policy
from igrpo_lite.policy.logprobs import Layout, best_layout, chosen_logprobs
from igrpo_lite.policy.tree import Branch
from igrpo_lite.sampling.base import Request, Sampler, request_seed
from igrpo_lite.types import Completion, Prompt

MAX_TOKENS = 16
"""Of each probing completion."""

_FULL, _LOW = (1e-4, 0.02), (0.1, 0.05)
"""What two ways to compute the same model may show in float32, and in less: mean |difference| of log-probabilities,
nats; and after the test step, a share of what it moved. Small, since confident models show little of any fault."""

_MOVED = 0.5  # nats by which the test step must change the policy's own log-probabilities, on average
_FIRST_STEP, _GROWTH, _TRIES = 4e-3, 3.0, 10


@dataclass(frozen=True, slots=True)
class Parity:
    """What the probe found, in nats.

    Attributes:
        mean, largest: |difference| between the log-probabilities of sampler and policy, per token.
        moved: how far the test step moved the policy's log-probabilities, on average.
        mean_moved: as ``mean``, after the test step was pushed.
        tolerance, tolerance_moved: what ``mean`` and ``mean_moved`` may be.
    """

    mean: float
    largest: float
    moved: float
    mean_moved: float
    tolerance: float
    tolerance_moved: float

    def failure(self) -> str | None:
        """What is wrong, for a person; ``None`` if nothing is."""
        if not self.mean <= self.tolerance:  # also when it is not a number
            return (
                f"the sampler's log-probabilities differ from the policy's by {self.mean:.3g} nats a token on average "
                f"(allowed: {self.tolerance:g}), so it samples from another model: an adapter that is missing or "
                "scaled wrongly, a temperature that is not applied, or other base weights"
            )
        if not self.moved >= _MOVED:
            return (
                f"even a large change of the adapter moves the policy by {self.moved:.3g} nats a token only, so it "
                "cannot learn; check that --lora-target-modules and --lora-layers name parts that the model uses"
            )
        if not self.mean_moved <= self.tolerance_moved:
            return (
                f"the sampler did not follow a change of the adapter: the policy moved by {self.moved:.3g} nats a "
                f"token, and {self.mean_moved:.3g} of them are missing in the sampler: the adapter is not pushed, is "
                "scaled wrongly, or the engine answers from a KV cache of older weights"
            )
        return None

    def record(self) -> dict[str, float]:
        return asdict(self)


def probe(
    policy: Policy,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    temperatures: Sequence[float],
    max_tokens: int = MAX_TOKENS,
) -> Parity:
    """Compare sampler and policy on ``prompts``, each at one of ``temperatures`` in turn.

    When this ends, also by an error, the adapter is bit for bit what it was before, in both.
    """
    requests = [
        Request(prompt, request_seed("parity", index), max_tokens, temperatures[index % len(temperatures)])
        for index, prompt in enumerate(prompts)
    ]
    layout = best_layout(policy.model.get_base_model())
    before = sampler.run(requests)
    scores = _scores(policy, layout, requests, before)
    gaps = (scores - _logprobs(before)).abs()
    try:
        with _moved_adapter(policy, lambda: _scores(policy, layout, requests, before), scores) as moved:
            sampler.load_adapter()
            after = sampler.run(requests)
            gaps_moved = (_scores(policy, layout, requests, after) - _logprobs(after)).abs()
    except BaseException:
        with suppress(Exception):  # the first error says more
            sampler.load_adapter()
        raise
    sampler.load_adapter()
    tolerance, share = _FULL if policy.model.get_base_model().dtype == torch.float32 else _LOW
    means = float(gaps.mean()), float(gaps.max()), moved, float(gaps_moved.mean())
    return Parity(*means, tolerance, max(tolerance, share * moved))


def _logprobs(completions: Sequence[Completion]) -> torch.Tensor:
    return torch.tensor([logprob for completion in completions for logprob in completion.logprobs])


@torch.no_grad()
def _scores(
    policy: Policy, layout: Layout, requests: Sequence[Request], completions: Sequence[Completion]
) -> torch.Tensor:
    branches = [
        Branch(request.prompt.ids, completion.ids, tuple(range(len(completion.ids))), request.temperature)
        for request, completion in zip(requests, completions, strict=True)
    ]
    scored = chosen_logprobs(policy.model.get_base_model(), branches, layout)
    return scored.logprobs[scored.mask].cpu()


@contextmanager
def _moved_adapter(policy: Policy, score: Callable[[], torch.Tensor], start: torch.Tensor) -> Iterator[float]:
    """Move the adapter until the policy's own log-probabilities show it; gives how far, and takes the step back."""
    tensors = [p for _, p in policy.adapter_parameters()]
    kept = [p.detach().clone() for p in tensors]
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(p.shape, generator=generator).to(p.device, p.dtype) for p in tensors]
    size, moved = _FIRST_STEP, 0.0
    try:
        for _ in range(_TRIES):
            for p, step in zip(tensors, steps, strict=True):
                p.data.add_(step, alpha=size)
            moved = float((score() - start).abs().mean())
            if moved >= _MOVED:
                break
            size *= _GROWTH
        yield moved
    finally:
        for p, old in zip(tensors, kept, strict=True):
            p.data.copy_(old)
