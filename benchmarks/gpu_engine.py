"""What one loaded model and its engine show: one copy of the weights, parity, the adapter's way, sleep and wake."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from gpu_common import Found, NotHere, measured
from rollout_adapter import push_times
from rollout_common import fill_adapter
from torch import Tensor, nn

from igrpo_lite.config import RunConfig
from igrpo_lite.config.resolve import resolve
from igrpo_lite.policy.fingerprint import base_fingerprint
from igrpo_lite.policy.loading import Policy
from igrpo_lite.problems.synthetic import load as load_problems
from igrpo_lite.sampling.base import Request, request_seed
from igrpo_lite.sampling.parity import probe
from igrpo_lite.sampling.vllm import VllmSampler
from igrpo_lite.sampling.vllm_internals import _runner
from igrpo_lite.sampling.vllm_policy import base_parameters
from igrpo_lite.training.card import Fitted, fitted, gpu_in_use
from igrpo_lite.training.prepare import prepare
from igrpo_lite.types import Completion
from igrpo_lite.workbench import Workbench

if TYPE_CHECKING:
    from gpu_worker import Context

_GOAL_MS = 50.0  # the adapter's way into the engine: Qwen2-1.5B, rank 16
_PUSHES = {False: 30, True: 3}
_STEPS = 2  # of the run that a plan is held against


@dataclass(slots=True)
class Loaded:
    """A run's parts as ``igrpo-lite train`` makes them, what the planner said about it, and bytes of the GPU that
    loading left allocated and took at most."""

    config: RunConfig
    prepared: Workbench
    card: Fitted
    allocated: int = 0
    peak: int = 0

    @property
    def policy(self) -> Policy:
        return self.prepared.policy

    @property
    def sampler(self) -> Any:
        return self.prepared.sampler

    @property
    def notes(self) -> list[str]:
        return [*self.card.notes, *self.prepared.notes]

    @property
    def llm(self) -> Any:
        """vLLM's engine; ``None`` where another one samples."""
        return self.sampler.engine.llm if isinstance(self.sampler, VllmSampler) else None

    def requests(self, count: int, tokens: int, temperature: float = 1.0) -> list[Request]:
        problems = load_problems("two-step", "test", count)
        prompts = [self.prepared.prompts.first(problem.question) for problem in problems]
        return [Request(prompt, request_seed("gpu", i), tokens, temperature) for i, prompt in enumerate(prompts)]


def load(settings: Mapping[str, Any]) -> Loaded:
    """What a run with these settings works with. Its adapter is not zero as a fresh one is, and so could be missed."""
    config = resolve(dict(settings))
    card = fitted(config, gpu_in_use(config))
    prepared = prepare(card.config)
    loaded = Loaded(card.config, prepared, card)
    if loaded.policy.device.type == "cuda":
        torch.cuda.synchronize()
        loaded.allocated, loaded.peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    fill_adapter(loaded.policy)
    loaded.sampler.load_adapter()
    return loaded


def settings(context: Context) -> dict[str, Any]:
    """Of two steps at full length, with the memory that the planner gives them."""
    packed = context.backend == "unsloth"
    length = 8 if context.tiny else 512
    small = {"max_num_seqs": 8, "kv_cache_gib": 0.0625} if context.tiny else {}
    return small | {
        "model": context.model(),
        "backend": context.backend,
        "load_in_4bit": packed,
        "device": context.device,
        "sampler": "auto" if packed and not context.on_gpu else "vllm",  # Unsloth starts no engine on a CPU
        "output_dir": str(context.scratch / f"run-{context.backend}"),
        "data": "two-step",
        "max_problems": 64,
        "prompts_per_step": 2 if context.tiny else 8,
        "num_generations": 4 if context.tiny else 8,
        "max_completion_length": length,
        "max_draft_length": length,
        "reward_funcs": ["random"],  # random weights earn nothing else, and without a signal there is no update
        "max_steps": _STEPS,
        "eval_size": 2,
        "eval_steps": _STEPS,
        "save_steps": _STEPS,
        "parity_steps": 0,  # a stage of its own
        "progress": "plain",
    }


def smoke(context: Context) -> None:
    """It samples with the engine that it should, and there is one copy of the frozen weights."""
    loaded, outcome = context.engine(), context.outcome
    requests = loaded.requests(4, 16)
    completions = loaded.sampler.run(requests)
    logprobs = torch.tensor([value for completion in completions for value in completion.logprobs])
    bad = int((~logprobs.isfinite()).sum()) + sum(not completion.ids for completion in completions)
    outcome.found.append(Found("empty completions and log-probabilities that are no numbers", bad, goal=0, cost=False))
    outcome.details["notes"] = loaded.notes
    outcome.details["dtype"] = str(loaded.policy.model.get_base_model().dtype)
    wanted = context.backend == "transformers" or context.on_gpu
    outcome.found.append(Found("samples with vLLM", loaded.llm is not None, "", wanted, True, cost=False))
    base = base_parameters(loaded.policy.model.get_base_model())
    copy = _total(base.values())
    sizes = outcome.details["bytes"] = _sizes(loaded)
    sizes["one copy of the weights"] = copy
    if loaded.llm is not None:
        outcome.found += _shared(loaded, base, copy)
    if context.on_gpu:
        rest = sizes["allocated"] - sizes["keys and values"] - sizes["adapter"] - sizes["engine's adapter"]
        what = "allocated, without keys, values and adapters"
        outcome.found.append(Found(what, rest / copy, "copies", 1.1))


def parity(context: Context) -> None:
    """The probe that every run begins with, its numbers against what it allows."""
    loaded, outcome = context.engine(), context.outcome
    prompts = [request.prompt for request in loaded.requests(4, 1)]
    found = probe(loaded.policy, loaded.sampler, prompts, [1.0, 0.7])
    outcome.details |= {"parity": found.record(), "failure": found.failure(), "notes": loaded.notes}
    outcome.found += [
        Found("sampler against policy, mean, nats a token", found.mean, "", found.tolerance, cost=False),
        Found("the same at most", found.largest),
        Found(
            f"after a step that moves the policy by {found.moved:.2f}",
            found.mean_moved,
            "",
            found.tolerance_moved,
            cost=False,
        ),
        Found("failures of the probe", float(found.failure() is not None), goal=0, cost=False),
    ]


def handover(context: Context) -> None:
    """``load_adapter()`` as after an update: the adapter has moved, and the engine has just sampled."""
    loaded = context.engine()
    if loaded.llm is None:
        raise NotHere("what samples here runs the policy itself, so nothing is handed over")
    requests = loaded.requests(4, 4)
    times = list(push_times(loaded.policy, loaded.sampler, requests, _PUSHES[context.tiny]))[1:]
    context.outcome.found.append(measured("the adapter into the engine", times, "ms", goal=_GOAL_MS))
    layers = loaded.sampler.layers
    context.outcome.details |= {"layers": len(layers), "rank": loaded.config.lora_r, "notes": loaded.notes}


def sleep(context: Context) -> None:
    """Memory of the GPU that an update gets, and what is the same after waking."""
    loaded, outcome = context.engine(), context.outcome
    if loaded.llm is None:
        raise NotHere("what samples here holds nothing between runs")
    kind, room = loaded.sampler.engine.sleeps, _kv_bytes(loaded.llm)
    requests = loaded.requests(4, 16, temperature=0.0)
    before, fingerprint = _fresh(loaded, requests), base_fingerprint(loaded.policy)
    turns = [_nap(loaded, context.on_gpu) for _ in range(1 if context.tiny else 3)]
    after = _fresh(loaded, requests)
    exact = loaded.policy.model.get_base_model().dtype == torch.float32
    outcome.found += [
        Found(
            "greedy sampling, after waking against before",
            _apart(before, after),
            "nats",
            1e-4 if exact else 0.1,
            cost=False,
        ),
        Found("frozen weights changed", float(base_fingerprint(loaded.policy) != fingerprint), goal=0, cost=False),
    ]
    outcome.details |= {"sleeps": kind, "notes": loaded.notes, "kv_cache_gib": room / 2**30, "turns": turns}
    if kind == "no":
        raise NotHere(
            "this vLLM cannot give its keys and values back without its weights, which are the policy's too"
            if context.on_gpu
            else "an engine on a CPU does not sleep"
        )
    share = min(turn["freed"] for turn in turns) / max(1, room)
    outcome.found += [
        Found("memory given back, of that for keys and values", share, "x", 0.9, at_least=True),
        measured("to sleep", [1e3 * turn["sleep"] for turn in turns], "ms"),
        measured("to wake", [1e3 * turn["wake"] for turn in turns], "ms"),
    ]


def _fresh(loaded: Loaded, requests: list[Request]) -> list[Completion]:
    """Completions for which no keys and values are found that an earlier run has left."""
    loaded.sampler.load_adapter()
    return loaded.sampler.run(requests)


def _apart(before: list[Completion], after: list[Completion]) -> float:
    """Mean difference of log-probabilities up to where two completions part, which ties let them do."""
    gaps = []
    for one, other in zip(before, after, strict=True):
        for first, second, a, b in zip(one.ids, other.ids, one.logprobs, other.logprobs, strict=False):
            gaps.append(abs(a - b))
            if first != second:
                break
    return sum(gaps) / len(gaps)


def _nap(loaded: Loaded, on_gpu: bool) -> dict[str, float]:
    """Seconds of both, and bytes that the driver has more in between."""
    free = _free(on_gpu)
    started = _clock(on_gpu)
    loaded.sampler.sleep()
    asleep = _clock(on_gpu) - started
    gained = _free(on_gpu) - free
    started = _clock(on_gpu)
    loaded.sampler.wake()
    return {"sleep": asleep, "wake": _clock(on_gpu) - started, "freed": gained}


def _clock(on_gpu: bool) -> float:
    """Seconds, once the GPU has done what it was told."""
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def _free(on_gpu: bool) -> int:
    """Bytes that the driver could give: memory which torch only keeps for itself is counted as free too."""
    if not on_gpu:
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def _shared(loaded: Loaded, base: dict[str, nn.Parameter], copy: int) -> Iterator[Found]:
    """The policy's frozen weights are the engine's."""
    engine = list(_ranges(_runner(loaded.llm).model.parameters()))
    query = next(p for name, p in base.items() if name.endswith("q_proj.weight"))
    inside = [p for p in base.values() if _inside(p, engine)]
    both = dict([*engine, *_ranges(base.values())])  # one range for whatever begins in the same place
    yield Found("first q_proj inside the engine's fused weight", _inside(query, engine), "", 1, True, cost=False)
    yield Found("share of the base that is the engine's own", _total(inside) / copy, "", 0.99, True, cost=False)
    weights = sum(end - start for start, end in both.items())
    yield Found("weights of policy and engine together", weights / copy, "copies", 1.1, cost=False)


def _sizes(loaded: Loaded) -> dict[str, int]:
    """Bytes on the GPU after loading, and of that what is no weight."""
    llm = loaded.llm
    return {
        "allocated": loaded.allocated,
        "keys and values": 0 if llm is None else _kv_bytes(llm),
        "adapter": _total(p for _, p in loaded.policy.adapter_parameters()),
        "engine's adapter": 0 if llm is None else _slot_bytes(llm),
    }


def _kv_bytes(llm: Any) -> int:
    """What vLLM holds for keys and values."""
    return sum(end - start for start, end in set(_ranges(_flat(_runner(llm).kv_caches))))


def _slot_bytes(llm: Any) -> int:
    """vLLM's buffers for adapters."""
    modules = _runner(llm).lora_manager._adapter_manager.modules.values()
    stacked = [getattr(layer, name, ()) for layer in modules for name in ("lora_a_stacked", "lora_b_stacked")]
    return sum(end - start for start, end in set(_ranges(_flat(stacked))))


def _flat(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)


def _ranges(tensors: Iterable[Tensor]) -> Iterator[tuple[int, int]]:
    """First address and the one past the last, of the whole memory behind each tensor."""
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            yield storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _inside(tensor: Tensor, ranges: list[tuple[int, int]]) -> bool:
    return any(start <= tensor.data_ptr() < end for start, end in ranges)


def _total(tensors: Iterable[Tensor]) -> int:
    """Bytes; of tensors in the same place (a tied head) once."""
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())
