"""What the parent and the processes of benchmarks/gpu.py share; imports nothing that Unsloth must come before."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MARK = "===== "
"""Begins the line of a log after which a stage's own words follow."""


class NotHere(Exception):
    """A stage has nothing to show on this machine; the message says why."""


@dataclass(frozen=True, slots=True)
class Found:
    """One number of a stage, beside what it should be.

    Attributes:
        value: its median, with ``low`` and ``high`` where it was measured several times.
        goal: at most this; with ``at_least`` at least this; ``None``: none was set.
        cost: of time or memory, so judged at full size on a GPU only. What must be right everywhere is judged always.
    """

    what: str
    value: float
    unit: str = ""
    goal: float | None = None
    at_least: bool = False
    low: float | None = None
    high: float | None = None
    cost: bool = True

    def record(self, judged: bool) -> dict[str, Any]:
        """As JSON types; ``met`` is ``None`` where nothing is judged."""
        if self.goal is None or (self.cost and not judged):
            met = None
        else:
            met = self.value >= self.goal if self.at_least else self.value <= self.goal  # not a number: not met
        return asdict(self) | {"value": float(self.value), "met": met}


def measured(what: str, values: Sequence[float] | Mapping[str, float], unit: str = "", **more: Any) -> Found:
    """A number of several measurements, or of their spread (``measuring.spread``)."""
    if isinstance(values, Mapping):
        median, low, high = values["median"], values["min"], values["max"]
    else:
        median, low, high = statistics.median(values), min(values), max(values)
    return Found(what, median, unit, low=low, high=high, **more)


@dataclass(slots=True)
class Outcome:
    """What a stage gives: numbers with goals, and whatever else is worth keeping."""

    found: list[Found] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stage:
    """One thing to show.

    Attributes:
        name: its topic, and where there are several of that the process.
        process: its stages run in one, one after the other, and share what is loaded there.
        run: ``module:function``; it gets a :class:`gpu_worker.Context`.
        what: a sentence.
        seconds: after which it is taken for dead, at full size on a GPU, its loading included.
        needs: packages.
        not_on_cpu: why it shows nothing there.
    """

    name: str
    process: str
    run: str
    what: str
    seconds: int
    needs: tuple[str, ...] = ()
    not_on_cpu: str = ""

    @property
    def topic(self) -> str:
        return self.name.partition("-")[0]


def environment(scratch: Path, device: str, has_flashinfer: bool) -> dict[str, str]:
    """What engines need on a machine without network and with packages on a path only. The user's own come first."""
    wanted = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine inside, with tensors that can be shared
        "VLLM_LOGGING_LEVEL": "INFO",  # into the logs: a GPU is rare, so what it said must be kept
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_VLLM_MERGED_ROLLOUT": "0",
        "UNSLOTH_COMPILE_LOCATION": str(scratch / "unsloth"),
    }
    if os.path.isdir("/sys/class/net/lo"):
        wanted |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    if device == "cpu":
        wanted["TORCHDYNAMO_DISABLE"] = "1"  # else the first log-probabilities wait for a C++ compiler
    if not has_flashinfer:  # vLLM 0.26 asks for it without looking whether it is there
        wanted["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def write_atomically(path: Path, content: Mapping[str, Any]) -> None:
    """As JSON, whole or not at all: a killed run leaves no half of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    aside.replace(path)
