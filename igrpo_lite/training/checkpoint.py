"""Checkpoints: complete or absent, checked when read, and enough to go on as if nothing had happened.

A checkpoint is written to a temporary folder, flushed to disk, and renamed into place, so that a crash at any moment
leaves the previous ones untouched. A manifest of hashes tells a damaged one when it is read; the newest sound one
counts.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from igrpo_lite.errors import RunFolderError
from igrpo_lite.policy.loading import Policy

KEPT = 2
"""Checkpoints that a run keeps, the newest ones."""

_MANIFEST = "manifest.json"
_DISK = (OSError, RuntimeError, SafetensorError)
"""What a full disk raises: safetensors and torch.save wrap the error of the operating system each in their own."""


@dataclass(frozen=True, slots=True)
class Found:
    """A sound checkpoint, and what was wrong with newer ones that were passed over."""

    path: Path
    step: int
    damaged: tuple[str, ...]


class Checkpoints:
    """The ``checkpoints`` folder of a run.

    Args:
        folder: where they lie, one folder a step.
        keep: how many of the newest are kept.
    """

    def __init__(self, folder: Path, keep: int = KEPT) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, step: int, policy: Policy, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Path:
        """Write everything a resumed run needs; ``state`` must be JSON-able.

        Raises:
            RunFolderError: the disk is full or not writable. Older checkpoints are untouched.
        """
        final = self.folder / f"step-{step:06d}"
        temporary = self.folder / f".tmp-{final.name}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            save_file(_on_cpu(_adapter_state(policy)), temporary / "adapter.safetensors")
            torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
            torch.save(_random_state(), temporary / "random.pt")
            (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
            hashes = {file.name: _sha256(file) for file in sorted(temporary.iterdir())}
            (temporary / _MANIFEST).write_text(json.dumps({"step": step, "files": hashes}), encoding="utf-8")
            for file in temporary.iterdir():
                _flush(file)
            _put_in_place(temporary, final)
        except _DISK as error:
            shutil.rmtree(temporary, ignore_errors=True)
            kept = self.steps()
            last = f"the checkpoint of step {kept[-1]} is untouched" if kept else "there is no earlier checkpoint"
            raise RunFolderError(
                f"checkpoint of step {step} could not be written to {self.folder}: {error}; {last}. "
                "Make room and run the same command again"
            ) from error
        # What is newer was damaged, or this run would have started from it.
        older = [kept for kept in self.steps() if kept <= step]
        for old in {*self.steps()} - {*older[-self.keep :]}:
            shutil.rmtree(self.folder / f"step-{old:06d}", ignore_errors=True)
        return final

    def steps(self) -> list[int]:
        """Steps of the checkpoints present, ascending, sound or not."""
        names = (path.name for path in self.folder.glob("step-*"))
        return sorted(int(name[5:]) for name in names if name[5:].isdigit())

    def latest(self) -> Found | None:
        """The newest checkpoint whose files match its manifest.

        Raises:
            RunFolderError: there are checkpoints and none is sound.
        """
        for aside in self.folder.glob(".old-step-*"):
            take_back(self.folder / aside.name.removeprefix(".old-"))
        damaged: list[str] = []
        for step in reversed(self.steps()):
            path = self.folder / f"step-{step:06d}"
            reason = _damage(path)
            if reason is None:
                return Found(path, step, tuple(damaged))
            damaged.append(f"checkpoint {path.name} is damaged ({reason})")
        if damaged:
            raise RunFolderError([*damaged, f"no sound checkpoint in {self.folder}; start over with --fresh"])
        return None


def restore(path: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a sound checkpoint's adapter, optimizer and random states back; returns its ``state``."""
    set_peft_model_state_dict(policy.model, load_file(path / "adapter.safetensors", device=str(policy.device)))
    optimizer.load_state_dict(torch.load(path / "optimizer.pt", map_location=policy.device, weights_only=True))
    _set_random_state(torch.load(path / "random.pt", weights_only=True))
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def save_adapter(policy: Policy, folder: Path) -> None:
    """Write a PEFT-loadable adapter with its tokenizer; an existing one is replaced only by a complete one."""
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        policy.model.save_pretrained(temporary, save_embedding_layers=False)
        policy.tokenizer.save_pretrained(temporary)
        for file in temporary.iterdir():
            _flush(file)
        _put_in_place(temporary, folder)
    except _DISK as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunFolderError(
            f"adapter could not be written to {folder}: {error}; make room and run the same command again"
        ) from error


def _adapter_state(policy: Policy) -> dict[str, torch.Tensor]:
    # Left to itself, PEFT asks the hub at every save whether the vocabulary has grown.
    return get_peft_model_state_dict(policy.model, save_embedding_layers=False)


def _put_in_place(complete: Path, final: Path) -> None:
    """Give a complete folder its name; what had it is deleted last (:func:`take_back` mends half of this)."""
    aside = final.with_name(f".old-{final.name}")
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        final.rename(aside)
    complete.rename(final)
    _flush(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def take_back(final: Path) -> None:
    """Give a folder its name back if a crash came between setting it aside and naming its successor."""
    aside = final.with_name(f".old-{final.name}")
    if aside.exists() and not final.exists():
        aside.rename(final)


def _damage(path: Path) -> str | None:
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        for name, digest in manifest["files"].items():
            if _sha256(path / name) != digest:
                return f"{name} does not match its hash"
    except (OSError, ValueError, KeyError) as error:
        return str(error)
    return None


def _random_state() -> dict[str, Any]:
    numpy_state: Any = np.random.get_state()
    _, words, position, has_gauss, cached = numpy_state
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [words.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    words, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", np.array(words, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _on_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # folders cannot be opened there
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
