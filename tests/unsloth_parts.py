"""Runs a scene of :mod:`unsloth_scenes` in a process of its own, with the real Unsloth on its path."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FOLDERS = [Path(sys.prefix) / "unsloth", Path(os.environ.get("IGRPO_LITE_UNSLOTH", "nowhere"))]
"""Where ``pip install --target`` may have put it (requirements-unsloth-cpu.txt)."""

FOUND = next((str(folder) for folder in FOLDERS if (folder / "unsloth" / "__init__.py").is_file()), None)
needs_unsloth = pytest.mark.skipif(
    FOUND is None and find_spec("unsloth") is None, reason="Unsloth is not installed: requirements-unsloth-cpu.txt"
)


def play(scene: str, folder: Path, **environment: str) -> str:
    """What it printed. An Unsloth that is imported in one process must not meet another back end there."""
    path = [*([FOUND] if FOUND else []), str(TESTS), str(TESTS.parent)]
    done = subprocess.run(
        [sys.executable, "-c", f"import unsloth_scenes; unsloth_scenes.{scene}()"],
        cwd=folder,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        | {"UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_COMPILE_LOCATION": str(folder / "compiled")}
        | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout
