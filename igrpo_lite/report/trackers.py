"""Logging to wandb, tensorboard or trackio beside the run folder, through accelerate and without any question asked."""

from __future__ import annotations

import math
import netrc
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from igrpo_lite.errors import ConfigError
from igrpo_lite.inputs import tracker_findings

_PROJECT = "igrpo-lite"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The finite numbers in nested `values`, keys joined by `/`; everything else is left out."""
    return dict(_numbers(values, prefix))


def _numbers(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            yield f"{prefix}{key}", value


class Trackers:
    """The trackers of one run; with none asked for, it does nothing and imports nothing.

    A tracker that fails while the run goes on (a full disk, a lost network) is dropped with one call of `warn`: the run
    folder has the same numbers, and no training is worth losing to its log.

    Args:
        report_to: names of the trackers.
        run_dir: the run folder; tensorboard and wandb write below it.
        run_name: name of the run in the tracker.
        config: the configuration, shown beside the run.
        warn: called with one sentence when a tracker is dropped.

    Raises:
        ConfigError: a tracker's package is missing or it cannot start.
    """

    def __init__(
        self,
        report_to: Sequence[str],
        run_dir: Path,
        run_name: str,
        config: Mapping[str, Any],
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._warn = warn
        self._trackers: list[Any] = []
        if not report_to:
            return
        if missing := tracker_findings(report_to):
            raise ConfigError(missing)
        for tracker in _make(report_to, run_dir, run_name):
            try:
                tracker.start()
                tracker.store_init_configuration(_settings(config))
            except Exception as error:  # each tracker has its own family of errors
                raise ConfigError(f"--report-to {tracker.name} could not start: {error}") from error
            self._trackers.append(tracker)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Log the numbers of `metrics` under `step`."""
        values = flat({key: value for key, value in metrics.items() if key != "step"})
        self._each(lambda tracker: tracker.log(values, step=step))

    def finish(self) -> None:
        """Flush and close all trackers."""
        self._each(lambda tracker: tracker.finish())
        self._trackers = []

    def _each(self, act: Callable[[Any], None]) -> None:
        for tracker in list(self._trackers):
            try:
                act(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                self._warn(f"{tracker.name} failed and is no longer logged to: {error}")


def _make(report_to: Sequence[str], run_dir: Path, run_name: str) -> list[Any]:
    if "wandb" in report_to:
        _never_ask()
    from accelerate.state import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers

    # accelerate's loggers refuse to work without a state; on the CPU it leaves the training's device alone.
    PartialState(cpu=True)
    run_id = _run_id(run_dir)
    options: dict[str, tuple[list[Any], dict[str, Any]]] = {
        "tensorboard": ([run_name, str(run_dir / "tensorboard")], {}),
        "trackio": ([_PROJECT], {"name": f"{run_name}-{run_id}", "resume": "allow", "embed": False}),
        "wandb": ([_PROJECT], {"name": run_name, "dir": str(run_dir), "id": run_id, "resume": "allow"}),
    }
    made = []
    for kind in filter_trackers(list(report_to), str(run_dir)):
        positional, named = options[str(kind)]
        made.append(LOGGER_TYPE_TO_CLASS[str(kind)](*positional, **named))
    return made


def _run_id(run_dir: Path) -> str:
    """An id kept in the run folder: a resumed run goes on in its curve, a fresh one of the same name gets its own."""
    path = run_dir / "tracker_id"
    if not path.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _never_ask() -> None:
    """Keep wandb from asking for an account: offline unless there is a key, and silent."""
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_CONSOLE", "off")  # it would record the live view's control codes
    if os.environ.get("WANDB_API_KEY") or _logged_in():
        return
    if os.environ.setdefault("WANDB_MODE", "offline") == "online":
        raise ConfigError("WANDB_MODE=online needs an account: set WANDB_API_KEY or run `wandb login` before")


def _logged_in() -> bool:
    base = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    host = base.split("://")[-1].split("/")[0].split(":")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _settings(config: Mapping[str, Any]) -> dict[str, bool | str | float | int]:
    return {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in config.items()
        if value is not None
    }
