"""Barrier, overlap and ahead: the same rollouts in another order, which policy samples what, and what it saves."""

from __future__ import annotations

import dataclasses
import json
import random
from itertools import chain, pairwise

import pytest
import torch
from bad_parts import assert_same, records
from scripted_sampler import ScriptedSampler
from tiny_parts import SMALL, small_config, tiny_parts

from igrpo_lite.algorithms.dynamic import with_signal
from igrpo_lite.algorithms.rollout import RolloutCollector
from igrpo_lite.config.resolve import resolve
from igrpo_lite.errors import ConfigError
from igrpo_lite.sampling.replica import Replica
from igrpo_lite.sampling.transformers import TransformersSampler
from igrpo_lite.training import train
from igrpo_lite.training.update import PolicyUpdate
from igrpo_lite.types import Score

SCHEDULES = ["barrier", "overlap", "ahead"]
REPLAY = {"tokens": "t-spmo", "tspmo_replay": 2}


@pytest.fixture(scope="module")
def parts():
    made = tiny_parts(small_config())
    yield made
    made.scorer.close()


def scripted(parts, pick=lambda count: 0):
    return ScriptedSampler(parts.prompts.tokenizer, [problem.answer for problem in parts.train[:3]], pick)


def collector_of(config, parts, sampler=None, scorer=None, on_progress=lambda done, total: None):
    return RolloutCollector(
        sampler or parts.sampler, scorer or parts.scorer, parts.prompts, config, config.seed, on_progress
    )


def batches(parts, steps, size=3):
    return [parts.train[size * step : size * (step + 1)] for step in range(steps)] + [[]]


def collect_all(collector, problems):
    """All steps of a run whose last batch is empty, as the loop asks for them."""
    return [collector.collect(now, step, upcoming=later) for step, (now, later) in enumerate(pairwise(problems))]


# Order of events, on a sampler whose texts follow from the request alone


@pytest.mark.parametrize("extra", [{}, REPLAY, {"num_generations": 5, "num_drafts": 1}])
def test_all_schedules_make_the_same_rollouts_of_the_same_texts(extra, parts):
    """Scripted texts know of no policy, so that even ``ahead`` must be equal, in whatever order they finish."""
    problems = batches(parts, 3)
    made = {}
    for schedule in SCHEDULES:
        for seed in (None, 0, 1):
            pick = random.Random(seed).randrange if seed is not None else lambda count: 0
            sampler = scripted(parts, pick)
            rollouts = collect_all(collector_of(small_config(schedule=schedule, **extra), parts, sampler), problems)
            asked = sorted((r.seed, r.prompt.ids, r.max_tokens, r.temperature) for r in sampler.requests)
            assert (rollouts, asked) == made.setdefault("first", (rollouts, asked))
            assert len(asked) == sum(rollout.sampled for step in rollouts for rollout in step)


def test_the_waves_of_ahead(parts):
    """The first step's drafts, and then always one step's refinements with the next step's drafts."""
    sampler = scripted(parts)
    collect_all(collector_of(small_config(schedule="ahead"), parts, sampler), batches(parts, 3))
    waves = [sorted({(r.tag.step, r.tag.stage) for r in wave}) for wave in sampler.runs]
    assert waves == [
        [(0, "stage1")],
        [(0, "stage2"), (1, "stage1")],
        [(1, "stage2"), (2, "stage1")],
        [(2, "stage2")],
    ]
    assert [len(wave) for wave in sampler.runs] == [9, 18, 18, 9]
    for wave in sampler.runs[1:]:
        stages = [r.tag.stage for r in wave]
        assert stages == sorted(stages, reverse=True), "what learns comes first"


def test_replays_of_ahead_join_the_next_drafts(parts):
    sampler = scripted(parts)
    collect_all(collector_of(small_config(schedule="ahead", **REPLAY), parts, sampler), batches(parts, 2))
    assert [len(wave) for wave in sampler.runs] == [9, 18, 9], "replays are asked for on the way, not in a wave"
    events = [(kind, r.tag.step, (r.tag.stage, r.tag.replay)) for kind, r in sampler.events]
    replays = [place for place, (kind, _, part) in enumerate(events) if kind == "asked" and part[1]]
    assert {events[place][2][0] for place in replays} == {"stage2"}
    first_draft = events.index(("sampled", 1, ("stage1", 0)))
    assert any(place < first_draft for place in replays), "before the next drafts are through"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("extra", [{}, REPLAY])
def test_progress_ends_at_what_was_expected(schedule, extra, parts):
    seen = []
    config = small_config(schedule=schedule, **extra)
    collector = collector_of(config, parts, scripted(parts), on_progress=lambda *counts: seen.append(counts))
    collect_all(collector, batches(parts, 3))
    ends = [done for (done, _), (after, _) in zip(seen, [*seen[1:], (1, 0)], strict=True) if after == 1]
    assert len(ends) == 3
    assert all(done <= total for done, total in seen)
    assert sum(done == total for done, total in seen) == 3


class Abstaining:
    """A scorer with verdicts and rewards of ``None`` among them."""

    in_worker = False

    def score(self, problem, prompt, completions):
        scores = []
        for completion in completions:
            r = random.Random(completion.text)
            parts = {"a": r.choice([None, 0.0, 0.1 + 0.2]), "b": r.choice([None, 1])}
            values = [value for value in parts.values() if value is not None]
            scores.append(Score(sum(values) if values else None, parts, "wrong", r.choice([None, "7"])))
        return scores


def test_drafts_survive_a_checkpoint_exactly(parts):
    """Through JSON, with rewards of None, into a collector that goes on as the one that sampled them."""
    config, problems = small_config(schedule="ahead"), batches(parts, 3)
    one, other = (collector_of(config, parts, scripted(parts), Abstaining()) for _ in range(2))
    for step in range(2):
        one.collect(problems[step], step, upcoming=problems[step + 1])
        state = json.loads(json.dumps(one.drafted()))
        assert [len(group["completions"]) for group in state] == [3, 3, 3]
        other.load_drafted(state, problems[step + 1], step + 1)
        assert other.drafted() == one.drafted()
    assert any(score["reward"] is None for group in state for score in group["scores"])
    expected = one.collect(problems[2], 2)
    assert other.collect(problems[2], 2) == expected
    assert {r.tag.stage for r in other.sampler.requests} == {"stage2"}, "its drafts came from the checkpoint"
    assert one.drafted() == other.drafted() == []


def test_drafts_of_a_step_that_is_not_made_are_passed_over(parts):
    """``max_steps`` may be lowered to where a stopped run is."""
    one = collector_of(small_config(schedule="ahead"), parts, scripted(parts))
    one.collect(parts.train[:3], 0, upcoming=parts.train[3:6])
    one.load_drafted(one.drafted(), [], 1)
    assert one.drafted() == []


@pytest.mark.parametrize("extra", [{}, REPLAY])
def test_problems_put_in_by_dynamic_sampling_have_both_stages_at_once(extra, parts):
    """They come too late to be drafted ahead; the next step's drafts are neither lost nor sampled again."""
    configs = [small_config(schedule=schedule, dynamic_sampling=2, **extra) for schedule in ("ahead", "barrier")]
    problems, found = batches(parts, 3), []
    for config in configs:
        sampler = scripted(parts)
        collector, steps = collector_of(config, parts, sampler), []
        for step in range(3):
            first = collector.collect(problems[step], step, upcoming=problems[step + 1])
            others = iter(parts.train[20 + 5 * step :])
            steps.append(with_signal(first, others, config, lambda more, slot: collector.collect(more, step, slot)))  # noqa: B023
        assert collector.drafted() == []
        found.append((steps, sorted(r.seed for r in sampler.requests)))
    assert found[0] == found[1]
    batches_, seeds = found[0]
    assert len(set(seeds)) == len(seeds)
    assert sum(batch.rounds for batch in batches_) >= 2


@pytest.mark.parametrize("algorithm", ["grpo", "igrpo-joint"])
def test_ahead_is_for_drafts_that_do_not_learn(algorithm):
    with pytest.raises(ConfigError, match=f"schedule: ahead is for igrpo; with {algorithm} "):
        resolve({"algorithm": algorithm, "schedule": "ahead"})
    assert resolve({"schedule": "ahead"}).algorithm == "igrpo"


# On the bundled model


def ids(steps):
    return [[[c.ids for c in group.completions] for group in rollout.groups] for step in steps for rollout in step]


def test_barrier_and_overlap_sample_the_same_tokens(parts):
    problems = batches(parts, 3)
    barrier, overlap = (
        collect_all(collector_of(small_config(schedule=schedule), parts), problems) for schedule in SCHEDULES[:2]
    )
    assert ids(barrier) == ids(overlap)
    for one, other in zip(chain(*barrier), chain(*overlap), strict=True):
        assert (one.choice, one.stage2.prompt) == (other.choice, other.stage2.prompt)
        assert [s.reward for s in one.stage2.scores] == [s.reward for s in other.stage2.scores]
        for a, b in zip(one.stage2.completions, other.stage2.completions, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def adapter_of(sampler_or_update):
    policy = sampler_or_update.policy
    model = policy if isinstance(sampler_or_update, Replica) else policy.model
    return torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "lora_" in n]).numpy().tobytes()


@pytest.fixture
def sampled(monkeypatch):
    """For every training request of a run: its tag, seed, and the adapter that the sampler had pushed to it."""
    seen, pushed, after = [], {}, []
    run, refresh, update = TransformersSampler.run, Replica.refresh, PolicyUpdate.step

    def watched_run(self, requests, on_finished=None, poll=None):
        def watched(request, completion):
            if hasattr(request.tag, "stage"):
                seen.append((request.tag, request.seed, pushed[id(self.replica)]))
            return on_finished(request, completion)

        return run(self, requests, on_finished and watched, poll)

    def watched_refresh(self):
        refresh(self)
        pushed[id(self)] = adapter_of(self)

    def watched_update(self, *arguments):
        after.append(adapter_of(self))
        return update(self, *arguments)

    monkeypatch.setattr(TransformersSampler, "run", watched_run)
    monkeypatch.setattr(Replica, "refresh", watched_refresh)
    monkeypatch.setattr(PolicyUpdate, "step", watched_update)
    return seen, after


@pytest.mark.slow
def test_refinements_of_ahead_are_on_policy_and_drafts_one_update_old(sampled, tmp_path):
    seen, policies = sampled
    settings = {"max_steps": 4, "temperature": 1.5, "warmup_ratio": 0.0, "parity_steps": 3}
    made = {}
    for schedule in ("ahead", "barrier"):
        seen.clear()
        policies.clear()
        summary = train(small_config(schedule=schedule, output_dir=str(tmp_path / schedule), **settings))
        assert summary["rollouts"] == len(seen) == 4 * 3 * 6
        assert len(set(policies)) == 4, "every step changed the adapter"
        for tag, _, policy in seen:
            lag = 1 if (schedule, tag.stage) == ("ahead", "stage1") and tag.step else 0
            assert policy == policies[tag.step - lag]
        made[schedule] = {(tag.step, tag.slot, tag.stage, tag.replay, tag.index): seed for tag, seed, _ in seen}
    assert made["ahead"] == made["barrier"], "the same requests with the same seeds"


AHEAD = SMALL | {
    "schedule": "ahead",
    "max_steps": 4,
    "eval_steps": 4,
    "save_steps": 2,
    "eval_size": 2,
    "parity_steps": 0,
}
VARIANTS = {
    "plain": {"parity_steps": 1},
    "replay": REPLAY | {"max_steps": 3},
    "dynamic": {"max_steps": 3, "dynamic_sampling": 1, "temperature": 0.7, "num_generations": 4},
}


def kept_records(folder):
    kept = [record for record in records(folder, "metrics.jsonl") if record["kind"] != "parity"]
    return [{key: value for key, value in record.items() if key not in ("time", "memory")} for record in kept]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with the schedule ahead that was never stopped."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(resolve(AHEAD | {"output_dir": str(folder)}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_stopped_after_every_step_ahead_is_bit_equal(variant, tmp_path):
    settings = AHEAD | VARIANTS[variant]
    whole, parts_of_it = tmp_path / "whole", tmp_path / "parts"
    summary = train(resolve(settings | {"output_dir": str(whole)}))
    for step in range(1, settings["max_steps"] + 1):
        minutes = 1e-6 if step < settings["max_steps"] else None
        last = train(resolve(settings | {"output_dir": str(parts_of_it), "max_minutes": minutes}))
        assert last["steps"] == step
    assert_same(whole, parts_of_it)
    assert kept_records(whole) == kept_records(parts_of_it)
    assert last["rollouts"] == summary["rollouts"]
    samples = records(whole, "samples.jsonl")
    lines = [sample["drafts"] + sample["refinements"] for sample in samples]
    replayed = [c for sample in samples for replay in sample.get("replays", ()) for c in replay["completions"]]
    assert summary["rollouts"] == sum(map(len, lines)) + len(replayed)
    assert (len(replayed) > 0) is (variant == "replay")
    assert (len(samples) > 3 * settings["max_steps"]) is (variant == "dynamic")


@pytest.mark.slow
@pytest.mark.parametrize("at", [2, 4])
def test_broken_off_in_mid_step_ahead_is_bit_equal(at, whole, tmp_path, monkeypatch):
    """As if killed during an update: it goes on with the drafts of the last checkpoint, two steps or one before."""
    update, calls = PolicyUpdate.step, []

    def killed(self, *arguments):
        calls.append(arguments)
        if len(calls) == at:
            raise ZeroDivisionError
        return update(self, *arguments)

    monkeypatch.setattr(PolicyUpdate, "step", killed)
    settings = resolve(AHEAD | {"output_dir": str(tmp_path / "killed")})
    with pytest.raises(ZeroDivisionError):
        train(settings)
    monkeypatch.undo()
    train(settings)
    assert_same(whole, tmp_path / "killed")
    assert kept_records(whole) == kept_records(tmp_path / "killed")


def test_a_run_stopped_ahead_may_be_ended_where_it_is_and_go_on_later(tmp_path):
    constant = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0, "max_steps": 3}
    settings = AHEAD | constant | {"output_dir": str(tmp_path / "run")}
    train(resolve(settings | {"max_minutes": 1e-6}))
    assert train(resolve(settings | {"max_steps": 1}))["steps"] == 1
    train(resolve(settings))
    train(resolve(settings | {"output_dir": str(tmp_path / "whole")}))
    assert_same(tmp_path / "whole", tmp_path / "run")


# What it costs, in decoding steps


def endless(parts, slots=128):
    """Completions that end at their limit only."""
    return TransformersSampler(Replica(parts.policy.model), parts.prompts.tokenizer, (), slots)


@pytest.mark.slow
def test_at_equal_lengths_two_stages_ahead_cost_as_many_steps_as_one(parts):
    settings = {"max_completion_length": 16}
    problems = batches(parts, 4)
    grpo, ahead = endless(parts), endless(parts)
    collect_all(collector_of(small_config(algorithm="grpo", **settings), parts, grpo), problems)
    collect_all(collector_of(small_config(schedule="ahead", **settings), parts, ahead), problems)
    assert grpo.sampled_tokens == ahead.sampled_tokens == 4 * 3 * 6 * 16
    first_drafts = 15
    assert ahead.decode_steps - first_drafts <= 1.02 * grpo.decode_steps
    barrier = endless(parts)
    collect_all(collector_of(small_config(schedule="barrier", **settings), parts, barrier), problems)
    assert barrier.decode_steps == 2 * grpo.decode_steps


class Uneven(TransformersSampler):
    """Each completion is as long as its seed says: 8 tokens and an exponential tail of 30, 160 at most."""

    def run(self, requests, on_finished=None, poll=None):
        def drawn(request):
            length = 8 + round(random.Random(request.seed).expovariate(1 / 30))
            return dataclasses.replace(request, max_tokens=min(length, 160))

        def followed(request, completion):
            return [drawn(more) for more in on_finished(request, completion)]

        return super().run([drawn(request) for request in requests], followed, poll)


@pytest.mark.slow
def test_overlap_saves_steps_where_lengths_differ(parts):
    steps = {}
    for schedule in SCHEDULES:
        sampler = Uneven(Replica(parts.policy.model), parts.prompts.tokenizer, (), 16)
        config = small_config(schedule=schedule, max_completion_length=160, prompts_per_step=8, num_generations=4)
        collect_all(collector_of(config, parts, sampler), batches(parts, 3, 8))
        steps[schedule] = sampler.decode_steps
    assert steps["overlap"] <= 0.85 * steps["barrier"]
    assert steps["ahead"] <= 0.85 * steps["barrier"]
