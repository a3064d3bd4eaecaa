"""A generative judge as a reward: a language model grades each completion between 0 and 1.

The paper's ablation (arXiv 2602.09000, table 3) uses such a score both to choose the draft and for the advantages.
:class:`Judge` asks an endpoint; where the policy grades itself, :mod:`igrpo_lite.algorithms.judging` asks. Calls run in
an event loop in a thread of their own, so that any thread may ask, also inside a notebook's loop, and calls under way
can be cancelled.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, replace

from igrpo_lite.config import RewardOptions
from igrpo_lite.errors import RewardError
from igrpo_lite.rewards.calls import Calls
from igrpo_lite.rewards.endpoint import CallFailed, Endpoint, Reply
from igrpo_lite.rewards.judge_cache import JudgeCache
from igrpo_lite.rewards.judge_prompt import REMINDER, judge_prompt, judge_template, read_score
from igrpo_lite.types import Problem


@dataclass(frozen=True, slots=True)
class Judgement:
    """One completion's score in [0, 1], or the error for which there is none.

    Attributes:
        reply: what the judge wrote.
        asked: whether it was asked; otherwise the score comes from the cache, or from the same text in the same group.
        tokens: read and written for it.
    """

    score: float | None
    reply: str = ""
    error: str | None = None
    timed_out: bool = False
    asked: bool = True
    tokens: int = 0


def read_judgement(replies: Sequence[Reply]) -> Judgement:
    """The judgement in a judge's reply, or in its first reply and the one to the reminder."""
    text, last = "\n".join(reply.text for reply in replies).strip(), replies[-1]
    tokens = sum(reply.tokens for reply in replies)
    # A truncated reply may end right behind a score that it only mentions.
    score = None if last.cut else read_score(last.text)
    return Judgement(score, text, _unread(text, last.cut) if score is None else None, tokens=tokens)


def each(texts: Sequence[str], found: Mapping[str, Judgement]) -> list[Judgement]:
    """The judgement of each text; a repeated text was asked about once."""
    return [
        found[text] if text not in texts[:i] else replace(found[text], asked=False, tokens=0)
        for i, text in enumerate(texts)
    ]


class Judge:
    """Grades completions at an endpoint; connects at the first call. Several threads may ask at the same time.

    Args:
        options: the ``judge_*`` settings; ``judge_prompt`` has been checked.
    """

    def __init__(self, options: RewardOptions) -> None:
        self._options = options
        self._template = judge_template(options)
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread
        self._cache: JudgeCache
        self._endpoint: Endpoint

    def grade(self, problem: Problem, completions: Sequence[str], calls: Calls, fresh: bool = False) -> list[Judgement]:
        """One judgement per completion's text, in order.

        Args:
            calls: counts tokens, and holds those that were spent before.
            fresh: do not look into the cache, so that the endpoint is known to work.

        Raises:
            RewardError: the endpoint or the cache cannot be used at all, the token budget is spent, or :meth:`close`
                was called meanwhile.
        """
        prompts = [judge_prompt(self._template, problem, text) for text in completions]
        with self._lock:
            loop = self._loop or self._start()
            # Under the lock, so that close() either cancels this or comes before it.
            graded = asyncio.run_coroutine_threadsafe(self._grade(list(dict.fromkeys(prompts)), calls, fresh), loop)
        try:
            found = graded.result()
        except CancelledError:
            raise RewardError("reward judge was cancelled") from None
        except BaseException:
            graded.cancel()
            raise
        return each(prompts, found)

    def close(self) -> None:
        """Cancel calls under way and end the connections; a later call makes new ones."""
        with self._lock:
            loop, self._loop = self._loop, None
            if loop is not None:
                asyncio.run_coroutine_threadsafe(self._end(), loop).result()
                loop.call_soon_threadsafe(loop.stop)
                self._thread.join()
                loop.close()

    def _start(self) -> asyncio.AbstractEventLoop:
        self._cache = JudgeCache()
        self._endpoint = Endpoint(self._options)
        self._loop = loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=loop.run_forever, name="judge", daemon=True)
        self._thread.start()
        return loop

    async def _end(self) -> None:
        under_way = asyncio.all_tasks() - {asyncio.current_task()}
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        await self._endpoint.close()
        self._cache.close()

    async def _grade(self, prompts: Sequence[str], calls: Calls, fresh: bool) -> dict[str, Judgement]:
        # Wait for all, even if one raises: what is under way is paid for.
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
        return "its reply was truncated before a score; raise --judge-max-tokens (a model that thinks first needs more)"
    *_, last = text.splitlines()
    return f"its reply does not end with a line `Score: x`, x from 0 to 1, even after a reminder: {last[:100]!r}"
