"""One torch thread everywhere: with contended cores more threads are many times slower, and results could differ.

Nothing here imports torch, which many tests do without.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from reward_parts import Make

from igrpo_lite.cli import main
from igrpo_lite.config import RunConfig
from igrpo_lite.rewards.scorer import Scorer

SIGNALS, SIGNALLED = socket.socketpair()
"""The numbers of signals that some Python handler took: to read, and to write."""
SIGNALS.setblocking(False)
SIGNALLED.setblocking(False)


def pytest_configure() -> None:
    signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: FrameType | None) -> None:
    pytest.exit("SIGTERM", returncode=128 + number)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    """A run in a test takes SIGTERM for its own, saves and returns: pytest ends after that test."""
    signal.set_wakeup_fd(SIGNALLED.fileno())  # anew for each test: asyncio takes it away
    result = yield
    try:
        numbers = SIGNALS.recv(4096)
    except BlockingIOError:
        numbers = b""
    if signal.SIGTERM in numbers:
        _end(signal.SIGTERM, None)
    return result


@pytest.fixture(autouse=True)
def _seeded() -> None:
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)
        torch.manual_seed(0)


@pytest.fixture
def say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, list[str], str]]:
    """Types ``igrpo-lite train`` with small settings in an empty folder: exit code, lines of stderr, stdout."""
    from bad_parts import SMALL

    monkeypatch.chdir(tmp_path)

    def typed(**settings: Any) -> tuple[int, list[str], str]:
        merged = SMALL | {"output_dir": "run", "progress": "plain"} | settings
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in merged.items() if value is not None]
        code = main(["train", *flags])
        captured = capsys.readouterr()
        return code, captured.err.splitlines(), captured.out

    return typed


@pytest.fixture
def refused(say: Callable[..., tuple[int, list[str], str]]) -> Callable[..., str]:
    """The same for a mistake: what stderr says, after a look at its form."""

    def mistaken(**settings: Any) -> str:
        code, lines, _ = say(**settings)
        assert code == 2
        assert lines
        assert all(line.startswith("error: ") and len(line) < 600 for line in lines), lines
        return "\n".join(lines)

    return mistaken


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Writes a reward file and makes a scorer of its functions (and of built-in ones, given by name)."""
    scorers: list[Scorer] = []

    def build(source: str, *names: str, timeout: float = 20.0, weights: list[float] | None = None) -> Scorer:
        path = tmp_path / "mine.py"
        path.write_text(textwrap.dedent(source), encoding="utf-8")
        specs = [name if name in ("accuracy", "format") else f"{path}:{name}" for name in names or ("reward",)]
        options = RunConfig(reward_funcs=specs, reward_weights=weights, reward_timeout=timeout)
        scorers.append(Scorer(options, "boxed"))
        return scorers[-1]

    yield build
    for scorer in scorers:
        scorer.close()


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """What ``nvidia-smi`` says is made up, by a program of its name: the banner, and the line of the GPU."""
    if os.name == "nt":
        pytest.skip("the driver's tool is stood in for by a shell script")

    def says(banner: str, row: str) -> None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f'#!/bin/sh\ncase "$*" in *query-gpu*) echo "{row}";; *) echo "{banner}";; esac\n')
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return says
