"""Choices of tokens, one file each: which tokens of a group learn, with what advantage and weight.

To add one: a file here whose ``CHOICE`` is a :class:`~igrpo_lite.algorithms.tokens.base.Tokens`, a line in
``config.TOKENS`` and a section in docs/methods.md.
"""

from __future__ import annotations

from importlib import import_module

from igrpo_lite.algorithms.tokens.base import Tokens
from igrpo_lite.config import TOKENS, UpdateOptions

_REGISTERED: dict[str, Tokens] = {}


def register(name: str, choice: Tokens) -> None:
    """Make ``tokens: NAME`` mean this choice, for as long as the process lives."""
    _REGISTERED[name] = choice
    TOKENS.setdefault(name, "")


def tokens_of(options: UpdateOptions) -> Tokens:
    """The choice of tokens of a configuration."""
    if options.tokens not in _REGISTERED:
        module = import_module(f"igrpo_lite.algorithms.tokens.{options.tokens.replace('-', '_')}")
        _REGISTERED[options.tokens] = module.CHOICE
    return _REGISTERED[options.tokens]
