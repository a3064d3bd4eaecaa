"""Held-out evaluation and its intervals."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from tiny_parts import small_config, tiny_parts

from igrpo_lite.evaluation.evaluate import evaluate
from igrpo_lite.evaluation.intervals import paired_change, wilson
from igrpo_lite.sampling.base import Request
from igrpo_lite.training import train


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (5, 10), (10, 10), (1, 7), (120, 200), (1319, 1319)])
def test_wilson_bounds_solve_their_defining_equation(successes, n):
    """Both bounds are proportions from which the observed one is 1.96 standard errors away."""
    found = wilson(successes, n)
    assert found.low <= found.accuracy <= found.high
    for bound in (found.low, found.high):
        distance = 1.959963984540054 * math.sqrt(bound * (1 - bound) / n)
        assert abs(found.accuracy - bound) == pytest.approx(distance, abs=1e-6)


def test_wilson_refuses_nonsense():
    for successes, n in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="not a proportion"):
            wilson(successes, n)


def test_paired_change_by_hand():
    before = [True] * 50 + [False] * 50
    after = [True] * 45 + [False] * 5 + [True] * 20 + [False] * 30
    change = paired_change(before, after)
    assert (change.gained, change.lost, change.n) == (20, 5, 100)
    assert change.difference == pytest.approx(0.15)
    # sqrt(25 - 15^2 / 100) / 100 * 1.96
    assert (change.low, change.high) == pytest.approx((0.15 - 0.09349, 0.15 + 0.09349), abs=1e-4)
    with pytest.raises(ValueError, match="not pairs"):
        paired_change([True], [])


def test_each_problem_is_answered_greedily_and_refined_from_its_own_draft():
    parts = tiny_parts(small_config())
    evaluation = evaluate(parts.held_out, parts.sampler, parts.prompts, 48)
    again = evaluate(parts.held_out[::-1], parts.sampler, parts.prompts, 48)
    assert [a.record() for a in again.answered[::-1]] == [a.record() for a in evaluation.answered]
    for answered in evaluation.answered:
        first = parts.prompts.first(answered.problem.question)
        (single,) = parts.sampler.run([Request(first, 1, 48, 0.0)])
        second = parts.prompts.second(answered.problem.question, first, single.ids)
        (refined,) = parts.sampler.run([Request(second, 2, 48, 0.0)])
        assert (answered.single.ids, answered.refined.ids) == (single.ids, refined.ids)
    result = evaluation.result()
    assert result["single"]["n"] == len(parts.held_out)
    assert result["single"]["accuracy"] == sum(evaluation.right()) / len(parts.held_out)
    parts.scorer.close()


def test_eval_command_measures_a_run_against_its_base(tmp_path):
    summary = train(small_config(output_dir=str(tmp_path / "run"), max_steps=2, learning_rate=5e-3))
    output = tmp_path / "result.json"
    arguments = ["eval", str(tmp_path / "run"), "--adapter", str(tmp_path / "run" / "adapter"), "--output", str(output)]
    done = subprocess.run([sys.executable, "-m", "igrpo_lite", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "with adapter" in done.stdout
    found = json.loads(output.read_text())
    for ours, theirs in (("base", "before"), ("adapted", "after")):
        for measure in ("single", "refined"):
            assert found[ours][measure] == summary[theirs][measure]
    change = found["single_change"]
    assert change["difference"] == pytest.approx(
        found["adapted"]["single"]["accuracy"] - found["base"]["single"]["accuracy"]
    )
