"""Plain lines for logs, pipes and notebooks: no control codes, no more lines than a person reads."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, TextIO

from rich.console import Console

from igrpo_lite.config import RunConfig
from igrpo_lite.report.screen import EvaluationName, Level, Pace, Sample
from igrpo_lite.report.summary import summary_view
from igrpo_lite.report.text import clean, count, duration, evaluation_line, number, percent, sample_lines

_WIDTH = 79
_SECONDS_BETWEEN_STEPS = 2.0
_SECONDS_BETWEEN_HEARTBEATS = 30.0
_LINES_BETWEEN_HEADERS = 20


class PlainScreen:
    """One compact line per step, or one per two seconds where steps are faster than that."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._spoke = clock()
        self._stepped: float | None = None
        self._pending: Mapping[str, Any] | None = None
        self._step_lines = 0
        self._pace = Pace(0, 1)
        self._two_stages = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._flush()

    def start(self, config: RunConfig, lines: Sequence[str], done_steps: int) -> None:
        self._pace = Pace(config.max_steps, config.eval_steps, done_steps)
        self._two_stages = config.two_stages
        for line in lines:
            self._say(clean(line))

    def message(self, text: str, level: Level = "info") -> None:
        self._flush()
        prefix = "warning: " if level == "warning" else ""
        for line in textwrap.wrap(prefix + clean(text), _WIDTH, subsequent_indent="  ", break_on_hyphens=False):
            self._say(line)

    def evaluation(self, name: EvaluationName, result: Mapping[str, Any]) -> None:
        self._flush()
        self._pace.evaluation(result.get("seconds"))
        self._say(evaluation_line(name, result))

    def step(self, metrics: Mapping[str, Any]) -> None:
        self._pace.step(metrics["step"], (metrics.get("time") or {}).get("step"))
        self._pending = metrics
        due = self._stepped is None or self._clock() - self._stepped >= _SECONDS_BETWEEN_STEPS
        if due or metrics["step"] >= self._pace.max_steps:
            self._flush()

    def sample(self, good: Sample | None, bad: Sample | None) -> None:
        self._flush()
        for label, sample in (("good", good), ("bad", bad)):
            for line in sample_lines(label, sample, _WIDTH) if sample else ():
                self._say(line)

    def heartbeat(self, text: str) -> None:
        if self._clock() - self._spoke >= _SECONDS_BETWEEN_HEARTBEATS:
            self._say(f"... {clean(text)}"[:_WIDTH])

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._flush()
        self._say("")
        # force_jupyter: rich would otherwise display HTML in a notebook; width and height: it would ask the terminal.
        console = Console(
            width=_WIDTH, height=25, color_system=None, force_terminal=False, force_jupyter=False, legacy_windows=False
        )
        with console.capture() as page:
            console.print(summary_view(summary), crop=False)
        for line in page.get().splitlines():
            self._say(line.rstrip())

    def _flush(self) -> None:
        """Print the latest step if it was held back."""
        if self._pending is None:
            return
        metrics, self._pending = self._pending, None
        if self._step_lines % _LINES_BETWEEN_HEADERS == 0:
            self._header()
        self._step_lines += 1
        self._stepped = self._clock()
        self._say(self._row(metrics))

    def _header(self) -> None:
        stages = f"{'reward':>8}{'right':>6}" * (2 if self._two_stages else 1)
        if self._two_stages:
            self._say(f"{'':>9}{'drafts':>14}{'refined':>14}")
        self._say(f"{'step':>9}{stages}{'informative':>13}{'cut':>6}{'length':>8}{'tok/s':>7}{'left':>7}")

    def _row(self, metrics: Mapping[str, Any]) -> str:
        stages = ("stage1", "stage2") if self._two_stages else ("stage1",)
        row = f"{metrics['step']}/{self._pace.max_steps}".rjust(9)
        for stage in stages:
            row += f"{number(metrics.get(f'{stage}/reward')):>8}{_tight(metrics.get(f'{stage}/accuracy')):>6}"
        last = stages[-1]
        cuts = [share for stage in stages if (share := metrics.get(f"{stage}/truncated")) is not None]
        row += f"{_tight(metrics.get(f'{last}/informative')):>13}{_tight(max(cuts, default=None)):>6}"
        row += f"{number(metrics.get(f'{last}/length'), 0):>8}"
        speed = (metrics.get("time") or {}).get("tokens_per_second")
        return row + f"{count(speed):>7}{duration(self._pace.remaining()):>7}"

    def _say(self, line: str) -> None:
        self._spoke = self._clock()
        stream = self._stream or sys.stdout
        if stream is None:  # a process without a console, such as pythonw
            return
        encoding = getattr(stream, "encoding", None) or "utf-8"
        stream.write(line.encode(encoding, "replace").decode(encoding) + "\n")
        stream.flush()


class QuietScreen(PlainScreen):
    """Warnings and the summary only."""

    def start(self, config: RunConfig, lines: Sequence[str], done_steps: int) -> None:
        pass

    def message(self, text: str, level: Level = "info") -> None:
        if level == "warning":
            super().message(text, level)

    def evaluation(self, name: EvaluationName, result: Mapping[str, Any]) -> None:
        pass

    def step(self, metrics: Mapping[str, Any]) -> None:
        pass

    def sample(self, good: Sample | None, bad: Sample | None) -> None:
        pass

    def heartbeat(self, text: str) -> None:
        pass


def _tight(share: float | None) -> str:
    return percent(share).replace(" ", "")
