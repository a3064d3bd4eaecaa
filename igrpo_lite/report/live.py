"""The live view of a terminal: held-out accuracy on top, then both stages, the pace, the latest warning and samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from igrpo_lite.config import RunConfig
from igrpo_lite.report.screen import EvaluationName, Level, Pace, Sample
from igrpo_lite.report.summary import summary_view
from igrpo_lite.report.text import (
    accuracy,
    clean,
    count,
    cut,
    duration,
    evaluation_line,
    number,
    percent,
    sample_lines,
)

_ROWS_WITHOUT_SAMPLES = 16


class LiveScreen:
    """A view that redraws in place; messages and evaluations also scroll by above it and stay readable afterwards.

    rich calls :meth:`view` from its own thread: the loop's thread therefore only ever replaces the values shown.
    Foreign text (problems, completions, names) is always a ``Text``, so that nothing in it is taken for markup.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(markup=False, emoji=False, highlight=False)
        self._clock = clock
        self._live: Live | None = None
        self._title = ""
        self._stages: tuple[tuple[str, str], ...] = ()
        self._pace = Pace(0, 1)
        self._began = clock()
        self._remaining: float | None = None
        self._status = ""
        self._metrics: Mapping[str, Any] = {}
        self._before: Mapping[str, Any] | None = None
        self._best: Mapping[str, Any] | None = None
        self._last: Mapping[str, Any] | None = None
        self._warnings = 0
        self._warning = ""
        self._samples: tuple[tuple[str, Sample], ...] = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def start(self, config: RunConfig, lines: Sequence[str], done_steps: int) -> None:
        self._title = clean(f"{config.algorithm} | {config.model} | {config.data}")
        drafts = "drafts" if config.two_stages else "completions"
        self._stages = (("stage1", drafts),) + ((("stage2", "refinements"),) if config.two_stages else ())
        self._pace = Pace(config.max_steps, config.eval_steps, done_steps)
        self._began = self._clock()
        for line in lines:
            self._console.print(Text(clean(line)))
        self._live = Live(get_renderable=self.view, console=self._console, refresh_per_second=2)
        self._live.start()

    def message(self, text: str, level: Level = "info") -> None:
        text = clean(text)
        if level == "warning":
            self._warnings += 1
            self._warning = text
            self._console.print(Text(f"Warning: {text}", style="yellow"))
        else:
            self._console.print(Text(text))

    def evaluation(self, name: EvaluationName, result: Mapping[str, Any]) -> None:
        self._pace.evaluation(result.get("seconds"))
        self._remaining = self._pace.remaining()
        if name == "before":
            self._before = result
        if self._best is None or _single(result) > _single(self._best):
            self._best = result
        self._last = result
        self._console.print(Text(evaluation_line(name, result), style="dim"))

    def step(self, metrics: Mapping[str, Any]) -> None:
        self._pace.step(metrics["step"], (metrics.get("time") or {}).get("step"))
        self._remaining = self._pace.remaining()
        self._metrics = metrics
        self._status = ""

    def sample(self, good: Sample | None, bad: Sample | None) -> None:
        self._samples = tuple((label, sample) for label, sample in (("good", good), ("bad", bad)) if sample)

    def heartbeat(self, text: str) -> None:
        self._status = text

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._close()
        self._console.print()
        self._console.print(summary_view(summary), crop=False)

    def view(self) -> RenderableType:
        """The present frame."""
        parts: list[RenderableType] = [Rule(Text(cut(self._title, 60)), style="dim"), self._progress(), Text()]
        if self._last is not None:
            parts += [self._held_out(), Text()]
        if self._metrics:
            parts += [self._stage_table(), *self._gauges()]
        if self._warnings:
            label = f"{self._warnings} warning{'s' if self._warnings > 1 else ''}, latest: "
            parts.append(self._line(label + self._warning, "yellow"))
        return Group(*parts, *self._sample_view())

    def _close(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            self._status, self._samples = "", ()
            live.stop()

    def _line(self, text: str, style: str = "") -> Text:
        return Text(cut(text, self._console.width - 1), style=style, no_wrap=True, overflow="crop")

    def _progress(self) -> RenderableType:
        done, total = self._pace.done, self._pace.max_steps
        grid = Table.grid(padding=(0, 2), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True, justify="right")
        times = f"{duration(self._clock() - self._began)} elapsed, {duration(self._remaining)} left"
        grid.add_row(Text(f"step {done}/{total}", style="bold"), ProgressBar(total=total, completed=done), Text(times))
        return Group(grid, self._line(self._status, "dim"))

    def _held_out(self) -> Table:
        before, best, last = self._before, self._best, self._last
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
        table.add_column("held-out accuracy", no_wrap=True)
        for name, result in (("before", None), ("best", best), ("last", last)):
            at = f" (step {result.get('step', '-')})" if result else ""
            table.add_column(name + at, justify="right", no_wrap=True)
        for label, key in (("single pass", "single"), ("refined", "refined")):
            cells = [accuracy((result or {}).get(key)) for result in (before, best, last)]
            if any(cell != "-" for cell in cells):
                table.add_row(label, *cells, style="bold" if key == "single" else "")
        return table

    def _stage_table(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        table.add_column("this step", no_wrap=True)
        for name in ("reward", "accuracy", "informative", "truncated", "length"):
            table.add_column(name, justify="right", no_wrap=True)
        for stage, label in self._stages:
            values = [self._metrics.get(f"{stage}/{key}") for key in ("accuracy", "informative", "truncated")]
            reward, length = self._metrics.get(f"{stage}/reward"), self._metrics.get(f"{stage}/length")
            table.add_row(label, number(reward), *map(percent, values), number(length, 0))
        return table

    def _gauges(self) -> list[Text]:
        metrics = self._metrics
        parts = [f"{count((metrics.get('time') or {}).get('tokens_per_second'))} tokens/s"]
        if (rate := metrics.get("learning_rate")) is not None:
            parts.append(f"learning rate {rate:.1e}")
        if (entropy := metrics.get("entropy")) is not None:
            parts.append(f"entropy {number(entropy)}")
        lines = [self._line(", ".join(parts), "dim")]
        named = (("copied", "drafts copied"), ("fixed", "wrong ones fixed"), ("broke", "right ones broken"))
        shares = [(label, metrics.get(f"stage2/{key}")) for key, label in named]
        if any(share is not None for _, share in shares):
            lines.append(self._line(", ".join(f"{label} {percent(share)}" for label, share in shares), "dim"))
        return lines

    def _sample_view(self) -> list[RenderableType]:
        lines = [
            Text(line, style="green" if label == "good" else "red", no_wrap=True, overflow="crop")
            for label, sample in self._samples
            for line in sample_lines(label, sample, self._console.width - 1)
        ]
        room = self._console.height - _ROWS_WITHOUT_SAMPLES
        return [Text(), *lines[:room]] if lines and room > 0 else []


def _single(result: Mapping[str, Any]) -> float:
    value = (result.get("single") or {}).get("accuracy")
    return -1.0 if value is None else value
