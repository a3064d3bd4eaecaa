"""The protocol between the algorithms and whatever generates tokens.

A sampler is event-driven: each finished completion is handed to ``on_finished`` at once, and the requests that this
returns join the batch that is still decoding. That is what lets a problem's refinements start while other problems are
still drafting.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from igrpo_lite.types import Completion, Prompt


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One completion to sample.

    Attributes:
        prompt: what to continue; requests with equal prompt ids share its prefill.
        seed: fixes this completion whatever else is in the batch (see :func:`request_seed`).
        max_tokens: token limit; reaching it makes a truncated completion.
        temperature: 0 decodes greedily.
        tag: the caller's own label, handed back untouched.
        top_p: sample from the likeliest tokens of at least this total probability only.
            Greedy decoding takes no notice of it.
    """

    prompt: Prompt
    seed: int
    max_tokens: int
    temperature: float = 1.0
    tag: object = None
    top_p: float = 1.0


OnFinished = Callable[[Request, Completion], Iterable[Request]]

Poll = Callable[[bool], Iterable[Request]]
"""Asked for further requests after every decoding step, with whether nothing is left to decode. Then it may wait for
what else goes on (a reward being computed); if it returns nothing even so, the run ends."""


class Sampler(Protocol):
    """Samples completions from the policy: pure temperature sampling, unless a request cuts the distribution off.

    Log-probabilities are those of the distribution sampled from, so after temperature and renormalised over the tokens
    that ``top_p`` leaves.

    Attributes:
        decode_steps, sampled_tokens, prefill_tokens, cached_tokens: counted since it was made: steps of the running
            batch, tokens sampled, prompt tokens computed, and prompt tokens that were not because they were known.
    """

    decode_steps: int
    sampled_tokens: int
    prefill_tokens: int
    cached_tokens: int

    def run(
        self, requests: Sequence[Request], on_finished: OnFinished | None = None, poll: Poll | None = None
    ) -> list[Completion]:
        """Completions of ``requests``, in their order; those of follow-up requests reach ``on_finished`` only."""
        ...

    def load_adapter(self) -> None:
        """Take over the policy's current adapter weights; call after every optimizer step."""
        ...

    def sleep(self) -> None:
        """Give memory back for the time of an update, where the engine can."""
        ...

    def wake(self) -> None:
        """Take it again; call before :meth:`run`, and before :meth:`load_adapter`."""
        ...

    def close(self) -> None:
        """Free everything; the sampler is of no use afterwards."""
        ...


class HoldsNothing:
    """What a sampler need not do that runs the policy's own modules and keeps nothing between runs."""

    def sleep(self) -> None:
        """Nothing is held between runs."""

    def wake(self) -> None:
        """Nothing to take again."""

    def close(self) -> None:
        """Nothing to free."""


def request_seed(*path: object) -> int:
    """A 63-bit seed from what identifies a request: run seed, step, problem id, stage, index.

    A hash, so that neighbouring paths share nothing, and independent of Python's hash randomisation.
    """
    digest = hashlib.blake2b("\x1f".join(map(str, path)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
