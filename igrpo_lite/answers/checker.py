"""Judges completions: the exact comparison first, and for what that cannot judge math-verify as fallback.

The fallback (:mod:`igrpo_lite.answers.opinion`) takes milliseconds or forever, so it runs in subprocesses with a
timeout: a hung check is killed and counted as unequal.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import queue
import threading
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from types import TracebackType
from typing import Literal

from igrpo_lite.answers.answers import Found, Verdict, compared, gold_answer, stated
from igrpo_lite.errors import RewardError
from igrpo_lite.worker.functions import in_short
from igrpo_lite.worker.process import LOAD_SECONDS, Worker

CACHED = 20_000
"""Opinions that are remembered."""

_OPINION = "igrpo_lite.answers.opinion:opinion"

Said = Literal["correct", "wrong", "unparsed", "timeout"]
Pair = tuple[str, str]


class AnswerChecker:
    """Judges completions against gold answers: exact comparison first, math-verify in subprocesses with a timeout for
    what that cannot judge.

    Processes start with the first question and know nothing of the caller's ``__main__`` (so notebooks are fine); they
    end with :meth:`close` or with the interpreter. Opinions are remembered. Several threads may judge at once.

    Args:
        second_opinion: whether to use the fallback. Without math-verify there is none.
        timeout: seconds that one opinion may take.
        workers: processes at most.
    """

    def __init__(self, second_opinion: bool = True, timeout: float = 5.0, workers: int = 2) -> None:
        self.second_opinion = second_opinion and _installed("math_verify")
        self.timeout = timeout
        self._workers = [Worker() for _ in range(max(1, workers))]
        self._idle: queue.LifoQueue[Worker] = queue.LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._said: OrderedDict[Pair, Said] = OrderedDict()
        self._lock = threading.Lock()
        self._closing = False

    def judge(self, items: Sequence[tuple[str, str, bool]]) -> list[Verdict]:
        """Verdicts on (text of the completion, gold answer, whether it was truncated), in order."""
        verdicts: list[Verdict] = []
        places: dict[Pair, list[int]] = {}
        for place, (text, gold, truncated) in enumerate(items):
            found = stated(text, truncated)
            if isinstance(found, Verdict):
                verdicts.append(found)
                continue
            judged, is_open = _exact(found, gold)
            verdicts.append(judged)
            if is_open and self.second_opinion:
                places.setdefault((found.text, gold), []).append(place)
        for pair, said in self._opinions(list(places)).items():
            for place in places[pair]:
                verdicts[place] = replace(verdicts[place], reason=said)
        return verdicts

    def close(self) -> None:
        """Ends the worker processes; a later question would start new ones."""
        self._closing = True
        for worker in self._workers:
            worker.close()
        self._closing = False

    def __enter__(self) -> AnswerChecker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _opinions(self, pairs: Sequence[Pair]) -> dict[Pair, Said]:
        with self._lock:
            said = {pair: self._said[pair] for pair in pairs if pair in self._said}
        waiting: queue.SimpleQueue[Pair] = queue.SimpleQueue()
        for pair in pairs:
            if pair not in said:
                waiting.put(pair)
        # Daemons: the interpreter can end while an opinion is due. The caller is one of those who ask.
        helpers = [
            threading.Thread(target=self._ask_all, args=(waiting, said), daemon=True)
            for _ in range(min(len(self._workers), waiting.qsize()) - 1)
        ]
        for helper in helpers:
            helper.start()
        self._ask_all(waiting, said)
        for helper in helpers:
            helper.join()
        return said

    def _ask_all(self, waiting: queue.SimpleQueue[Pair], said: dict[Pair, Said]) -> None:
        while True:
            try:
                pair = waiting.get_nowait()
            except queue.Empty:
                return
            answer = self._ask(pair)
            with self._lock:
                said[pair] = self._said[pair] = answer
                if len(self._said) > CACHED:
                    self._said.popitem(last=False)

    def _ask(self, pair: Pair) -> Said:
        worker, timed_out = self._idle.get(), False
        try:
            if not self.second_opinion:
                return "unparsed"
            _load(worker)
            outcome = worker.call(_OPINION, {"completions": [pair[0]], "golds": [pair[1]]}, 1, self.timeout)
            timed_out = outcome.timed_out
        except RewardError as error:
            if not self._closing:
                self.second_opinion = False
                warnings.warn(
                    f"math-verify cannot be asked, and is not from here on: {error}", RuntimeWarning, stacklevel=2
                )
            return "unparsed"
        finally:
            if timed_out:  # its process was killed; the next one loads while others answer
                threading.Thread(target=self._revive, args=(worker,), daemon=True).start()
            else:
                self._idle.put(worker)
        same = outcome.returned.values[0] if outcome.returned else None
        return "timeout" if timed_out else "unparsed" if same is None else "correct" if same else "wrong"

    def _revive(self, worker: Worker) -> None:
        try:
            with contextlib.suppress(RewardError):  # closed meanwhile; otherwise the next question meets it
                _load(worker)
        finally:
            self._idle.put(worker)


def _load(worker: Worker) -> None:
    """Starts the process and loads sympy, which takes seconds that no question should pay for."""
    if worker.pid is None:
        loaded = worker.call(_OPINION, {"completions": [], "golds": []}, 0, LOAD_SECONDS)
        if loaded.error:
            raise RewardError(in_short(loaded.error))


def _exact(found: Found, gold: str) -> tuple[Verdict, bool]:
    """The verdict of the exact comparison, and whether an opinion could still change it."""
    asked: list[Pair] = []
    judged = compared(found, gold, lambda *pair: asked.append(pair))
    return judged, bool(asked) and judged.reason == "unparsed"


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # what importlib says of a module that was set to None
        return False


def verify(text: str, gold: str, truncated: bool = False) -> Verdict:
    """Judges one completion against a gold answer or solution, with a checker that lasts as long as the process."""
    return _shared().judge([(text, gold_answer(gold) or gold, truncated)])[0]


@cache
def _shared() -> AnswerChecker:
    checker = AnswerChecker(workers=1)
    atexit.register(checker.close)
    return checker
