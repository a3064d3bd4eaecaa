"""Versions of what a result depends on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

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
