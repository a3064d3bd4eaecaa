"""Scores that a judge has given, in one SQLite file that several runs may use at the same time."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import sys
import time
from pathlib import Path

from igrpo_lite.errors import RewardError

WAIT_SECONDS = 60.0
"""For another process to finish its write."""


def cache_folder(folder: str | None) -> Path:
    """The folder that was set, or the user's own (``XDG_CACHE_HOME``, ``~/.cache`` and what other systems have)."""
    if folder is not None:
        return Path(folder).expanduser()
    home = {"win32": os.environ.get("LOCALAPPDATA"), "darwin": "~/Library/Caches"}.get(sys.platform)
    return Path(os.environ.get("XDG_CACHE_HOME") or home or "~/.cache").expanduser() / "igrpo-lite" / "judge"


class JudgeCache:
    """Scores by what was asked of whom. For one thread.

    Raises:
        RewardError: from any method, when the folder cannot be written or holds something else.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "scores.sqlite3"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Each statement is its own transaction, so none waits for a lock while holding one.
            self._connection = sqlite3.connect(self.path, timeout=WAIT_SECONDS, isolation_level=None)
            self._run("CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, score REAL, reply TEXT, made REAL)")
        except (OSError, sqlite3.Error) as error:
            raise self._failure(error) from error

    @staticmethod
    def key(url: str, model: str, prompt: str) -> bytes:
        """Of one judgement. The prompt is template, question, completion and, where it is shown, gold answer."""
        return hashlib.sha256("\x1f".join((url, model, prompt)).encode()).digest()

    def get(self, key: bytes) -> tuple[float, str] | None:
        """Score and reply, if there are any."""
        found = self._run("SELECT score, reply FROM scores WHERE key = ?", key).fetchone()
        return None if found is None else (float(found[0]), str(found[1]))

    def put(self, key: bytes, score: float, reply: str) -> None:
        """Keep a score; the first one stays."""
        self._run("INSERT OR IGNORE INTO scores VALUES (?, ?, ?, ?)", key, score, reply, time.time())

    def close(self) -> None:
        self._connection.close()

    def _run(self, statement: str, *values: object) -> sqlite3.Cursor:
        try:
            return self._connection.execute(statement, values)
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> RewardError:
        return RewardError(
            f"judge_cache: {self.path} cannot be used: {error}; mend it, delete it, or set another --judge-cache"
        )
