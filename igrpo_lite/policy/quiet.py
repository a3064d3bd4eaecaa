"""Keep what libraries print while they start off our screen."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import cache
from typing import TextIO


@contextmanager
def quiet(stdout: bool = False) -> Iterator[None]:
    """Silence warnings and file descriptor 2 (some messages come from C++), unless VLLM_LOGGING_LEVEL asks for more
    than errors. ``sys.stdout`` has a file descriptor inside in any case: vLLM duplicates it for every process group,
    and the stream of an old notebook kernel has none.

    Args:
        stdout: silence ``sys.stdout`` too.
    """
    loud = os.environ.get("VLLM_LOGGING_LEVEL", "ERROR") != "ERROR"
    with ExitStack() as stack:
        if (stdout and not loud) or not _has_descriptor(sys.stdout):
            stack.enter_context(redirect_stdout(_nowhere()))
        if not loud:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.enter_context(_silent_descriptor(2))
            stack.enter_context(_only_errors(logging.getLogger("torch._library.triton")))
        yield


@cache
def _nowhere() -> TextIO:
    """The null device, never closed: a log handler made meanwhile, like vLLM's at its first import, keeps it."""
    return open(os.devnull, "w", encoding="utf-8")


def _has_descriptor(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.fileno() >= 0
    except (AttributeError, OSError, ValueError):  # io.UnsupportedOperation is the last two
        return False


@contextmanager
def _silent_descriptor(number: int) -> Iterator[None]:
    sys.stderr.flush()
    kept = os.dup(number)
    os.dup2(_nowhere().fileno(), number)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, number)
        os.close(kept)


@contextmanager
def _only_errors(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
