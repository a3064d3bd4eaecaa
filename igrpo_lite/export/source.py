"""What is exported: a run's adapter, with the settings it was trained with; and what is asked of the export."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from igrpo_lite.config import RunConfig
from igrpo_lite.config.resolve import examine, load_file
from igrpo_lite.config.retired import without_retired
from igrpo_lite.errors import ConfigError, RunFolderError
from igrpo_lite.inputs import model_findings

Kind = Literal["adapter", "merged-16bit", "gguf"]
Onto = Literal["original", "dequantized"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]

_PLAIN_LORA: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "bias": (None, "none"),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
}
"""Fields of ``adapter_config.json`` with the values of an adapter that is a sum of low-rank products and nothing else:
what :mod:`igrpo_lite.export.merging` can merge and vLLM can serve."""


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked for.

    Attributes:
        output: folder to make; it must not exist, or be empty.
        quantization: type of a GGUF file's weights, as llama.cpp names it.
        onto: 4-bit runs: merge onto the original 16-bit weights, or onto what the adapter was trained against.
        base: 16-bit model to merge onto; unset: the run's own, or the original of a known 4-bit copy.
        dtype: of merged weights; ``auto``: the base's 16-bit type.
        device: where models are run; unset: as in the run.
        problems: held-out questions that the export is verified on; 0: none.
    """

    to: Kind
    output: Path
    quantization: str = "q8_0"
    onto: Onto = "original"
    base: str | None = None
    dtype: Dtype = "auto"
    device: str | None = None
    problems: int = 8

    def findings(self) -> list[str]:
        """What is wrong with these options alone."""
        found = []
        if self.problems < 0:
            found.append(f"--problems: must be 0 or more, not {self.problems}")
        if self.to == "gguf" and bits(self.quantization) is None:
            found.append(f"--quantization: {self.quantization!r} is no type of llama.cpp's; take q8_0, q4_k_m or f16")
        if self.output.is_file():
            found.append(f"--output: {self.output} is a file; name a folder")
        elif self.output.is_dir() and any(self.output.iterdir()):
            found.append(f"--output: {self.output} is not empty; name another folder, or delete it first")
        if self.to == "adapter" and (self.onto != "original" or self.base is not None or self.dtype != "auto"):
            found.append("--onto, --base and --dtype are for merged weights; an adapter is exported as it is")
        if self.base is not None and self.onto == "dequantized":
            found.append("--base and --onto dequantized name two different weights to merge onto; give one of them")
        return found


def default_output(run: Path, to: Kind, quantization: str) -> Path:
    """Where an export goes that has no other place: ``export/<kind>`` in the run folder."""
    return run / "export" / (f"gguf-{quantization.lower()}" if to == "gguf" else to)


def bits(quantization: str) -> int | None:
    """Bits per weight that the name of a GGUF type says; ``None`` for what is no such name."""
    match = re.fullmatch(r"(?:b?f(16|32)|(?:i?q|tq)([1-68])_[0-9a-z_]+)", quantization.lower())
    return None if match is None else int(match[1] or match[2])


@dataclass(frozen=True, slots=True)
class Source:
    """A run's adapter and what is known about it.

    Attributes:
        adapter: its folder.
        which: ``best``, ``last``, or the path that was given.
        lora: its ``adapter_config.json``.
        summary: the run's ``summary.json``; empty where the run was not finished.
        questions: held-out questions of the run's last evaluation.
        dtype: type that the run held or computed its frozen weights in; ``auto`` where it did not record it.
    """

    run: Path
    config: RunConfig
    adapter: Path
    which: str
    lora: Mapping[str, Any]
    summary: Mapping[str, Any]
    questions: tuple[str, ...]
    dtype: str

    @property
    def name(self) -> str:
        """Name to serve the model under."""
        return re.sub(r"[^\w.-]+", "-", self.run.resolve().name).strip("-.") or "model"

    @property
    def rank(self) -> int:
        return max(self.lora["r"], *(self.lora.get("rank_pattern") or {0: 0}).values())

    @property
    def evaluation(self) -> Mapping[str, Any] | None:
        """The run's held-out evaluation of this adapter; ``None`` for one that was not evaluated."""
        return self.summary.get({"best": "best", "last": "after"}.get(self.which, ""))


def read_source(run: Path, adapter: str | None) -> Source:
    """The run in a folder, and its adapter.

    Args:
        adapter: ``best``, ``last`` or a folder; unset: the best, where the run kept one, else the last.

    Raises:
        RunFolderError: no run, settings that cannot be read, no such adapter, or not a plain LoRA adapter.
    """
    if not (run / "config.yaml").is_file():
        raise RunFolderError(f"{run} is not a run folder (no config.yaml); give the --output-dir of a training run")
    folder, which, found = _adapter(run, adapter)
    lora = _json(folder / "adapter_config.json")
    if not found:
        odd = [name for name, plain in _PLAIN_LORA.items() if lora.get(name) not in plain]
        found += [f"{folder} is not a plain LoRA adapter ({', '.join(odd)}); it cannot be exported"] if odd else []
    settings: dict[str, Any] = {}
    unread: list[str] = []
    try:
        settings = without_retired(load_file(run / "config.yaml"))
    except ConfigError as error:
        unread = error.problems
    config, wrong = examine(settings)
    found += [f"{run}/config.yaml: {problem}" for problem in (*unread, *wrong)] + model_findings(config)
    if found:
        raise RunFolderError(found)
    dtype = _trained_in(run) if config.dtype == "auto" else config.dtype
    config = config.model_copy(update={"backend": "transformers"})  # whatever trained it
    return Source(run, config, folder, which, lora, _json(run / "summary.json"), _questions(run), dtype)


def _adapter(run: Path, adapter: str | None) -> tuple[Path, str, list[str]]:
    places = {"best": run / "best", "last": run / "adapter"}
    if adapter is None:
        adapter = next((name for name, place in places.items() if place.is_dir()), "last")
    folder = places.get(adapter, Path(adapter))
    files = ("adapter_config.json", "adapter_model.safetensors")
    missing = [name for name in files if not (folder / name).is_file()]
    if not missing:
        return folder, adapter, []
    why = "the run has not saved one yet" if adapter in places else "give best, last or a folder"
    return folder, adapter, [f"{folder} holds no adapter (no {missing[0]}): {why}"]


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _questions(run: Path) -> tuple[str, ...]:
    files = sorted((run / "evaluations").glob("*.jsonl"))
    if not files:
        return ()
    return tuple(json.loads(line)["question"] for line in files[-1].read_text(encoding="utf-8").splitlines())


def _trained_in(run: Path) -> str:
    states = sorted((run / "checkpoints").glob("step-*/state.json"))
    return (_json(states[-1]).get("dtype") if states else None) or "auto"
