"""An OpenAI-compatible endpoint over httpx: calls with a limit on time, number and cost, retried where that can help.

httpx is there anyway (huggingface_hub needs it). The ``openai`` client would be 30 MB and half a second of import for a
third of this file: the token budget, the masked key and the texts of errors would still be ours.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from igrpo_lite.config import RewardOptions
from igrpo_lite.errors import RewardError
from igrpo_lite.rewards.calls import Calls

KEY = "OPENAI_API_KEY"
"""Environment variable that holds the endpoint's key; it may be unset for local servers."""

RETRIES = 3
"""Further tries of a failed call."""

CONCURRENCY = 8
"""Calls at the same time."""

BACKOFF_SECONDS = 0.5
"""Wait before the first retry; it doubles each time, less a random half."""

MAX_RETRY_AFTER_SECONDS = 300.0
"""Where a server asks for a longer wait, the call fails instead."""

_RETRIED = frozenset({408, 409, 425, 429})
_FATAL = frozenset({401, 402, 403, 404, 405})
"""These stop the run; other 4xx may be about one completion, for example one that is too long for the judge."""

_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model wrote; ``tokens`` were read and written for it, ``cut``: it reached the token limit."""

    text: str
    cut: bool
    tokens: int


class CallFailed(Exception):
    """One call failed, which says nothing about the others. ``wait``: seconds that the server asks for."""

    def __init__(self, text: str, retry: bool = True, wait: float | None = None, timed_out: bool = False) -> None:
        super().__init__(text)
        self.retry, self.wait, self.timed_out = retry, wait, timed_out


class Endpoint:
    """One endpoint, used from one event loop.

    A failure that every other call would meet too raises :class:`RewardError`, which stops the run; any other raises
    :class:`CallFailed`.
    """

    def __init__(self, options: RewardOptions) -> None:
        self.url = (options.judge_url or "").rstrip("/")
        self._key = os.environ.get(KEY, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):  # httpx would print all of it in its error
            raise RewardError(f"reward judge: the key in {KEY} has characters that no key has")
        self._model = options.judge_model
        self._timeout = options.reward_timeout
        self._budget = options.judge_token_budget
        self._settings: dict[str, Any] = {"temperature": 0, "max_tokens": options.judge_max_tokens}
        self._random = random.Random()  # not the global one, whose state belongs to the run
        self._free, self._naming = asyncio.Semaphore(CONCURRENCY), asyncio.Lock()
        host = urlsplit(self.url).hostname
        try:
            self._client = httpx.AsyncClient(
                headers={"Authorization": f"Bearer {self._key}"} if self._key else None,
                limits=httpx.Limits(max_connections=CONCURRENCY),
                timeout=None,
                trust_env=host not in _LOCAL,  # no proxy for servers on this machine
            )
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            raise RewardError(
                f"reward judge: the proxy in ALL_PROXY, HTTP_PROXY or HTTPS_PROXY cannot be used: "
                f"{str(error).rstrip('.')}; fix it, or add {host} to NO_PROXY"
            ) from error

    async def close(self) -> None:
        """End the connections."""
        await self._client.aclose()

    async def model(self) -> str:
        """The model's name; where it is not set, the endpoint must offer exactly one (:class:`RewardError`)."""
        async with self._naming:
            if self._model is None:
                try:
                    offered = await self._offered()
                except CallFailed as failure:
                    raise RewardError(f"reward judge: {failure}") from None
                if len(offered) != 1:
                    names = ", ".join(offered[:10]) or "none"
                    raise RewardError(
                        f"reward judge: {self.url} offers {len(offered)} models ({names}); choose one with "
                        "--judge-model"
                    )
                self._model = offered[0]
            return self._model

    async def ask(self, messages: Sequence[Mapping[str, str]], calls: Calls) -> Reply:
        """One chat completion, with retries. Its tokens are added to ``calls``."""
        body = {"model": await self.model(), "messages": list(messages)}
        for attempt in range(RETRIES + 1):
            try:
                async with self._free:
                    return await self._post(body, calls)
            except CallFailed as failure:
                if not failure.retry or attempt == RETRIES:
                    raise
                backoff = BACKOFF_SECONDS * 2**attempt * self._random.uniform(0.5, 1.0)
                await asyncio.sleep(backoff if failure.wait is None else failure.wait)
        raise AssertionError("the last attempt returns or raises")

    async def _post(self, body: Mapping[str, Any], calls: Calls) -> Reply:
        if self._budget is not None and calls.tokens >= self._budget:
            raise RewardError(
                f"reward judge: it has read and written {calls.tokens:,} tokens, and judge_token_budget is "
                f"{self._budget:,}; the scores so far are kept: raise it, and the same command goes on"
            )
        sent = self._settings
        response = await self._request("POST", "/chat/completions", {**body, **sent})
        if response.status_code == 200:
            return self._read(response, calls)
        error = _error(response)
        wrong = error.get("param")
        if str(error.get("code", "")).startswith("unsupported") and wrong in sent:
            # OpenAI's reasoning models want max_completion_tokens and no temperature.
            self._settings = {name: value for name, value in sent.items() if name != wrong}
            if wrong == "max_tokens":
                self._settings["max_completion_tokens"] = sent[wrong]
            return await self._post(body, calls)
        raise await self._failure(response, error)

    async def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> httpx.Response:
        try:
            async with asyncio.timeout(self._timeout):
                return await self._client.request(method, self.url + path, json=body)
        except TimeoutError:
            raise CallFailed(f"{self.url} did not reply within {self._timeout:g} s", timed_out=True) from None
        except httpx.InvalidURL as error:
            raise RewardError(f"judge_url: {self.url} is not a valid address: {error}") from None
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise CallFailed(
                f"{self.url} cannot be reached: {reason}; is the server up, and judge_url right?"
            ) from None

    def _read(self, response: httpx.Response, calls: Calls) -> Reply:
        try:
            content = _json(response)
            choice = content["choices"][0]
            text, cut = choice["message"].get("content"), choice.get("finish_reason") == "length"
            tokens = (content.get("usage") or {}).get("total_tokens")
        except (LookupError, TypeError, AttributeError):
            raise CallFailed(
                f"{self.url} did not reply with a chat completion: {self._excerpt(response.text, 100)!r}; "
                "does judge_url end in /v1?"
            ) from None
        if isinstance(tokens, int):
            calls.tokens += tokens
        elif self._budget is not None:
            raise RewardError(
                f"reward judge: {self.url} does not report its usage, so judge_token_budget has no effect; leave it out"
            )
        # A lone surrogate is not UTF-8 and could not be kept.
        plain = text.encode(errors="replace").decode() if isinstance(text, str) else ""
        return Reply(plain, cut, tokens if isinstance(tokens, int) else 0)

    async def _failure(self, response: httpx.Response, error: Mapping[str, Any]) -> Exception:
        """The exception for a status other than 200."""
        status = response.status_code
        message = str(error.get("message") or response.text or response.reason_phrase)
        text = f"{self.url} answered {status} ({self._excerpt(message, 300)})"
        if status in _FATAL or error.get("code") == "insufficient_quota":
            advice = "fix that, then the same command goes on"
            if status in (401, 403):
                problem = f"the key in {KEY} was refused" if self._key else f"{KEY} is not set"
                advice = f"{problem}: put the endpoint's key into that environment variable"
            elif status == 404:
                advice = await self._missing()
            return RewardError(f"reward judge: {text}; {advice}")
        try:
            wait = float(response.headers["retry-after"])
        except (KeyError, ValueError):
            wait = None
        if wait is not None and wait > MAX_RETRY_AFTER_SECONDS:
            return CallFailed(f"{text}, and asks to wait {wait:.0f} s", retry=False)
        return CallFailed(text, retry=status in _RETRIED or status >= 500, wait=wait)

    async def _missing(self) -> str:
        """Why there is no such model or path."""
        try:
            return f"judge_model is {self._model!r}, and the endpoint offers {', '.join((await self._offered())[:10])}"
        except (CallFailed, RewardError):
            return "its models cannot be listed either, so judge_url may be wrong: it mostly ends in /v1"

    async def _offered(self) -> list[str]:
        response = await self._request("GET", "/models")
        if response.status_code in (401, 403):
            raise await self._failure(response, _error(response))
        try:
            return [str(entry["id"]) for entry in _json(response)["data"]]
        except (LookupError, TypeError):
            said = f"{response.status_code} ({self._excerpt(response.text, 100)})"
            raise CallFailed(
                f"{self.url}/models answered {said}; does judge_url end in /v1? If it is right, set --judge-model"
            ) from None

    def _excerpt(self, text: str, most: int) -> str:
        """The beginning of what a server wrote, on one line and without the key."""
        line = " ".join(text.split())
        return (line.replace(self._key, "***") if self._key else line)[:most]


def _json(response: httpx.Response) -> Any:
    """A reply's body; ``None`` where it is not JSON."""
    try:
        return response.json()
    except (ValueError, RecursionError):
        return None


def _error(response: httpx.Response) -> dict[str, Any]:
    """The error in a reply's body as an object: OpenAI's, or a plain text or ``detail`` as other servers send it."""
    body = _json(response)
    error = body.get("error", body) if isinstance(body, dict) else {}
    return {"message": error.get("detail")} | error if isinstance(error, dict) else {"message": error}
