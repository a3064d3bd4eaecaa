"""Variants of our own: each against the rule that its name promises, on the bundled model's rollouts."""

from __future__ import annotations

import dataclasses
import math
import random
import statistics

import pytest
from tiny_parts import small_config, tiny_parts
from update_parts import config_of, rollouts_of, run_update, with_rewards

from igrpo_lite.algorithms.drafts import choose_draft
from igrpo_lite.algorithms.learning import learning_sequences, plain_refinements, totals
from igrpo_lite.algorithms.rollout import RolloutCollector, is_single_stage, learning_groups
from igrpo_lite.config import RolloutOptions
from igrpo_lite.rewards.hiding import hide_answer
from igrpo_lite.settings import examine
from igrpo_lite.training.health import Health
from igrpo_lite.types import Completion, Score


@pytest.fixture(scope="module")
def parts():
    made = tiny_parts(config_of("igrpo-joint"))
    yield made
    made.scorer.close()


@pytest.fixture(scope="module")
def collect(parts):
    return rollouts_of(parts)


@pytest.mark.parametrize(
    ("draft", "shown"),
    [
        (r"27+30=57; \boxed{57}", r"27+30=?; \boxed{?}"),
        (r"157 and 5.57 and 57.5 and 1,057 and x57; \boxed{57}", r"157 and 5.57 and 57.5 and 1,057 and x57; \boxed{?}"),
        ("He has 57. So <answer>57</answer>", "He has ?. So <answer>?</answer>"),
        (r"a \frac{1}{2} b \boxed{\frac{1}{2}}", r"a ? b \boxed{?}"),
        ("#### 12", "#### ?"),
        ("no number at all", "no number at all"),
        ("", ""),
    ],
)
def test_hidden_answers(draft, shown):
    assert hide_answer(draft) == shown


def test_refinements_see_the_draft_without_its_answer(parts):
    config = small_config(draft_answer="hidden")
    hiding = tiny_parts(config)
    rollouts = RolloutCollector(hiding.sampler, hiding.scorer, hiding.prompts, config, 0).collect(parts.train[:6], 0)
    for rollout in rollouts:
        answer = rollout.draft_score.answer
        assert hide_answer(rollout.draft.text) in rollout.stage2.prompt.text
        assert f"boxed{{{answer}}}" in rollout.draft.text
        assert f"boxed{{{answer}}}" not in rollout.stage2.prompt.text
    hiding.scorer.close()


def choose(rewards, **options):
    drafts = [Completion((1, 2), "x", (0.0, 0.0), "stop") for _ in rewards]
    scores = [Score(reward, {}, "wrong", "1") for reward in rewards]
    return choose_draft(drafts, scores, RolloutOptions(**options), random.Random(options.pop("seed", 0)))


def test_the_worst_draft_and_either_end_by_chance():
    assert choose([0.5, 0.1, 1.0, 0.1], draft_selection="worst").index == 1
    drafts = [Completion((1,), "x", (0.0,), "stop")] * 3
    scores = [Score(reward, {}, "wrong", "1") for reward in (0.5, 0.1, 1.0)]
    options = RolloutOptions(draft_selection="mixed")
    chosen = [choose_draft(drafts, scores, options, random.Random(seed)).index for seed in range(400)]
    assert set(chosen) == {1, 2}
    assert abs(chosen.count(2) - 200) < 60  # six standard deviations of a fair coin


@pytest.mark.parametrize(("rewards", "shown"), [([1.0, 1.0], False), ([0.0, 0.0], False), ([0.0, 1.0], True)])
def test_drafts_that_agree_are_not_shown(rewards, shown):
    assert choose(rewards, draft_fallback="agree").shown is shown


@pytest.mark.parametrize("share", [0.0, 0.25, 1 / 3, 0.5, 1.0])
@pytest.mark.parametrize("prompts_per_step", [1, 2, 12])
def test_the_share_of_single_stages_is_spread_over_the_run(share, prompts_per_step):
    config = small_config(single_stage_share=share, prompts_per_step=prompts_per_step)
    steps = 24 // prompts_per_step
    single = [is_single_stage(step, slot, config) for step in range(steps) for slot in range(prompts_per_step)]
    assert sum(single) == math.floor(24 * share + 1e-9)
    for start in range(0, 24, 12):
        assert sum(single[start : start + 12]) in (math.floor(12 * share), math.ceil(12 * share))


def test_a_single_stage_has_no_drafts_so_their_temperature_is_not_its(parts):
    """Neither in sampling nor in the loss; the sampler's log-probabilities tell of both."""
    settings = {"algorithm": "igrpo", "single_stage_share": 0.5, "draft_temperature": 2.0, "temperature": 0.7}
    config = small_config(prompts_per_step=4, **settings)
    mixed = RolloutCollector(parts.sampler, parts.scorer, parts.prompts, config, 0).collect(parts.train[:4], 0)
    config = small_config(algorithm="grpo", temperature=0.7)
    grpo = RolloutCollector(parts.sampler, parts.scorer, parts.prompts, config, 0).collect(parts.train[:4], 0)
    assert ids_of(mixed[1::2]) == ids_of(grpo[1::2])
    assert ids_of(mixed[::2])[0][:3] != ids_of(grpo[::2])[0][:3]
    joint = small_config(prompts_per_step=4, **settings | {"algorithm": "igrpo-joint"})
    for rollout in mixed:
        found = {s.prompt: s.temperature for s in learning_sequences([rollout], joint, 0)}
        assert found[rollout.stage1.prompt] == (0.7 if rollout.stage2 is None else 2.0)
    _, stats = run_update(joint, parts.policy, mixed)
    assert stats.sampler_gap < 1e-4


def ids_of(rollouts):
    return [[completion.ids for completion in group.completions] for r in rollouts for group in r.groups]


@pytest.mark.parametrize("algorithm", ["igrpo", "igrpo-joint"])
def test_single_stages_are_grpos_and_the_rest_is_as_without(parts, algorithm):
    mixed, plain, grpo = (
        RolloutCollector(parts.sampler, parts.scorer, parts.prompts, config, 0).collect(parts.train[:4], 0)
        for config in (
            small_config(algorithm=algorithm, single_stage_share=0.5),
            small_config(algorithm=algorithm),
            small_config(algorithm="grpo"),
        )
    )
    expected = [plain[0], grpo[1], plain[2], grpo[3]]
    assert ids_of(mixed) == ids_of(expected)
    assert {r.sampled for r in mixed} == {6}
    for rollout in mixed[1::2]:
        assert [group.stage for group in learning_groups(rollout, algorithm)] == ["stage1"]


def rewards_of(group):
    return [score.reward for score in group.scores]


def advantages_of(sequences):
    return [s.learning.advantages[0] for s in sequences if not s.foreign]


def test_pooled_groups_share_mean_and_spread(collect):
    rollouts = collect("igrpo-joint")
    found = advantages_of(learning_sequences(rollouts, config_of("igrpo-joint", joint_groups="pooled"), 0))
    expected = []
    for rollout in rollouts:
        rewards = rewards_of(rollout.stage1) + rewards_of(rollout.stage2)
        mean, spread = statistics.mean(rewards), statistics.stdev(rewards)
        expected += [(reward - mean) / (spread + 1e-4) for reward in rewards]
    assert found == pytest.approx(expected, abs=1e-5)


def test_the_drafts_reward_as_the_baseline(collect):
    """Also where all refinements earned the same, which teaches nothing otherwise; not where no draft was shown."""
    first, second, third = collect("igrpo")
    second = with_rewards(second, "stage2", lambda index, reward: 1.0)
    second = with_rewards(second, "stage1", lambda index, reward: 0.25)
    third = dataclasses.replace(third, choice=dataclasses.replace(third.choice, shown=False))
    found = learning_sequences([first, second, third], config_of("igrpo", stage2_baseline="draft"), 0)
    mean, spread = statistics.mean(rewards_of(third.stage2)), statistics.stdev(rewards_of(third.stage2))
    expected = [reward - first.draft_score.reward for reward in rewards_of(first.stage2)]
    expected += [0.75] * len(second.stage2.scores)
    expected += [(reward - mean) / (spread + 1e-4) for reward in rewards_of(third.stage2)]
    assert advantages_of(found) == pytest.approx(expected, abs=1e-5)


def test_better_refinements_are_also_learned_under_the_question(collect):
    rollouts = collect("igrpo")
    config = config_of("igrpo", plain_refinements=0.5)
    sequences = learning_sequences(rollouts, config, 0)
    foreign = [s for s in sequences if s.foreign]
    expected = []
    for rollout in rollouts:
        mean = statistics.mean(rewards_of(rollout.stage1))
        for completion, reward in zip(rollout.stage2.completions, rewards_of(rollout.stage2), strict=True):
            if reward > mean:
                expected.append((rollout.stage1.prompt, completion, 0.5 * (reward - mean)))
    assert expected
    assert [(s.prompt, s.completion) for s in foreign] == [entry[:2] for entry in expected]
    assert [s.learning.advantages[0] for s in foreign] == pytest.approx([entry[2] for entry in expected])
    assert totals(sequences) == totals(learning_sequences(rollouts, config_of("igrpo"), 0))
    hidden = dataclasses.replace(rollouts[0], stage2=dataclasses.replace(rollouts[0].stage2, prompt=expected[0][0]))
    assert plain_refinements(hidden, config, 0, 0) == []


def test_refinements_under_the_question_keep_to_the_choice_of_tokens(collect):
    rollouts = collect("igrpo")
    config = config_of("igrpo", plain_refinements=0.5, tokens="s-grpo", sgrpo_alpha=2, sgrpo_p=0.3)
    foreign = [s for s in learning_sequences(rollouts, config, 0) if s.foreign]
    everything = [s for s in learning_sequences(rollouts, config_of("igrpo", plain_refinements=0.5), 0) if s.foreign]
    assert [s.completion for s in foreign] == [s.completion for s in everything]
    for sequence in foreign:
        assert {0, 1} <= set(sequence.learning.indices)
    chosen, tokens = (sum(len(s.learning.indices) for s in found) for found in (foreign, everything))
    assert 0.2 * tokens < chosen < 0.7 * tokens
    assert foreign == [s for s in learning_sequences(rollouts, config, 0) if s.foreign]
    assert foreign != [s for s in learning_sequences(rollouts, config, 1) if s.foreign]
    cut = config_of("igrpo", plain_refinements=0.5, mask_truncated_completions=True)
    group = rollouts[0].stage2
    short = tuple(dataclasses.replace(completion, finish="length") for completion in group.completions)
    rollout = dataclasses.replace(rollouts[0], stage2=dataclasses.replace(group, completions=short))
    assert not any(s.learning.indices for s in plain_refinements(rollout, cut, 0, 0))


def test_foreign_prompts_do_not_count_as_the_samplers_error(parts, collect):
    """Under the other prompt the log-probabilities differ by much, under their own by rounding."""
    rollouts = collect("igrpo")
    (with_foreign,), stats = run_update(config_of("igrpo", plain_refinements=0.5), parts.policy, rollouts)
    (without,), plain = run_update(config_of("igrpo"), parts.policy, rollouts)
    assert stats.sampler_gap == pytest.approx(plain.sampler_gap, abs=1e-6)
    assert stats.learning_sequences > plain.learning_sequences
    assert any(not with_foreign[name].allclose(without[name], rtol=1e-3) for name in without)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"algorithm": "grpo", "stage2_baseline": "draft"}, "stage2_baseline"),
        ({"algorithm": "grpo", "single_stage_share": 0.5}, "single_stage_share"),
        ({"algorithm": "igrpo", "joint_groups": "pooled"}, "joint_groups"),
        ({"algorithm": "igrpo", "draft_answer": "hidden", "draft_placement": "multi-turn"}, "draft_answer"),
        ({"algorithm": "igrpo", "single_stage_share": 0.5, "schedule": "ahead"}, "single_stage_share"),
        ({"algorithm": "igrpo", "plain_refinements": 1, "tokens": "t-spmo"}, "plain_refinements"),
        ({"algorithm": "igrpo", "stage2_baseline": "draft", "dynamic_sampling": 2}, "stage2_baseline"),
        ({"algorithm": "igrpo", "plain_refinements": 1, "importance_sampling_mode": "none"}, "plain_refinements"),
        ({"algorithm": "igrpo", "single_stage_share": 1.5}, "single_stage_share"),
    ],
)
def test_variants_that_would_have_no_effect_are_refused(settings, complaint):
    _, findings = examine(settings)
    assert len(findings) == 1
    assert findings[0].startswith(complaint)


def test_the_papers_methods_are_the_defaults():
    config, findings = examine({"algorithm": "igrpo"})
    assert not findings
    assert (config.draft_answer, config.stage2_baseline, config.joint_groups) == ("shown", "mean", "own")
    assert (config.single_stage_share, config.plain_refinements) == (0.0, 0.0)


@pytest.mark.parametrize(
    "settings",
    [{}, {"stage2_baseline": "draft"}, {"single_stage_share": 0.5}, {"plain_refinements": 0.5}],
)
def test_equal_rewards_in_a_stage_are_no_dead_end_for_these(settings):
    """The paper's method learns nothing from groups of equal rewards; a variant may, as long as sequences learn."""
    health = Health(small_config(algorithm="igrpo", patience_dead=3, **settings))
    for step in range(1, 5):
        health.update({"step": step, "stage2/informative": 0.0, "learning_sequences": 4, "grad_norm": 1.0, "loss": 0.1})
    assert (health.dead() is None) is bool(settings)
