"""Versions of what a result depends on, and the range of vLLM versions that are supported."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

VLLM = ">=0.26,<0.33"
"""The vLLM versions that the sampler is written for and was run with: the first, the last and two between on a CPU. The
extra ``vllm``, the sets and the documentation are held against it by tests."""

_PACKAGES = ("igrpo-lite", "torch", "transformers", "peft", "datasets", "accelerate", "tokenizers", "numpy")


def installed_versions() -> dict[str, str]:
    """Python's version and those of the packages that matter, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
