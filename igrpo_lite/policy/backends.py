"""Which back end loads the model, decided before torch or transformers are imported; and loading through it.

One back end for each process: Unsloth changes transformers' and PEFT's classes when it is imported, wants to be
imported before them, and nothing undoes that. So :func:`enter` is the first thing that a verb does with its
configuration.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from igrpo_lite.config import ModelOptions
from igrpo_lite.environment.hardware import has_gpu
from igrpo_lite.environment.torch_build import cuda_trouble
from igrpo_lite.errors import ModelError
from igrpo_lite.planning.models import hub_id
from igrpo_lite.planning.shapes import FAST
from igrpo_lite.tiny import MODEL_DIR

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

Name = Literal["transformers", "unsloth"]


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What to load.

    Attributes:
        options: of the run; also says how to sample, where it is a whole configuration.
        config: of transformers.
        dtype: of the frozen weights, or of what 4-bit ones are computed in.
        seed: of a fresh adapter.
        adapter: folder of a saved one; unset: a fresh one.
        context: tokens of the longest prompt and its completion together; unset: the model's own limit.
    """

    options: ModelOptions
    config: Any
    device: torch.device
    dtype: torch.dtype
    seed: int
    adapter: Path | None = None
    context: int | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model with its adapter, the vLLM engine that came with it and holds the same frozen weights, if one did, and
    sentences for the user."""

    model: PeftModel
    engine: Any = None
    notes: tuple[str, ...] = ()


class Backend(Protocol):
    """A way to load the model that learns. What samples from it is chosen in :mod:`igrpo_lite.sampling.choice`."""

    def load(self, request: LoadRequest) -> Loaded:
        """The model with its adapter. Raises :class:`ModelError` if that cannot be."""
        ...


@dataclass(frozen=True, slots=True)
class Choice:
    """A back end by name, and the reason in a sentence; empty where there was nothing to choose."""

    name: Name
    why: str = ""

    def backend(self) -> Backend:
        if self.name == "unsloth":
            from igrpo_lite.policy import unsloth

            return unsloth.backend
        from igrpo_lite.policy import plain

        return plain.backend


_entered: Name | None = None


def enter(options: ModelOptions) -> Choice:
    """Choose the back end, and import what it must import first. May be called again, with the same outcome.

    Raises:
        ModelError: the back end cannot be had, or this process works with another one already.
    """
    global _entered
    before = _entered or ("unsloth" if "unsloth" in sys.modules else None)
    choice = choose(options)
    if before is not None and choice.name != before:
        if options.backend != "auto":
            raise ModelError(
                f"backend: this process works with {before} already, which cannot be undone; for {options.backend} "
                "start a new one (in a notebook: restart the kernel)"
            )
        choice = Choice(before, f"the model is loaded with {before}, as this process works with it already")
    if choice.name == "unsloth":
        from igrpo_lite.policy import unsloth_import

        unsloth_import.prepare(options)
    _entered = choice.name
    return choice


def choose(options: ModelOptions) -> Choice:
    """The back end that the configuration names, or the best that is there."""
    if options.backend != "auto":
        return Choice(options.backend)
    if not (options.device == "auto" or options.device.startswith("cuda")) or not has_gpu():
        return Choice("transformers")
    trouble = cuda_trouble(options.device)
    if trouble is not None:
        return Choice("transformers", str(trouble))
    if find_spec("unsloth") is None:
        return Choice("transformers")
    reason = _unfit(options)
    if reason:
        return Choice("transformers", f"the model is loaded with transformers, not with Unsloth: {reason}")
    return Choice("unsloth", "the model is loaded with Unsloth, which shares its weights with vLLM (--backend)")


def _unfit(options: ModelOptions) -> str | None:
    """Why an installed Unsloth is not taken on a GPU."""
    if options.model == "tiny":
        return "the bundled model is too small to gain from it"
    kind = model_type(options)
    if kind is not None and kind not in FAST:
        return f"it has no fast path for models of type {kind}"
    if find_spec("vllm") is None:
        return "it is only faster together with vLLM, which is not installed"
    if getattr(options, "sampler", "auto") == "transformers":
        return "it samples with vLLM, and --sampler says transformers"
    return None


def model_path(name: str) -> str:
    """The folder of the bundled model for ``tiny``, the hub id of a short name, anything else as it is."""
    return str(MODEL_DIR) if name == "tiny" else hub_id(name)


def model_type(options: ModelOptions) -> str | None:
    """``model_type`` in the model's ``config.json``, which is fetched if need be; ``None`` if that cannot be had."""
    path = Path(model_path(options.model)) / "config.json"
    if not path.is_file():
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(model_path(options.model), "config.json", revision=options.revision))
        except Exception:  # no network, no such model: loading says what is wrong
            return None
    try:
        found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return str(found["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
