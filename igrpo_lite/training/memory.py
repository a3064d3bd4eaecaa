"""Memory in use, for the record of every step: leaks kill long runs, and growth shows long before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil  # type: ignore[import-untyped]

if TYPE_CHECKING:
    import torch

_MIB = 2**20
_WARM_UP = 30  # steps in which caches and allocators rightly grow
_LEVEL = 20  # steps of whose memory the least counts, so that evaluations and other peaks do not
_GROWTH, _LEAST = 1.5, 1000.0  # times the level after warm-up, and MiB, that a growth must exceed
_FALL = 0.8  # of the step before: a new process, or a new engine


def memory(device: torch.device) -> dict[str, float]:
    """Resident memory of this process, and what torch has reserved on a CUDA device and its peak, in MiB."""
    found = {"rss": psutil.Process().memory_info().rss / _MIB}
    if device.type == "cuda":
        import torch

        found["device"] = torch.cuda.memory_reserved(device) / _MIB
        found["device_peak"] = torch.cuda.max_memory_allocated(device) / _MIB
    return found


class Growth(NamedTuple):
    """From ``first`` MiB around step ``since`` to ``last`` MiB."""

    since: int
    first: float
    last: float


class MemoryTrend:
    """Notices memory (``rss`` or ``device`` of :func:`memory`) that keeps growing after the first steps."""

    def __init__(self) -> None:
        self._state: dict[str, dict[str, Any]] = {}

    def add(self, step: int, used: Mapping[str, float]) -> None:
        """Take in one step."""
        for kind in {"rss", "device"} & used.keys():
            known = self._state.get(kind)
            if known is None or used[kind] < _FALL * known["recent"][-1]:
                known = self._state[kind] = {"seen": 0, "since": step, "first": None, "recent": []}
            known["seen"] += 1
            known["recent"] = [*known["recent"], used[kind]][-_LEVEL:]
            if known["seen"] == _WARM_UP + _LEVEL:
                known |= {"since": step, "first": min(known["recent"])}

    def growing(self) -> Iterator[tuple[str, Growth]]:
        """What has grown by half of its level after warm-up and by 1,000 MiB, and stays there."""
        for kind, known in sorted(self._state.items()):
            first, last = known["first"], min(known["recent"])
            if first is not None and last > max(_GROWTH * first, first + _LEAST):
                yield kind, Growth(known["since"], first, last)

    def state(self) -> dict[str, Any]:
        """As JSON types."""
        return {kind: dict(known) for kind, known in self._state.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state`; one of an earlier version is left out."""
        self._state = {kind: dict(known) for kind, known in state.items() if "recent" in known}
