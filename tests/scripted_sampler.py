"""A sampler without a model: what it writes follows from the request alone, in which order it finishes from the test.

So the order of events is exact, and rollouts that depend on that order cannot hide behind rounding.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from igrpo_lite.sampling.base import OnFinished, Poll, Request
from igrpo_lite.types import Completion


class ScriptedSampler:
    """Writes some noise and one of two answers, cut at the request's limit.

    Args:
        tokenizer: the texts' own.
        answers: what is boxed; one of them, drawn by the request's seed.
        pick: which of so many requests under way finishes next; the first unless told.

    Attributes:
        runs: requests of each call of :meth:`run`, without follow-ups.
        events: ("sampled", request) and ("asked", request) in the order in which they happened.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        answers: Sequence[str],
        pick: Callable[[int], int] = lambda count: 0,
    ) -> None:
        self.tokenizer = tokenizer
        self.answers = answers
        self.pick = pick
        self.runs: list[list[Request]] = []
        self.events: list[tuple[str, Request]] = []

    @property
    def requests(self) -> list[Request]:
        return [request for kind, request in self.events if kind == "asked"]

    def run(
        self, requests: Sequence[Request], on_finished: OnFinished | None = None, poll: Poll | None = None
    ) -> list[Completion]:
        self.runs.append(list(requests))
        waiting, completions = list(requests), {}
        self.events += [("asked", request) for request in requests]
        while waiting:
            request = waiting.pop(self.pick(len(waiting)))
            completions[id(request)] = completion = self.write(request)
            self.events.append(("sampled", request))
            more = list(on_finished(request, completion)) if on_finished else []
            self.events += [("asked", follow_up) for follow_up in more]
            waiting += more
        return [completions[id(request)] for request in requests]

    def load_adapter(self) -> None:
        pass

    def write(self, request: Request) -> Completion:
        r = random.Random(request.seed)
        noise = "; ".join(f"{r.randint(2, 99)}+{r.randint(2, 99)}={r.randint(2, 99)}" for _ in range(r.randint(0, 4)))
        text = f"{noise}; \\boxed{{{r.choice(self.answers)}}}"
        whole = [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]
        ids = tuple(whole[: request.max_tokens])
        logprobs = tuple(-r.random() for _ in ids)
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return Completion(ids, text, logprobs, "stop" if len(ids) == len(whole) else "length")
