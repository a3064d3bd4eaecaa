"""Tokens per second: vLLM through our sampler, our own sampler, and transformers' ``generate()``, same weights.

vllm              our sampler on vLLM with the LoRA adapter, weights shared with the policy
vllm-own-weights  the same with a copy of the weights of its own, packed by vLLM (another engine, so other turns)
vllm-no-adapter   vLLM with the adapter off: what the adapter costs there
transformers      our sampler on transformers
generate          ``generate()`` on the PEFT model, as one would write it first
generate-merged   ``generate()`` on a copy with the adapter merged in
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from measuring import paired, shown, spread, take_turns
from peft import PeftModel
from rollout_common import Finding, Options, heavy_tail, make_policy, make_sampler, parameters, random_model
from sampler import Contender, Workload, generate, ours, problem_prompts
from transformers import AutoModelForCausalLM

from igrpo_lite.policy.loading import Policy
from igrpo_lite.sampling.base import Request, request_seed
from igrpo_lite.sampling.replica import Replica

PART = "speed"
GOALS = {"equal": 1.5, "uneven": 2.5}
PROMPTS = 4
EQUAL_ONLY = ("vllm-no-adapter", "generate-merged")  # they say the same again


def measure(options: Options) -> dict[str, Any]:
    sizes = options.sizes
    model = random_model(options.folder, sizes.layers, sizes.hidden)
    found: dict[str, Any] = {"findings": [], "lengths": {}, "turns": []}
    for shared in (True, False):  # an engine each
        policy, config = make_policy(model)
        policy.model.save_pretrained(options.folder / "adapter")
        sampler = make_sampler("vllm", policy, config, PROMPTS * sizes.group, share_base=shared)
        plain = PeftModel.from_pretrained(_base(model), options.folder / "adapter").eval()
        contenders = {"vllm" if shared else "vllm-own-weights": vllm(policy, sampler)}
        contenders["generate"] = generate(plain, policy.tokenizer, ())
        if shared:
            merged = PeftModel.from_pretrained(_base(model), options.folder / "adapter").merge_and_unload().eval()
            contenders["vllm-no-adapter"] = vllm(policy, sampler, adapted=False)
            contenders["transformers"] = ours(Replica(make_policy(model)[0].model), policy.tokenizer, ())
            contenders["generate-merged"] = generate(merged, policy.tokenizer, ())
        found["parameters"] = parameters(policy)
        for name, workload in workloads(problem_prompts(config, PROMPTS), sizes.group, sizes.tokens).items():
            found["lengths"][name] = workload.limits
            few = {k: c for k, c in contenders.items() if name == "equal" or k not in EQUAL_ONLY}
            _measure(name, workload, few, sizes.speed_turns, found)
        sampler.close()
    return found


def workloads(prompts: Sequence[Any], group: int, longest: int) -> dict[str, Workload]:
    """Equal lengths; and uneven ones, 8 + Exp(40) tokens, of which one at least is the longest."""
    count, law, rng = len(prompts) * group, heavy_tail(longest, mean=40.0), random.Random(0)
    uneven = [longest] + [law(rng) for _ in range(count - 1)]
    rng.shuffle(uneven)
    return {"equal": Workload(prompts, [longest] * count, False), "uneven": Workload(prompts, uneven, False)}


def vllm(policy: Policy, sampler: Any, adapted: bool = True) -> Contender:
    def sample(workload: Workload, seed: int) -> list[tuple[int, ...]]:
        prompts = [prompt for prompt in workload.prompts for _ in range(workload.group)]
        requests = [
            Request(prompt, request_seed(seed, index), limit, workload.temperature)
            for index, (prompt, limit) in enumerate(zip(prompts, workload.limits, strict=True))
        ]
        with nullcontext() if adapted else policy.model.disable_adapter():
            sampler.load_adapter()  # as after an update: no keys and values are left of the turn before
        return [completion.ids for completion in sampler.run(requests)]

    return sample


def _base(model: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def _measure(
    name: str, workload: Workload, contenders: Mapping[str, Contender], turns: int, found: dict[str, Any]
) -> None:
    warm = Workload(workload.prompts, [4] * len(workload.limits), False)
    for sample in contenders.values():
        sample(warm, 0)

    def once(contender: Contender) -> None:
        # Everyone samples each rollout to its own limit, except that generate() runs all of them to the longest.
        assert [len(ids) for ids in contender(workload, 1)] == list(workload.limits)

    seconds = take_turns({key: lambda c=c: once(c) for key, c in contenders.items()}, turns)
    tokens = sum(workload.limits)
    found["turns"].append({"lengths": name, "tokens": tokens, "longest": max(workload.limits), "seconds": seconds})

    def ratio(side: str, baseline: str, goal: float | None = None) -> None:
        clocks = {clock: paired(seconds[baseline][clock], seconds[side][clock]) for clock in ("wall", "cpu")}
        value = clocks["wall"] | {"cpu": clocks["cpu"]["median"]}
        found["findings"].append(Finding(PART, f"tokens/s, {name} lengths: {side}", baseline, value, goal, True))

    pairs = [("vllm", "generate"), ("vllm", "generate-merged"), ("vllm", "transformers"), ("vllm", "vllm-no-adapter")]
    pairs += [("vllm-no-adapter", "generate-merged"), ("transformers", "generate"), ("vllm-own-weights", "generate")]
    for side, baseline in pairs:
        if side in seconds and baseline in seconds:
            ratio(side, baseline, GOALS[name] if side.startswith("vllm") and baseline == "generate" else None)


def report(found: Mapping[str, Any]) -> str:
    lines = []
    for turns in found["turns"]:
        count = len(found["lengths"][turns["lengths"]])
        lines.append(
            f"\n{turns['lengths']} lengths: {count} rollouts of {turns['tokens'] / count:.0f} tokens on average, "
            f"{turns['longest']} at most; {found['parameters']:,} weights"
        )
        for name, seconds in turns["seconds"].items():
            wall, cpu = (spread([turns["tokens"] / s for s in seconds[clock]]) for clock in ("wall", "cpu"))
            lines.append(f"  {name:<17} {shown(wall, digits=0):>18} tok/s wall   {shown(cpu, digits=0):>18} tok/s CPU")
    return "\n".join(lines)
