"""Our sampler against transformers' ``generate()`` on the rollouts of one step, in tokens per second.

Everything samples at temperature 1 from the same weights: a base model with a LoRA adapter that is not zero. Four ways:

ours              what training uses on this model (a merged copy for small models)
ours-unmerged     our sampler on the PEFT model itself, as on a large model
generate          ``generate()`` on the PEFT model, as one would write it first
generate-merged   ``generate()`` on a copy with the adapter merged in

They take turns, and ratios are taken within a turn, so that a machine that is busy at times hurts all alike. Only
useful tokens count: up to and with the end token, or up to a request's own limit.
"""

from __future__ import annotations

import argparse
import gc
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import provenance, shown, spread, write_json
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from igrpo_lite.config import RunConfig
from igrpo_lite.config.resolve import resolve
from igrpo_lite.policy.loading import load_policy, load_tokenizer, model_path
from igrpo_lite.policy.prompting import prompt_builder
from igrpo_lite.problems.synthetic import load
from igrpo_lite.sampling.base import Request, request_seed
from igrpo_lite.sampling.replica import Replica
from igrpo_lite.sampling.transformers import TransformersSampler
from igrpo_lite.types import Prompt

RATIOS = (("ours", "generate"), ("ours", "generate-merged"), ("ours-unmerged", "generate"))
SHORTEST, LONGEST = 4, 256


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts, one token limit a rollout (prompt by prompt), and whether end tokens end a rollout."""

    prompts: Sequence[Prompt]
    limits: Sequence[int]
    stops: bool = True
    temperature: float = 1.0

    @property
    def group(self) -> int:
        return len(self.limits) // len(self.prompts)


Contender = Callable[[Workload, int], list[tuple[int, ...]]]
"""Samples a workload with a seed and returns each rollout's useful tokens."""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        config = resolve({"model": model_folder(options, Path(scratch))})
        contenders, model = build(config, Path(scratch) / "adapter")
        torch.set_num_threads(options.threads)
        prompts = problem_prompts(config, options.prompts)
        print(f"{model['parameters']:,} weights, {len(prompts)} prompts x {options.group}, {options.threads} thread(s)")
        workloads = {
            "own lengths": Workload(prompts, [options.max_tokens] * (len(prompts) * options.group)),
            "uneven lengths": Workload(prompts, heavy_tail(len(prompts) * options.group, options.longest), False),
        }
        result = provenance("sampler.py", arguments, options.threads) | {
            "model": model,
            "same_greedy_outputs": same_greedy(contenders, prompts, options.max_tokens),
            "settings": {
                name: getattr(options, name)
                for name in ("prompts", "group", "max_tokens", "longest", "warmup", "repeats")
            },
            "workloads": {},
        }
        print(f"greedy outputs equal to generate-merged: {result['same_greedy_outputs']}")
        for name, workload in workloads.items():
            found = measure(contenders, workload, options.warmup, options.repeats)
            result["workloads"][name] = found
            print(report(name, found))
    write_json(options.json, result)
    return result


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=8, help="problems")
    parser.add_argument("--group", type=int, default=16, help="rollouts per problem")
    parser.add_argument("--max-tokens", type=int, default=48, help="token limit of the model's own lengths")
    parser.add_argument("--longest", type=int, default=LONGEST, help="longest of the uneven lengths")
    parser.add_argument("--hidden", type=int, help="measure a random model of this width instead of the bundled one")
    parser.add_argument("--layers", type=int, default=8, help="layers of the random model")
    parser.add_argument("--warmup", type=int, default=1, help="turns that do not count")
    parser.add_argument("--repeats", type=int, default=7, help="turns that count")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the result here")
    return parser.parse_args(arguments)


def model_folder(options: argparse.Namespace, scratch: Path) -> str:
    """The bundled model, or a random one of the wanted size that reads the same prompts."""
    if options.hidden is None:
        return "tiny"
    tokenizer = load_tokenizer(RunConfig())
    heads = max(2, options.hidden // 64)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = scratch / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def build(config: RunConfig, adapter: Path) -> tuple[dict[str, Contender], dict[str, Any]]:
    """All ways to sample from one set of weights, and a description of these."""
    policy = load_policy(config, seed=0)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in policy.adapter_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    policy.model.save_pretrained(adapter)
    base = policy.model.get_base_model()

    def theirs() -> PeftModel:
        # Loaded anew, with the attention that transformers chooses by itself.
        plain = AutoModelForCausalLM.from_pretrained(model_path(config.model), dtype=torch.float32)
        return PeftModel.from_pretrained(plain, adapter).eval()

    replica = Replica(policy.model)
    tokenizer, ends = policy.tokenizer, policy.stop_ids
    contenders = {
        "ours": ours(replica, tokenizer, ends),
        "ours-unmerged": ours(Replica(policy.model, "shared"), tokenizer, ends),
        "generate": generate(theirs(), tokenizer, ends),
        "generate-merged": generate(theirs().merge_and_unload(), tokenizer, ends),
    }
    described = {
        "name": "tiny" if config.model == "tiny" else "random",
        "parameters": sum(p.numel() for name, p in base.named_parameters() if "lora_" not in name),
        "hidden": base.config.hidden_size,
        "layers": base.config.num_hidden_layers,
        "dtype": "float32",
        "lora_r": config.lora_r,
        "ours": replica.kind,
    }
    return contenders, described


def ours(replica: Replica, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> Contender:
    def sample(workload: Workload, seed: int) -> list[tuple[int, ...]]:
        prompts = [prompt for prompt in workload.prompts for _ in range(workload.group)]
        requests = [
            Request(prompt, request_seed(seed, index), limit, workload.temperature)
            for index, (prompt, limit) in enumerate(zip(prompts, workload.limits, strict=True))
        ]
        sampler = TransformersSampler(replica, tokenizer, ends if workload.stops else [-1], len(requests))
        return [completion.ids for completion in sampler.run(requests)]

    return sample


def generate(model: Any, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> Contender:
    def sample(workload: Workload, seed: int) -> list[tuple[int, ...]]:
        torch.manual_seed(seed)
        padded = tokenizer.pad(
            {"input_ids": [list(prompt.ids) for prompt in workload.prompts]}, padding_side="left", return_tensors="pt"
        )
        pure = {"do_sample": True, "temperature": workload.temperature, "top_k": 0, "top_p": 1.0}
        settings = GenerationConfig(
            **(pure if workload.temperature else {"do_sample": False}),
            max_new_tokens=max(workload.limits),
            num_return_sequences=workload.group,
            eos_token_id=list(ends) if workload.stops else None,
            pad_token_id=tokenizer.pad_token_id,
        )
        model.generation_config = settings  # generate() would fill gaps in ours from the model's own, end tokens too
        with torch.no_grad():
            sampled = model.generate(**padded, generation_config=settings)[:, padded["input_ids"].shape[1] :]
        useful = []
        for row, limit in zip(sampled.tolist(), workload.limits, strict=True):
            length = min(len(row), limit)
            if workload.stops:
                length = next((at + 1 for at, token in enumerate(row[:length]) if token in ends), length)
            useful.append(tuple(row[:length]))
            tokenizer.decode(row[:length], skip_special_tokens=True)  # ours gives texts too
        return useful

    return sample


def problem_prompts(config: RunConfig, count: int) -> list[Prompt]:
    prompts = prompt_builder(config)
    return [prompts.first(problem.question) for problem in load("two-step", "validation", count)]


def heavy_tail(count: int, longest: int) -> list[int]:
    """Lengths as of a model that sometimes rambles: log-normal around 24 tokens, between 4 and ``longest``."""
    drawn = random.Random(0)
    lengths = (round(math.exp(drawn.gauss(math.log(24), 1.1))) for _ in range(count))
    return [min(max(length, SHORTEST), longest) for length in lengths]


def same_greedy(contenders: dict[str, Contender], prompts: Sequence[Prompt], limit: int) -> dict[str, str]:
    """How many greedy outputs equal those of ``generate-merged``: the weights are the same, rounding may differ."""
    workload = Workload(prompts, [limit] * len(prompts), temperature=0.0)
    outputs = {name: sample(workload, 0) for name, sample in contenders.items()}
    wanted = outputs.pop("generate-merged")
    return {
        name: f"{sum(a == b for a, b in zip(found, wanted, strict=True))} of {len(prompts)}"
        for name, found in outputs.items()
    }


def measure(contenders: dict[str, Contender], workload: Workload, warmup: int, repeats: int) -> dict[str, Any]:
    """Let all contenders take turns; the order rotates."""
    names = list(contenders)
    seconds: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in names}
    tokens: dict[str, list[int]] = {name: [] for name in names}
    for turn in range(-warmup, repeats):
        for position in range(len(names)):
            name = names[(turn + position) % len(names)]
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            useful = sum(map(len, contenders[name](workload, turn + warmup)))
            took = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
            if turn >= 0:
                tokens[name].append(useful)
                for clock, value in took.items():
                    seconds[name][clock].append(value)
    rates = {
        name: {clock: [n / s for n, s in zip(tokens[name], seconds[name][clock], strict=True)] for clock in took}
        for name in names
    }
    return {
        "rollouts": len(workload.limits),
        "prompt_tokens": sum(len(prompt.ids) for prompt in workload.prompts),
        "longest": max(workload.limits),
        "contenders": {
            name: {
                "useful_tokens": tokens[name],
                "seconds": seconds[name],
                "tokens_per_second": {clock: spread(values) for clock, values in rates[name].items()},
            }
            for name in names
        },
        "ratios": {
            f"{a} / {b}": {
                clock: spread([x / y for x, y in zip(rates[a][clock], rates[b][clock], strict=True)]) for clock in took
            }
            for a, b in RATIOS
        },
    }


def report(name: str, found: dict[str, Any]) -> str:
    rollouts = found["rollouts"]
    lines = [f"\n{name}: {rollouts} rollouts, at most {found['longest']} tokens"]
    for contender, numbers in found["contenders"].items():
        mean = sum(numbers["useful_tokens"]) / len(numbers["useful_tokens"]) / rollouts
        wall, cpu = (shown(numbers["tokens_per_second"][clock], digits=0) for clock in ("wall", "cpu"))
        lines.append(f"  {contender:<16} {mean:6.1f} tokens each   {wall:>20} tok/s wall   {cpu:>20} tok/s CPU")
    for pair, clocks in found["ratios"].items():
        lines.append(f"  {pair:<32} {shown(clocks['wall'], 'x'):>22} wall   {shown(clocks['cpu'], 'x'):>22} CPU")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
