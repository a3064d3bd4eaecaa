"""The benchmark scripts: their arithmetic on known numbers, and one small run of the sampler's. Never times."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """Imports a script of ``benchmarks/`` by name, as it is when it runs from there."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def summary(algorithm: str, seed: int, before: float, after: float | None) -> dict[str, Any]:
    def evaluation(accuracy: float) -> dict[str, Any]:
        return {"single": {"accuracy": accuracy}, "refined": {"accuracy": accuracy + 0.05}}

    return {
        "algorithm": algorithm,
        "seed": seed,
        "before": evaluation(before),
        "after": None if after is None else evaluation(after),
        "stopped": None if after is not None else "no signal",
        "rollouts": 640,
        "time": {"loading": 100.0, "rollout": 3.0, "update": 2.0, "evaluation": 50.0},
    }


def records(*accuracies: float) -> list[dict[str, Any]]:
    steps = [{"kind": "step", "tokens/sampled": 50, "tokens/learning": 10 * n} for n in (1, 2, 3)]
    evaluations = [
        {"kind": "evaluation", "single": {"accuracy": a}, "refined": {"accuracy": a + 0.05}} for a in accuracies
    ]
    return [*evaluations, *steps]


@pytest.mark.parametrize(
    ("freedom", "wanted"),
    [
        (1, 12.7062047),
        (2, 4.3026527),
        (3, 3.1824463),
        (4, 2.7764451),
        (9, 2.2621572),
        (30, 2.0422725),
        (120, 1.9799304),
    ],
)
def test_quantiles_of_students_t(script, freedom, wanted):
    assert script("learning").t_quantile(freedom) == pytest.approx(wanted, abs=1e-6)


def test_the_interval_of_a_mean_is_students(script):
    found = script("learning").over_seeds([0.5, 0.6, 0.7, 0.8, 0.9])
    margin = 2.7764451 * 0.15811388 / 5**0.5
    assert (found["mean"], found["sd"]) == (pytest.approx(0.7), pytest.approx(0.15811388))
    assert (found["low"], found["high"]) == (pytest.approx(0.7 - margin), pytest.approx(0.7 + margin))


def test_one_seed_has_no_interval(script):
    found = script("learning").over_seeds([0.5])
    assert (found["mean"], found["sd"], found["low"], found["high"]) == (0.5, None, None, None)


def test_a_run_is_read_from_its_own_files(script, tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(summary("igrpo", 3, 0.4, 0.6)))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records(0.4, 0.65, 0.6)))
    run = script("learning").read_run(tmp_path)
    assert (run.algorithm, run.seed, run.rollouts) == ("igrpo", 3, 640)
    assert run.before == {"single": 0.4, "refined": pytest.approx(0.45)}
    assert run.after == {"single": 0.6, "refined": pytest.approx(0.65)}
    assert (run.best_single, run.sampled_tokens, run.learning_tokens) == (0.65, 150, 60)
    assert run.seconds == 5.0  # neither loading nor evaluating


@pytest.mark.parametrize(
    ("before", "path", "after", "collapsed"),
    [
        (0.4, [0.4, 0.7, 0.6], 0.6, False),  # exactly ten points below the best
        (0.4, [0.4, 0.7, 0.59], 0.59, True),
        (0.4, [0.4, 0.42, 0.39], 0.39, True),  # below its start
        (0.4, [0.4, 0.5, 0.5], None, True),  # stopped by the diagnosis
    ],
)
def test_what_counts_as_a_collapse(script, before, path, after, collapsed):
    run = script("learning").run_from(summary("grpo", 0, before, after), records(*path))
    assert run.collapsed is collapsed


def test_tables_from_synthetic_runs(script):
    learning = script("learning")
    ends = {"grpo": (0.5, 0.6, 0.3), "igrpo": (0.6, 0.65, 0.7)}
    runs = [
        learning.run_from(summary(name, seed, 0.4, after), records(0.4, after))
        for name, finals in ends.items()
        for seed, after in enumerate(finals)
    ]
    runs.reverse()  # the order in which runs end is no matter
    table, paired = learning.table(runs), learning.paired(runs)
    assert table["grpo"]["single"]["after"]["values"] == [0.5, 0.6, 0.3]
    assert table["igrpo"]["single"]["change"]["mean"] == pytest.approx(0.25)
    assert table["igrpo"]["refined"]["after"]["mean"] == pytest.approx(0.70)
    assert (table["grpo"]["collapses"], table["igrpo"]["collapses"]) == (1, 0)
    assert (table["grpo"]["rollouts"], table["grpo"]["learning_tokens"]) == (640, 60)
    assert paired.keys() == {"igrpo"}
    assert paired["igrpo"]["single"]["values"] == pytest.approx([0.1, 0.05, 0.4])
    result = {
        "command": "python benchmarks/learning.py",
        "settings": {"steps": 3},
        "machine": {"cpu": "a processor", "threads": 1},
        "versions": {"torch": "2"},
        "workers": 1,
        "table": table,
        "paired": paired,
    }
    text = learning.markdown(result)
    assert "| igrpo | single | 40.0 ± 0.0 [40.0, 40.0] | 65.0 ± 5.0 [52.6, 77.4] |" in text
    assert "| grpo | 3 | 1 | 640 | 150 | 60 | 5 |" in text
    assert "| igrpo | single | 18.3 ± 18.9 [-28.7, 65.4] | +10.0, +5.0, +40.0 |" in text


def test_settings_are_read_like_a_recipe(script):
    options = script("learning").parse(["--set", "learning_rate=2e-3", "--set", "num_drafts=4", "--seeds", "1", "2"])
    assert options.set == {"learning_rate": "2e-3", "num_drafts": 4}  # YAML's view of 2e-3; the settings read it
    assert options.seeds == [1, 2]


def test_results_do_not_name_folders(script):
    arguments = ["--repeats", "3", "--json", "/somewhere/out.json", "--output-dir=/elsewhere"]
    assert script("measuring").command("sampler.py", arguments) == "python benchmarks/sampler.py --repeats 3"


@pytest.mark.parametrize("model", [[], ["--hidden", "64", "--layers", "2"]])
def test_the_sampler_benchmark_counts_useful_tokens(script, tmp_path, model):
    sizes = ["--prompts", "2", "--group", "2", "--max-tokens", "6", "--longest", "8", "--warmup", "0", "--repeats", "2"]
    sampler = script("sampler")
    threads = torch.get_num_threads()
    sampler.main([*sizes, *model, "--json", str(tmp_path / "out.json")])
    torch.set_num_threads(threads)
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["model"]["name"] == ("random" if model else "tiny")
    assert result["same_greedy_outputs"] == dict.fromkeys(("ours", "ours-unmerged", "generate"), "2 of 2")
    assert result["workloads"].keys() == {"own lengths", "uneven lengths"}
    for found in result["workloads"].values():
        assert found["rollouts"] == 4
        assert found["contenders"].keys() == {"ours", "ours-unmerged", "generate", "generate-merged"}
        for numbers in found["contenders"].values():
            assert len(numbers["useful_tokens"]) == len(numbers["seconds"]["wall"]) == 2
        assert found["ratios"].keys() == {f"{a} / {b}" for a, b in sampler.RATIOS}
    wanted = sum(sampler.heavy_tail(4, 8))  # no end tokens: everyone samples exactly as much as was asked for
    uneven = result["workloads"]["uneven lengths"]["contenders"]
    assert {n for numbers in uneven.values() for n in numbers["useful_tokens"]} == {wanted}


def test_uneven_lengths_have_a_heavy_tail(script):
    lengths = sorted(script("sampler").heavy_tail(128, 256))
    assert lengths[0] >= 4
    assert lengths[-1] == 256
    assert sum(lengths) / 128 > 1.5 * lengths[64]
