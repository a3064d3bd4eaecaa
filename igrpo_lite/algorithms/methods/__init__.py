"""Methods, one file each: what is sampled after the drafts, which groups learn, with what advantage.

To add one: a file here whose ``METHOD`` is a :class:`~igrpo_lite.algorithms.methods.base.Method`, a line in
``config.ALGORITHMS`` and a section in docs/methods.md.
"""

from __future__ import annotations

from importlib import import_module

from igrpo_lite.algorithms.methods.base import Method
from igrpo_lite.config import ALGORITHMS, RolloutOptions
from igrpo_lite.types import Stage

_REGISTERED: dict[str, Method] = {}


def register(name: str, method: Method, learning_stages: tuple[Stage, ...]) -> None:
    """Make ``algorithm: NAME`` mean this method, for as long as the process lives."""
    _REGISTERED[name] = method
    ALGORITHMS[name] = learning_stages


def method_of(options: RolloutOptions) -> Method:
    """The method of a configuration."""
    if options.algorithm not in _REGISTERED:
        module = import_module(f"igrpo_lite.algorithms.methods.{options.algorithm.replace('-', '_')}")
        _REGISTERED[options.algorithm] = module.METHOD
    return _REGISTERED[options.algorithm]
