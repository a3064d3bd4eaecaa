"""An OpenAI-compatible endpoint: calls with a limit on time, number and cost, tried again where that can help.

Used from one event loop. httpx comes with datasets and huggingface_hub.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from igrpo_lite.config import RewardOptions
from igrpo_lite.errors import RewardError
from igrpo_lite.rewards.calls import Calls

if TYPE_CHECKING:
    import httpx

BACKOFF_SECONDS = 0.5
"""Wait before the first further try; it doubles each time, and a random half of it is left out."""

MAX_BACKOFF_SECONDS = 30.0
MAX_RETRY_AFTER_SECONDS = 300.0
"""Where a server asks for a longer wait, the call fails instead."""

_RETRIED = frozenset({408, 409, 425, 429})
_HOPELESS = frozenset({402, 405})
"""Like 401, 403 and 404 these stop the run; other 4xx may be about one completion (too long for the judge, say)."""

_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model wrote; ``tokens`` were read and written for it, ``cut`` says that it did not end by itself."""

    text: str
    cut: bool
    tokens: int


class CallFailed(Exception):
    """One call, not the endpoint as a whole."""

    def __init__(self, told: str, retry: bool = True, wait: float | None = None, timed_out: bool = False) -> None:
        super().__init__(told)
        self.retry = retry
        self.wait = wait
        self.timed_out = timed_out


def url_finding(url: str) -> str | None:
    """What is wrong with the form of an endpoint's address."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        return f"judge_url: {url!r} is no address: {error}"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return f"judge_url: must be like http://localhost:8000/v1, not {url!r}"
    if parts.username or parts.password:
        return "judge_url: must not hold a key; put it into the environment variable that judge_api_key_env names"
    if parts.query or parts.fragment or parts.path.rstrip("/").endswith("/chat/completions"):
        return f"judge_url: give it up to the version, like {parts.scheme}://{parts.netloc}/v1, not {url!r}"
    return None


class Endpoint:
    """One endpoint; an asynchronous context manager, inside which the other methods are called.

    Every failure that no other completion would escape is a :class:`RewardError`, which stops the run; any other is a
    :class:`CallFailed`.
    """

    def __init__(self, options: RewardOptions, backoff: float = BACKOFF_SECONDS) -> None:
        self.url = (options.judge_url or "").rstrip("/")
        self._key_name = options.judge_api_key_env
        self._key = os.environ.get(self._key_name, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):  # httpx would name the whole of it in its complaint
            raise RewardError(f"reward judge: the key in {self._key_name} holds characters that no key has")
        self._model = options.judge_model
        self._timeout = options.judge_timeout
        self._retries = options.judge_retries
        self._budget = options.judge_token_budget
        self._concurrency = options.judge_concurrency
        self._backoff = backoff
        self._settings: dict[str, Any] = {"temperature": 0, "max_tokens": options.judge_max_tokens}
        self._random = random.Random()  # a global one would move what the run draws from it
        self._client: httpx.AsyncClient
        self._places: asyncio.Semaphore
        self._naming: asyncio.Lock
        self._closed_until = 0.0

    async def __aenter__(self) -> Endpoint:
        import httpx

        self._places, self._naming = asyncio.Semaphore(self._concurrency), asyncio.Lock()
        try:
            self._client = httpx.AsyncClient(
                headers={"Authorization": f"Bearer {self._key}"} if self._key else None,
                limits=httpx.Limits(max_connections=self._concurrency),
                timeout=None,
                trust_env=urlsplit(self.url).hostname not in _LOCAL,  # no proxy has this machine's servers
            )
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            raise RewardError(
                f"reward judge: the proxy that ALL_PROXY, HTTP_PROXY or HTTPS_PROXY names cannot be used: "
                f"{str(error).rstrip('.')}; mend that, or name {urlsplit(self.url).hostname} in NO_PROXY"
            ) from error
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def model(self) -> str:
        """The model's name, asked for where it was not set. Raises :class:`RewardError` unless there is just one."""
        async with self._naming:
            if self._model is None:
                try:
                    offered = await self._offered()
                except CallFailed as failure:
                    raise RewardError(f"reward judge: {failure}") from None
                if len(offered) != 1:
                    raise RewardError(
                        f"reward judge: {self.url} offers {len(offered)} models ({_listed(offered)}); choose one with "
                        "--judge-model"
                    )
                self._model = offered[0]
            return self._model

    async def ask(self, messages: Sequence[Mapping[str, str]], calls: Calls) -> Reply:
        """One chat completion, tried again as often as was set. Tokens are counted in ``calls``, also failing ones."""
        body = {"model": await self.model(), "messages": list(messages)}
        attempt = 0
        while True:
            try:
                async with self._places:
                    await self._opening()
                    return await self._post(body, calls)
            except CallFailed as failure:
                if failure.wait is not None:
                    self._closed_until = max(self._closed_until, time.monotonic() + failure.wait)
                if not failure.retry or attempt == self._retries:
                    raise
                if failure.wait is None:
                    pause = min(self._backoff * 2**attempt, MAX_BACKOFF_SECONDS)
                    await asyncio.sleep(pause * self._random.uniform(0.5, 1.0))
                attempt += 1

    async def _opening(self) -> None:
        """A server that said how long to wait said it to all calls."""
        while (left := self._closed_until - time.monotonic()) > 0:
            await asyncio.sleep(left)

    async def _post(self, body: Mapping[str, Any], calls: Calls) -> Reply:
        if self._budget is not None and calls.tokens >= self._budget:
            raise RewardError(
                f"reward judge: it has read and written {calls.tokens:,} tokens, and judge_token_budget is "
                f"{self._budget:,}; the scores so far are kept, so raise it to go on from there"
            )
        sent = self._settings
        response = await self._request("POST", "/chat/completions", {**body, **sent})
        if response.status_code == 200:
            return self._read(response, calls)
        if self._suits(response, sent):
            return await self._post(body, calls)
        raise self._failure(response, await self._lost() if response.status_code == 404 else "")

    async def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> httpx.Response:
        import httpx

        try:
            async with asyncio.timeout(self._timeout):
                return await self._client.request(method, self.url + path, json=body)
        except TimeoutError:
            raise CallFailed(f"{self.url} did not reply within {self._timeout:g} s", timed_out=True) from None
        except httpx.InvalidURL as error:
            raise RewardError(f"judge_url: {self.url} is no address: {error}") from None
        except httpx.HTTPError as error:
            what = str(error) or type(error).__name__
            raise CallFailed(
                f"{self.url} cannot be reached: {what}; is the server up, and the address right?"
            ) from None

    def _read(self, response: httpx.Response, calls: Calls) -> Reply:
        try:
            content = _content(response)
            choice = content["choices"][0]
            text = choice["message"].get("content")
            tokens = (content.get("usage") or {}).get("total_tokens")
        except (LookupError, TypeError, AttributeError):
            raise CallFailed(
                f"{self.url} replied with something that is no chat completion: {self._excerpt(response.text, 100)!r}; "
                "does the address end in /v1?"
            ) from None
        if isinstance(tokens, int):
            calls.tokens += tokens
        elif self._budget is not None:
            raise RewardError(
                f"reward judge: {self.url} does not report its usage, so judge_token_budget cannot be kept; leave it "
                "out, and mind the cost in another way"
            )
        return Reply(
            text=text.encode(errors="replace").decode() if isinstance(text, str) else "",  # halves of surrogate pairs
            cut=choice.get("finish_reason") == "length",
            tokens=tokens if isinstance(tokens, int) else 0,
        )

    def _suits(self, response: httpx.Response, sent: Mapping[str, Any]) -> bool:
        """Whether a call can be made again because only its form did not suit: reasoning models of OpenAI's want
        ``max_completion_tokens`` and no temperature."""
        error = _error(response)
        wrong = error.get("param") if str(error.get("code", "")).startswith("unsupported") else None
        if response.status_code != 400 or wrong not in ("max_tokens", "temperature") or wrong not in sent:
            return False
        kept = {name: value for name, value in self._settings.items() if name != wrong}
        if wrong == "max_tokens":
            kept["max_completion_tokens"] = sent[wrong]
        self._settings = kept
        return True

    def _failure(self, response: httpx.Response, lost: str) -> Exception:
        """What a status other than 200 means; ``lost`` explains a 404."""
        status, said = response.status_code, self._said(response)
        if status in (401, 403):
            held = f"the key in {self._key_name} was refused" if self._key else f"{self._key_name} is not set"
            return RewardError(f"reward judge: {said}; {held}: put the key for it into that environment variable")
        if status == 404:
            return RewardError(f"reward judge: {said}; {lost}")
        if response.has_redirect_location:
            target = response.headers["location"]
            return RewardError(f"reward judge: {said}, and points to {target}; give the address itself as judge_url")
        if status in _HOPELESS or _error(response).get("code") == "insufficient_quota":
            return RewardError(f"reward judge: {said}; mend that, then the same command goes on")
        wait = _retry_after(response.headers.get("retry-after"))
        if wait is not None and wait > MAX_RETRY_AFTER_SECONDS:
            return CallFailed(f"{said}, and asks to wait {wait:.0f} s", retry=False)
        return CallFailed(said, retry=status in _RETRIED or status >= 500, wait=wait)

    async def _lost(self) -> str:
        """What may be wrong where there is no such model or path."""
        try:
            return f"judge_model is {self._model!r}, and it offers {_listed(await self._offered())}"
        except (CallFailed, RewardError):
            return "nor can its models be listed, so the address may be wrong: it mostly ends in /v1"

    async def _offered(self) -> list[str]:
        response = await self._request("GET", "/models")
        if response.status_code != 200:
            raise self._failure(response, "does the address end in /v1? If it is right, set --judge-model")
        try:
            return [str(entry["id"]) for entry in _content(response)["data"]]
        except (LookupError, TypeError):
            raise CallFailed(f"{self.url} lists no models that can be read; set --judge-model") from None

    def _said(self, response: httpx.Response) -> str:
        message = str(_error(response).get("message") or response.text or response.reason_phrase)
        return f"{self.url} answered {response.status_code} ({self._excerpt(message, 300)})"

    def _excerpt(self, text: str, most: int) -> str:
        """The beginning of what a server wrote, in one line; the key, should it be in there, is left out."""
        line = " ".join(text.split())
        return (line.replace(self._key, "***") if self._key else line)[:most]


def _content(response: httpx.Response) -> Any:
    """The JSON of a reply's body; ``None`` where it holds none."""
    try:
        return response.json()
    except (ValueError, RecursionError):
        return None


def _error(response: httpx.Response) -> dict[str, Any]:
    """The error in a reply's body, in any of the usual forms; its ``message`` may be missing."""
    body = _content(response)
    error = body.get("error", body) if isinstance(body, dict) else {}
    if not isinstance(error, dict):
        return {"message": error}
    return error if "message" in error else {**error, "message": error.get("detail")}


def _retry_after(value: str | None) -> float | None:
    """Seconds that a ``Retry-After`` header asks for, which is a number of them or a date."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") if names else "none"
