"""Whole steps of GRPO with LoRA and vLLM: ours against TRL's, each in a process of its own, step by step in turns.

The same random model, prompts, rollouts of equal length, adapter and learning rate; both update on all rollouts at
once. The reward is the share of digits, so that no group is without a signal (ours would leave that out of its update).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from measuring import paired, shown, spread
from rollout_common import Finding, Options, Sizes, random_model

from igrpo_lite.config.resolve import resolve
from igrpo_lite.policy.prompting import prompt_builder
from igrpo_lite.problems.synthetic import load
from igrpo_lite.training.schedule import batch_indices

PART = "training"
GOAL = 0.7
PROMPTS = 4
SIDES = ("ours", "trl", "trl-default")
_PLACES = ("model", "data", "reward", "prompts")
_REWARD = """def share_of_digits(completions, **columns):
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]
"""


class Side:
    """A trainer in its own process."""

    def __init__(self, name: str, settings: dict[str, Any], folder: Path) -> None:
        self.name = name
        path = folder / f"{name}.json"
        path.write_text(json.dumps(settings | {"folder": str(folder / name)}))
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        script = Path(__file__).with_name("rollout_trainers.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), name, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.start = self.read()

    def step(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        return self.read()

    def result(self, steps: list[dict[str, Any]]) -> dict[str, Any]:
        """Its steps and its memory: the GPU's, as allocated; on a CPU what is resident, that of processes of its own
        (ours computes users' rewards in one) included."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        others = sum(child.memory_info().rss for child in children) / 2**20
        used = steps[-1]["memory"]
        peak = used["device_peak"] if "device_peak" in used else used["peak"] + others
        return {"imported": self.start["imported"], "peak": peak, "of_children": others, "steps": steps}

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            raise SystemExit(f"{self.name} ended with {self.process.returncode}:\n{self.errors.read()[-4000:]}")
        return dict(json.loads(line))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(60)
        finally:
            self.process.kill()
            self.errors.close()


def measure(options: Options) -> dict[str, Any]:
    sizes = options.sizes
    model = random_model(options.folder, sizes.layers, sizes.hidden)
    found = compare(settings_for(model, options.folder, sizes), options.folder, SIDES)
    for baseline, named in (("trl", "TRL 1.16, engine in float32"), ("trl-default", "TRL 1.16, engine in bfloat16")):
        found["findings"] += _ratios(found["sides"], baseline, named)
    return found


def compare(settings: dict[str, Any], folder: Path, names: Sequence[str], turns: bool = True) -> dict[str, Any]:
    """The steps of all sides. Without ``turns`` each is done before the next begins, and a GPU is its own meanwhile."""
    found: dict[str, Any] = {
        "settings": {name: value for name, value in settings.items() if name not in _PLACES},
        "sides": {},
        "findings": [],
    }
    for together in [names] if turns else [(name,) for name in names]:
        found["sides"] |= _stepped(settings, folder, together)
    wanted = settings["rollouts"] * settings["tokens"]
    for name, side in found["sides"].items():
        tokens = [step["tokens"] for step in side["steps"]]
        made = [b - a for a, b in pairwise(tokens)]
        if made != [wanted] * len(made):
            raise RuntimeError(f"{name} sampled {made} tokens in its steps, not {wanted} in each")
    return found


def _stepped(settings: dict[str, Any], folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Results of sides that live at the same time and take turns."""
    steps: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    sides: list[Side] = []
    try:
        for name in names:
            sides.append(Side(name, settings, folder))
        for turn in range(settings["steps"]):
            for position in range(len(sides)):
                side = sides[(turn + position) % len(sides)]
                steps[side.name].append(side.step())
        return {side.name: side.result(steps[side.name]) for side in sides}
    finally:
        for side in sides:
            side.close()


def settings_for(model: str, folder: Path, sizes: Sizes, per_step: int = PROMPTS) -> dict[str, Any]:
    """What all sides are told, for a CPU; the prompts are those that our run will take, step by step."""
    seed = 0
    problems = load("two-step", "train", per_step * sizes.train_steps)
    data, reward = folder / "problems.jsonl", folder / "reward.py"
    data.write_text("".join(json.dumps({"question": p.question, "answer": p.answer}) + "\n" for p in problems))
    reward.write_text(_REWARD)
    taken = [
        problems[index]
        for step in range(sizes.train_steps)
        for index in batch_indices(len(problems), per_step, step, seed)
    ]
    builder = prompt_builder(resolve({"model": model}))
    prompts = [builder.first(problem.question) for problem in taken]
    return {
        "model": model,
        "data": str(data),
        "reward": str(reward),
        "seed": seed,
        "prompts": [prompt.text for prompt in prompts],
        "prompts_per_step": per_step,
        "group": sizes.train_group,
        "rollouts": per_step * sizes.train_group,
        "tokens": sizes.train_tokens,
        "steps": sizes.train_steps,
        "lora_r": 16,
        "learning_rate": 1e-4,
        "max_model_len": max(len(prompt.ids) for prompt in prompts) + sizes.train_tokens,
        "kv_cache_gib": 0.125,
        "device": "cpu",
        "dtype": "float32",
        "gradient_checkpointing": False,
        "rows": per_step * sizes.train_group,
        "update_tokens": 16384,
    }


def _ratios(sides: Mapping[str, Any], baseline: str, named: str) -> list[Finding]:
    """Of step times within turns, after the first; and of most memory."""
    seconds = {
        name: {clock: [step[clock] for step in sides[name]["steps"][1:]] for clock in ("wall", "cpu")}
        for name in ("ours", baseline)
    }
    ratio = {clock: paired(seconds["ours"][clock], seconds[baseline][clock]) for clock in ("wall", "cpu")}
    peak = {name: sides[name]["peak"] for name in ("ours", baseline)}
    goal = GOAL if baseline == "trl" else None
    return [
        Finding(PART, "time of a GRPO step: ours", named, ratio["wall"] | {"cpu": ratio["cpu"]["median"]}, goal),
        Finding(PART, "peak resident memory: ours", named, spread([peak["ours"] / peak[baseline]]), goal),
    ]


def report(found: Mapping[str, Any]) -> str:
    settings = found["settings"]
    lines = [
        f"\n{settings['prompts_per_step']} prompts x {settings['group']} completions of {settings['tokens']} tokens, "
        f"LoRA rank {settings['lora_r']}; seconds by the clock, median of steps after the first"
    ]
    for name, side in found["sides"].items():
        steps = side["steps"][1:]
        parts = sorted({part for step in steps for part in step["parts"]})
        inside = ", ".join(f"{p} {spread([step['parts'].get(p, 0.0) for step in steps])['median']:.2f}" for p in parts)
        lines.append(
            f"  {name:<12} {shown(spread([step['wall'] for step in steps]))} s ({inside}); CPU "
            f"{spread([step['cpu'] for step in steps])['median']:.2f} s; peak {side['peak']:.0f} MiB "
            f"({side['imported']:.0f} before the model)"
        )
    return "\n".join(lines)
