"""Real problem sets through every step of a run. The tiny model learns nothing from them; nothing may break."""

from __future__ import annotations

import json

import pytest
from real_data import real_data
from tiny_parts import small_config

from igrpo_lite.training import train


@pytest.mark.parametrize("name", ["gsm8k_train.jsonl", "SVAMP.json"])
@pytest.mark.parametrize("placement", ["plain", "multi-turn"])
def test_a_run_over_a_public_set(name, placement, tmp_path, capsys):
    settings = {
        "data": str(real_data(name)),
        "draft_placement": placement,
        "max_problems": 300,
        "max_steps": 2,
        "max_prompt_length": 250,
        "output_dir": str(tmp_path / "run"),
        "progress": "plain",
    }
    summary = train(small_config(**settings))
    assert summary["steps"] == 2
    assert summary["after"]["single"]["n"] == summary["problems"]["held_out"] <= 8
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 6
    assert all(sample["gold"] for sample in samples)
    output = " ".join(capsys.readouterr().out.split())
    if name.startswith("gsm8k"):
        assert "left out as longer than 250 prompt tokens" in output
        assert summary["problems"]["train"] < 300
