"""A subprocess with a timeout, in which users' reward functions and math-verify run.

A thread cannot be stopped and an alarm signal works in the main thread only; a process can always be killed. It is a
bare ``python -c`` that imports this module and the user's file, nothing else: no fork (torch's threads do not survive
one) and no ``multiprocessing`` spawn (it would run the caller's ``__main__`` again, which a notebook does not have).
Requests and replies are pickles with a length before each, over pipes that only this module holds: whatever a function
prints goes to standard error.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from igrpo_lite.errors import RewardError
from igrpo_lite.worker.functions import Returned, UserFunction, last_lines, load_function, run_function

LOAD_SECONDS = 60.0
"""Time for the process to start and a user's file to be imported; the timeout of calls does not include it."""

GRACE_SECONDS = 1.0
"""The worker ends itself at the timeout and writes down where it hung; after this much longer it is killed."""

MOST_SECONDS = 1e6
"""The longest timeout: clocks and locks of some systems take none much longer."""

EXIT_SECONDS = 2.0
"""Time a worker has, once its parent is gone, to finish what it does and close its files."""

_OURS = os.path.join("igrpo_lite", "worker") + os.sep

_BOOT = (
    "import json, sys; a = json.loads(sys.argv[1]); sys.path[:] = a['path']; sys.argv[:] = ['']; "
    "from igrpo_lite.worker.process import serve; serve(a['parent'], a['trace'])"
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one call: what the function returned, or the text of its failure."""

    returned: Returned | None
    error: str | None = None
    timed_out: bool = False


class _Ended(Exception):
    """The process ended or was ended while a reply was due."""

    def __init__(self, text: str, timed_out: bool) -> None:
        super().__init__(text)
        self.timed_out = timed_out


class Worker:
    """Starts the process at first use, and again after it had to be killed. Calls are made one at a time."""

    def __init__(self, load_timeout: float = LOAD_SECONDS) -> None:
        self.load_timeout = load_timeout
        self._folder = os.getcwd()
        self._process: subprocess.Popen[bytes] | None = None
        self._replies: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._loaded: dict[str, bool] = {}
        self._trace = ""
        self._lock = threading.Lock()
        self._cancelled = False

    @property
    def pid(self) -> int | None:
        """Process id while one is running."""
        return self._process.pid if self._process is not None else None

    def splits(self, spec: str) -> bool:
        """Whether the function takes one completion per call. Imports it where that has not been done.

        Raises :class:`RewardError` when the file cannot be imported in time.
        """
        with self._lock:
            return self._load(spec)

    def call(self, spec: str, columns: Mapping[str, Sequence[Any]], count: int, timeout: float) -> Outcome:
        """Call a function on ``count`` completions.

        Raises :class:`RewardError` when it cannot be imported or called, or returned something that is not a reward,
        or is closed meanwhile; what it raises by itself, and a timeout, are an :class:`Outcome`.
        """
        timeout = min(timeout, MOST_SECONDS)
        with self._lock:
            self._load(spec)
            try:
                kind, content = self._ask(("call", spec, dict(columns), count, timeout), timeout)
            except _Ended as ended:
                if self._cancelled:
                    raise RewardError(f"reward {spec} was cancelled") from None
                return Outcome(None, str(ended), ended.timed_out)
        return Outcome(content) if kind == "returned" else Outcome(None, content)

    def close(self) -> None:
        """End the process, at once if another thread is waiting for it; a later call would start a new one."""
        patience = EXIT_SECONDS + 1.0
        while not self._lock.acquire(timeout=0.05):
            self._cancelled, patience = True, 0.0
            _kill(self._process)
        try:
            self._stop(patience)
        finally:
            self._cancelled = False
            self._lock.release()

    def _load(self, spec: str) -> bool:
        if self._process is not None and self._process.poll() is not None:
            self._stop()
        if spec not in self._loaded:
            try:
                if self._process is None:
                    self._start()
                self._loaded[spec] = bool(self._ask(("load", spec, self.load_timeout), self.load_timeout)[1])
            except _Ended as ended:
                raise RewardError(f"reward {spec} cannot be imported: {ended}") from None
        return self._loaded[spec]

    def _start(self) -> None:
        handle, self._trace = tempfile.mkstemp(prefix="igrpo-reward-", suffix=".txt")
        os.close(handle)
        # The folder of this package comes last: it is only needed where the caller's own path is relative.
        path = [str(entry) for entry in sys.path] + [str(Path(__file__).resolve().parents[2])]
        start = json.dumps({"path": path, "parent": os.getpid(), "trace": self._trace})
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, start],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=self._folder,
            # Its own session: Ctrl-C is for us to handle, and a kill also reaches what the function has started.
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
        self._replies = queue.SimpleQueue()
        threading.Thread(target=_pump, args=(self._process.stdout, self._replies), daemon=True).start()
        self._receive(self.load_timeout)

    def _ask(self, request: tuple[Any, ...], timeout: float) -> tuple[str, Any]:
        try:
            frame = pickle.dumps(request, protocol=pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            raise RewardError(f"reward {request[1]}: a column of the data cannot be handed to it: {error}") from error
        process = self._process
        assert process is not None
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # already dead: the missing reply says so
            write_frame(process.stdin, frame)
        kind, content = pickle.loads(self._receive(timeout))
        if kind == "refused":
            raise RewardError(content)
        return kind, content

    def _receive(self, timeout: float) -> bytes:
        began = time.monotonic()
        try:
            frame = self._replies.get(timeout=timeout + GRACE_SECONDS)
        except queue.Empty:
            frame, overdue = None, True
        else:
            overdue = False
        if frame is not None:
            return frame
        process = self._process
        if process is not None and not overdue:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.5)  # it is ending by itself: let it, for its exit code
        where = self._hung_at()
        code = self._stop()
        if overdue or (where and time.monotonic() - began >= 0.9 * timeout):
            raise _Ended(f"no reply within {timeout:g} s, so it was stopped" + (f" in\n{where}" if where else ""), True)
        raise _Ended(f"its process ended by itself (exit code {code})", False)

    def _hung_at(self) -> str:
        with contextlib.suppress(OSError):
            traces = Path(self._trace).read_text(encoding="utf-8", errors="replace")
            main_thread = traces.rpartition("most recent call first")[2]
            lines = [line for line in main_thread.splitlines()[1:] if _OURS not in line]
            return "\n".join(line for line in lines[:4] if line.strip())
        return ""

    def _stop(self, patience: float = 0.0) -> int | None:
        process, self._process = self._process, None
        self._loaded.clear()
        if process is None:
            return None
        with contextlib.suppress(OSError, AttributeError):
            process.stdin.close()  # type: ignore[union-attr]
        if patience:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)
        _kill(process)
        code = process.wait()
        with contextlib.suppress(OSError):
            os.unlink(self._trace)
        return code


def _kill(process: subprocess.Popen[bytes] | None) -> None:
    """End it and what the function has started, also when the process itself is gone."""
    with contextlib.suppress(OSError):
        if process is None:
            return
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)


def _pump(pipe: IO[bytes], replies: queue.SimpleQueue[bytes | None]) -> None:
    with contextlib.suppress(OSError, ValueError), pipe:
        while (frame := read_frame(pipe)) is not None:
            replies.put(frame)
    replies.put(None)


def write_frame(pipe: IO[bytes], frame: bytes) -> None:
    pipe.write(len(frame).to_bytes(8, "big") + frame)
    pipe.flush()


def read_frame(pipe: IO[bytes]) -> bytes | None:
    """The next frame, or ``None`` at the end of the pipe."""
    head = pipe.read(8)
    if len(head) < 8:
        return None
    size = int.from_bytes(head, "big")
    frame = pipe.read(size)
    return frame if len(frame) == size else None


def serve(parent: int, trace_path: str) -> None:
    """The worker's own loop; ends with its parent."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    with contextlib.suppress(AttributeError, OSError):
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    inbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    threading.Thread(target=_read_until_parent_ends, args=(requests, inbox, trace_path), daemon=True).start()
    if os.name == "posix":
        threading.Thread(target=_watch, args=(parent, trace_path), daemon=True).start()
    functions: dict[str, UserFunction] = {}
    with asyncio.Runner() as runner, open(trace_path, "w", encoding="utf-8") as trace:
        write_frame(replies, b"ready")
        while (frame := inbox.get()) is not None:
            write_frame(replies, pickle.dumps(_answer(frame, functions, runner, trace)))
    with contextlib.suppress(OSError):
        os.unlink(trace_path)


def _answer(frame: bytes, functions: dict[str, UserFunction], runner: asyncio.Runner, trace: Any) -> tuple[str, Any]:
    def wait(awaitable: Any) -> Any:
        async def outer() -> Any:
            return await awaitable

        return runner.run(outer())  # one loop for the life of the process: clients made in it stay usable

    try:
        kind, spec, *rest = pickle.loads(frame)
        # The watchdog is a thread of C: it also ends a call that never gives Python's lock back (9**9**9).
        faulthandler.dump_traceback_later(rest[-1], exit=True, file=trace)
        try:
            if spec not in functions:
                functions[spec] = load_function(spec)
            function = functions[spec]
            if kind == "load":
                return "loaded", function.scalar and not function.concurrent
            return "returned", run_function(function, rest[0], rest[1], wait)
        finally:
            faulthandler.cancel_dump_traceback_later()
    except RewardError as error:
        return "refused", error.problems
    except BaseException:  # sys.exit() in a reward is its failure, not the end of the worker
        return "raised", _own_part(traceback.format_exc())


def _own_part(text: str) -> str:
    """A traceback without our frames, at most 40 lines of it."""
    kept: list[str] = []
    skip = False
    for line in text.splitlines():
        if line.startswith("  File "):
            skip = _OURS in line
        elif not line.startswith(" "):
            skip = False
        if not skip:
            kept.append(line)
    return last_lines("\n".join(kept), 40)


def _read_until_parent_ends(requests: IO[bytes], inbox: queue.SimpleQueue[bytes | None], trace_path: str) -> None:
    with contextlib.suppress(OSError):
        while (frame := read_frame(requests)) is not None:
            inbox.put(frame)
    inbox.put(None)
    time.sleep(EXIT_SECONDS)
    _end(trace_path)


def _watch(parent: int, trace_path: str) -> None:
    # The pipe's end is not enough: another child forked from the parent may hold it open.
    while os.getppid() == parent:
        time.sleep(2.0)
    _end(trace_path)


def _end(trace_path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(trace_path)
    if sys.platform != "win32" and os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(0)
