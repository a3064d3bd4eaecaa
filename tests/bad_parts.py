"""Small runs that go wrong: settings, rows and a look at what is left in the run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

SMALL: dict[str, Any] = {
    "num_generations": 4,
    "max_completion_length": 24,
    "prompts_per_step": 2,
    "max_problems": 40,
    "eval_size": 4,
    "max_steps": 1,
    "eval_steps": 100,
    "save_steps": 2,
    "patience_dead": 0,
}
ROWS = [{"question": f"What is {i} + {i + 1}?", "answer": str(2 * i + 1)} for i in range(30)]


def write_rows(path: Path, rows: list[dict[str, Any]] = ROWS) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path.name


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def steps(folder: Path) -> list[int]:
    return [record["step"] for record in records(folder, "metrics.jsonl") if record["kind"] == "step"]


def assert_same(a: Path, b: Path) -> None:
    """Bit-equal adapters and samples."""
    left, right = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (a, b))
    assert all(left[key].equal(right[key]) for key in left)
    assert (a / "samples.jsonl").read_bytes() == (b / "samples.jsonl").read_bytes()
    assert steps(a) == steps(b)
