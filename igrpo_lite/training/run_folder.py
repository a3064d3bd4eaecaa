"""A run is a folder of plain files; running the same command again continues it.

config.yaml            every setting, resolved
metrics.jsonl          one line per step and per evaluation; everything but the key ``time`` is reproducible
samples.jsonl          one line per problem and step: drafts, chosen draft, refinements, rewards, verdicts
evaluations/           every held-out answer of each evaluation
checkpoints/           what a resumed run starts from
adapter/, best/        the last adapter, and the best one by held-out single-pass accuracy
summary.json           before and after
"""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from igrpo_lite.config import RunConfig
from igrpo_lite.config.resolve import RESUMABLE, differences, dump, load_file, resolve
from igrpo_lite.config.retired import RETIRED, RETIRED_VALUES, resumed
from igrpo_lite.errors import ConfigError, RunFolderError
from igrpo_lite.problems.sources import short_name


class RunFolder:
    """One run's folder, created or continued, and locked while open. Use as a context manager."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.path = Path(config.output_dir or default_folder(config))
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.best = self.path / "best"
        self._lock = FileLock(self.path / ".lock")

    def __enter__(self) -> RunFolder:
        """Lock the folder, set an old run aside with ``fresh``, and check that it belongs to this configuration.

        Raises:
            RunFolderError: not writable, in use, not a run folder, or made with other settings.
        """
        try:
            if self.config.fresh:
                self._set_aside()
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise RunFolderError(f"{self.path} is in use by another run; wait for it or set --output-dir") from error
        except OSError as error:
            raise RunFolderError(
                f"{self.path} cannot be written: {error.strerror or error}; set --output-dir to another folder"
            ) from error
        try:
            self._check_owner()
            self.write_text("config.yaml", dump(self.config))
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def write_text(self, name: str, text: str) -> None:
        """Replace a small file as a whole."""
        target = self.path / name
        temporary = target.with_name(f".tmp-{target.name}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, target)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise RunFolderError(
                f"{target} could not be written: {error.strerror or error}; make room and run the same command again"
            ) from error

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(_finite(value), indent=2, ensure_ascii=False) + "\n")

    def write_lines(self, name: str, records: list[dict[str, Any]]) -> None:
        self.write_text(name, "".join(_line(record) for record in records))

    def summary(self) -> dict[str, Any] | None:
        """What an earlier start of this run left as its summary."""
        try:
            return json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def has_work(self) -> bool:
        """Whether an earlier start got as far as a result: before that, mending a setting must not lock anybody out."""
        samples = self.path / "samples.jsonl"
        written = samples.exists() and samples.stat().st_size > 0
        return written or (self.path / "summary.json").exists() or any(self.checkpoints.glob("step-*"))

    def _set_aside(self) -> None:
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return
        self._require_run_folder()
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        # Taking the lock first tells a run that is still going from one that is over.
        with self._lock.acquire(timeout=0):
            pass
        self.path.rename(aside)

    def _check_owner(self) -> None:
        if not (self.path / "config.yaml").exists():
            if any(entry.name != ".lock" for entry in self.path.iterdir()):
                self._require_run_folder()
            return
        if not self.has_work():
            return
        settings: dict[str, Any] = {}
        try:
            settings = load_file(self.path / "config.yaml")
            made_with = resolve(resumed(settings))
        except ConfigError as error:
            problem = error.problems[0]
            name = problem.partition(":")[0]
            gone = name in RETIRED or settings.get(name) in RETIRED_VALUES.get(name, ())
            restore = ", and" if gone else "; restore it, or"
            raise RunFolderError(
                f"{self.path}/config.yaml, which says how the run was made, cannot be used: {problem}{restore} start "
                "over with --fresh (the old run is kept beside it, to evaluate and export)"
            ) from error
        changed = {k: v for k, v in differences(made_with, self.config).items() if k not in RESUMABLE}
        if changed:
            lines = [f"{name}: {old!r} then, {new!r} now" for name, (old, new) in changed.items()]
            raise RunFolderError(
                [
                    f"{self.path} was made with other settings: {'; '.join(lines)}",
                    "use the same settings to continue it, --output-dir for another folder, or --fresh to start over "
                    "(the old run is kept beside it)",
                ]
            )

    def _require_run_folder(self) -> None:
        if not (self.path / "config.yaml").exists():
            raise RunFolderError(f"{self.path} holds files but no run (no config.yaml); choose another --output-dir")


class Records:
    """A JSON-lines file that a resumed run cuts back to where its checkpoint was.

    Attributes:
        missing: bytes that the checkpoint knows of and the file no longer has; it goes on with whole lines.
    """

    def __init__(self, path: Path, position: int = 0) -> None:
        self.path = path
        try:
            kept = position
            if position and (not path.exists() or path.stat().st_size < position):
                kept = path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0
            self.missing = position - kept
            self._stream = path.open("ab")
            self._stream.truncate(kept)
            self._stream.seek(kept)
        except OSError as error:
            raise RunFolderError(f"{path} cannot be written: {error.strerror or error}") from error

    def append(self, *records: dict[str, Any]) -> None:
        """Write whole lines at once and hand them to the operating system."""
        try:
            self._stream.write("".join(_line(record) for record in records).encode())
            self._stream.flush()
        except OSError as error:
            raise RunFolderError(
                f"{self.path} could not be written: {error.strerror or error}; make room and run the same command "
                "again to go on from the last checkpoint"
            ) from error

    @property
    def position(self) -> int:
        """Bytes written so far."""
        return self._stream.tell()

    def close(self) -> None:
        with suppress(OSError):  # a full disk was reported when the line was written
            self._stream.close()


def default_folder(config: RunConfig) -> str:
    """``runs/<model>-<data>-<algorithm>``, from the last part of model and data names."""
    parts = [Path(config.model).name, short_name(config.data), config.algorithm]
    return str(Path("runs") / "-".join(parts))


def _line(record: dict[str, Any]) -> str:
    return json.dumps(_finite(record), ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity; they become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
