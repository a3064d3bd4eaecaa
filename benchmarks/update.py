"""Time and memory of our policy update against TRL 1.16's on the same groups, and of each way to choose tokens.

Both sides run forward and backward, without the optimizer step, on one random model with the same LoRA adapter. TRL's
is the real ``GRPOTrainer._compute_loss`` on tensors that are ready; ours is the real ``PolicyUpdate.step`` from
rollouts on, so choosing tokens and building trees is in its time. Loss and gradients are compared before timing.

TRL's head scores completion positions only on CUDA, but every position, prompt and padding too, on a CPU. That would
flatter us, so TRL runs here as on CUDA in this respect, except in the lines that say "as it is on a CPU".
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import trl
from measuring import paired, provenance, shown, spread, take_turns, write_json
from memory import activation_memory
from torch import Tensor
from update_cases import CASES, HEAD_ROWS, HEADS, Case, Ratio, Side, make_rollout
from update_sides import QWEN, Contender, HeadAlone, Models, ModelShape, Ours, Trl, run_config

TOLERANCE = 1e-4  # of loss and gradients, relative; in bfloat16 differences are only printed
MIB = 2**20


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    result = provenance("update.py", arguments, options.threads) | {
        "device": torch.cuda.get_device_name() if options.device.type == "cuda" else "cpu",
        "settings": {
            "dtype": options.dtype,
            "repeats": options.repeats,
            "gradient_checkpointing": options.gradient_checkpointing,
            "lora_r": 16,
            "memory": "torch.cuda.max_memory_allocated" if options.device.type == "cuda" else "counted live storages",
        },
        "models": {},
        "cases": {},
    }
    result["versions"]["trl"] = trl.__version__
    for name, shape in model_shapes(options).items():
        result["models"][name] = {field: getattr(shape, field) for field in shape.__slots__}
        for case, found in measure_model(name, shape, options):
            result["cases"][case] = found
            print(report_case(case, found), flush=True)
    print(table(result["cases"]))
    write_json(options.json, result)
    return result


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [case.name for case in CASES] + [HEADS]
    parser.add_argument("--cases", nargs="+", choices=names, default=names, help="only these")
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu, or cuda with shapes at full size")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights; CUDA: bfloat16")
    parser.add_argument("--models", nargs="+", choices=QWEN, default=list(QWEN), help="shapes of random models on CUDA")
    parser.add_argument("--layers", type=int, default=8, help="of the model on a CPU")
    parser.add_argument("--hidden", type=int, default=512, help="its width, a multiple of 64")
    parser.add_argument("--vocab", type=int, nargs=2, default=[32_000, 151_936], help="its vocabularies")
    parser.add_argument("--scale", type=float, help="of all lengths; unset: on a CPU each case's own, on CUDA 1")
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, help="of both; CUDA: on")
    parser.add_argument("--repeats", type=int, default=3, help="turns that count")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run and agree?")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args(arguments)
    if options.quick:
        options.layers, options.hidden, options.vocab, options.scale, options.repeats = 3, 128, [257, 389], 1 / 32, 1
    cuda = options.device.type == "cuda"
    options.dtype = options.dtype or ("bfloat16" if cuda else "float32")
    if options.gradient_checkpointing is None:
        options.gradient_checkpointing = cuda
    return options


def model_shapes(options: argparse.Namespace) -> dict[str, ModelShape]:
    if options.device.type == "cuda":
        return {name: QWEN[name] for name in options.models}
    heads, width = options.hidden // 64, options.hidden
    sizes = (width, options.layers, heads, max(1, heads // 4), 11 * width // 4)
    return {f"vocabulary {vocab:,}": ModelShape(vocab, *sizes) for vocab in options.vocab}


def measure_model(name: str, shape: ModelShape, options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """All wanted cases of one model; on a CPU the second vocabulary has those that are marked ``large``."""
    cuda = options.device.type == "cuda"
    large = not cuda and shape.vocab == options.vocab[1]
    suffix = f" {name}" if cuda else ""
    with tempfile.TemporaryDirectory() as folder:
        models: dict[str, Models] = {}
        for case in CASES:
            if case.name not in options.cases or case.large != large:
                continue
            if cuda and any(side.every_position for side in case.sides.values()):
                continue
            for layers in {side.lora_layers for side in case.sides.values()} - models.keys():
                kind = getattr(torch, options.dtype)
                models[layers] = Models(
                    shape, options.device, kind, Path(folder), layers, options.gradient_checkpointing
                )
            yield case.name + suffix, measure_case(case, models, options)
    models.clear()
    if HEADS in options.cases:
        rows = HEAD_ROWS[options.device.type][large]
        yield f"{HEADS} {name}", measure_heads(shape, rows // 32 if options.quick else rows, options)
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()


def measure_case(case: Case, models: dict[str, Models], options: argparse.Namespace) -> dict[str, Any]:
    scale = options.scale or (1.0 if options.device.type == "cuda" else case.scale)
    prompt, response = round(case.prompt * scale), round(case.response * scale)
    shape = next(iter(models.values())).shape
    rollouts = [make_rollout(prompt, response, case.group, case.lengths, shape.vocab)]

    def make(side: Side) -> Ours | Trl:
        owner = models[side.lora_layers]
        settings: dict[str, Any] = {"tokens": side.tokens}
        if side.tokens == "s-grpo":  # the preset of the goal: alpha 100, P 0.5, k 200
            settings |= {"sgrpo_alpha": round(100 * scale), "sgrpo_p": 0.5, "sgrpo_k": round(200 * scale)}
        if side.micro_batch is not None:
            settings["update_tokens"] = side.micro_batch * (prompt + response)
        config = run_config(owner, **settings)
        if side.by == "ours":
            return Ours(owner, rollouts, config, side.rows)
        return Trl(owner, rollouts, config, side.micro_batch, side.every_position)

    contenders = {name: make(side) for name, side in case.sides.items()}
    objectives = {name: (side.tokens, side.lora_layers) for name, side in case.sides.items()}
    references = {}
    for name, objective in objectives.items():
        if case.sides[name].by == "trl":
            references[objective] = contenders[name]
    for objective in objectives.values():
        references.setdefault(objective, make(Side("trl", *objective)))

    lengths = [len(c.ids) for c in rollouts[0].stage1.completions]
    found = {"prompt": prompt, "lengths": lengths, "scale": scale, "layers": shape.layers, "vocab": shape.vocab}
    return found | compare(contenders, case.ratios, objectives, references, options)


def measure_heads(shape: ModelShape, rows: int, options: argparse.Namespace) -> dict[str, Any]:
    weight = torch.randn(shape.vocab, shape.hidden, generator=torch.Generator().manual_seed(0)) / shape.hidden**0.5
    weight = weight.to(options.device, getattr(torch, options.dtype))
    contenders = {kind: HeadAlone(kind, weight, rows) for kind in ("ours", "trl", "naive")}
    ratios = (
        Ratio("ours", "trl", "our chunked head vs TRL 1.16's on the same rows"),
        Ratio("ours", "naive", "our chunked head vs log_softmax of all logits"),
        Ratio("trl", "naive", "TRL 1.16's chunked head vs log_softmax of all logits"),
    )
    objectives = dict.fromkeys(contenders, ("head", "all"))
    found = {"rows": rows, "hidden": shape.hidden, "vocab": shape.vocab}
    return found | compare(contenders, ratios, objectives, {("head", "all"): contenders["naive"]}, options)


def compare(
    contenders: Mapping[str, Contender],
    ratios: Sequence[Ratio],
    objectives: Mapping[str, tuple[str, str]],
    references: Mapping[tuple[str, str], Contender],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Check against the reference of each objective, count memory in the same run, then let all take turns."""
    differences, memory = {}, {}

    def observe(contender: Contender) -> dict[str, int]:
        if options.device.type == "cuda":
            contender()  # compiles kernels
        contender.clear()
        return activation_memory(contender, options.device)

    for objective, reference in references.items():
        seen = {id(reference): observe(reference)}
        wanted = flat(reference.gradients())
        for name in (name for name in contenders if objectives[name] == objective):
            side = contenders[name]
            memory[name] = seen.get(id(side)) or observe(side)
            differences[name] = {
                "loss": abs(side.loss - reference.loss) / max(1.0, abs(reference.loss)),
                "gradients": float((flat(side.gradients()) - wanted).norm() / wanted.norm()),
            }
    worst = max(value for found in differences.values() for value in found.values())
    if options.dtype == "float32" and not worst <= TOLERANCE:
        raise SystemExit(f"the sides do not compute the same: {differences}")
    finish = torch.cuda.synchronize if options.device.type == "cuda" else (lambda: None)
    seconds = take_turns(contenders, options.repeats, finish)
    return {
        "sides": {
            name: {
                "backbone_tokens": side.tokens,
                "head_rows": side.head_rows,
                "seconds": seconds[name],
                "memory": memory[name],
                "difference": differences[name],
            }
            for name, side in contenders.items()
        },
        "ratios": [
            {
                "side": ratio.side,
                "baseline": ratio.baseline,
                "what": ratio.what,
                "time": {c: paired(seconds[ratio.side][c], seconds[ratio.baseline][c]) for c in ("wall", "cpu")},
                "memory": {m: memory[ratio.side][m] / max(1, memory[ratio.baseline][m]) for m in ("peak", "kept")},
                "goals": {"time": ratio.time, "peak": ratio.peak},
            }
            for ratio in ratios
        ],
    }


def flat(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten().float() for gradient in gradients])


def report_case(name: str, found: dict[str, Any]) -> str:
    shape = f"{found['rows']} rows" if "rows" in found else f"prompt {found['prompt']}, completions {found['lengths']}"
    lines = [f"\n{name}: {shape}, vocabulary {found['vocab']:,}"]
    for side, numbers in found["sides"].items():
        seconds = shown(spread(numbers["seconds"]["wall"]))
        memory, difference = numbers["memory"], numbers["difference"]
        lines.append(
            f"  {side:<12} {numbers['backbone_tokens']:>7,} tokens {numbers['head_rows']:>7,} head rows "
            f"{seconds:>18} s   peak {memory['peak'] / MIB:>7.0f} MiB, kept {memory['kept'] / MIB:>7.0f} MiB   "
            f"off by: loss {difference['loss']:.0e}, gradients {difference['gradients']:.0e}"
        )
    return "\n".join(lines)


def table(cases: dict[str, Any]) -> str:
    """All ratios, with the tokens and rows of both sides; behind time and peak memory stands the goal, ! if missed.

    Times by the clock, median (lowest-highest) of paired turns, then by processor time. Kept: for the backward pass.
    """
    heading = ("case", "tokens", "head rows", "time", "goal", "CPU", "peak", "goal", "kept", "what against what")
    lines = [_line(heading)]
    for name, found in cases.items():
        for ratio in found["ratios"]:
            sides = [found["sides"][ratio[which]] for which in ("side", "baseline")]
            counts = [" / ".join(f"{side[of]:,}" for side in sides) for of in ("backbone_tokens", "head_rows")]
            time, memory, goals = ratio["time"], ratio["memory"], ratio["goals"]
            lines.append(
                _line(
                    (
                        name,
                        *counts,
                        shown(time["wall"], digits=3),
                        _goal(time["wall"]["median"], goals["time"]),
                        f"{time['cpu']['median']:.3f}",
                        f"{memory['peak']:.2f}",
                        _goal(memory["peak"], goals["peak"]),
                        f"{memory['kept']:.2f}" if sides[0]["backbone_tokens"] else "",
                        ratio["what"],
                    )
                )
            )
    return "\n" + "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    widths = (24, 13, 13, 19, 6, 6, 5, 6, 5)
    first, *middle = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=False))
    return "  ".join((first.strip().ljust(widths[0]), *middle, cells[-1]))


def _goal(value: float, goal: float | None) -> str:
    return "" if goal is None else f"{goal:.2f}{' ' if value <= goal else '!'}"


if __name__ == "__main__":
    main()
