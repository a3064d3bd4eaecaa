"""Users' own rewards, those that work and every way to fail. The functions and processes are real."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from reward_parts import PROBLEM, PROMPT, RIGHT, WRONG, Make, completion, parts

from igrpo_lite.errors import RewardError
from igrpo_lite.worker.functions import checked_values
from igrpo_lite.worker.process import Worker

# Users' functions that work


def test_trl_form_gets_what_it_names(make: Make) -> None:
    scorer = make(
        """
        def reward(completions, answer, level, prompts, completion_ids, question, other=3):
            assert (answer, level, prompts) == (["7"] * 2, ["easy"] * 2, ["How many?"] * 2)
            assert (completion_ids, question, other) == ([[5, 6]] * 2, ["How many?"] * 2, 3)
            return [len(c) for c in completions]
        def everything(prompts, completions, log_metric, log_extra, **kwargs):
            log_metric("x", 1.0); log_extra("y", [1])
            return [float(sorted(kwargs) == ["answer", "completion_ids", "level", "question"])] * len(completions)
        """,
        "reward",
        "everything",
    )
    assert parts(scorer, "ab", "abc") == [2.0, 3.0]
    assert parts(scorer, "ab", name="everything") == [1.0]


def test_scalar_async_callable_and_none(make: Make) -> None:
    scorer = make(
        """
        import asyncio
        def reward(completion, answer, level): return None if completion == "skip" else completion == answer
        async def later(completions, **_): await asyncio.sleep(0.01); return [0.5] * len(completions)
        async def each(completion): await asyncio.sleep(0.3); return len(completion)
        class Judge:
            def __call__(self, completions): return tuple(completions and [1] * len(completions))
        judge = Judge()
        """,
        "reward", "later", "each", "judge",
    )  # fmt: skip
    began = time.monotonic()
    scores = scorer.score(PROBLEM, PROMPT, [completion(text) for text in ("7", "skip", "no", "x", "y", "z")])
    assert time.monotonic() - began < 1.7, "the six waits of 0.3 s run at the same time"
    assert [score.parts["reward"] for score in scores] == [1.0, None, 0.0, 0.0, 0.0, 0.0]
    assert scores[1].parts == {"reward": None, "later": 0.5, "each": 4.0, "judge": 1.0}
    assert scores[1].reward == 5.5


def test_all_none_gives_no_reward(make: Make) -> None:
    scorer = make("def reward(completions): return [None, 1]")
    scores = scorer.score(PROBLEM, PROMPT, [completion(RIGHT), completion(WRONG)])
    assert [score.reward for score in scores] == [None, 1.0]
    assert scores[0].reason == "correct"


def test_a_part_of_weight_0_is_recorded_and_no_opinion(make: Make) -> None:
    scorer = make("def reward(completions): return [None, 2]", "reward", "accuracy", weights=[0.5, 0])
    scores = scorer.score(PROBLEM, PROMPT, [completion(RIGHT), completion(WRONG)])
    assert [score.reward for score in scores] == [None, 1.0]
    assert [score.parts["accuracy"] for score in scores] == [1.0, 0.0]


def test_arrays_are_lists() -> None:
    numpy = pytest.importorskip("numpy")
    assert checked_values("f", numpy.array([1, 2]), 2) == [1.0, 2.0]
    assert checked_values("f", [numpy.float32(0.5), True], 2) == [0.5, 1.0]


def test_prints_and_standard_input_do_no_harm(make: Make) -> None:
    scorer = make(
        """
        import os, sys, subprocess
        print("at import")
        def reward(completions):
            print("x" * 100_000); os.write(1, b"raw"); subprocess.run([sys.executable, "-c", "print('child')"])
            return [float(sys.stdin.read() == "")] * len(completions)
        """
    )
    assert parts(scorer, "a", "b") == [1.0, 1.0]
    assert parts(scorer, "a") == [1.0]


def test_a_big_batch_crosses_the_pipe(make: Make) -> None:
    scorer = make("def reward(completions): return [len(c) for c in completions]")
    assert parts(scorer, *["y" * 500_000] * 4) == [500_000.0] * 4


def test_the_worker_imports_nothing_heavy_and_finds_neighbours(make: Make, tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("VALUE = 4.0\n", encoding="utf-8")
    scorer = make(
        """
        import sys
        from neighbour import VALUE
        def reward(completions):
            heavy = {"torch", "transformers", "numpy", "pydantic"} & set(sys.modules)
            assert not heavy, heavy
            return [VALUE] * len(completions)
        """
    )
    scorer.check(PROBLEM)
    assert parts(scorer, "a") == [4.0]


# Users' functions that are wrong: the run stops


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("def reward(completions): return [1.0]", "1 values for 2 completions"),
        ("def reward(completions): return 1.0", "expected a list of 2 numbers"),
        ("def reward(completions): return [float('nan')] * 2", "nan (float), expected a finite number"),
        ("def reward(completions): return [1, float('inf')]", "inf (float)"),
        ("def reward(completions): return ['1', 2]", "'1' (str)"),
        ("def reward(completion): return [1]", "[1] (list)"),
        ("def reward(completions, answers): return [1, 1]", "asks for answers"),
        ("def reward(completions, answers): return [1, 1]", "did you mean answer?"),
        ("def reward(completions, /): return [1, 1]", "positional-only"),
        ("def reward(completions): return [1 / 0] * 2", "ZeroDivisionError"),
        ("def reward(completions): return [c[0]['content'] for c in completions]", "plain strings here"),
        ("import sys\ndef reward(completions): sys.exit(3)", "SystemExit: 3"),
        ("import os\ndef reward(completions): os._exit(3)", "ended by itself (exit code 3)"),
        ("import no_such_thing\ndef reward(completions): return [1, 1]", "No module named 'no_such_thing'"),
        ("import os\nos._exit(4)\ndef reward(completions): return [1, 1]", "cannot be imported"),
        ("reward = 3", "a int, not a function"),
    ],
)
def test_check_names_what_is_wrong(make: Make, source: str, told: str) -> None:
    scorer = make(source)
    with pytest.raises(RewardError) as raised:
        scorer.check(PROBLEM)
    assert told in str(raised.value)
    assert "mine.py:reward" in str(raised.value)


def test_check_tells_where_a_call_hangs(make: Make) -> None:
    scorer = make("import time\n\ndef reward(completions):\n    while True: time.sleep(0.1)", timeout=1.0)
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"no reply within 1 s(.|\n)*mine.py\", line 4 in reward"):
        scorer.check(PROBLEM)
    assert time.monotonic() - began < 6.0


def test_a_timeout_of_any_length_is_taken(make: Make) -> None:
    assert parts(make("def reward(completions): return [1]", timeout=1e300), "x") == [1.0]


def test_an_import_that_hangs_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "slow.py"
    path.write_text("import time\ntime.sleep(60)\ndef reward(completions): ...\n", encoding="utf-8")
    worker = Worker(load_timeout=2.0)
    with pytest.raises(RewardError, match="no reply within 2 s"):
        worker.splits(f"{path}:reward")
    assert worker.pid is None


# Calls that fail now and then: counted


def test_a_call_that_raises_or_ends_leaves_its_part_out(make: Make) -> None:
    scorer = make(
        """
        import os
        def reward(completions):
            if "raise" in completions: raise ValueError("no such thing")
            if "die" in completions: os._exit(9)
            return [1.0] * len(completions)
        """,
        "reward",
        "accuracy",
    )
    scores = scorer.score(PROBLEM, PROMPT, [completion("raise"), completion(RIGHT)])
    assert [score.parts["reward"] for score in scores] == [None, None]
    assert [score.reward for score in scores] == [0.0, 1.0]
    assert parts(scorer, "die") == [None]
    assert parts(scorer, "fine") == [1.0]
    calls = scorer.failures["reward"]
    assert (calls.made, calls.raised, calls.timed_out, calls.failed) == (3, 2, 0, 2)
    assert "ValueError: no such thing" in calls.first
    assert "igrpo_lite" not in calls.first


def test_a_scalar_function_fails_for_its_own_completion_only(make: Make) -> None:
    scorer = make("def reward(completion): return 1 / len(completion)")
    assert parts(scorer, "ab", "", "a") == [0.5, None, 1.0]


def test_hanging_calls_are_killed_with_their_children_and_work_goes_on(make: Make, tmp_path: Path) -> None:
    mark = tmp_path / "child.txt"
    scorer = make(
        f"""
        import subprocess, sys, time
        def reward(completions):
            if "hang" in completions:
                child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
                open({str(mark)!r}, "w").write(str(child.pid))
                time.sleep(600)
            if "lock" in completions: 9 ** 9 ** 9  # never gives the interpreter's lock back
            return [1.0] * len(completions)
        """,
        timeout=1.0,
    )
    began = time.monotonic()
    assert parts(scorer, "hang") == [None]
    assert parts(scorer, "fine") == [1.0]
    assert parts(scorer, "lock") == [None]
    assert time.monotonic() - began < 12.0
    assert scorer.failures["reward"].timed_out == 2
    if os.name == "posix":
        assert _gone(int(mark.read_text()))


def test_too_many_failures_stop_the_run(make: Make) -> None:
    scorer = make(
        """
        def reward(completions):
            if "raise" in completions: raise ValueError("first" if "1" in completions else "later")
            return [1.0] * len(completions)
        """
    )
    assert parts(scorer, "raise", "1") == [None, None]
    for _ in range(18):
        parts(scorer, "fine")
    assert len(scorer.score(PROBLEM, PROMPT, [completion("fine")])) == 1, "1 in 20 is 5 %"
    with pytest.raises(RewardError, match=r"failed in 2 of 21 calls(.|\n)*ValueError: first"):
        parts(scorer, "raise")


# The worker's life


def _gone(pid: int) -> bool:
    for _ in range(60):
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat")
            if state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.1)
    return False


def test_close_lets_the_worker_finish_and_it_can_start_again(make: Make, tmp_path: Path) -> None:
    mark = tmp_path / "done.txt"
    scorer = make(
        f"""
        import atexit
        atexit.register(lambda: open({str(mark)!r}, "w").write("closed"))
        def reward(completions): return [1.0] * len(completions)
        """
    )
    assert parts(scorer, "a") == [1.0]
    scorer.close()
    assert mark.read_text() == "closed"
    assert parts(scorer, "a") == [1.0]


@pytest.mark.skipif(os.name != "posix", reason="looks processes up by signal 0")
@pytest.mark.parametrize("kind", ["-c", "stdin"])
def test_it_works_without_a_main_file_and_dies_with_its_parent(tmp_path: Path, kind: str) -> None:
    (tmp_path / "mine.py").write_text("def reward(completions): return [2.0] * len(completions)\n", encoding="utf-8")
    program = textwrap.dedent(
        """
        import os
        from igrpo_lite.worker.process import Worker
        worker = Worker()
        values = worker.call("mine.py:reward", {"completions": ["a"]}, 1, 10.0).returned.values
        assert values == [2.0], values
        assert worker.call("mine:reward", {"completions": ["a"]}, 1, 10.0).returned.values == [2.0]
        print(worker.pid, flush=True)
        os.kill(os.getpid(), 9)
        """
    )
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, *(["-c", program] if kind == "-c" else ["-"])],
        input=None if kind == "-c" else program,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip().isdigit(), done.stderr
    assert _gone(int(done.stdout))


def test_the_functions_of_the_docs_work(make: Make) -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "rewards.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    scorer = make(source, "brief", "polite")
    scorer.check(PROBLEM)
    scores = scorer.score(PROBLEM, PROMPT, [completion("please do"), completion(""), completion("a b c d")])
    assert [score.parts["brief"] for score in scores] == [0.5, None, 0.25]
    assert [score.parts["polite"] for score in scores] == [1.0, 0.0, 0.0]
    assert scorer.take_logged() == {"reward/brief/words": 2.0}
