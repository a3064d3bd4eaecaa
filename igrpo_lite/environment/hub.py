"""Whether models and data can be had from the Hugging Face hub: one short request, as its own library makes them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

from igrpo_lite.environment.facts import Hub

TIMEOUT = 3.0
_ENDPOINT = "https://huggingface.co"
_CACHE = Path("~/.cache/huggingface/hub")


class HubQuestion:
    """The request, in a thread of its own: looking up a name cannot be given a time limit.

    Args:
        ask: whether the network may be used.
    """

    def __init__(self, ask: bool) -> None:
        constants = _constants()
        endpoint = constants.ENDPOINT if constants else os.environ.get("HF_ENDPOINT", _ENDPOINT)
        self._hub = Hub(endpoint, "not asked", token=_has_token(constants))
        self._thread: Thread | None = None
        if constants is not None and constants.HF_HUB_OFFLINE:
            self._hub = replace(self._hub, state="offline")
        elif ask:
            self._hub = replace(self._hub, state="unreachable", detail=f"no answer within {TIMEOUT:.0f} s")
            self._thread = Thread(target=self._ask, daemon=True)
            self._thread.start()

    def answer(self) -> Hub:
        """What came of it; waits for the rest of the time limit."""
        if self._thread is not None:
            self._thread.join(2 * TIMEOUT)
        return self._hub

    def _ask(self) -> None:
        try:
            from huggingface_hub.utils import get_session

            # The library's session: the same proxies, certificates and headers as a download.
            code = get_session().head(self._hub.endpoint, timeout=TIMEOUT, follow_redirects=True).status_code
        except Exception as error:
            cause = (str(error).strip().splitlines() or [""])[0]
            self._hub = replace(self._hub, detail=f"{type(error).__name__}: {cause}".rstrip(": "))
        else:
            wrong = code >= 500 or code == 407  # the proxy wants a password
            self._hub = replace(self._hub, state="unreachable" if wrong else "reachable", detail=f"HTTP {code}")


def cache_folder() -> Path:
    """Where downloaded models go."""
    constants = _constants()
    return Path(constants.HF_HUB_CACHE) if constants else _CACHE.expanduser()


def _constants() -> Any:
    """The hub library's reading of its environment variables; ``None`` if it is not there or broken."""
    try:
        from huggingface_hub import constants
    except Exception:
        return None
    return constants


def _has_token(constants: Any) -> bool:
    stored = constants is not None and Path(constants.HF_TOKEN_PATH).is_file()
    return stored or any(map(os.environ.get, ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")))
