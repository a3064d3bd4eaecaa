"""Trackers: what they are given, what is missing, and that none of them can end a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from igrpo_lite.errors import ConfigError
from igrpo_lite.report.trackers import Trackers, flat, tracker_findings


def in_new_process(code: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, igrpo_lite.report.live, igrpo_lite.report.plain, igrpo_lite.training.health;"
        "from igrpo_lite.report.trackers import Trackers, tracker_findings; from pathlib import Path;"
        "Trackers([], Path('.'), 'x', {}).log({'a': 1}, 1); tracker_findings(['wandb']);"
        "print([m for m in ('torch', 'accelerate', 'transformers') if m in sys.modules])"
    )
    assert in_new_process(code).strip() == "[]"


def test_metrics_are_flattened_to_finite_numbers() -> None:
    nested = {"a": 1, "time": {"step": 0.5, "none": None}, "stage1/reasons": {"correct": 3}}
    nested |= {"text": "x", "nan": float("nan")}
    assert flat(nested) == {"a": 1, "time/step": 0.5, "stage1/reasons/correct": 3}


def test_a_missing_tracker_is_found_before_anything_starts(tmp_path: Path) -> None:
    assert tracker_findings([]) == []
    assert ["pip install nowhere" in found for found in tracker_findings(["nowhere_a", "nowhere_b"])] == [True, True]
    with pytest.raises(ConfigError, match="pip install nowhere"):
        Trackers(["nowhere"], tmp_path, "run", {})


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    code = (
        "import json; from pathlib import Path; from igrpo_lite.report.trackers import Trackers;"
        f"trackers = Trackers(['tensorboard'], Path({str(tmp_path)!r}), 'run', {{'a': None, 'b': ['x'], 'c': 1.5}});"
        "[trackers.log({'step': s, 'time': {'step': s / 2}, 'kl': None}, s) for s in (1, 2)]; trackers.finish();"
        "from tensorboard.backend.event_processing.event_accumulator import EventAccumulator as Events;"
        f"events = Events({str(tmp_path / 'tensorboard' / 'run')!r}); events.Reload();"
        "tags = events.Tags()['scalars'];"
        "print(json.dumps([tags, [[e.step, e.value] for e in events.Scalars('time/step')]]))"
    )
    # A process of its own: accelerate's state would stay behind for the tests that come after.
    assert json.loads(in_new_process(code).splitlines()[-1]) == [["time/step"], [[1, 0.5], [2, 1.0]]]


def test_a_tracker_that_breaks_is_dropped_with_one_warning(tmp_path: Path) -> None:
    class FullDisk:
        name = "tensorboard"

        def log(self, values: dict[str, float], step: int) -> None:
            raise OSError("no space left")

    said: list[str] = []
    trackers = Trackers([], tmp_path, "run", {}, warn=said.append)
    trackers._trackers.append(FullDisk())
    for step in range(3):
        trackers.log({"step": step, "loss": 0.1}, step)
    trackers.finish()
    assert len(said) == 1
    assert "no space left" in said[0]
