"""The adapter on its way into the engine: what a push costs, and what many of them leave of the frozen weights.

Beside it what TRL's vLLM sync does around its copy of all weights: PEFT's ``merge_adapter()`` and ``unmerge_adapter()``
in place.
"""

from __future__ import annotations

import gc
import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from measuring import spread
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from rollout_common import Finding, Options, make_policy, make_sampler, parameters, random_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from igrpo_lite.policy.fingerprint import base_fingerprint
from igrpo_lite.policy.loading import Policy, linear_names
from igrpo_lite.sampling.base import Request, Sampler, request_seed
from igrpo_lite.sampling.replica import Replica
from igrpo_lite.types import Prompt

PUSH, DRIFT = "push", "drift"
PUSH_GOALS = {"tiny": 1.0, "24m": 5.0}  # milliseconds
_STEP = 2e-4  # of an entry of the adapter in one update, standard deviation


def measure_push(options: Options) -> dict[str, Any]:
    """``load_adapter()`` as it is called after an update: the adapter has moved, and the engine has just sampled."""
    found: dict[str, Any] = {"findings": [], "models": {}}
    for name, model in _models(options).items():
        policy, config = make_policy(model)
        merged, _ = make_policy(model)
        sampler, replica = make_sampler("vllm", policy, config, 8), Replica(merged.model)
        requests = [Request(Prompt("", tuple(range(5, 60))), request_seed(i), 4) for i in range(8)]
        generator = torch.Generator().manual_seed(0)
        milliseconds: dict[str, list[float]] = {"push": [], "merge_unmerge": [], "transformers": []}
        for push in push_times(policy, sampler, requests, options.sizes.pushes):
            milliseconds["push"].append(push)
            move(merged, generator)
            milliseconds["merge_unmerge"].append(timed(partial(sync_as_trl, merged.model)))
            milliseconds["transformers"].append(timed(replica.refresh))
        sampler.close()
        found["models"][name] = {"parameters": parameters(policy), "notes": sampler.notes, "milliseconds": milliseconds}
        merge = spread(milliseconds["merge_unmerge"])["median"]
        against = f"TRL's merge_adapter + unmerge_adapter alone: {merge:.2f} ms"
        push = spread(milliseconds["push"])
        found["findings"].append(Finding(PUSH, f"load_adapter, {name}", against, push, PUSH_GOALS.get(name), unit="ms"))
    return found


def measure_drift(options: Options) -> dict[str, Any]:
    """How far the frozen weights are from where they were, relative, after many updates with a sync each."""
    found: dict[str, Any] = {"findings": [], "sides": {}, "skipped": []}
    sizes = options.sizes

    def add(name: str, what: str, syncs: int, drift: dict[str, Any], goal: float | None = None) -> None:
        found["sides"][name] = {"syncs": syncs} | drift
        value = dict.fromkeys(("median", "min", "max"), drift["relative"])
        moved = f"before {syncs} updates and syncs (what the adapter adds: {drift['adapter']:.1e})"
        found["findings"].append(
            Finding(DRIFT, f"relative drift of the frozen weights: {what}", moved, value, goal, unit="")
        )

    for dtype in (torch.float32, torch.bfloat16):
        short = str(dtype).removeprefix("torch.")
        model = random_model(options.folder, sizes.layers, sizes.hidden, dtype)
        add(f"ours, {short}", f"ours, {short}", sizes.syncs, _our_drift(model, short, sizes.syncs), 0.0)
        theirs = make_policy(model, short, std=0.0)[0].model
        add(f"trl, {short}", f"TRL's merge and unmerge, {short}", sizes.syncs, _their_drift(theirs, sizes.syncs))
    if importlib.util.find_spec("bitsandbytes") is None:
        found["skipped"].append("NF4: needs bitsandbytes, which is not installed")
    else:
        add("trl, nf4", "TRL's merge and unmerge, NF4, one layer", sizes.syncs_nf4, _nf4_drift(options))
    gc.collect()
    return found


def push_times(policy: Policy, sampler: Sampler, requests: Sequence[Request], pushes: int) -> Iterator[float]:
    """Milliseconds of ``load_adapter()`` after each of so many moves of the adapter; between them the sampler works."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(pushes):
        sampler.run(requests)
        move(policy, generator)
        yield timed(sampler.load_adapter)


def _models(options: Options) -> dict[str, str]:
    name = "24m" if options.sizes.hidden == 512 else "small"
    return {"tiny": "tiny", name: random_model(options.folder, options.sizes.layers, options.sizes.hidden)}


def timed(call: Callable[[], object]) -> float:
    _finish()
    started = time.perf_counter()
    call()
    _finish()
    return 1e3 * (time.perf_counter() - started)


def _finish() -> None:
    """Wait for what was left running on a GPU."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def sync_as_trl(model: Any) -> None:
    """What ``VLLMGeneration.sync_weights`` of TRL 1.16 does to the model that learns."""
    model.merge_adapter()
    model.unmerge_adapter()


@torch.no_grad()
def move(policy: Policy, generator: torch.Generator) -> None:
    """One small random step of the adapter, as an update makes it."""
    _moved([p for _, p in policy.adapter_parameters()], generator)


@torch.no_grad()
def _moved(tensors: list[Any], generator: torch.Generator) -> None:
    for p in tensors:
        p.add_(torch.randn(p.shape, generator=generator).to(p), alpha=_STEP)


def _our_drift(model: str, dtype: str, syncs: int) -> dict[str, Any]:
    """Of a policy whose weights are the engine's own."""
    policy, config = make_policy(model, dtype, std=0.0)
    before = base_fingerprint(policy), [weight.clone() for weight in _weights(policy.model)]
    sampler = make_sampler("vllm", policy, config, 8)
    generator = torch.Generator().manual_seed(0)
    for step in range(syncs):
        move(policy, generator)
        sampler.load_adapter()
        if step % 20 == 0:
            sampler.run([Request(Prompt("", tuple(range(5, 40))), request_seed(step), 4)])
    drift = _drift(before[1], policy.model)
    drift["same_fingerprint"] = base_fingerprint(policy) == before[0]
    drift["one_copy"] = not sampler.notes
    sampler.close()
    if not drift["same_fingerprint"]:
        drift["relative"] = max(drift["relative"], float("nan"))  # something else has changed
    return drift


def _their_drift(model: PeftModel, syncs: int) -> dict[str, Any]:
    adapter = [p for p in model.parameters() if p.requires_grad]
    before = [weight.clone() for weight in _weights(model)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(syncs):
        _moved(adapter, generator)
        sync_as_trl(model)
    return _drift(before, model)


def _nf4_drift(options: Options) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    path = random_model(options.folder, 1, options.sizes.hidden, torch.bfloat16)
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(path, quantization_config=quantised, device_map="cpu")
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=16, target_modules=linear_names(base)))
    return _their_drift(model, options.sizes.syncs_nf4)


@torch.no_grad()
def _weights(model: PeftModel) -> Iterator[Tensor]:
    """Of the adapted layers, in float32."""
    for layer in _layers(model):
        weight = layer.get_base_layer().weight
        if getattr(weight, "quant_state", None) is not None:
            from bitsandbytes.functional import dequantize_4bit

            yield dequantize_4bit(weight.data, weight.quant_state).float()
        else:
            yield weight.float()


def _layers(model: PeftModel) -> list[LoraLayer]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


@torch.no_grad()
def _drift(before: list[Tensor], model: PeftModel) -> dict[str, Any]:
    """Norm of what changed, and of what the adapter adds, over the norm of the weights."""
    changed = sum(float((old - new).square().sum()) for old, new in zip(before, _weights(model), strict=True))
    whole = sum(float(old.square().sum()) for old in before)
    added = sum(
        float((layer.lora_B[name].weight @ layer.lora_A[name].weight * layer.scaling[name]).square().sum())
        for layer in _layers(model)
        for name in layer.lora_A
    )
    return {"relative": (changed / whole) ** 0.5, "adapter": (added / whole) ** 0.5}


def report_push(found: Mapping[str, Any]) -> str:
    lines = []
    for name, model in found["models"].items():
        lines.append(f"\n{name}, {model['parameters']:,} weights: milliseconds, median (lowest-highest)")
        for what, values in model["milliseconds"].items():
            numbers = spread(values)
            lines.append(f"  {what:<14} {numbers['median']:7.2f} ({numbers['min']:.2f}-{numbers['max']:.2f})")
        lines += [f"  {note}" for note in model["notes"]]
    return "\n".join(lines)


def report_drift(found: Mapping[str, Any]) -> str:
    lines = ["\nrelative drift of the frozen weights"]
    for name, side in found["sides"].items():
        same = {True: ", same fingerprint", False: ", ANOTHER FINGERPRINT", None: ""}[side.get("same_fingerprint")]
        lines.append(
            f"  {name:<15} {side['relative']:.1e} after {side['syncs']} syncs (adapter {side['adapter']:.1e}){same}"
        )
    return "\n".join(lines + [f"  skipped {why}" for why in found["skipped"]])
