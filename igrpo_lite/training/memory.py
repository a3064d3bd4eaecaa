"""Memory in use, for the record of every step: leaks kill long runs, and a trend shows long before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

import psutil  # type: ignore[import-untyped]

if TYPE_CHECKING:
    import torch

_MIB = 2**20

_WARM_UP = 30  # steps in which caches and allocators rightly grow
_FEWEST, _MOST = 40, 128  # points of a series; beyond, every second one is dropped, so a long run is seen as a whole
_BLOCKS = 8
_SHARE, _MIN_GROWTH = 0.25, 200.0  # of the start, MiB: what a growth must exceed
_FALL = 0.8


def memory(device: torch.device) -> dict[str, float]:
    """Resident memory of this process, and what torch has taken on a CUDA device and its peak, in MiB."""
    found = {"rss": psutil.Process().memory_info().rss / _MIB}
    if device.type == "cuda":
        import torch

        found["device"] = torch.cuda.memory_reserved(device) / _MIB
        found["device_peak"] = torch.cuda.max_memory_allocated(device) / _MIB
    return found


@dataclass(frozen=True, slots=True)
class Growth:
    """A steady growth: from ``first`` MiB around step ``since`` to ``last``, ``slope`` MiB a step.

    ``steps_left`` until this machine's memory is full; ``None`` for a device, whose size is not known here.
    """

    since: int
    first: float
    last: float
    slope: float
    steps_left: int | None


@dataclass(slots=True)
class _Series:
    seen: int = 0
    last: float = 0.0
    stride: int = 1
    points: list[tuple[int, float]] = field(default_factory=list)

    def add(self, step: int, value: float) -> None:
        if value < _FALL * self.last:  # started again, or an engine made anew
            self.seen, self.stride, self.points = 0, 1, []
        self.last = value
        if self.seen >= _WARM_UP and (self.seen - _WARM_UP) % self.stride == 0:
            self.points.append((step, value))
        self.seen += 1
        if len(self.points) > _MOST:
            self.points, self.stride = self.points[::2], 2 * self.stride


class MemoryTrend:
    """Tells a leak from warm-up, noise and single large allocations, by the numbers of :func:`memory`."""

    def __init__(self) -> None:
        self._series = {kind: _Series() for kind in ("rss", "device")}

    def add(self, step: int, used: Mapping[str, float]) -> None:
        """Take in one step."""
        for kind, series in self._series.items():
            if kind in used:
                series.add(step, used[kind])

    def growing(self) -> Iterator[tuple[str, Growth]]:
        """What grows (``rss`` or ``device``), and how: by more than a quarter of its start, and almost all the time."""
        for kind, series in self._series.items():
            count = len(series.points)
            if count < _FEWEST:
                continue
            blocks = [series.points[i * count // _BLOCKS : (i + 1) * count // _BLOCKS] for i in range(_BLOCKS)]
            steps, levels = ([median(point[axis] for point in block) for block in blocks] for axis in (0, 1))
            growth = levels[-1] - levels[0]
            rises = [after - before > growth / _BLOCKS / 4 for before, after in pairwise(levels)]
            if growth <= max(_SHARE * levels[0], _MIN_GROWTH) or sum(rises) < len(rises) - 1 or not rises[-1]:
                continue
            slope = growth / (steps[-1] - steps[0])
            room = psutil.virtual_memory().total / _MIB - series.last
            left = max(0, round(room / slope)) if kind == "rss" else None
            yield kind, Growth(round(steps[0]), levels[0], series.last, slope, left)

    def state(self) -> dict[str, Any]:
        """As JSON types."""
        states = {kind: asdict(series) for kind, series in self._series.items()}
        return {kind: state | {"points": [list(point) for point in state["points"]]} for kind, state in states.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state`."""
        self._series = {kind: _Series(**state.get(kind, {})) for kind in self._series}
        for series in self._series.values():
            series.points = [(step, value) for step, value in series.points]
