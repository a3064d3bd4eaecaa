"""The screens: what they say, that foreign text cannot harm them, and that nothing is wider than the terminal."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from igrpo_lite.config import RunConfig
from igrpo_lite.report import choice as screen_module
from igrpo_lite.report.choice import make_screen
from igrpo_lite.report.live import LiveScreen
from igrpo_lite.report.plain import PlainScreen, QuietScreen
from igrpo_lite.report.screen import Pace, Sample, Screen
from igrpo_lite.report.text import clean, count, cut, duration, evaluation_line, sample_lines

NASTY = "a [bold red]b[/] [/nope] \x1b[2J\x1b]0;title\x07 c\r\x08\x00 \u202egnirts\u202c \ud800 漢字かな :smile: \\["
GOOD = Sample(NASTY, None, NASTY * 40, "57", "correct", 1.1)
BAD = Sample("Ana has 50 pens. " * 30, NASTY, "\\boxed{31}\n" * 200, NASTY, "wrong", None)


def evaluation(step: int, accuracy: float, width: float = 0.068) -> dict[str, Any]:
    part = {"accuracy": accuracy, "n": 200, "low": accuracy - width, "high": accuracy + width}
    return {"step": step, "single": part, "refined": part, "single_length": 20.0, "seconds": 2.0}


def metrics(step: int, **changes: Any) -> dict[str, Any]:
    values = {"reward": 0.44, "accuracy": 0.46, "informative": 0.77, "truncated": 0.0, "length": 17.2}
    stages = {f"{stage}/{key}": value for stage in ("stage1", "stage2") for key, value in values.items()}
    time = {"rollout": 0.2, "reward": 0.0, "update": 0.5, "step": 0.8, "tokens_per_second": 1830.0}
    return {"step": step, "loss": 0.123, "learning_rate": 9.3e-4, "entropy": 0.11, "time": time} | stages | changes


SUMMARY = {
    "before": evaluation(0, 0.475),
    "after": evaluation(40, 0.638),
    "steps": 40,
    "max_steps": 40,
    "best": evaluation(20, 0.65),
    "evaluations": 3,
    "time": {"rollout": 20.0, "update": 3700.0},
    "adapter": "runs/" + "long-name-" * 12 + "/adapter",
    "next": ["igrpo-lite eval runs/" + "long-name-" * 12],
}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def drive(screen: Screen, clock: Clock, steps: int = 40, seconds: float = 0.8) -> None:
    config = RunConfig(max_steps=steps, eval_steps=20)
    with screen:
        screen.start(config, ["8 problems per step", NASTY], 0)
        screen.evaluation("before", evaluation(0, 0.475))
        for step in range(1, steps + 1):
            clock.now += seconds
            screen.heartbeat(NASTY)
            screen.step(metrics(step))
            if step == 20:
                screen.evaluation("during", evaluation(20, 0.638))
                screen.sample(GOOD, BAD)
                screen.message("61% of the drafts were cut. " + NASTY, "warning")
                screen.message("saved " + NASTY)
        screen.evaluation("after", evaluation(steps, 0.61))
        screen.finish(SUMMARY)


def break_off(screen: Screen) -> None:
    with screen:
        screen.start(RunConfig(), [], 0)
        screen.step(metrics(1))
        screen.step(metrics(2))
        raise RuntimeError


def plain_lines(screen_type: type[PlainScreen] = PlainScreen, **options: Any) -> list[str]:
    stream, clock = io.StringIO(), Clock()
    drive(screen_type(stream, clock), clock, **options)
    return stream.getvalue().splitlines()


def terminal(width: int = 80, height: int = 24) -> Console:
    return Console(file=io.StringIO(), width=width, height=height, force_terminal=True, record=True)


def frame(screen: LiveScreen, width: int = 80, height: int = 24) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None)
    console.print(screen.view())
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def running_live(width: int = 80, height: int = 24) -> LiveScreen:
    """A live screen in the middle of a run, its own thread never started."""
    screen = LiveScreen(terminal(width, height), Clock())
    screen.start(RunConfig(max_steps=40, eval_steps=20, model=NASTY), [], 0)
    screen.evaluation("before", evaluation(0, 0.475))
    screen.evaluation("during", evaluation(20, 0.638))
    screen.evaluation("during", evaluation(30, 0.61))
    screen.step(metrics(30, **{"stage2/copied": 0.62, "stage2/fixed": None, "stage2/broke": 0.04}))
    screen.sample(GOOD, BAD)
    screen.message("first", "warning")
    screen.message("61% of the drafts were cut. " + NASTY, "warning")
    screen.heartbeat("drafts 33/64 " + NASTY)
    screen.__exit__()
    screen.sample(GOOD, BAD)
    screen.heartbeat("drafts 33/64 " + NASTY)
    return screen


# Text


def test_clean_leaves_one_harmless_line() -> None:
    text = clean(NASTY)
    assert text.isprintable()
    assert "[bold red]b[/]" in text
    assert "2J" not in text
    assert "title" not in text
    assert clean("a\n\tb\r\nc") == "a b c"


@pytest.mark.parametrize("width", [3, 10, 33, 80])
@pytest.mark.parametrize("keep_end", [True, False])
def test_cut_never_exceeds_its_width(width: int, keep_end: bool) -> None:
    for text in (NASTY, "漢" * 200, "x" * 100_000, "", "e\u0301" * 90):
        assert cell_len(cut(text, width, keep_end)) <= width


def test_cut_can_keep_the_answer_at_the_end() -> None:
    assert cut("3*9=27; " * 1000 + "\\boxed{57}", 40, keep_end=True).endswith("\\boxed{57}")
    assert cut("abc", 3) == "abc"


def test_numbers_are_short() -> None:
    assert [duration(s) for s in (None, 0, 34.4, 725)] == ["-", "0:00", "0:34", "12:05"]
    assert [duration(s) for s in (11100, 187200)] == ["3h05m", "2d04h"]
    assert [count(n) for n in (None, 950, 1830, 23_000, 1.2e6)] == ["-", "950", "1.8k", "23k", "1.2M"]


def test_lines_about_evaluations_and_samples_fit() -> None:
    line = evaluation_line("during", evaluation(20, 0.638))
    assert line == "held-out accuracy, step 20: 63.8 % (57.0-70.6), refined 63.8 % (57.0-70.6)"
    assert len(evaluation_line("during", evaluation(123_456, 0.9, 0.1))) <= 79
    assert evaluation_line("before", {"step": 0, "single": {"accuracy": 0.5}}) == "held-out accuracy, before: 50.0 %"
    for sample in (GOOD, BAD):
        assert all(cell_len(line) <= 79 for line in sample_lines("good", sample, 79))


def test_pace_counts_evaluations_roughly() -> None:
    pace = Pace(max_steps=100, eval_steps=50, done_steps=40)
    assert pace.remaining() is None
    for step in range(41, 51):
        pace.step(step, 2.0)
    assert pace.remaining() == 100.0
    pace.evaluation(7.0)
    assert pace.remaining() == 107.0


# Plain lines


def test_plain_lines_fit_and_hold_no_control_codes() -> None:
    lines = plain_lines()
    for line in lines:
        assert line.isprintable()
        assert cell_len(line) <= 79 or "long-name-" in line or "漢" in line
    text = "\n".join(lines)
    assert "[bold red]b[/]" in text
    assert "loss" not in text
    assert "held-out accuracy, before: 47.5 %" in text
    assert "held-out accuracy, step 20: 63.8 %" in text


def test_plain_steps_are_thinned_but_first_and_last_are_there() -> None:
    steps = [line.split("/")[0].strip() for line in plain_lines() if "/40 " in line]
    assert steps[0] == "1"
    assert steps[-1] == "40"
    assert "20" in steps
    assert len(steps) < 20
    slow = [line for line in plain_lines(seconds=5.0) if "/40 " in line]
    assert len(slow) == 40


def test_a_step_held_back_is_shown_when_the_run_breaks_off() -> None:
    stream, clock = io.StringIO(), Clock()
    with pytest.raises(RuntimeError):
        break_off(PlainScreen(stream, clock))
    assert "2/200 " in stream.getvalue()


def test_grpo_has_one_stage_and_absent_numbers_are_dashes() -> None:
    stream = io.StringIO()
    screen = PlainScreen(stream, Clock())
    screen.start(RunConfig(algorithm="grpo"), [], 0)
    screen.step({"step": 1})
    header, row = stream.getvalue().splitlines()
    assert header.count("reward") == 1
    assert row.split() == ["1/200"] + ["-"] * 7


def test_the_heartbeat_speaks_only_in_silence() -> None:
    stream, clock = io.StringIO(), Clock()
    screen = PlainScreen(stream, clock)
    for second in range(100):
        clock.now = float(second)
        screen.heartbeat(f"drafts {second}/100")
    assert stream.getvalue().splitlines() == ["... drafts 30/100", "... drafts 60/100", "... drafts 90/100"]


def test_quiet_keeps_warnings_and_the_summary() -> None:
    lines = plain_lines(QuietScreen)
    assert lines[0].startswith("warning: 61%")
    assert any("+16.3 points" in line for line in lines)
    assert not any("/40 " in line for line in lines)


def test_the_summary_is_honest() -> None:
    text = "\n".join(plain_lines())
    assert "n = 200 problems" in text
    assert "do not overlap" in text
    assert "one seed" in text
    assert "Best of 3 evaluations: 65.0 % (58.2-71.8) at step 20" in text
    assert "flatters" in text
    assert SUMMARY["adapter"] in text, "a path must stay whole to be copied"
    assert SUMMARY["next"][0] in text
    stream = io.StringIO()
    PlainScreen(stream).finish({"before": evaluation(0, 0.475), "after": evaluation(20, 0.52), "stopped": "Ctrl-C"})
    assert "overlap: the change can be noise" in stream.getvalue()
    assert "Stopped: Ctrl-C" in stream.getvalue()
    PlainScreen(stream).finish({})
    PlainScreen(stream).finish({"before": evaluation(0, 0.475), "after": None})
    assert "no change can be stated" in stream.getvalue()


def test_a_narrow_encoding_does_not_stop_a_run() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    clock = Clock()
    drive(PlainScreen(stream, clock), clock)
    assert b"??" in raw.getvalue()


# The live view


@pytest.mark.parametrize(("width", "height"), [(80, 24), (80, 40), (60, 20), (120, 50)])
def test_the_live_view_fits(width: int, height: int) -> None:
    lines = frame(running_live(width, height), width, height)
    assert all(cell_len(line) <= width for line in lines)
    assert len(lines) < height
    text = "\n".join(lines)
    assert text.replace("\n", "").isprintable()
    assert "loss" not in text


def test_the_live_view_shows_what_matters() -> None:
    text = "\n".join(frame(running_live(height=40), height=40))
    for said in ("47.5 % (40.7-54.3)", "best (step 20)", "last (step 30)", "refinements", "77 %", "1.8k tokens/s"):
        assert said in text
    assert "2 warnings, latest: 61% of the drafts" in text
    assert "drafts 33/64" in text
    assert "drafts copied 62 %, wrong ones fixed -, right ones broken 4 %" in text
    assert "[bold red]b[/]" in text
    assert "[/nope]" in text
    assert ":smile:" in text
    assert "igrpo" in text
    assert "step 30/40" in text


def test_the_live_screen_restores_the_terminal_after_an_error() -> None:
    console = terminal()
    stdout = sys.stdout
    with pytest.raises(RuntimeError):
        break_off(LiveScreen(console, Clock()))
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert sys.stdout is stdout
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l"), "the cursor must be visible again"


def test_a_whole_live_run_strips_what_models_write() -> None:
    console, clock = terminal(), Clock()
    drive(LiveScreen(console, clock), clock)
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[2J" not in written
    assert "\x1b]0;" not in written
    assert "\u202e" not in written
    text = console.export_text()
    assert "Warning: 61% of the drafts" in text
    assert "+16.3 points" in text
    assert SUMMARY["adapter"] in text


# Choice of the screen


class Stream(io.StringIO):
    """A standard output that says it is, or is not, a terminal, and must never be asked for its file number."""

    encoding = "utf-8"

    def __init__(self, tty: bool) -> None:
        super().__init__()
        self._tty = tty

    def isatty(self) -> bool:
        return self._tty

    def fileno(self) -> int:
        raise AssertionError("fileno() does not exist in notebooks")


@pytest.fixture
def outside_notebooks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in screen_module._NOTEBOOK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name in ("ipykernel", "google.colab"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    return


@pytest.mark.usefixtures("outside_notebooks")
def test_the_screen_suits_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(progress: str, stdout: object) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stdout)
            return type(make_screen(progress)).__name__

    assert chosen("auto", Stream(tty=True)) == "LiveScreen"
    assert chosen("auto", Stream(tty=False)) == chosen("live", Stream(tty=False)) == "PlainScreen"
    assert chosen("plain", Stream(tty=True)) == "PlainScreen"
    assert chosen("off", Stream(tty=True)) == "QuietScreen"
    assert chosen("auto", object()) == chosen("auto", None) == "PlainScreen"
    for name, value in (("TERM", "dumb"), ("COLAB_RELEASE_TAG", "1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert chosen("auto", Stream(tty=True)) == "PlainScreen"
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    assert chosen("auto", Stream(tty=True)) == "PlainScreen"
    assert chosen("live", Stream(tty=True)) == "LiveScreen"


def test_plain_lines_need_no_file_number(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, clock = Stream(tty=False), Clock()
    monkeypatch.setattr(sys, "stdout", stream)
    drive(PlainScreen(clock=clock), clock)
    assert "\x1b" not in stream.getvalue()
    assert "+16.3 points" in stream.getvalue()


def test_colour_variables_do_not_colour_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    assert "\x1b" not in "\n".join(plain_lines())
