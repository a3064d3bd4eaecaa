"""Counts of calls that may fail: those of users' functions and of the judge."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Calls:
    """The calls of one reward, counted.

    Attributes:
        first: the first failure: a traceback, or where a function hung, or what an endpoint said.
        tokens: read and written by the judge, failures included.
    """

    made: int = 0
    raised: int = 0
    timed_out: int = 0
    first: str = ""
    tokens: int = 0

    @property
    def failed(self) -> int:
        return self.raised + self.timed_out
