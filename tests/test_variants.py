"""Problems of one stage among those of two (``single_stage_share``), on the bundled model's rollouts."""

from __future__ import annotations

import math

import pytest
from tiny_parts import small_config, tiny_parts
from update_parts import config_of, rollouts_of

from igrpo_lite.algorithms.methods import method_of
from igrpo_lite.algorithms.rollout import RolloutCollector
from igrpo_lite.config.resolve import examine
from igrpo_lite.training.health import Health


@pytest.fixture(scope="module")
def parts():
    made = tiny_parts(config_of("igrpo-joint"))
    yield made
    made.scorer.close()


@pytest.fixture(scope="module")
def collect(parts):
    return rollouts_of(parts)


@pytest.mark.parametrize("share", [0.0, 0.25, 1 / 3, 0.5, 1.0])
@pytest.mark.parametrize("prompts_per_step", [1, 2, 12])
def test_the_share_of_single_stages_is_spread_over_the_run(share, prompts_per_step):
    config = small_config(single_stage_share=share, prompts_per_step=prompts_per_step)
    steps = 24 // prompts_per_step
    single = [config.is_single_stage(step, slot) for step in range(steps) for slot in range(prompts_per_step)]
    assert sum(single) == math.floor(24 * share + 1e-9)
    for start in range(0, 24, 12):
        assert sum(single[start : start + 12]) in (math.floor(12 * share), math.ceil(12 * share))


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
    config = small_config(algorithm=algorithm, single_stage_share=0.5)
    for rollout in mixed[1::2]:
        assert [group.stage for group, _ in method_of(config).learning_groups(rollout, config)] == ["stage1"]


@pytest.mark.parametrize("settings", [{"algorithm": "grpo"}, {"schedule": "ahead"}, {"algorithm": "igrpo-joint"}])
def test_single_stages_that_would_have_no_effect_are_refused(settings):
    _, findings = examine(settings | {"single_stage_share": 0.5})
    assert [text.split(":")[0] for text in findings] == ["single_stage_share"] * (
        settings != {"algorithm": "igrpo-joint"}
    )


@pytest.mark.parametrize("settings", [{}, {"single_stage_share": 0.5}])
def test_equal_rewards_in_a_stage_are_no_dead_end_for_these(settings):
    """The paper's method learns nothing from groups of equal rewards; a variant may, as long as sequences learn."""
    health = Health(small_config(algorithm="igrpo", patience_dead=3, **settings))
    for step in range(1, 5):
        health.update({"step": step, "stage2/informative": 0.0, "learning_sequences": 4, "grad_norm": 1.0, "loss": 0.1})
    assert (health.dead() is None) is bool(settings)
