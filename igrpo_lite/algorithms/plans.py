"""Plans share one engine: each says what it waits for, and the requests of all of them decode in one batch.

A plan is a generator. It yields :class:`Sample`, :class:`Compute`, :class:`All` or :class:`Barrier`, is sent the
answer, and returns its result. What it asks for next joins the running batch. Nothing here knows what is sampled.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any, TypeVar

from igrpo_lite.sampling.base import Request, Sampler
from igrpo_lite.types import Completion

T = TypeVar("T")
Plan = Generator["Sample | Compute | All | Barrier", Any, T]

COMPUTE_STEPS = 8
"""Decoding steps after which the driver waits for a computed value that samples follow. If it took the value whenever
it is ready, the shape of the batch, and with it rounding, would depend on the clock: no run could be repeated bit for
bit."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Answer: the completions of these requests, in order. Each request has a tag of its own."""

    requests: Sequence[Request]


@dataclass(frozen=True, slots=True)
class Compute:
    """Answer: what ``call`` returns. ``joins``: samples follow it, which should still reach the running batch."""

    call: Callable[[], Any]
    joins: bool = False


@dataclass(frozen=True, slots=True)
class All:
    """Answer: the results of these plans, in order; they run side by side."""

    plans: Sequence[Plan[Any]]


@dataclass(frozen=True, slots=True)
class Barrier:
    """No answer. With ``Driver.run(..., barrier=True)`` the plan waits here until no plan samples or computes; else it
    goes on at once."""


class Driver:
    """Runs plans on one sampler.

    Args:
        threads: how many :class:`Compute` calls run beside the decoding; 0: each runs at once, and decoding waits.
        on_sampled: called with every request and its completion, after the plan has gone on.

    Attributes:
        waited: seconds in which nothing was decoded because a computed value was missing.
        computing: the calls under way.
    """

    def __init__(
        self,
        sampler: Sampler,
        threads: int = 0,
        on_sampled: Callable[[Request, Completion], None] = lambda request, completion: None,
    ) -> None:
        self.sampler, self.on_sampled = sampler, on_sampled
        self.threads = ThreadPoolExecutor(threads, "rewards") if threads else None
        self.waited = 0.0
        self.computing: list[_Computing] = []
        self._open: dict[Any, tuple[_Join, int]] = {}  # by tag: who waits for the completion, and its index there
        self._held: list[tuple[tuple[int, ...], _GoOn]] | None = None  # plans at a barrier; None: there is no barrier
        self._polls = 0

    def run(self, plans: Sequence[Plan[T]], barrier: bool = False) -> list[T]:
        """The results of the plans, in order. After an error nothing is left open; with threads, :meth:`close` then
        gives up the calls under way."""
        root = _Join(len(plans), lambda results: [])
        self._held = [] if barrier else None
        try:
            wave = [
                more for index, plan in enumerate(plans) for more in self._go((index,), partial(root.put, index), plan)
            ]
            while wave:
                self.sampler.run(wave, self._on_finished, self._poll if self.threads else None)
                held, self._held = sorted(self._held or [], key=itemgetter(0)), [] if barrier else None
                wave = [more for _, go_on in held for more in go_on(None)]
        finally:
            self._open.clear()
            for plan in plans:
                plan.close()
        return root.values

    def close(self, give_up: Callable[[], None] = lambda: None) -> None:
        """End the threads. ``give_up`` makes a call that is still running fail."""
        if self.threads is not None:
            self.threads.shutdown(wait=False, cancel_futures=True)
            for computing in self.computing:
                while not computing.value.done():  # repeatedly: between two calls there is nothing to give up
                    give_up()
                    wait([computing.value], 0.05)
            self.threads.shutdown()

    def _go(self, place: tuple[int, ...], then: _GoOn, plan: Plan[Any], answer: Any = None) -> list[Request]:
        """Continue a plan until it waits for something; the requests to sample for it.

        Args:
            place: of the plan among those given to :meth:`run`, or that of the plan it is a part of, then its own.
            then: gets its result.
        """
        while True:
            try:
                ask = plan.send(answer)
            except StopIteration as end:
                return then(end.value)
            go_on = partial(self._go, place, then, plan)
            if isinstance(ask, Sample) and ask.requests:
                join = _Join(len(ask.requests), go_on)
                self._open.update({request.tag: (join, index) for index, request in enumerate(ask.requests)})
                return list(ask.requests)
            if isinstance(ask, All) and ask.plans:
                join = _Join(len(ask.plans), go_on)
                parts = enumerate(ask.plans)
                return [more for i, part in parts for more in self._go((*place, i), partial(join.put, i), part)]
            if isinstance(ask, Compute) and self.threads is not None:
                due = self._polls + COMPUTE_STEPS if ask.joins and self._held is None else math.inf
                self.computing.append(_Computing(self.threads.submit(ask.call), due, go_on))
                return []
            if isinstance(ask, Barrier) and self._held is not None:
                self._held.append((place, go_on))
                return []
            answer = self._waited_for(ask.call) if isinstance(ask, Compute) else []

    def _on_finished(self, request: Request, completion: Completion) -> Iterable[Request]:
        join, index = self._open.pop(request.tag)
        more = join.put(index, completion)
        self.on_sampled(request, completion)
        return more

    def _poll(self, idle: bool) -> Iterable[Request]:
        """What follows the values that are due; with nothing left to decode, that is the next of them."""
        self._polls += 1
        more: list[Request] = []
        while self.computing and (min(c.due for c in self.computing) <= self._polls or (idle and not more)):
            answer = self._waited_for(self.computing[0].value.result)
            more += self.computing.pop(0).then(answer)
        return more

    def _waited_for(self, call: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        answer = call()
        self.waited += time.perf_counter() - started
        return answer


_GoOn = Callable[[Any], list[Request]]
"""Takes an answer; gives the requests that follow it."""


class _Join:
    """Collects answers, and goes on with the list of them once the last is there."""

    def __init__(self, count: int, then: _GoOn) -> None:
        self.values: list[Any] = [None] * count
        self.left, self.then = count, then

    def put(self, index: int, value: Any) -> list[Request]:
        self.values[index] = value
        self.left -= 1
        return [] if self.left else self.then(self.values)


@dataclass(frozen=True, slots=True)
class _Computing:
    """A call under way; ``due`` is the decoding step that waits for its value."""

    value: Future[Any]
    due: float
    then: _GoOn
