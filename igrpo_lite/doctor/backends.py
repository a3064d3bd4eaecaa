"""Which back ends really work: each is tried in a process of its own, which may crash or hang without harm."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

from igrpo_lite.doctor.probe import MARK
from igrpo_lite.environment.facts import BackEnd, Gpu, Torch

BACK_ENDS = {
    "transformers-16bit": "torch",
    "transformers-4bit": "bitsandbytes",
    "vllm": "vllm",
    "unsloth": "unsloth",
}
"""The back ends, and the module that each stands or falls with. Without the first nothing works."""

_TRIAL = "igrpo_lite.doctor.probe"


@dataclass(slots=True)
class Trial:
    """A trial under way, with its output in files: pipes stay open while a grandchild lives."""

    process: subprocess.Popen[bytes]
    output: Path

    def result(self, until: float) -> dict[str, Any]:
        """What it reported by ``until``, a time of :func:`monotonic`; with an ``error`` wherever it does not work."""
        started = monotonic()
        try:
            code = self.process.wait(max(0.1, until - started))
        except subprocess.TimeoutExpired:
            self.kill()
            return self._reports() | {"error": f"no result within the time limit; last output: {self._last_line()!r}"}
        found = self._reports()
        if "works" not in found and "error" not in found:
            how = signal.strsignal(-code) or f"signal {-code}" if code < 0 else f"exit code {code}"
            found["error"] = f"the process died ({how}); last output: {self._last_line()!r}"
        return found

    def kill(self) -> None:
        """End it, and on POSIX what it started."""
        if os.name == "posix":
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        else:
            self.process.kill()
        self.process.wait()

    def _reports(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for line in self._lines():
            if line.startswith(MARK):
                with suppress(ValueError):  # killed while it wrote
                    found |= json.loads(line.removeprefix(MARK))
        return found

    def _last_line(self) -> str:
        said = [line for line in self._lines() if line.strip() and not line.startswith(MARK)]
        return said[-1][:200] if said else ""

    def _lines(self) -> list[str]:
        return self.output.read_text(encoding="utf-8", errors="replace").splitlines()


@contextmanager
def started(names: Mapping[str, str] = BACK_ENDS) -> Iterator[dict[str, Trial]]:
    """Start a trial of every back end that is installed, all at once; whatever still runs at the end is killed."""
    there = [name for name, module in names.items() if _is_there(module)]
    with TemporaryDirectory(prefix="igrpo-lite-doctor-", ignore_cleanup_errors=True) as folder:
        trials = {}
        try:
            for name in there:
                trials[name] = _start(name, Path(folder))
            yield trials
        finally:
            for trial in trials.values():
                if trial.process.poll() is None:
                    trial.kill()


def judged(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, BackEnd]:
    """The state of every back end, from the reports of those that were tried."""
    return {
        name: BackEnd("not installed")
        if name not in reports
        else BackEnd("broken", str(reports[name]["error"]))
        if "error" in reports[name]
        else BackEnd("works")
        for name in BACK_ENDS
    }


def torch_of(report: Mapping[str, Any]) -> Torch | None:
    """What the first back end's trial said about torch; ``None`` if it did not get that far."""
    said = report.get("torch")
    if said is None:
        return None
    gpus = tuple(Gpu(**device | {"capability": tuple(device["capability"])}) for device in said["devices"])
    return Torch(**said | {"devices": gpus})


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError, AttributeError):
        return True  # something of that name is there, and so broken that its trial should say how


def _start(name: str, folder: Path) -> Trial:
    output = folder / name
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, map(os.path.abspath, filter(None, sys.path)))),
        "HF_HUB_OFFLINE": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_COMPILE_LOCATION": str(folder / "unsloth"),  # else it lands in the user's folder
        "PYTHONIOENCODING": "utf-8",
    }
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", _TRIAL, name],  # -P: no module of the current folder in place of a real one
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=os.name == "posix",
        )
    return Trial(process, output)
