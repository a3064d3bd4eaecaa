"""Memory of a forward and backward pass beyond what was there before: counted on a CPU, on CUDA the allocator's."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveStorages(TorchDispatchMode):
    """Bytes of the tensor storages that operators made while this was active and that still live.

    Counted, not resident memory: what an operator allocates inside itself and gives back is not seen, and neither is
    the allocator's slack. Weights and inputs made before do not count; gradients left in parameters do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(_storages((args, *kwargs.values())))
        result = func(*args, **kwargs)
        for storage in _storages(result):
            if not any(storage is other for other in given):  # else a view, or written in place
                self._made(storage)
        return result

    def _made(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        known = self._sizes.get(key)
        if known is not None and known[1]() is storage:
            return

        def gone(_: object) -> None:
            self.live -= self._sizes.pop(key)[0]

        self._sizes[key] = (size, weakref.ref(storage, gone))
        self.live += size
        self.peak = max(self.peak, self.live)


def activation_memory(run: Callable[[], object], device: torch.device) -> dict[str, int]:
    """Bytes of ``run()``, which calls ``backward()`` on one or more losses, beyond those in use before.

    Returns:
        ``peak``: most at any moment. ``kept``: most at the start of a backward pass, so what the forward pass leaves
        for it, without the temporaries of either.
    """
    if device.type != "cuda":
        with LiveStorages() as storages, _before_backward(lambda: storages.live) as kept:
            run()
        return {"peak": storages.peak, "kept": max(kept)}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with _before_backward(lambda: torch.cuda.memory_allocated() - before) as kept:
        run()
    torch.cuda.synchronize()
    return {"peak": torch.cuda.max_memory_allocated() - before, "kept": max(kept)}


@contextmanager
def _before_backward(look: Callable[[], int]) -> Iterator[list[int]]:
    """What ``look()`` says at the start of every ``Tensor.backward``."""
    seen: list[int] = []
    backward = Tensor.backward

    def watched(self: Tensor, *args: Any, **kwargs: Any) -> None:
        seen.append(look())
        backward(self, *args, **kwargs)

    with patch.object(Tensor, "backward", watched):
        yield seen


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    """Of all tensors in an operator's arguments or results, which nest in lists and tuples at most."""
    if isinstance(values, Tensor):
        yield values.untyped_storage()
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _storages(value)
