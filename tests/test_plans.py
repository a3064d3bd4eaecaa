"""The driver of plans: what is sampled when, on a sampler that finishes requests in a given order."""

from __future__ import annotations

import random
import threading
import time

import pytest

from igrpo_lite.algorithms.plans import COMPUTE_STEPS, All, Barrier, Compute, Driver, Sample
from igrpo_lite.sampling.base import Request
from igrpo_lite.types import Completion, Prompt


class Engine:
    """Finishes one request per decoding step; the text of a completion is its request's tag.

    Attributes:
        runs: tags of each run, without follow-ups.
        order: tags in the order in which they finished.
    """

    def __init__(self, pick=lambda count: 0, fail_at=None):
        self.pick, self.fail_at = pick, fail_at
        self.runs, self.order = [], []
        self.steps = 0

    def run(self, requests, on_finished=None, poll=None):
        self.runs.append([request.tag for request in requests])
        waiting = list(requests)
        while waiting or (poll and (more := list(poll(True)))):
            waiting += [] if waiting else more
            request = waiting.pop(self.pick(len(waiting)))
            self.steps += 1
            if request.tag == self.fail_at:
                raise ZeroDivisionError
            self.order.append(request.tag)
            waiting += on_finished(request, Completion((1,), str(request.tag), (0.0,), "stop"))
            waiting += poll(False) if poll else ()


def sample(*tags):
    return Sample([Request(Prompt("", ()), 0, 1, tag=tag) for tag in tags])


def texts(*tags):
    """A plan of one wave."""
    completions = yield sample(*tags)
    return [completion.text for completion in completions]


def two_stages(name, count=2):
    first = yield from texts(*(f"{name}1{i}" for i in range(count)))
    score = yield Compute(lambda: len(first), joins=True)
    yield Barrier()
    second = yield from texts(*(f"{name}2{i}" for i in range(score)))
    return first, second


def expected(name, count=2):
    return [f"{name}1{i}" for i in range(count)], [f"{name}2{i}" for i in range(count)]


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("barrier", [False, True])
@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_results_depend_on_neither_order_nor_threads_nor_barriers(threads, barrier, seed):
    pick = random.Random(seed).randrange if seed is not None else lambda count: 0
    driver = Driver(Engine(pick), threads)
    names = ["a", "b", "c"]
    assert driver.run([two_stages(name, 1 + i) for i, name in enumerate(names)], barrier) == [
        expected(name, 1 + i) for i, name in enumerate(names)
    ]
    driver.close()


def test_what_a_plan_asks_for_next_joins_the_running_batch():
    engine = Engine()
    Driver(engine).run([two_stages("a"), two_stages("b")])
    assert engine.runs == [["a10", "a11", "b10", "b11"]]
    assert engine.order == ["a10", "a11", "b10", "b11", "a20", "a21", "b20", "b21"]


@pytest.mark.parametrize("threads", [0, 2])
def test_behind_a_barrier_all_plans_go_on_in_their_order(threads):
    engine = Engine(lambda count: count - 1)  # the last one finishes first
    driver = Driver(engine, threads)
    driver.run([two_stages("a"), texts("b10"), two_stages("c")], barrier=True)
    assert engine.runs == [["a10", "a11", "b10", "c10", "c11"], ["a20", "a21", "c20", "c21"]]
    driver.close()


def test_a_barrier_holds_plans_inside_others_too():
    def inner(name):
        first = yield from texts(f"{name}1")
        yield Barrier()
        return first + (yield from texts(f"{name}2"))

    def outer(name):
        return (yield All([inner(f"{name}x"), inner(f"{name}y")]))

    engine = Engine(lambda count: count - 1)
    assert Driver(engine).run([outer("a"), outer("b")], barrier=True) == [
        [["ax1", "ax2"], ["ay1", "ay2"]],
        [["bx1", "bx2"], ["by1", "by2"]],
    ]
    assert [sorted(run) for run in engine.runs] == [["ax1", "ay1", "bx1", "by1"], ["ax2", "ay2", "bx2", "by2"]]
    assert engine.runs[1] == ["ax2", "ay2", "bx2", "by2"]  # in the order of the plans, whenever each got there


@pytest.mark.parametrize("seed", range(5))
def test_plans_nest(seed):
    def inner(name, depth):
        found = yield from texts(f"{name}-own")
        if not depth:
            return found
        parts = yield All([inner(f"{name}{i}", depth - 1) for i in range(2)])
        return found + [text for part in parts for text in part]

    def names(name, depth):
        return [f"{name}-own"] + [n for i in range(2) if depth for n in names(f"{name}{i}", depth - 1)]

    engine = Engine(random.Random(seed).randrange)
    driver = Driver(engine)
    assert driver.run([inner("p", 3), inner("q", 2)]) == [names("p", 3), names("q", 2)]
    assert len(engine.order) == 15 + 7
    assert not driver._open


@pytest.mark.parametrize("threads", [0, 1])
def test_what_needs_no_engine_does_not_start_it(threads):
    def idle():
        return 7
        yield

    def empty():
        assert (yield All([])) == []
        assert (yield Sample([])) == []
        assert (yield All([idle(), idle()])) == [7, 7]
        return 8

    engine = Engine()
    driver = Driver(engine, threads)
    assert driver.run([idle(), empty()]) == [7, 8]
    assert driver.run([]) == []
    assert engine.runs == []
    driver.close()


def test_every_completion_is_told_after_the_plan_has_gone_on():
    seen = []

    def plan():
        yield from texts("a")
        seen.append("went on")

    Driver(Engine(), on_sampled=lambda request, completion: seen.append(completion.text)).run([plan()])
    assert seen == ["went on", "a"]


def computing(name, call, joins, after=()):
    yield from texts(name)
    value = yield Compute(call, joins)
    if after:
        yield from texts(*after)
    return value


def test_with_threads_decoding_goes_on_while_a_value_is_computed():
    gate = threading.Event()

    def late():
        assert gate.wait(30)
        return "late"

    def opening():
        yield from texts(*(f"b{i}" for i in range(3)))
        gate.set()  # with decoding standing still, this is never reached
        yield from texts("c")

    driver = Driver(Engine(), threads=1)
    assert driver.run([computing("a", late, joins=False), opening()]) == ["late", None]
    driver.close()


@pytest.mark.parametrize("pause", [0.0, 0.05])
def test_a_value_that_samples_follow_is_taken_after_a_fixed_number_of_steps(pause):
    """However long it takes, so that the batches are always the same ones."""

    def call():
        time.sleep(pause)
        return 1

    engine = Engine()
    driver = Driver(engine, threads=1)
    others = [f"b{i}" for i in range(20)]
    driver.run([computing("a", call, joins=True, after=["next"]), texts(*others)])
    order = engine.order
    assert order[0] == "a"
    assert order[-1] == "next"  # it waits its turn behind what was asked for before
    polls = driver._polls
    driver.run([computing("a", call, joins=False, after=["next"]), texts(*others)])
    assert driver._polls >= polls + len(others)
    driver.close()


def test_due_values_are_taken_at_their_step_and_others_when_nothing_is_left():
    taken = {}

    def plan(name, joins):
        yield from texts(name)
        yield Compute(lambda: None, joins)
        taken[name] = engine.steps

    engine = Engine()
    driver = Driver(engine, threads=1)
    driver.run([plan("a", True), plan("b", False), texts(*(f"c{i}" for i in range(30)))])
    assert taken == {"a": 1 + COMPUTE_STEPS - 1, "b": 32}
    driver.close()


@pytest.mark.parametrize("threads", [0, 1])
def test_after_an_error_nothing_is_left_open(threads):
    ended = []

    def plan(name):
        try:
            yield from texts(f"{name}1", f"{name}2")
        finally:
            ended.append(name)

    engine = Engine(fail_at="b1")
    driver = Driver(engine, threads)
    with pytest.raises(ZeroDivisionError):
        driver.run([plan("a"), plan("b"), plan("c")])
    assert ended == ["a", "b", "c"]
    assert not driver._open
    engine.fail_at = None
    assert driver.run([texts("b1")]) == [["b1"]], "it can go on"
    driver.close()


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("barrier", [False, True])
def test_an_error_of_a_plan_or_a_call_is_the_runs(threads, barrier):
    def broken():
        yield from texts("a")
        yield Barrier()
        raise KeyError("mine")

    def call():
        raise LookupError("call")

    driver = Driver(Engine(), threads)
    with pytest.raises(KeyError, match="mine"):
        driver.run([two_stages("b"), broken()], barrier)
    with pytest.raises(LookupError, match="call"):
        driver.run([two_stages("b"), computing("c", call, joins=False)], barrier)
    assert not driver._open
    driver.close()


def test_closing_gives_up_what_is_being_computed():
    given_up = threading.Event()

    def hangs():
        assert given_up.wait(30)
        raise InterruptedError

    driver = Driver(Engine(fail_at="b2"), threads=1)
    with pytest.raises(ZeroDivisionError):
        driver.run([computing("a", hangs, joins=False), texts("b1", "b2")])
    (computed,) = driver.computing
    assert not computed.value.done()
    driver.close(given_up.set)
    assert isinstance(computed.value.exception(), InterruptedError)
    driver.close(given_up.set)  # twice is once
