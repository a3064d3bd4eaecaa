"""Schedules of the rollout: engine steps and time of ``ahead``, ``overlap`` and ``barrier`` on one engine each.

The real collector with the real scorer on the bundled model. Every step begins with a push of the adapter, as in
training; so nothing is found in a prefix cache that another contender has left there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from measuring import paired, spread, take_turns
from rollout_common import Finding, GivenLengths, Law, Options, Sizes, constant, heavy_tail, make_policy, make_sampler

from igrpo_lite.algorithms.rollout import Rollout, RolloutCollector
from igrpo_lite.config import RunConfig
from igrpo_lite.config.resolve import resolve
from igrpo_lite.policy.prompting import prompt_builder
from igrpo_lite.problems.synthetic import load
from igrpo_lite.rewards.scorer import Scorer
from igrpo_lite.sampling.base import Sampler

PART = "schedules"
SCHEDULES = ("barrier", "overlap", "ahead")


class Schedule:
    """The rollouts of one schedule, step after step. Calling it makes those of the next step."""

    def __init__(self, sampler: Sampler, law: Law, config: RunConfig, steps: int) -> None:
        self.sampler = sampler
        self.size = config.prompts_per_step
        self.problems = load("two-step", "train", self.size * (steps + 1))
        self.given = GivenLengths(sampler, law)
        scorer = Scorer(config, config.answer_style)
        self.collector = RolloutCollector(self.given, scorer, prompt_builder(config), config, seed=0)
        self.decode_steps: list[int] = []
        self.sampled: list[int] = []
        self.rollouts: list[list[Rollout]] = []

    def __call__(self) -> None:
        step = len(self.rollouts)
        self.sampler.load_adapter()
        before = self.sampler.decode_steps, self.sampler.sampled_tokens
        self.rollouts.append(self.collector.collect(self._problems(step), step, upcoming=self._problems(step + 1)))
        self.decode_steps.append(self.sampler.decode_steps - before[0])
        self.sampled.append(self.sampler.sampled_tokens - before[1])

    def again(self) -> None:
        """The requests of the last step in one batch, without a schedule: what its prompts cost."""
        self.sampler.load_adapter()
        self.sampler.run(self.given.asked)

    def _problems(self, step: int) -> list[Any]:
        return self.problems[self.size * step : self.size * (step + 1)]


def measure(options: Options) -> dict[str, Any]:
    found: dict[str, Any] = {"findings": [], "runs": []}
    for engine in options.engines:
        for live in sorted({*options.sizes.live, rollouts(options.sizes)}):
            policy, config = make_policy("tiny")
            sampler = make_sampler(engine, policy, config, live)
            on_engine(engine, sampler, live, options.sizes, found)
            sampler.close()
    return found


def on_engine(
    engine: str,
    sampler: Sampler,
    live: int,
    sizes: Sizes,
    found: dict[str, Any],
    more: Mapping[str, Any] | None = None,
) -> None:
    """Add to ``found`` what a sampler with room for ``live`` sequences shows; ``more``: settings of the rollouts."""
    if live == rollouts(sizes):
        for length in sizes.equal:
            _equal(engine, sampler, length, sizes, found, more or {})
    if live in sizes.live:
        _uneven(engine, sampler, live, sizes, found, more or {})


def rollouts(sizes: Sizes) -> int:
    """Of one step."""
    return sizes.prompts * (sizes.drafts + sizes.refinements)


def _equal(
    engine: str, sampler: Sampler, length: int, sizes: Sizes, found: dict[str, Any], more: Mapping[str, Any]
) -> None:
    contenders = _contenders(sampler, constant(length), sizes, ("grpo", "ahead"), more)
    seconds = _take_turns(contenders, sizes, {"its requests in one batch": contenders["ahead"].again})
    run = _run(engine, rollouts(sizes), f"all of {length} tokens", contenders, seconds, sizes)
    assert run["sides"]["ahead"]["sampled_tokens"] == run["sides"]["grpo"]["sampled_tokens"]
    found["runs"].append(run)
    found["findings"] += _ratios(run, "ahead", "grpo", "GRPO with N + G rollouts", 1.02, 1.05)
    batch = paired(seconds["ahead"]["wall"], seconds["its requests in one batch"]["wall"])
    cpu = paired(seconds["ahead"]["cpu"], seconds["its requests in one batch"]["cpu"])["median"]
    where = f"wall, {run['engine']}, {run['live']} live, {run['lengths']}: ahead"
    found["findings"].append(Finding(PART, where, "its own requests in one batch", batch | {"cpu": cpu}))


def _uneven(
    engine: str, sampler: Sampler, live: int, sizes: Sizes, found: dict[str, Any], more: Mapping[str, Any]
) -> None:
    contenders = _contenders(sampler, heavy_tail(sizes.longest), sizes, SCHEDULES, more)
    seconds = _take_turns(contenders, sizes)
    lengths = f"8 + Exp(30), at most {sizes.longest}"
    run = _run(engine, live, lengths, contenders, seconds, sizes)
    run["overlap_samples_as_barrier"] = _same(contenders["overlap"], contenders["barrier"])
    found["runs"].append(run)
    few = live == min(sizes.live)
    found["findings"] += _ratios(run, "overlap", "barrier", "barrier", 0.85 if few else None, None)
    found["findings"] += _ratios(run, "ahead", "barrier", "barrier", None, None)


def _contenders(
    sampler: Sampler, law: Law, sizes: Sizes, names: tuple[str, ...], more: Mapping[str, Any]
) -> dict[str, Schedule]:
    def config(name: str) -> RunConfig:
        settings: dict[str, Any] = {
            "prompts_per_step": sizes.prompts,
            "num_generations": sizes.drafts + sizes.refinements,
            "max_completion_length": max(*sizes.equal, sizes.longest),
            **more,
        }
        if name == "grpo":
            return resolve(settings | {"algorithm": "grpo"})
        return resolve(settings | {"num_drafts": sizes.drafts, "schedule": name})

    return {name: Schedule(sampler, law, config(name), sizes.warm_up + sizes.turns) for name in names}


def _take_turns(
    contenders: Mapping[str, Schedule], sizes: Sizes, others: Mapping[str, Callable[[], None]] | None = None
) -> dict[str, dict[str, list[float]]]:
    for schedule in contenders.values():
        for _ in range(sizes.warm_up):
            schedule()
    return take_turns({**contenders, **(others or {})}, sizes.turns)


def _same(one: Schedule, other: Schedule) -> str:
    pairs = [
        (a.ids, b.ids)
        for mine, theirs in zip(one.rollouts, other.rollouts, strict=True)
        for left, right in zip(mine, theirs, strict=True)
        for x, y in zip(left.groups, right.groups, strict=True)
        for a, b in zip(x.completions, y.completions, strict=True)
    ]
    return f"{sum(a == b for a, b in pairs)} of {len(pairs)}"


def _run(
    engine: str,
    live: int,
    lengths: str,
    contenders: Mapping[str, Schedule],
    seconds: Mapping[str, Mapping[str, list[float]]],
    sizes: Sizes,
) -> dict[str, Any]:
    sides = {
        name: {
            "decode_steps": schedule.decode_steps[sizes.warm_up :],
            "sampled_tokens": schedule.sampled[sizes.warm_up :],
            "seconds": seconds[name],
        }
        for name, schedule in contenders.items()
    }
    return {"engine": engine, "live": live, "lengths": lengths, "rollouts": rollouts(sizes), "sides": sides}


def _ratios(
    run: Mapping[str, Any], name: str, baseline: str, named: str, steps: float | None, wall: float | None
) -> list[Finding]:
    mine, theirs = run["sides"][name], run["sides"][baseline]
    where = f"{run['engine']}, {run['live']} live, {run['lengths']}: {name}"
    counts = paired(mine["decode_steps"], theirs["decode_steps"])
    total = sum(mine["decode_steps"]) / sum(theirs["decode_steps"])
    times = {clock: paired(mine["seconds"][clock], theirs["seconds"][clock]) for clock in ("wall", "cpu")}
    return [
        Finding(PART, f"decode steps, {where}", named, counts | {"total": total}, steps),
        Finding(PART, f"wall, {where}", named, times["wall"] | {"cpu": times["cpu"]["median"]}, wall),
    ]


def report(found: Mapping[str, Any]) -> str:
    lines = []
    for run in found["runs"]:
        lines.append(f"\n{run['engine']}, {run['rollouts']} rollouts a step, {run['live']} live, {run['lengths']}")
        for name, side in run["sides"].items():
            steps, seconds = spread(side["decode_steps"]), spread(side["seconds"]["wall"])
            rate = sum(side["sampled_tokens"]) / sum(side["seconds"]["wall"])
            lines.append(
                f"  {name:<8} {steps['median']:6.0f} decode steps   {seconds['median']:6.2f} s   {rate:6.0f} tok/s"
            )
        if "overlap_samples_as_barrier" in run:
            lines.append(f"  overlap's completions equal to barrier's: {run['overlap_samples_as_barrier']}")
    return "\n".join(lines)
