"""The runs of a comparison, each a process of its own, some at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from igrpo_lite.config import RunConfig

_POLL = 0.1


@dataclass(frozen=True, slots=True)
class Job:
    """One run to be made or continued; ``log`` takes what its process prints."""

    name: str
    config: RunConfig
    log: Path


@dataclass(frozen=True, slots=True)
class Ended:
    """A job that is over, after ``seconds``; ``failure`` says in a line what went wrong, if anything did."""

    job: Job
    seconds: float
    failure: str | None


def run_all(jobs: Sequence[Job], at_once: int, ended: Callable[[Ended], None], say: Callable[[str], None]) -> None:
    """Run all jobs, ``at_once`` at a time, in their order; one that fails does not keep the others from running.

    Raises:
        KeyboardInterrupt: Ctrl-C; by then every run has finished its step and saved, or, after a second Ctrl-C, has
            been ended and goes on from its last checkpoint.
    """
    waiting, running = deque(jobs), list[_Process]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(_Process(waiting.popleft()))
            for process in [process for process in running if process.over()]:
                running.remove(process)
                ended(process.ended())
            if running:
                time.sleep(_POLL)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and running:
            names = ", ".join(process.job.name for process in running)
            say(f"stopping {names}: saved after the step at hand; Ctrl-C again ends at once")
        _stop(running)
        raise


def _stop(running: Sequence[_Process]) -> None:
    for process in running:
        process.ask_to_stop()
    try:
        while not all(process.over() for process in running):
            time.sleep(_POLL)
    except KeyboardInterrupt:
        for process in running:
            process.kill()
        raise


class _Process:
    """A job's process (igrpo_lite/comparison/child.py)."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._started = time.monotonic()
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "igrpo_lite.comparison.child"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                env=_environment(job.config),
                start_new_session=True,  # Ctrl-C is for the comparison, which asks its runs to stop
            )
        with suppress(BrokenPipeError):  # it died at once, and its log says why
            self._input.write(json.dumps(job.config.model_dump()) + "\n")
            self._input.flush()

    @property
    def _input(self) -> IO[str]:
        assert self._process.stdin is not None
        return self._process.stdin

    def over(self) -> bool:
        return self._process.poll() is not None

    def ended(self) -> Ended:
        self.ask_to_stop()
        code = self._process.returncode
        failure = f"{_reason(self.job.log, code)} ({self.job.log})" if code else None
        return Ended(self.job, time.monotonic() - self._started, failure)

    def ask_to_stop(self) -> None:
        with suppress(BrokenPipeError):
            self._input.close()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def _environment(config: RunConfig) -> dict[str, str]:
    """On a CPU one thread each, where the user has not said otherwise: small models are no faster with more."""
    on_cpu = not config.device.startswith(("cuda", "mps"))
    return ({"OMP_NUM_THREADS": "1"} if on_cpu else {}) | os.environ


def _reason(log: Path, code: int) -> str:
    if code < 0:  # what it had printed by then says nothing of that
        why = "; out of memory?" if -code == signal.SIGKILL else ""
        return f"its process was ended by signal {-code} ({signal.strsignal(-code)}){why}"
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    mistakes = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return "; ".join(mistakes or lines[-1:]) or f"exit code {code}"
