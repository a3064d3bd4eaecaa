"""The two-stage rollout on the bundled model: who is conditioned on what, and what randomness may depend on."""

from __future__ import annotations

import pytest
from tiny_parts import small_config, tiny_parts

from igrpo_lite.algorithms.rollout import RolloutCollector


def collect(config, parts, step=0, problems=None):
    collector = RolloutCollector(parts.sampler, parts.scorer, parts.prompts, config, config.seed)
    return collector.collect(problems or parts.train[: config.prompts_per_step], step)


def token_ids(rollouts):
    return [[completion.ids for completion in group.completions] for r in rollouts for group in r.groups]


@pytest.fixture(scope="module")
def parts():
    with_scorer = tiny_parts(small_config())
    yield with_scorer
    with_scorer.scorer.close()


@pytest.mark.parametrize("algorithm", ["igrpo", "igrpo-joint"])
def test_two_stages_share_the_budget_and_the_best_draft_is_shown(parts, algorithm):
    config = small_config(algorithm=algorithm, num_generations=7, num_drafts=3)
    for rollout in collect(config, parts):
        assert (len(rollout.stage1.completions), len(rollout.stage2.completions)) == (3, 4)
        rewards = [score.reward for score in rollout.stage1.scores]
        assert rewards[rollout.choice.index] == max(rewards)
        question = rollout.stage1.problem.question
        assert rollout.stage1.prompt == parts.prompts.first(question)
        assert rollout.stage2.prompt == parts.prompts.second(question, rollout.stage1.prompt, rollout.draft.ids)
        assert rollout.draft.text in rollout.stage2.prompt.text
        assert rollout.stage2.prompt.text.index(question) < rollout.stage2.prompt.text.index(rollout.draft.text)


def test_grpo_is_one_stage_with_the_whole_budget(parts):
    config = small_config(algorithm="grpo")
    assert (config.n_drafts, config.n_refinements) == (6, 0)
    for rollout in collect(config, parts):
        assert len(rollout.stage1.completions) == 6
        assert rollout.stage2 is None
        assert rollout.choice is None


def test_drafts_of_igrpo_are_grpos_first_samples(parts):
    """Stage 1 is the same distribution and the same seeds: the comparison of methods starts from equal draws."""
    two = collect(small_config(algorithm="igrpo"), parts)
    one = collect(small_config(algorithm="grpo"), parts)
    for a, b in zip(two, one, strict=True):
        assert [c.ids for c in a.stage1.completions] == [c.ids for c in b.stage1.completions[:3]]


@pytest.mark.parametrize("changes", [{"schedule": "barrier"}, {"max_num_seqs": 5}, {"max_num_seqs": 1}])
def test_samples_depend_on_seeds_only(parts, changes):
    reference = token_ids(collect(small_config(), parts))
    parts.sampler.max_num_seqs = changes.get("max_num_seqs", 128)
    found = token_ids(collect(small_config(**changes), parts))
    parts.sampler.max_num_seqs = 128
    assert found == reference


def test_seed_and_step_change_everything(parts):
    reference = token_ids(collect(small_config(), parts))
    assert token_ids(collect(small_config(), parts, step=1)) != reference
    assert token_ids(collect(small_config(seed=1), parts)) != reference


def test_one_problem_twice_in_a_batch_is_sampled_twice(parts):
    problem = parts.train[0]
    first, second = collect(small_config(temperature=1.5), parts, problems=[problem, problem])
    assert [c.ids for c in first.stage1.completions] != [c.ids for c in second.stage1.completions]


def test_prefill_is_once_per_prompt(parts):
    before = parts.sampler.prefill_tokens
    rollouts = collect(small_config(), parts)
    prompts = {group.prompt.ids for r in rollouts for group in r.groups}
    assert parts.sampler.prefill_tokens - before == sum(map(len, prompts))
