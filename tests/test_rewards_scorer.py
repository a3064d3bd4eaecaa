"""Scores, weights and users' own rewards in every way in which these fail. The functions and processes are real."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from igrpo_lite.config import RewardOptions
from igrpo_lite.errors import RewardError
from igrpo_lite.rewards.builtin import format_reward, opens_thinking
from igrpo_lite.rewards.custom import checked_values, find_function_error
from igrpo_lite.rewards.scorer import Scorer, reward_findings
from igrpo_lite.rewards.worker import Worker
from igrpo_lite.types import Completion, Problem, Prompt

PROBLEM = Problem("p1", "How many?", "7", {"level": "easy"})
PROMPT = Prompt("How many?", (1, 2))
RIGHT, WRONG = r"It is \boxed{7}", r"It is \boxed{8}"

Make = Callable[..., Scorer]


def completion(text: str, finish: str = "stop") -> Completion:
    return Completion((5, 6), text, (-0.1, -0.2), "length" if finish == "length" else "stop")


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Writes a reward file and makes a scorer of its functions (and of built-in ones, given by name)."""
    scorers: list[Scorer] = []

    def build(source: str, *names: str, timeout: float = 20.0, weights: list[float] | None = None) -> Scorer:
        path = tmp_path / "mine.py"
        path.write_text(textwrap.dedent(source), encoding="utf-8")
        specs = [name if name in ("accuracy", "format") else f"{path}:{name}" for name in names or ("reward",)]
        options = RewardOptions(reward_funcs=specs, reward_weights=weights, reward_timeout=timeout)
        scorers.append(Scorer(options, "boxed"))
        return scorers[-1]

    yield build
    for scorer in scorers:
        scorer.close()


def parts(scorer: Scorer, *texts: str, name: str = "reward") -> list[float | None]:
    return [score.parts[name] for score in scorer.score(PROBLEM, PROMPT, [completion(text) for text in texts])]


# Built-in rewards


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (RIGHT, 1.0),
        (r"\boxed{1} \boxed{2}", 0.0),
        (r"\boxed{1} \boxed{2", 0.0),
        (r"\boxed{ }", 0.0),
        (r"\fbox{1}", 0.0),
        ("7", 0.0),
        (r"<think>\boxed{1}</think> \boxed{2}", 1.0),
    ],
)
def test_format_boxed(text: str, value: float) -> None:
    assert format_reward(text, False, "boxed") == value
    assert format_reward(text, True, "boxed") == 0.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>\na\nb\n</think>\n<answer>\n7\n</answer>\n", 1.0),
        ("<think></think><answer>7</answer>", 1.0),
        ("<think>a</think><answer> </answer>", 0.0),
        ("<think>a</think> so <answer>7</answer>", 0.0),
        ("<think>a</think><answer>7</answer> done", 0.0),
        ("so <think>a</think><answer>7</answer>", 0.0),
        ("<think>a</think><answer>7</answer><answer>7</answer>", 0.0),
        ("<think>a<think>b</think><answer>7</answer>", 0.0),
        ("<answer>7</answer><think>a</think>", 0.0),
        ("a</think><answer>7</answer>", 0.0),
    ],
)
def test_format_tags(text: str, value: float) -> None:
    assert format_reward(text, False, "tags") == value


def test_format_tags_after_an_opened_thought() -> None:
    assert opens_thinking("<|assistant|>\n<think>\n")
    assert not opens_thinking("<think></think> go")
    assert format_reward("a\nb</think>\n<answer>7</answer>", False, "tags", think_opened=True) == 1.0
    assert format_reward("<think>a</think><answer>7</answer>", False, "tags", think_opened=True) == 0.0


def test_weights_and_reasons() -> None:
    with Scorer(RewardOptions(), "boxed") as scorer:
        assert (scorer.names, scorer.weights) == (("accuracy", "format"), (1.0, 0.1))
        scorer.check(PROBLEM)
        texts = [completion(RIGHT), completion(WRONG), completion("7"), completion("hm"), completion("7", "length")]
        scores = scorer.score(PROBLEM, PROMPT, texts)
    assert [score.reward for score in scores] == [1.1, 0.1, 1.0, 0.0, 0.0]
    assert [score.reason for score in scores] == ["correct", "wrong", "correct", "no_answer", "truncated"]
    assert [score.answer for score in scores] == ["7", "8", "7", None, None]


def test_neither_prompt_nor_draft_is_read() -> None:
    with Scorer(RewardOptions(), "boxed") as scorer:
        (score,) = scorer.score(PROBLEM, Prompt(f"How many?\nDraft:\n{RIGHT}", (1,)), [completion("I agree.")])
    assert (score.reward, score.reason) == (0.0, "no_answer")


def test_check_refuses_a_gold_that_cannot_be_verified() -> None:
    with Scorer(RewardOptions(), "boxed") as scorer, pytest.raises(RewardError, match="answer_column"):
        scorer.check(Problem("p", "q", ""))


# Settings


def test_findings_come_all_at_once(tmp_path: Path) -> None:
    broken, other = tmp_path / "broken.py", tmp_path / "other.py"
    broken.write_text("def f(:\n", encoding="utf-8")
    other.write_text("def length_reward(completions): ...\n", encoding="utf-8")
    specs = ["acuracy", "nowhere.py:f", f"{broken}:f", f"{other}:lenght_reward", f"{other}", "no_such_package.x:f"]
    findings = reward_findings(RewardOptions(reward_funcs=specs, reward_weights=[0.0, 0.0]))
    expected = [
        "did you mean accuracy",
        "no file nowhere.py",
        "line 1",
        "did you mean length_reward",
        "names no function",
        "no module no_such_package",
        "2 weights for 6 rewards",
        "all are 0",
    ]
    assert len(findings) == len(expected)
    assert all(part in finding for part, finding in zip(expected, findings, strict=True))
    with pytest.raises(RewardError) as raised:
        Scorer(RewardOptions(reward_funcs=specs), "boxed")
    assert len(raised.value.problems) == 6


def test_static_check_runs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "danger.py"
    path.write_text("raise SystemExit\nif 1:\n    def late(completions): ...\nalias = late\n", encoding="utf-8")
    assert find_function_error(f"{path}:late") is None
    assert find_function_error(f"{path}:alias") is None
    assert find_function_error("json.decoder:scanstring") is None
    assert "no function" in str(find_function_error("json.decoder:nothing"))


def test_functions_go_by_their_own_name(make: Make) -> None:
    scorer = make("def a(completions): ...\ndef b(completions): ...", "a", "accuracy", "b", weights=[2, 1, 0.5])
    assert scorer.names == ("a", "accuracy", "b")
    assert scorer.weights == (2, 1, 0.5)


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
        from igrpo_lite.rewards.worker import Worker
        worker = Worker()
        values = worker.call("mine.py:reward", {"completions": ["a"]}, 1, 10.0).values
        assert values == [2.0], values
        assert worker.call("mine:reward", {"completions": ["a"]}, 1, 10.0).values == [2.0]
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
