"""Each finding fires on a stream with its fault and is silent on a healthy one; a resumed diagnosis is the same."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest

from igrpo_lite.config import RunConfig
from igrpo_lite.training.health import SILENT_STEPS, Finding, Health

Metrics = dict[str, Any]


def healthy(step: int, algorithm: str = "igrpo", **changes: Any) -> Metrics:
    """One step of a run that learns: accuracy from 0.40 to 0.70 in 100 steps, with some scatter."""
    rng = random.Random(f"health {step}")
    metrics: Metrics = {"step": step, "loss": 0.01, "grad_norm": 0.3, "learning_rate": 1e-4, "entropy": 0.2}
    metrics |= {"learning_sequences": 40, "reward_failures": 0, "time": {"step": rng.random()}}
    luck = rng.uniform(-0.05, 0.05)
    for stage in ("stage1",) if algorithm == "grpo" else ("stage1", "stage2"):
        right = min(0.4 + 0.003 * step, 0.7) + luck + rng.uniform(-0.02, 0.02)
        metrics |= {
            f"{stage}/accuracy": right,
            f"{stage}/reward": right + 0.1,
            f"{stage}/rewards/accuracy": right,
            f"{stage}/rewards/format": 1.0,
            f"{stage}/truncated": 0.02,
            f"{stage}/informative": 0.75,
            f"{stage}/all_right": 0.15,
            f"{stage}/all_wrong": 0.1,
            f"{stage}/reasons": {"correct": 30, "wrong": 30, "no_answer": 2},
        }
    return metrics | changes


def both(key: str, value: Any) -> Metrics:
    return {f"stage1/{key}": value, f"stage2/{key}": value}


def config(**fields: Any) -> RunConfig:
    return RunConfig(**fields)


def run(health: Health, stream: Iterable[Metrics]) -> list[tuple[int, Finding]]:
    return [(metrics["step"], finding) for metrics in stream for finding in health.update(metrics)]


def codes(found: list[tuple[int, Finding]]) -> list[str]:
    return list(dict.fromkeys(finding.code for _, finding in found))


@pytest.mark.parametrize("algorithm", ["grpo", "igrpo", "igrpo-joint"])
def test_a_healthy_run_is_left_alone(algorithm: str) -> None:
    health = Health(config(algorithm=algorithm))
    assert run(health, (healthy(step, algorithm) for step in range(1, 201))) == []
    assert health.dead() is None


def test_cut_completions_name_the_flag_and_the_share() -> None:
    some = run(Health(config()), [healthy(1, **both("truncated", 0.3))])
    assert codes(some) == ["truncated"]
    most = run(Health(config()), [healthy(1, **{"stage1/truncated": 0.61})])
    assert codes(most) == ["mostly-truncated"]
    assert "61% of the drafts" in most[0][1].text
    assert "--max-completion-length" in most[0][1].text


def test_worsening_truncation_is_told_at_once() -> None:
    stream = [healthy(step, **both("truncated", 0.3 if step < 4 else 0.95)) for step in range(1, 9)]
    assert codes(run(Health(config()), stream)) == ["truncated", "mostly-truncated"]


def test_a_lasting_finding_is_repeated_rarely() -> None:
    found = run(Health(config()), (healthy(step, **both("truncated", 0.9)) for step in range(1, 50)))
    assert [step for step, _ in found] == [1, 1 + SILENT_STEPS, 1 + 2 * SILENT_STEPS]


@pytest.mark.parametrize(("value", "said"), [(0.0, "always 0.0"), (-2.0, "always -2.0"), (None, "abstained")])
def test_a_dead_reward_part_is_named(value: float | None, said: str) -> None:
    found = run(Health(config()), (healthy(step, **both("rewards/xml", value)) for step in range(1, 10)))
    assert [step for step, _ in found] == [5]
    assert found[0][1].code == "dead-reward:xml"
    assert said in found[0][1].text
    assert "`xml`" in found[0][1].text


def test_a_part_that_moves_or_was_seen_too_seldom_is_not_dead() -> None:
    moving = (healthy(step, **both("rewards/xml", float(step % 4 == 0))) for step in range(1, 30))
    assert run(Health(config()), moving) == []
    differing = (healthy(step, **{"stage1/rewards/xml": 0.0, "stage2/rewards/xml": 0.5}) for step in range(1, 30))
    assert run(Health(config()), differing) == []
    few = (healthy(step, **both("rewards/xml", 0.0)) for step in range(1, 8))
    assert run(Health(config(prompts_per_step=1)), few) == []


def hopeless(step: int, reason: str) -> Metrics:
    zero = both("accuracy", 0.0) | both("reward", 0.1) | both("rewards/accuracy", 0.0) | both("informative", 0.0)
    return healthy(step, **zero, **both("all_wrong", 1.0), **both("all_right", 0.0), **both("reasons", {reason: 32}))


@pytest.mark.parametrize(
    ("reason", "flag"), [("no_answer", "--answer-style"), ("wrong", "--data"), ("unparsed", "--answer-style")]
)
def test_all_wrong_groups_name_the_main_reason(reason: str, flag: str) -> None:
    found = run(Health(config()), (hopeless(step, reason) for step in range(1, 8)))
    assert codes(found) == ["all-wrong"]
    text = found[0][1].text
    assert f"`{reason}`" in text
    assert flag in text
    assert "pass rate 0.0%" in text
    assert "0% expected at 4" in text


def test_all_right_groups_show_what_was_to_be_expected() -> None:
    easy = both("accuracy", 0.99) | both("informative", 0.04) | both("all_right", 0.96) | both("all_wrong", 0.0)
    found = run(Health(config(algorithm="grpo")), (healthy(step, "grpo", **easy) for step in range(1, 8)))
    assert codes(found) == ["all-right"]
    assert f"{1 - 0.99**8:.0%} expected at 8 per group" in found[0][1].text


def test_what_follows_from_truncation_is_no_second_finding() -> None:
    stream = (hopeless(step, "truncated") | both("truncated", 1.0) for step in range(1, 8))
    assert codes(run(Health(config()), stream)) == ["mostly-truncated"]


def test_a_frozen_adapter_is_seen() -> None:
    found = run(Health(config()), (healthy(step, grad_norm=0.0) for step in range(1, 5)))
    assert [(step, f.code) for step, f in found] == [(2, "frozen")]
    still = run(Health(config(beta=0.04)), (healthy(step, kl=0.0) for step in range(1, 8)))
    assert codes(still) == ["frozen"]
    assert "KL" in still[0][1].text


def test_no_gradient_without_informative_groups_is_not_a_frozen_adapter() -> None:
    stream = (healthy(step, grad_norm=0.0, learning_sequences=0, **both("informative", 0.0)) for step in range(1, 15))
    assert "frozen" not in codes(run(Health(config()), stream))
    warming_up = (healthy(step, kl=0.0, learning_rate=0.0) for step in range(1, 8))
    assert run(Health(config(beta=0.04)), warming_up) == []


def test_reward_without_accuracy_is_called_hacking() -> None:
    def hacked(step: int) -> Metrics:
        flat = 0.4 + 0.02 * (step % 2)
        gain = min(step / 20, 2.0)
        parts = both("rewards/length", gain) | both("rewards/accuracy", flat)
        return healthy(step, **parts, **both("accuracy", flat), **both("reward", flat + gain))

    found = run(Health(config()), map(hacked, range(1, 40)))
    assert codes(found) == ["reward-hacking"]
    assert "`length`" in found[0][1].text
    assert "--reward-weights" in found[0][1].text


def test_a_policy_that_learns_to_please_itself_is_called_that() -> None:
    def pleased(step: int) -> Metrics:
        grade = min(0.3 + step / 50, 0.95) + 0.01 * (step % 2)
        return healthy(step, **both("rewards/judge", grade), **both("accuracy", 0.4), **both("reward", grade))

    for judge_by, told in (
        ("policy", "`judge`, the policy's grade of itself. It may"),
        ("endpoint", "`judge`. It may"),
    ):
        found = run(Health(config(reward_funcs=["judge"], judge_by=judge_by)), map(pleased, range(1, 30)))
        assert codes(found)[0] == "reward-hacking"
        assert told in found[0][1].text


def leaking(step: int, refinements_too: bool) -> Metrics:
    rng = random.Random(f"leak {step}")
    luck, drop = rng.uniform(-0.05, 0.05), min(max(step - 40, 0) * 0.006, 0.25)
    first = 0.6 + luck - drop
    second = 0.68 + luck + rng.uniform(-0.02, 0.02) - (drop if refinements_too else 0.0)
    return healthy(step) | {
        "stage1/reward": first,
        "stage1/accuracy": first,
        "stage2/reward": second,
        "stage2/accuracy": second,
        "stage2/copied": 0.9,
    }


def test_the_answer_leak_is_explained() -> None:
    found = run(Health(config()), (leaking(step, refinements_too=False) for step in range(1, 100)))
    assert codes(found) == ["answer-leak"]
    step, finding = found[0]
    assert 55 < step < 85
    assert "igrpo-joint" in finding.text
    assert "--learning-rate" in finding.text
    assert "90% repeat it" in finding.text
    joint = run(Health(config(algorithm="igrpo-joint")), (leaking(s, refinements_too=False) for s in range(1, 100)))
    assert codes(joint) == ["answer-leak"]
    assert "igrpo-joint" not in joint[0][1].text


def test_a_fall_of_both_stages_is_no_leak() -> None:
    found = run(Health(config()), (leaking(step, refinements_too=True) for step in range(1, 100)))
    assert codes(found) == ["reward-fall"]


@pytest.mark.parametrize(("entropy", "code"), [(0.01, "entropy-low"), (2.6, "entropy-high")])
def test_entropy_at_its_ends(entropy: float, code: str) -> None:
    assert codes(run(Health(config()), (healthy(step, entropy=entropy) for step in range(1, 6)))) == [code]
    absent = (healthy(step, entropy=None) for step in range(1, 6))
    assert run(Health(config()), absent) == []


def test_a_broken_gradient_stops_and_is_never_silenced() -> None:
    found = run(Health(config()), (healthy(step, grad_norm=math.nan) for step in (1, 2)))
    assert [(f.code, f.level) for _, f in found] == [("not-finite", "stop")] * 2
    assert "--learning-rate" in found[0][1].text


def test_the_most_important_finding_comes_first() -> None:
    stream = [hopeless(step, "wrong") | both("truncated", 0.3) | {"entropy": 0.001} for step in range(1, 10)]
    at = dict.fromkeys(range(1, 10), "")
    for step, finding in run(Health(config()), stream):
        at[step] += finding.code + " "
    assert at[1] == "truncated "
    assert at[3] == "all-wrong entropy-low "


def test_dead_needs_patience_and_gives_the_main_reason() -> None:
    health = Health(config(patience_dead=6))
    for step in range(1, 6):
        health.update(hopeless(step, "no_answer"))
        assert health.dead() is None
    health.update(hopeless(6, "no_answer"))
    reason = health.dead()
    assert reason is not None
    assert "6 steps" in reason
    assert "`no_answer`" in reason
    health.update(healthy(7))
    assert health.dead() is None


def test_dead_without_a_known_cause_still_has_a_sentence() -> None:
    equal = both("informative", 0.0) | both("all_right", 0.5) | both("all_wrong", 0.5)
    health = Health(config(patience_dead=3))
    run(health, (healthy(step, **equal) for step in range(1, 4)))
    assert "rewards within a group were equal" in (health.dead() or "")


def test_dead_looks_at_what_learns_and_can_be_switched_off() -> None:
    refined_dead = [healthy(step, **{"stage2/informative": 0.0}) for step in range(1, 30)]
    for algorithm, patience, stops in (("igrpo", 20, True), ("igrpo-joint", 20, False), ("igrpo", 0, False)):
        health = Health(config(algorithm=algorithm, patience_dead=patience))
        run(health, refined_dead)
        assert (health.dead() is not None) is stops
    masked = Health(config(patience_dead=5))
    run(masked, (healthy(step, learning_sequences=0) for step in range(1, 6)))
    assert masked.dead() is not None


@pytest.mark.parametrize("algorithm", ["grpo", "igrpo", "igrpo-joint"])
def test_replays_alone_are_a_learning_signal(algorithm: str) -> None:
    settings = {"algorithm": algorithm, "patience_dead": 3}
    for share, stops in ((0.25, False), (0.0, True), (None, True)):
        health = Health(config(**settings))
        still = both("informative", 0.0) if algorithm != "grpo" else {"stage1/informative": 0.0}
        run(health, (healthy(s, algorithm, **still, **{"replay/informative": share}) for s in range(1, 4)))
        assert (health.dead() is not None) is stops
    frozen = Health(config(**settings))
    stream = (healthy(s, algorithm, **still, **{"replay/informative": 0.5}, grad_norm=0.0) for s in range(1, 4))
    assert "frozen" in codes(run(frozen, stream)), "replays taught something, so there should be a gradient"


@pytest.mark.parametrize(("kept", "stops"), [(0, True), (1, False)])
def test_with_dynamic_sampling_dead_is_a_step_that_keeps_nothing(kept: int, stops: bool) -> None:
    health = Health(config(patience_dead=3, dynamic_sampling=2))
    still = both("informative", 0.0) | {"dynamic/kept": kept, "dynamic/rounds": 2, "dynamic/problems": 24}
    run(health, (healthy(step, **still) for step in range(1, 4)))
    assert (health.dead() is not None) is stops


def gaps(values: Iterable[float | None], **settings: Any) -> list[tuple[int, Finding]]:
    health = Health(config(**settings))
    return run(health, (healthy(step, sampler_gap=value) for step, value in enumerate(values, start=1)))


def test_a_sampler_that_parts_from_the_policy_is_told_and_then_stops_the_run() -> None:
    assert gaps([0.004, None, 0.02, 0.03, 0.9, 0.9, 0.01, 0.9]) == [], "two steps may be chance"
    told = gaps([0.1, 0.2, 0.06, 0.3])
    assert [(step, f.code, f.level) for step, f in told] == [(3, "sampler-gap", "warning")]
    assert "0.12 nats" in told[0][1].text
    for cause in ("older adapter", "other base weights", "--temperature", "--dtype float32"):
        assert cause in told[0][1].text
    stopped = gaps([0.6, 0.7, None, 0.8, 0.9, 0.6, 0.7])
    assert [(step, f.level) for step, f in stopped] == [(6, "stop"), (7, "stop")], "as often as it is found"


def using(rss: Iterable[float], kind: str = "rss", **settings: Any) -> list[tuple[int, Finding]]:
    health = Health(config(**settings))
    return run(health, (healthy(step, memory={kind: mib}) for step, mib in enumerate(rss, start=1)))


def noise(step: int) -> float:
    return random.Random(f"memory {step}").uniform(-40, 40)


def test_memory_that_grows_is_reported() -> None:
    found = using(800 + 6 * step + noise(step) for step in range(1, 301))
    assert codes(found) == ["memory:rss"]
    step, finding = found[0]
    assert 195 <= step <= 240, "1,000 MiB at 6 MiB a step, after 30 steps of warm-up"
    assert finding.level == "warning"
    assert "goes on from here with fresh memory." in finding.text
    first, last = (float(text.replace(",", "")) for text in re.findall(r"([\d,]+) MiB", finding.text))
    assert last - first >= 1000
    assert {later - sooner for (sooner, _), (later, _) in pairwise(found)} == {SILENT_STEPS}
    assert codes(using((800 + 6 * step for step in range(1, 301)), kind="device")) == ["memory:device"]


def test_a_slow_leak_is_found_in_a_long_run() -> None:
    found = using(4000 + step + 3 * noise(step) for step in range(1, 2500))
    assert codes(found) == ["memory:rss"]
    assert 1900 < found[0][0] < 2200, "half of 4,000 MiB at 1 MiB a step"


@pytest.mark.parametrize(
    "used",
    [
        [800.0 + 3 * noise(step) for step in range(400)],
        [800.0 + 20 * min(step, 25) + noise(step) for step in range(400)],  # warm-up
        [800.0 + 600 * (step > 90) + noise(step) for step in range(400)],  # one large allocation
        [800.0 + 400 * (step > 60) + 400 * (step > 150) for step in range(400)],
        [800.0 + 900 * (1 - 0.98**step) + noise(step) for step in range(120, 700)],  # levels off
        [800.0 + 700 * (step % 50 == 0) for step in range(400)],  # evaluations
        [30000.0 + 10 * step for step in range(400)],  # small beside what is there
        [200.0 + step for step in range(180)],  # small in itself
        [3000.0 - 5 * step for step in range(400)],
    ],
)
def test_memory_that_does_not_leak_is_left_alone(used: list[float]) -> None:
    assert using(used) == []


def test_a_new_process_or_engine_starts_the_watch_anew() -> None:
    """Each time it falls back before it has grown enough; afterwards a leak is found as fast as before."""
    saw = [2000.0 + 20 * (step % 90) for step in range(400)]
    assert using(saw) == []
    steep = [800.0 + 6 * step for step in range(1, 101)] + [800.0 + 6 * step for step in range(1, 301)]
    alone = using(steep[100:])[0][0]
    assert using(steep)[0][0] == 100 + alone


@pytest.mark.parametrize("resumed_at", [1, 35, 75, 180, 400])
def test_the_watch_goes_on_where_it_was(resumed_at: int) -> None:
    stream = [healthy(step, memory={"rss": 3000 + 4 * step + noise(step)}) for step in range(1, 600)]
    straight, first, second = (Health(config()) for _ in range(3))
    expected = run(straight, stream)
    found = run(first, stream[:resumed_at])
    state = json.loads(json.dumps(first.state()))
    second.load_state(state)
    assert second.state() == first.state()
    assert found + run(second, stream[resumed_at:]) == expected
    assert second.state() == straight.state()
    assert codes(expected) == ["memory:rss"]
    earlier = state | {"memory": {"rss": {"seen": 3, "last": 900.0, "stride": 1, "points": []}}}
    Health(config()).load_state(earlier)  # a checkpoint of an earlier version


def faulty(step: int) -> Metrics:
    metrics = leaking(step, refinements_too=False) | both("rewards/xml", 0.0)
    if step % 7 == 0:
        metrics |= both("informative", 0.0) | {"grad_norm": 0.0, "entropy": None}
    return metrics | both("truncated", 0.25 + 0.3 * (step > 50))


@pytest.mark.parametrize("resumed_at", [1, 4, 19, 57, 80])
def test_a_resumed_diagnosis_is_the_same(resumed_at: int) -> None:
    straight, first, second = (Health(config(patience_dead=4)) for _ in range(3))
    expected = run(straight, map(faulty, range(1, 100)))
    found = run(first, map(faulty, range(1, resumed_at + 1)))
    second.load_state(json.loads(json.dumps(first.state())))
    assert second.state() == first.state()
    found += run(second, map(faulty, range(resumed_at + 1, 100)))
    assert found == expected
    assert len(codes(expected)) >= 4
    assert second.state() == straight.state()
    assert json.dumps(second.state()) == json.dumps(straight.state())


def test_the_state_is_a_copy_and_holds_no_times() -> None:
    health = Health(config())
    health.update(healthy(1))
    state = health.state()
    before = json.dumps(state)
    assert "time" not in before
    health.update(healthy(2))
    assert json.dumps(state) == before
