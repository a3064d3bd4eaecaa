"""A real short run whose adapter is far from zero, for tests of exports."""

from __future__ import annotations

import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_parts import small_config

from igrpo_lite.export.source import Kind, Options, Source, read_source
from igrpo_lite.training import train

_FOLDER = tempfile.TemporaryDirectory()
QUESTIONS = 5


@cache
def short_run() -> Path:
    """A run of two steps; its last adapter was then moved, so that it answers some questions in another way."""
    run = Path(_FOLDER.name) / "my run"
    train(small_config(output_dir=str(run), max_steps=2, eval_steps=1, save_steps=1, learning_rate=2e-3))
    move_adapter(run / "adapter", 0.1)
    return run


def move_adapter(folder: Path, std: float) -> None:
    """Add noise to an adapter's matrices B."""
    path = folder / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(3)
    tensors = load_file(path)
    for name in sorted(tensors):
        if "lora_B" in name:
            tensors[name] = tensors[name] + torch.randn(tensors[name].shape, generator=generator) * std
    save_file(tensors, path, metadata={"format": "pt"})


def copied_run(folder: Path, **settings: Any) -> Path:
    """The same run in another folder, as if it had been made with other settings."""
    run = folder / "copy"
    shutil.copytree(short_run(), run)
    written = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) | settings
    (run / "config.yaml").write_text(yaml.safe_dump(written), encoding="utf-8")
    return run


def source(run: Path | None = None) -> Source:
    """The moved adapter of a run."""
    return read_source(run or short_run(), "last")


def options(to: Kind, output: Path, **changes: Any) -> Options:
    """Options with a few questions."""
    return Options(to, output, **({"problems": QUESTIONS} | changes))
