"""Every private part of vLLM that igrpo-lite touches, each with the versions it was found in.

Run on 0.26.0, 0.28.0, 0.31.0 and 0.32.0 (CPU). Nothing here is needed for correct samples: where a part is not as
expected, :class:`Unexpected` is raised, and the sampler takes the public way and says what it costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from igrpo_lite.sampling.vllm_policy import base_parameters

_FEW_ROWS = 4  # below it, MKL is as fast
_LAST_STEPS = 16  # 2 are enough: the batch that is under way, and one that clears the finished ids


class Unexpected(Exception):
    """This vLLM is built differently; the message says where."""


@contextmanager
def plain_cpu_weights() -> Iterator[None]:
    """While an engine is made on a CPU: keep ordinary weight matrices instead of packing them.

    0.28 ... 0.32: ``dispatch_cpu_unquantized_gemm`` asks these two, falls back to ``torch.nn.functional.linear``, and
    keeps the weight. (Up to 0.27 the second is asked only if VLLM_CPU_SGL_KERNEL is set.) Where they are named
    otherwise nothing happens, the weights are packed, and :func:`share_base` finds none to share.
    """
    import vllm._custom_ops as ops
    import vllm.model_executor.layers.utils as layers

    changes = [(ops, "_supports_onednn", False), (layers, "check_cpu_sgl_kernel", lambda *_, **__: False)]
    before = [(module, name, getattr(module, name)) for module, name, _ in changes if hasattr(module, name)]
    try:
        for module, name, value in changes:
            if hasattr(module, name):
                setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def multiply_plain_weights_fast(llm: Any) -> None:
    """Let float32 matrices that were left as they are be multiplied by oneDNN, not by MKL.

    ``torch.nn.functional.linear`` takes MKL, which is half as fast on AMD processors. 0.28 ... 0.32: each layer has its
    function in ``cpu_linear``; where there is none nothing happens.
    """
    if not torch.backends.mkldnn.is_available():
        return
    for module in _runner(llm).model.modules():
        weight = getattr(module, "weight", None)
        if (
            hasattr(module, "cpu_linear")
            and isinstance(weight, Tensor)
            and weight.dtype == torch.float32
            and weight.numel()
        ):
            module.cpu_linear = _onednn_linear


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.shape[0] < _FEW_ROWS:
        return nn.functional.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def runs_transformers_code(llm: Any) -> bool:
    """Whether vLLM has no code of its own for the model and runs transformers' class, after changing it for everybody.

    0.31: such a class then refuses to run outside vLLM (``'Olmo2Model' object has no attribute 'do_not_compile'``).
    """
    return type(_runner(llm).model).__module__.startswith("vllm.model_executor.models.transformers")


def empty(llm: Any) -> None:
    """Step the engine until its scheduler and its batch queue hold nothing of the last requests.

    The scheduler keeps the ids of finished requests until one more step, and with asynchronous scheduling (vLLM's
    default on a GPU) the step after the last is under way already. 0.31, 0.32: ``release_kv_cache_memory`` refuses
    until then.

    Raises:
        Unexpected: it does not become empty, or cannot be looked into.
    """
    try:
        core = llm.llm_engine.engine_core.engine_core
        for _ in range(_LAST_STEPS):
            if not core.scheduler.has_requests() and not core.batch_queue:
                return
            llm.llm_engine.step()
    except AttributeError as error:
        raise Unexpected(f"its scheduler: {error}") from error
    raise Unexpected("its scheduler does not become empty")


def release_kv_cache(llm: Any) -> None:
    """Pause an empty engine and release its KV cache's memory, until ``llm.wake_up()``. 0.31, 0.32.

    Raises:
        Unexpected: vLLM refuses; the engine goes on as before.
    """
    llm.sleep(level=0)
    try:
        llm.release_kv_cache_memory()
    except RuntimeError as error:
        if "release_kv_cache_memory() requires" not in str(error):  # it failed on the way
            raise
        llm.wake_up(tags=["scheduling"])
        raise Unexpected(str(error)) from error


def shut_down(llm: Any) -> None:
    """Stop an engine in this process and take vLLM's global process groups down, so that another can be started.

    0.26 ... 0.32: ``InprocClient.shutdown`` ends in ``cleanup_dist_env_and_memory``; left to the garbage collector,
    that would hit the next engine.
    """
    llm.llm_engine.engine_core.shutdown()


@dataclass(frozen=True, slots=True)
class Shared:
    """What :func:`share_base` did.

    Attributes:
        shared_bytes: of the policy's parameters that are now the engine's.
        own_bytes: of those that are not.
        reason: why, of one of them.
    """

    shared_bytes: int
    own_bytes: int
    reason: str


@torch.no_grad()
def share_base(llm: Any, model: nn.Module) -> Shared:
    """Let a transformers model's frozen parameters be views of the engine's, where shape, type and values agree.

    vLLM stacks some matrices (``packed_modules_mapping``: q, k and v; gate and up) and pads the vocabulary, so each of
    the model's parameters is a block of rows of one of the engine's. 0.26 ... 0.32 alike, CPU (see
    :func:`plain_cpu_weights`) and CUDA.

    Args:
        model: with LoRA layers in place or not, on the engine's device or on the CPU; adapter tensors are left alone.
    """
    own = base_parameters(model)
    total = sum(p.numel() * p.element_size() for p in own.values())
    shared, reasons = 0, []
    for name, block in _blocks(llm, own):
        parameter = own.pop(name)
        why = _difference(block, parameter)
        if why:
            reasons.append(f"{name}: {why}")
            continue
        parameter.data = block
        shared += parameter.numel() * parameter.element_size()
    reasons += [f"{name}: the engine has none of that name" for name in own]
    return Shared(shared, total - shared, reasons[0] if reasons else "")


def adapter_slots(llm: Any, lora_id: int, names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """The buffers that an active adapter is computed from: by module path, A ``[rank, in]`` and B ``[out, rank]``.

    Views of the engine's memory, as large as its largest rank. 0.26 ... 0.32: ``LoRAModelManager.modules`` holds for
    each (stacked) layer ``lora_a_stacked``, ``lora_b_stacked``: one tensor ``[slots, 1, ...]`` per part.

    Args:
        names: module paths in the transformers model that need one.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    try:
        manager = _runner(llm).lora_manager._adapter_manager
        slot = manager.lora_index_to_id.index(lora_id)
        for name, layer in manager.modules.items():
            parts = manager.packed_modules.get(name, [name])
            if not set(parts) & set(names):
                continue
            if not len(parts) == len(layer.lora_a_stacked) == len(layer.lora_b_stacked):
                raise Unexpected(f"{name} has other parts than {parts}")
            for part, a, b in zip(parts, layer.lora_a_stacked, layer.lora_b_stacked, strict=True):
                found[part] = (a[slot, 0], b[slot, 0])
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        raise Unexpected(f"adapter slots: {error}") from error
    missing = sorted(set(names) - found.keys())
    if missing:
        raise Unexpected(f"no adapter slot for {missing[0]}")
    return found


def _runner(llm: Any) -> Any:
    """The model runner: in an engine of one process (``UniProcExecutor``) an ordinary object. 0.26 ... 0.32."""
    return llm.llm_engine.model_executor.driver_worker.model_runner


def _blocks(llm: Any, own: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The rows of the engine's parameters that each of ``own`` should be equal to, by name."""
    try:
        engine = _runner(llm).model
        packed = getattr(engine, "packed_modules_mapping", None) or {}
    except AttributeError:
        return
    for name, parameter in engine.named_parameters():
        path, _, leaf = name.replace(".base_layer.", ".").rpartition(".")
        parent, _, module = path.rpartition(".")
        start = 0
        for part in packed.get(module, [module]):
            target = f"{parent}.{part}.{leaf}".lstrip(".")
            if target not in own:
                break
            rows = own[target].shape[0]
            yield target, parameter.data[start : start + rows] if parameter.dim() else parameter.data
            start += rows


def _difference(block: Tensor, parameter: Tensor) -> str:
    """Why the parameter cannot be the engine's block; empty if it can."""
    if block.shape != parameter.shape:
        return f"{list(block.shape)} in the engine, {list(parameter.shape)} in the policy"
    if block.dtype != parameter.dtype:
        return f"{block.dtype} in the engine, {parameter.dtype} in the policy"
    return "" if torch.equal(block, parameter.to(block.device)) else "other values in the engine"
