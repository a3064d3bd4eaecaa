"""Running out of memory: how it is recognised, and how room is made for another try."""

from __future__ import annotations

import gc
import traceback

import torch

_CPU_ALLOCATOR = "can't allocate memory"  # torch has no class of its own for the CPU's


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of torch says that memory is full, on a GPU or on the CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _CPU_ALLOCATOR in str(error)


def speaks_of_memory(error: BaseException) -> bool:
    """Whether an engine could not be started for want of memory: vLLM says so in errors of many kinds."""
    return is_out_of_memory(error) or "memory" in str(error).lower()


def forget(error: BaseException) -> None:
    """Clear the frames of a failure, and of those that it followed: what they hold would stay in memory. Unsloth raises
    an error of its own while it handles vLLM's, whose frames hold the engine."""
    met: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is not None and id(one) not in met:
            met.add(id(one))
            traceback.clear_frames(one.__traceback__)
            left += [one.__cause__, one.__context__]


def make_room(device: torch.device) -> None:
    """Free what nothing holds any more. Call it outside of the handler: the traceback holds the tensors."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
