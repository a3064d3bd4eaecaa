"""Where tests find the real problem sets, which are not part of the project."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def real_data(name: str) -> Path:
    """The path of one real problem set; skips the test, with the reason, where the set is not to be found."""
    given = os.environ.get("IGRPO_LITE_TEST_DATA")
    folder = Path(given) if given else Path(__file__).resolve().parents[1].parent / "shared" / "data"
    path = folder / name
    if not path.is_file():
        pytest.skip(f"real problem set {name} is not at hand; set IGRPO_LITE_TEST_DATA to a folder that has it")
    return path
