"""A real HTTP server that speaks the OpenAI chat form; settings with which the policy is the judge."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from igrpo_lite.config import RunConfig
from igrpo_lite.rewards import endpoint
from igrpo_lite.rewards.calls import Calls
from igrpo_lite.rewards.judge import Judge, Judgement
from igrpo_lite.types import Problem

PROBLEM = Problem("p1", "How many?", "7")

SHORT = "{question}\n{completion}\nScore: x"
JUDGED: dict[str, Any] = {
    "reward_funcs": "accuracy,judge",
    "judge_by": "policy",
    "judge_max_tokens": 12,
    "judge_prompt": SHORT,
}
REPLAY = {"tokens": "t-spmo", "tspmo_replay": 2}


@dataclass
class Answer:
    """What the server sends back; ``None`` as body: it hangs up without a word."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def said(text: str | None, tokens: int | None = 10, finish: str = "stop") -> Answer:
    """A chat completion."""
    usage = {} if tokens is None else {"usage": {"total_tokens": tokens}}
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return Answer({"object": "chat.completion", "choices": [choice]} | usage)


def refused(status: int, message: str = "no", **headers: str) -> Answer:
    return Answer({"error": {"message": message}}, status, {k.replace("_", "-"): v for k, v in headers.items()})


def attempt(body: dict[str, Any]) -> str:
    """The completion that a request asks about."""
    found = re.search(r"<(attempt-\w+)>\n(.*)\n</\1>", body["messages"][0]["content"], re.DOTALL)
    assert found
    return found[2]


@dataclass
class Request:
    path: str
    body: dict[str, Any]
    headers: dict[str, str]
    time: float


class JudgeServer:
    """Started at once; ``requests`` are the chat completions asked for, in the order of their arrival.

    Args:
        behave: gives the answer to a request's body and its number, from 0.
    """

    def __init__(self, behave: Callable[[dict[str, Any], int], Answer], models: tuple[str, ...] = ("judge-1",)) -> None:
        self.behave = behave
        self.models = models
        self.listing: Answer | None = None  # instead of the list of models
        self.requests: list[Request] = []
        self.at_once = self.most_at_once = 0
        self.released = threading.Event()
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.reply(outer.listing or Answer({"data": [{"id": name} for name in outer.models]}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.reply(outer.answer(Request(self.path, body, dict(self.headers), time.monotonic())))

            def reply(self, answer: Answer) -> None:
                self.close_connection = answer.body is None
                if answer.body is None:
                    return
                content = answer.body if isinstance(answer.body, str) else json.dumps(answer.body)
                self.send_response(answer.status)
                for name, value in {**answer.headers, "Content-Length": str(len(content.encode()))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content.encode())

            def log_message(self, *_: object) -> None: ...

            def handle(self) -> None:
                with suppress(ConnectionError):  # the client gave up waiting
                    super().handle()

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self, request: Request) -> Answer:
        with self._lock:
            number = len(self.requests)
            self.requests.append(request)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return self.behave(request.body, number)
        finally:
            with self._lock:
                self.at_once -= 1

    def hang(self) -> Answer:
        """Until the test is over."""
        self.released.wait(60)
        return Answer()

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()


class Asker:
    """Makes servers and judges of them, and closes both. Scores are cached in ``folder``; retries wait milliseconds.

    ``retries`` and ``concurrency`` among the settings stand for the constants of the endpoint.
    """

    def __init__(self, folder: Any, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(endpoint, "BACKOFF_SECONDS", 0.001)
        self.calls = Calls()
        self._made: list[Any] = []

    def serve(self, behave: Callable[[dict[str, Any], int], Answer], **more: Any) -> JudgeServer:
        self._made.append(server := JudgeServer(behave, **more))
        return server

    def config(self, server: JudgeServer | str, **settings: Any) -> RunConfig:
        url = server if isinstance(server, str) else server.url
        for name in {"retries", "concurrency"} & settings.keys():
            self.patch.setattr(endpoint, name.upper(), settings.pop(name))
        base = {"judge_url": url}
        return RunConfig(**{"reward_funcs": ["judge"], **base, **settings})

    def judge(self, server: JudgeServer | str, **settings: Any) -> Judge:
        self._made.append(judge := Judge(self.config(server, **settings)))
        return judge

    def grade(self, server: JudgeServer | str, *texts: str, **settings: Any) -> list[Judgement]:
        return self.judge(server, **settings).grade(PROBLEM, texts or ("It is 7.",), self.calls)

    def close(self) -> None:
        for made in reversed(self._made):
            made.close()
