"""Memory in use, for the record of every step: leaks kill long runs, and a trend shows long before."""

from __future__ import annotations

import psutil  # type: ignore[import-untyped]
import torch

_MIB = 2**20


def memory(device: torch.device) -> dict[str, float]:
    """Resident memory of this process, and what torch has taken on a CUDA device and its peak, in MiB."""
    found = {"rss": psutil.Process().memory_info().rss / _MIB}
    if device.type == "cuda":
        found["device"] = torch.cuda.memory_reserved(device) / _MIB
        found["device_peak"] = torch.cuda.max_memory_allocated(device) / _MIB
    return found
