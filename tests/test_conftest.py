"""The tests' own rules: SIGTERM ends them, and those of ``make quick`` are collected without torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep

import pytest

ROOT = Path(__file__).parents[1]
WAIT = """
import time
from pathlib import Path
from igrpo_lite.training.interrupt import Interrupt

def test_that_waits():
    with {context} as interrupt:
        Path("started").touch()
        for _ in range(6000):
            if {done}:
                break
            time.sleep(0.01)

def test_after_it():
    Path("went-on").touch()
"""


@pytest.mark.parametrize(
    ("context", "done"), [("Interrupt()", "interrupt.requested"), ("__import__('contextlib').nullcontext()", "False")]
)
def test_sigterm_ends_pytest(context, done, tmp_path):
    """Also where a run has its own handler, which saves, returns and lets the program go on."""
    (tmp_path / "test_it.py").write_text(WAIT.format(context=context, done=done))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "conftest",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        ".",
        "test_it.py",
    ]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    deadline = monotonic() + 60
    while not (tmp_path / "started").exists() and process.poll() is None and monotonic() < deadline:
        sleep(0.01)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "Exit: SIGTERM" in output
    assert not (tmp_path / "went-on").exists()
