"""Scores that a judge has given, in one SQLite file that several runs may use at the same time."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from pathlib import Path

from igrpo_lite.errors import RewardError

WAIT_SECONDS = 60.0
"""How long to wait for another process to finish its write."""


def cache_file() -> Path:
    """The file, in ``XDG_CACHE_HOME`` or ``~/.cache``."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return home / "igrpo-lite" / "judge" / "scores.sqlite3"


class JudgeCache:
    """Scores by endpoint, model and prompt. Used by one thread at a time.

    Raises:
        RewardError: from any method, when the file cannot be written or is not ours.
    """

    def __init__(self) -> None:
        self.path = cache_file()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Each statement is its own transaction, so none waits for a lock while holding one.
            self._connection = sqlite3.connect(
                self.path, timeout=WAIT_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._run("CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, score REAL, reply TEXT, made REAL)")
        except (OSError, sqlite3.Error) as error:
            raise self._failure(error) from error

    @staticmethod
    def key(url: str, model: str, prompt: str) -> bytes:
        """The key of one judgement; the prompt has everything that the judge reads."""
        return hashlib.sha256("\x1f".join((url, model, prompt)).encode()).digest()

    def get(self, key: bytes) -> tuple[float, str] | None:
        """Score and reply, if there are any."""
        found = self._run("SELECT score, reply FROM scores WHERE key = ?", key).fetchone()
        return None if found is None else (float(found[0]), str(found[1]))

    def put(self, key: bytes, score: float, reply: str) -> None:
        """Keep a score; the first one stays."""
        self._run("INSERT OR IGNORE INTO scores VALUES (?, ?, ?, ?)", key, score, reply, time.time())

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def _run(self, statement: str, *values: object) -> sqlite3.Cursor:
        try:
            return self._connection.execute(statement, values)
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> RewardError:
        return RewardError(
            f"reward judge: its cache {self.path} cannot be used: {error}; delete the file, or set the environment "
            "variable XDG_CACHE_HOME to another folder"
        )
