"""Users' rewards are computed while decoding goes on: proved by events, and without any effect on the results."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from bad_parts import assert_same, records, steps
from reward_parts import PROBLEM, PROMPT, completion
from tiny_parts import SMALL, small_config, tiny_parts

from igrpo_lite.algorithms.rollout import RolloutCollector
from igrpo_lite.config.resolve import resolve
from igrpo_lite.errors import RewardError
from igrpo_lite.rewards.scorer import Scorer
from igrpo_lite.sampling.replica import Replica
from igrpo_lite.sampling.transformers import TransformersSampler
from igrpo_lite.training import train

CASES = {
    "grpo": {"algorithm": "grpo"},
    "overlap": {"schedule": "overlap"},
    "barrier": {"schedule": "barrier"},
    "ahead": {"schedule": "ahead"},
    "joint with replay": {"algorithm": "igrpo-joint", "tokens": "t-spmo", "tspmo_replay": 2},
}


@pytest.fixture(scope="module")
def parts():
    made = tiny_parts(small_config())
    yield made
    made.scorer.close()


class Watched(TransformersSampler):
    """Looks on before every decoding step. A problem's completions have a length of their own, 6, 18 or 30 tokens, so
    that there is something to decode while the first group is scored."""

    look = staticmethod(lambda idle: None)

    def run(self, requests, on_finished=None, poll=None):
        def cut(request):
            return dataclasses.replace(request, max_tokens=min(request.max_tokens, 6 + 12 * request.tag.slot))

        def followed(request, completion):
            return [cut(more) for more in on_finished(request, completion)]

        def watched(idle):
            self.look(idle)
            return [cut(more) for more in poll(idle)] if poll else ()

        return super().run([cut(request) for request in requests], followed, watched)


def wait_for(path):
    """Until a reward's process has made a file; decoding stands still meanwhile."""
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture
def collect(parts, tmp_path):
    """Rollouts of two steps with a user's reward; the sampler, and the collector, which is closed at the end."""
    made = []

    def collected(body, look=None, warm=True, timeout=20.0, head="", **settings):
        path = tmp_path / f"own{len(made)}.py"
        path.write_text(
            f"import os, random, time\n{head}\n"
            "def f(completions):\n"
            "    values = [len(text) % 3 for text in completions]\n"
            "    if completions == ['warm']: return values\n" + textwrap.indent(textwrap.dedent(body), "    ") + "\n"
            "    return values\n"
        )
        config = small_config(reward_funcs=["accuracy", f"{path}:f"], reward_timeout=timeout, **settings)
        scorer = Scorer(config, "boxed")
        if warm:
            scorer.score(PROBLEM, PROMPT, [completion("warm")])  # its process has started
        sampler = Watched(Replica(parts.policy.model), parts.prompts.tokenizer, ())
        collector = RolloutCollector(sampler, scorer, parts.prompts, config, config.seed)
        made.append((collector, scorer))
        if look is not None:
            sampler.look = lambda idle: look(collector, idle)
        rollouts = collector.collect(parts.train[:3], 0, upcoming=parts.train[3:6])
        return rollouts + collector.collect(parts.train[3:6], 1), sampler, collector

    collected.made = made
    yield collected
    for collector, scorer in made:
        collector.close()
        scorer.close()


@pytest.mark.parametrize("case", CASES)
def test_decoding_goes_on_while_a_reward_is_computed(case, collect, tmp_path):
    """A reward that comes only once three more tokens have been decoded: were it waited for, it would time out."""
    started, gate = tmp_path / "started", tmp_path / "gate"
    beside = []

    def look(collector, idle):
        if not collector.driver.computing or gate.exists():
            return
        wait_for(started)
        beside.append(collector.sampler.decode_steps)
        if len(set(beside)) == 4:
            gate.touch()

    body = f"""
        open({str(started)!r}, "w").close()
        while not os.path.exists({str(gate)!r}): time.sleep(0.002)
    """
    rollouts, _, collector = collect(body, look, **CASES[case])
    assert gate.exists()
    scores = [score for rollout in rollouts for group in rollout.groups for score in group.scores]
    assert all(score.parts["f"] is not None for score in scores)
    calls = collector.scorer.failures["f"]
    assert calls.failed == 0
    assert calls.made - 1 == sum(len(r.groups) + len(r.replays) for r in rollouts)


@pytest.mark.parametrize("case", CASES)
def test_how_long_a_reward_takes_changes_nothing(case, collect):
    """Not even the last bit of a log-probability: the batches are the same."""
    slow, slow_sampler, collector = collect("time.sleep(random.random() * 0.05)", **CASES[case])
    assert collector.driver.waited > 0
    fast, fast_sampler, _ = collect("pass", **CASES[case])
    assert slow == fast
    assert slow_sampler.decode_steps == fast_sampler.decode_steps


@pytest.mark.parametrize("case", ["grpo", "overlap", "ahead"])
def test_a_sleeping_reward_is_the_same_as_one_computed_in_between(case, collect, monkeypatch):
    slow, slow_sampler, _ = collect("time.sleep(0.3)", **CASES[case])
    monkeypatch.setattr(Scorer, "in_worker", False)
    waited_for, sampler, collector = collect("pass", **CASES[case])
    assert collector.driver.threads is None
    if case != "overlap":  # nothing joins a running batch, so the batches are the same ones
        assert slow == waited_for
        assert slow_sampler.decode_steps == sampler.decode_steps
    else:
        for one, other in zip(slow, waited_for, strict=True):
            for a, b in zip(one.groups, other.groups, strict=True):
                assert [c.ids for c in a.completions] == [c.ids for c in b.completions]
                assert a.scores == b.scores


def reward_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("rewards") and thread.is_alive()]


@pytest.fixture
def no_thread_left():
    before = set(reward_threads())
    yield
    assert not set(reward_threads()) - before


FAILURES = {
    "wrong count": ("return values[1:]", "values for 3 completions"),
    "not a number": ("return [float('nan')] * len(values)", "returned nan"),
    "in its second group": (
        "open(__file__ + '.calls', 'a').write('.')\n"
        "if os.path.getsize(__file__ + '.calls') == 2: return 'three'\n"
        "time.sleep(0.02)",
        "returned 'three'",
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("case", ["overlap", "ahead"])
def test_what_is_no_reward_stops_the_run(case, failure, collect, no_thread_left):
    body, told = FAILURES[failure]
    with pytest.raises(RewardError, match=told):
        collect(body, **CASES[case])
    collector, _ = collect.made[-1]
    collector.close()


@pytest.mark.parametrize("case", ["overlap", "barrier"])
def test_a_hanging_reward_times_out_for_its_own_group_only(case, collect):
    body = """
        open(__file__ + ".calls", "a").write(".")
        if os.path.getsize(__file__ + ".calls") == 3: time.sleep(600)
    """
    rollouts, _, collector = collect(body, timeout=0.5, **CASES[case])
    without = [g for r in rollouts for g in r.groups if all(score.parts["f"] is None for score in g.scores)]
    assert len(without) == 1
    assert all(
        score.parts["f"] is not None for r in rollouts for g in r.groups if g is not without[0] for score in g.scores
    )
    calls = collector.scorer.failures["f"]
    assert (calls.timed_out, calls.failed) == (1, 1)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_what_is_being_computed_is_given_up(error, collect, tmp_path, no_thread_left):
    """The worker's call would take ten minutes; it is ended with its process, and the rest is not begun."""
    started, finished = tmp_path / "started", tmp_path / "finished"
    body = f"""
        open({str(started)!r}, "a").write(".")
        time.sleep(600)
        open({str(finished)!r}, "w").close()
    """

    def look(collector, idle):
        if collector.driver.computing:
            wait_for(started)
            raise error

    with pytest.raises(error):
        collect(body, look, timeout=700, algorithm="grpo")
    collector, scorer = collect.made[-1]
    assert not collector.driver.computing[0].value.done()
    collector.close()
    assert scorer._worker.pid is None
    assert not finished.exists()
    assert started.read_text() == ".", "one call was made and no other"
    collector.close()  # twice is once
    scores = scorer.score(PROBLEM, PROMPT, [completion("warm")])
    assert scores[0].parts["f"] is not None, "the scorer itself can go on"


def test_a_process_that_is_still_importing_is_given_up_too(collect, tmp_path, no_thread_left):
    importing = tmp_path / "importing"

    def look(collector, idle):
        if collector.driver.computing:
            wait_for(importing)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect("", look, warm=False, algorithm="grpo", head=f"open({str(importing)!r}, 'w').close(); time.sleep(600)")
    collector, scorer = collect.made[-1]
    collector.close()
    assert scorer._worker.pid is None


# Whole runs

RUN = SMALL | {"reward_funcs": "own.py:f", "reward_timeout": 600, "save_steps": 100, "eval_size": 2, "max_steps": 4}


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_a_second_ctrl_c_ends_a_hanging_reward_and_keeps_the_steps_before(tmp_path, monkeypatch):
    """The first one waits for the end of the step, which may be long; the second one does not."""
    monkeypatch.chdir(tmp_path)
    good = "import os, time\ndef f(completions):\n    return [len(text) % 3 for text in completions]\n"
    own = tmp_path / "own.py"
    own.write_text(good)
    train(resolve(RUN | {"output_dir": "straight"}))
    # One call before the run, then six a step: it hangs in the third step.
    own.write_text(
        "import os, time\ndef f(completions):\n    open('calls', 'a').write('.')\n"
        "    if os.path.getsize('calls') > 15:\n        open('hangs', 'w').close()\n        time.sleep(600)\n"
        "    return [len(text) % 3 for text in completions]\n"
    )
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in (RUN | {"output_dir": "run"}).items()]
    command = [sys.executable, "-m", "igrpo_lite", "train", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    while not Path("hangs").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "the same command goes on from the last checkpoint" in told
    assert sorted(path.name for path in Path("run/checkpoints").iterdir()) == ["step-000000", "step-000002"]
    own.write_text(good)
    train(resolve(RUN | {"output_dir": "run"}))
    assert_same(tmp_path / "straight", tmp_path / "run")
    assert steps(tmp_path / "run") == [1, 2, 3, 4]


def test_calls_that_fail_now_and_then_are_counted_alike_in_every_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        "import random, time\ndef f(completions):\n    time.sleep(random.random() / 50)\n"
        "    if sum(map(len, completions)) % 13 == 0: raise ValueError('unlucky')\n"
        "    return [1.0] * len(completions)\n"
    )
    monkeypatch.setattr("igrpo_lite.rewards.scorer.MAX_FAILED_SHARE", 1.0)
    settings = RUN | {"reward_funcs": "accuracy,own.py:f", "patience_dead": 0}
    train(resolve(settings | {"output_dir": "one"}))
    for minutes in (1e-6, 1e-6, None):
        train(resolve(settings | {"output_dir": "other", "max_minutes": minutes}))
    failures = [
        [r["reward_failures"] for r in records(tmp_path / name, "metrics.jsonl") if r["kind"] == "step"]
        for name in ("one", "other")
    ]
    assert failures[0] == failures[1]
    assert failures[0] == sorted(failures[0])
    assert failures[0][-1] > 0
    assert_same(tmp_path / "one", tmp_path / "other")
