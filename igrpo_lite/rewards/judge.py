"""A generative judge as a reward: a language model grades each completion between 0 and 1.

The paper's ablation (arXiv 2602.09000, table 3) uses such a score both to choose the draft and for the advantages.
:class:`Judge` asks an endpoint; where the policy grades itself, :mod:`igrpo_lite.algorithms.judging` asks. Calls to the
endpoint run in an event loop in a thread of their own, so that any thread may ask, also inside a notebook's loop, and
so that those under way can be cancelled.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import closing
from dataclasses import dataclass, replace

from igrpo_lite.config import RewardOptions
from igrpo_lite.errors import RewardError
from igrpo_lite.rewards.calls import Calls
from igrpo_lite.rewards.endpoint import BACKOFF_SECONDS, CallFailed, Endpoint, Reply
from igrpo_lite.rewards.judge_cache import JudgeCache, cache_folder
from igrpo_lite.rewards.judge_prompt import REMINDER, judge_prompt, judge_template, read_score
from igrpo_lite.types import Problem


@dataclass(frozen=True, slots=True)
class Judgement:
    """One completion's score in [0, 1], or why there is none.

    Attributes:
        reply: what the judge wrote.
        asked: whether the judge was; otherwise it comes from the cache, or from the same text in the same group.
        tokens: read and written for it.
    """

    score: float | None
    reply: str = ""
    error: str | None = None
    timed_out: bool = False
    asked: bool = True
    tokens: int = 0


def read_judgement(replies: Sequence[Reply]) -> Judgement:
    """What a judge's reply, or that and the one to the reminder, says of one completion."""
    text, last = "\n".join(reply.text for reply in replies).strip(), replies[-1]
    tokens = sum(reply.tokens for reply in replies)
    # A reply that was cut may have been cut right behind a score that it only speaks of.
    score = None if last.cut else read_score(last.text)
    return Judgement(score, text, _unread(text, last.cut) if score is None else None, tokens=tokens)


def each(asked: Sequence[str], found: Mapping[str, Judgement]) -> list[Judgement]:
    """The judgement of each thing that was to be asked; what came before in the same group was not asked again."""
    return [
        found[text] if text not in asked[:i] else replace(found[text], asked=False, tokens=0)
        for i, text in enumerate(asked)
    ]


class Judge:
    """Grades completions at an endpoint; connects at the first call. Several threads may ask at the same time.

    Args:
        options: the ``judge_*`` settings; ``judge_prompt`` has been checked.
        backoff: seconds before the first further try of a failed call.
    """

    def __init__(self, options: RewardOptions, backoff: float = BACKOFF_SECONDS) -> None:
        self._options = options
        self._backoff = backoff
        self._template = judge_template(options)
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._cache: JudgeCache
        self._endpoint: Endpoint
        self._ended: asyncio.Event

    def grade(self, problem: Problem, completions: Sequence[str], calls: Calls, fresh: bool = False) -> list[Judgement]:
        """One judgement per completion's text, in order.

        Args:
            calls: where tokens are counted, and how many have been spent before.
            fresh: look up nothing, so that the endpoint is known to work.

        Raises:
            RewardError: the endpoint or the cache cannot be used at all, the token budget is spent, or :meth:`close`
                was called meanwhile.
        """
        prompts = [judge_prompt(self._template, problem, text) for text in completions]
        with self._lock:
            loop = self._loop or self._start()
            # Under the lock, so that closing either cancels this or comes before it.
            graded = asyncio.run_coroutine_threadsafe(self._grade(list(dict.fromkeys(prompts)), calls, fresh), loop)
        try:
            found = graded.result()
        except CancelledError:
            raise RewardError("reward judge was given up while it was being asked") from None
        except BaseException:
            graded.cancel()
            raise
        return each(prompts, found)

    def close(self) -> None:
        """Cancels calls under way and ends the connections; a later call would make new ones."""
        with self._lock:
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
            if loop is not None:
                loop.call_soon_threadsafe(self._ended.set)
        if thread is not None:
            thread.join()

    def _start(self) -> asyncio.AbstractEventLoop:
        started: Future[asyncio.AbstractEventLoop] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)), name="judge", daemon=True)
        self._thread.start()
        self._loop = started.result()
        return self._loop

    async def _serve(self, started: Future[asyncio.AbstractEventLoop]) -> None:
        try:
            self._cache = JudgeCache(cache_folder(self._options.judge_cache))
            with closing(self._cache):
                async with Endpoint(self._options, self._backoff) as self._endpoint:
                    self._ended = ended = asyncio.Event()
                    started.set_result(asyncio.get_running_loop())
                    await ended.wait()
                    under_way = asyncio.all_tasks() - {asyncio.current_task()}
                    for task in under_way:
                        task.cancel()
                    await asyncio.gather(*under_way, return_exceptions=True)
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)  # whatever it is: somebody waits

    async def _grade(self, prompts: Sequence[str], calls: Calls, fresh: bool) -> dict[str, Judgement]:
        # All are waited for, whatever becomes of one: what is under way is paid for.
        found = await asyncio.gather(*(self._judgement(p, calls, fresh) for p in prompts), return_exceptions=True)
        judgements = {}
        for prompt, judgement in zip(prompts, found, strict=True):
            if isinstance(judgement, BaseException):
                raise judgement
            judgements[prompt] = judgement
        return judgements

    async def _judgement(self, prompt: str, calls: Calls, fresh: bool) -> Judgement:
        endpoint = self._endpoint
        try:
            key = JudgeCache.key(endpoint.url, await endpoint.model(), prompt)
            if not fresh and (kept := self._cache.get(key)) is not None:
                return Judgement(*kept, asked=False)
            reply = await endpoint.ask(_turns(prompt), calls)
            found = read_judgement([reply])
            if found.score is None:
                text = reply.text
                again = _turns(prompt, text, REMINDER) if text.strip() else _turns(f"{prompt}\n\n{REMINDER}")
                found = read_judgement([reply, await endpoint.ask(again, calls)])
        except CallFailed as failure:
            return Judgement(None, error=str(failure), timed_out=failure.timed_out)
        if found.score is not None:
            self._cache.put(key, found.score, found.reply)
        return found


def _turns(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant", "user")
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def _unread(text: str, cut: bool) -> str:
    if cut or not text:
        return "its reply was cut before a score; raise --judge-max-tokens (a model that thinks first needs more)"
    *_, last = text.splitlines()
    return f"its reply does not end with a line `Score: x`, x from 0 to 1, also when asked again: {last[:100]!r}"
