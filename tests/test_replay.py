"""T-SPMO's replay: where it restarts, what a continuation becomes, and that it changes nothing else."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripted_sampler import ScriptedSampler
from tiny_parts import small_config, tiny_parts

from igrpo_lite.algorithms.methods import method_of
from igrpo_lite.algorithms.replay import choose_restarts
from igrpo_lite.algorithms.rollout import RolloutCollector
from igrpo_lite.training.records import rollout_record
from igrpo_lite.types import Completion, Group, Problem, Prompt, Score

REPLAY = {"tokens": "t-spmo", "tspmo_replay": 3}
ALGORITHMS = {"grpo": ["stage1"], "igrpo": ["stage2"], "igrpo-joint": ["stage1", "stage2"]}


@pytest.fixture(scope="module")
def parts():
    made = tiny_parts(small_config())
    yield made
    made.scorer.close()


def collect(config, parts, sampler=None, on_progress=lambda done, total: None, problems=None, scorer=None):
    collector = RolloutCollector(
        sampler or parts.sampler, scorer or parts.scorer, parts.prompts, config, config.seed, on_progress
    )
    return collector.collect(problems or parts.train[: config.prompts_per_step], 0)


def scripted(parts, pick=lambda count: 0):
    """Half of its answers are right for the first problems, so groups are mixed."""
    answers = [problem.answer for problem in parts.train[:3]]
    return ScriptedSampler(parts.prompts.tokenizer, answers, pick)


def group_of(rewards, lengths):
    completions = tuple(Completion(tuple(range(n)), "", (0.0,) * n, "stop") for n in lengths)
    scores = tuple(Score(reward, {}, "wrong") for reward in rewards)
    return Group(Problem("p", "?", "1"), "stage1", Prompt("", ()), completions, scores)


rewards_and_lengths = st.lists(
    st.tuples(st.sampled_from([None, 0.0, 0.1, 0.5, 1.0, 1.1]), st.integers(1, 5)), min_size=1, max_size=8
)


@given(rewards_and_lengths, st.integers(0, 2**32))
def test_one_success_and_one_failure_else_any(pairs, seed):
    rewards, lengths = zip(*pairs, strict=True)
    restarts = choose_restarts(group_of(rewards, lengths), random.Random(seed))
    exact = [Fraction(reward) for reward in rewards if reward is not None]
    usable = {i for i, reward in enumerate(rewards) if reward is not None and lengths[i] > 1}
    mean = sum(exact, Fraction(0)) / max(1, len(exact))
    above, below = ({i for i in usable if side * (Fraction(rewards[i]) - mean) > 0} for side in (1, -1))
    found = [restart.source for restart in restarts]
    assert all(1 <= restart.start < lengths[restart.source] for restart in restarts)
    if above and below:
        assert len(found) == 2
        assert found[0] in above
        assert found[1] in below
    else:
        assert len(found) == bool(usable)
        assert set(found) <= usable


def test_sources_and_places_are_uniform():
    group = group_of([1.0, 1.0, 0.0, 0.0, 0.0, 0.0], [4, 4, 3, 3, 3, 1])
    draws = [choose_restarts(group, random.Random(seed)) for seed in range(6000)]
    for kind, expected in ((0, 2 * 3), (1, 3 * 2)):
        seen = Counter((restarts[kind].source, restarts[kind].start) for restarts in draws)
        assert len(seen) == expected
        # Five standard deviations of a binomial count.
        share = 1 / expected
        assert all(abs(count - 6000 * share) < 5 * (6000 * share * (1 - share)) ** 0.5 for count in seen.values())


def test_a_reward_at_the_mean_is_neither_success_nor_failure():
    for seed in range(50):
        restarts = choose_restarts(group_of([0.0, 0.5, 1.0], [3, 3, 3]), random.Random(seed))
        assert [restart.source for restart in restarts] == [2, 0]


def test_equal_rewards_have_no_kinds_however_their_mean_rounds():
    """The mean of ten times 0.7 need not be 0.7 in floating point."""
    for reward in (0.1, 0.7, 1.1, 1 / 3):
        for size in range(2, 12):
            assert len(choose_restarts(group_of([reward] * size, [5] * size), random.Random(size))) == 1


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("schedule", ["overlap", "barrier"])
def test_a_replay_is_whole_completions_of_the_stages_prompt(algorithm, schedule, parts):
    config = small_config(algorithm=algorithm, schedule=schedule, **REPLAY)
    rollouts = collect(config, parts, scripted(parts))
    for rollout in rollouts:
        assert {replay.group.stage for replay in rollout.replays} == set(ALGORITHMS[algorithm])
        groups = {g.stage: g for g, start in method_of(config).learning_groups(rollout, config) if not start}
        for replay in rollout.replays:
            group = groups[replay.group.stage]
            source, *whole = replay.group.completions
            place = next(i for i, completion in enumerate(group.completions) if completion is source)
            assert (replay.group.problem, replay.group.prompt) == (group.problem, group.prompt)
            assert replay.group.scores[0] is group.scores[place]
            assert 1 <= replay.start < len(source.ids)
            assert len(whole) == 3
            assert replay.group.scores[1:] == tuple(parts.scorer.score(group.problem, group.prompt, whole))
            for completion in whole:
                assert completion.ids[: replay.start] == source.ids[: replay.start]
                assert completion.logprobs[: replay.start] == source.logprobs[: replay.start]
                assert len(completion.logprobs) == len(completion.ids) <= config.max_completion_length
                assert completion.text == parts.prompts.tokenizer.decode(completion.ids, skip_special_tokens=True)
                assert completion.truncated is (completion.ids[-1] != parts.prompts.tokenizer.eos_token_id)


def test_restarts_are_in_a_success_and_in_a_failure(parts):
    config = small_config(algorithm="grpo", **REPLAY)
    rollouts = collect(config, parts, scripted(parts), problems=parts.train[:8])  # the last ones are all wrong
    for rollout in rollouts:
        rewards = [score.reward for score in rollout.stage1.scores]
        sources = [replay.group.scores[0].reward for replay in rollout.replays]
        if len(set(rewards)) > 1:
            mean = sum(rewards) / len(rewards)
            assert sources[0] > mean > sources[1]
        else:
            assert sources == [rewards[0]]
    assert {len(rollout.replays) for rollout in rollouts} == {1, 2}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_requests_of_a_replay(algorithm, parts):
    """Prompt and kept tokens, what is left of the length, the stage's temperature, seeds of their own."""
    config = small_config(algorithm=algorithm, temperature=0.9, **REPLAY)
    sampler = scripted(parts)
    rollouts = collect(config, parts, sampler)
    seeds = [request.seed for request in sampler.requests]
    assert len(set(seeds)) == len(seeds)
    for rollout in rollouts:
        for replay in rollout.replays:
            source = replay.group.completions[0]
            ids = replay.group.prompt.ids + source.ids[: replay.start]
            found = [request for request in sampler.requests if request.prompt.ids == ids]
            assert len(found) >= 3
            assert all(request.max_tokens == config.max_completion_length - replay.start for request in found)
            assert all(request.temperature == 0.9 for request in found)
            assert all(request.prompt.text.startswith(replay.group.prompt.text) for request in found)
    assert len(seeds) == 3 * 6 + 3 * sum(len(rollout.replays) for rollout in rollouts)


def test_the_order_of_events(parts):
    """Overlap: the last refinement of a problem asks for its replays at once. Barrier: they are a wave of their own."""
    overlap, barrier = scripted(parts), scripted(parts)
    rollouts = collect(small_config(**REPLAY), parts, overlap)
    assert collect(small_config(schedule="barrier", **REPLAY), parts, barrier) == rollouts
    replays = [3 * len(rollout.replays) for rollout in rollouts]
    assert [len(run) for run in overlap.runs] == [3 * 3]
    assert [len(run) for run in barrier.runs] == [3 * 3, 3 * 3, sum(replays)]
    slots = [request.tag.slot for request in barrier.runs[2]]
    assert slots == [slot for slot, count in enumerate(replays) for _ in range(count)]
    events = [(kind, request.tag.slot, (request.tag.stage, request.tag.replay)) for kind, request in overlap.events]
    for slot, count in enumerate(replays):
        last = max(i for i, event in enumerate(events) if event == ("sampled", slot, ("stage2", 0)))
        asked = [i for i, (kind, place, part) in enumerate(events) if (kind, place) == ("asked", slot) and part[1]]
        assert asked == list(range(last + 1, last + 1 + count))
    first_replay = next(i for i, (kind, _, part) in enumerate(events) if kind == "asked" and part[1])
    assert ("sampled", 2, ("stage2", 0)) in events[first_replay:], "the last problem is not waited for"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_rollouts_do_not_depend_on_the_order_of_finishing(algorithm, parts):
    config = small_config(algorithm=algorithm, **REPLAY)
    reference = collect(config, parts, scripted(parts))
    for seed in range(5):
        r = random.Random(seed)
        for schedule in ("overlap", "barrier"):
            again = config.model_copy(update={"schedule": schedule})
            assert collect(again, parts, scripted(parts, r.randrange)) == reference
    assert collect(config.model_copy(update={"seed": 1}), parts, scripted(parts)) != reference


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_replay_leaves_the_other_rollouts_as_they_are(algorithm, parts):
    with_replay = collect(small_config(algorithm=algorithm, **REPLAY), parts, scripted(parts))
    without = collect(small_config(algorithm=algorithm, tokens="t-spmo"), parts, scripted(parts))
    idle = small_config(algorithm=algorithm).model_copy(update={"tspmo_replay": 3})
    other_tokens = collect(idle, parts, scripted(parts))
    assert [dataclasses.replace(rollout, replays=()) for rollout in with_replay] == without == other_tokens
    assert any(rollout.replays for rollout in with_replay)


def test_only_what_is_new_is_scored(parts):
    scored = []

    class Counting(type(parts.scorer)):
        def score(self, problem, prompt, completions):
            scored.append(len(completions))
            return super().score(problem, prompt, completions)

    scorer = Counting(small_config(), "boxed")
    rollouts = collect(small_config(algorithm="grpo", **REPLAY), parts, scripted(parts), scorer=scorer)
    scorer.close()
    assert sorted(scored) == sorted([6] * 3 + [3] * sum(len(rollout.replays) for rollout in rollouts))


@pytest.mark.parametrize("schedule", ["overlap", "barrier"])
def test_progress_counts_to_what_is_expected(schedule, parts):
    seen = []
    config = small_config(algorithm="igrpo-joint", schedule=schedule, **REPLAY)
    rollouts = collect(config, parts, scripted(parts), lambda done, total: seen.append((done, total)))
    every = 3 * 6 + 3 * sum(len(rollout.replays) for rollout in rollouts)
    assert [done for done, _ in seen] == list(range(1, every + 1))
    totals = [total for _, total in seen]
    assert totals == sorted(totals)
    assert (totals[0], totals[-1]) == (3 * 6, every)


def test_completions_of_one_token_are_not_replayed(parts):
    config = small_config(algorithm="grpo", max_completion_length=1, **REPLAY)
    assert all(rollout.replays == () for rollout in collect(config, parts))


@pytest.mark.parametrize("changes", [{"schedule": "barrier"}, {"max_num_seqs": 5}])
def test_replays_of_the_model_depend_on_seeds_only(changes, parts):
    def ids(rollouts):
        groups = [g for r in rollouts for g in (*r.groups, *(replay.group for replay in r.replays))]
        return [[completion.ids for completion in group.completions] for group in groups]

    settings = REPLAY | {"algorithm": "igrpo-joint"}
    reference = ids(collect(small_config(**settings), parts))
    parts.sampler.max_num_seqs = changes.get("max_num_seqs", 128)
    found = ids(collect(small_config(**settings, **changes), parts))
    parts.sampler.max_num_seqs = 128
    assert found == reference


def test_whole_completions_have_the_models_logprobs(parts):
    """Kept tokens and continuation together are what the policy would say of the whole, from the stage's own prompt."""
    config = small_config(algorithm="grpo", temperature=0.8, **REPLAY)
    rollouts = collect(config, parts)
    assert all(rollout.replays for rollout in rollouts)
    for replay in (replay for rollout in rollouts for replay in rollout.replays):
        prompt = replay.group.prompt.ids
        for completion in replay.group.completions:
            with torch.no_grad():
                logits = parts.policy.model(input_ids=torch.tensor([prompt + completion.ids])).logits[0].float()
            logprobs = torch.log_softmax(logits[len(prompt) - 1 : -1] / 0.8, dim=-1)
            expected = logprobs.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=1e-4, atol=1e-4)


def test_records_name_the_source_and_hold_the_continuations(parts):
    rollouts = collect(small_config(algorithm="igrpo-joint", **REPLAY), parts, scripted(parts))
    for rollout in rollouts:
        record = json.loads(json.dumps(rollout_record(1, rollout)))
        assert len(record["replays"]) == len(rollout.replays)
        for told, replay in zip(record["replays"], rollout.replays, strict=True):
            stage = {"stage1": "drafts", "stage2": "refinements"}[told["stage"]]
            assert record[stage][told["source"]]["text"] == replay.group.completions[0].text
            assert told["start"] == replay.start
            assert [c["text"] for c in told["completions"]] == [c.text for c in replay.group.completions[1:]]
            assert [c["reward"] for c in told["completions"]] == [s.reward for s in replay.group.scores[1:]]
    assert "replays" not in rollout_record(1, dataclasses.replace(rollouts[0], replays=()))
