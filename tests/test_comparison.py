"""A comparison's arithmetic, on known numbers and against brute force; its tables and pictures."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from comparison_parts import a_run, records, summary
from rich.console import Console

from igrpo_lite.comparison.figure import COLOURS, draw
from igrpo_lite.comparison.markdown import markdown, show
from igrpo_lite.comparison.runs import Run, read_run
from igrpo_lite.comparison.tables import notes, paired, table
from igrpo_lite.errors import RunFolderError
from igrpo_lite.evaluation.statistics import over_seeds, over_seeds_and_problems, t_quantile


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
        (1000, 1.9623391),
    ],
)
def test_quantiles_of_students_t(freedom, wanted):
    assert t_quantile(freedom) == pytest.approx(wanted, abs=1e-6)


def test_the_interval_of_a_mean_is_students():
    found = over_seeds([0.5, 0.6, 0.7, 0.8, 0.9])
    margin = 2.7764451 * 0.15811388 / 5**0.5
    assert (found["mean"], found["sd"]) == (pytest.approx(0.7), pytest.approx(0.15811388))
    assert (found["low"], found["high"]) == (pytest.approx(0.7 - margin), pytest.approx(0.7 + margin))


def test_one_seed_has_no_interval():
    found = over_seeds([0.5])
    assert (found["mean"], found["sd"], found["low"], found["high"]) == (0.5, None, None, None)


def crossed(rng: np.random.Generator, seeds: int, problems: int, by_seed: float, by_problem: float) -> np.ndarray:
    noise = rng.normal(0, 1, (seeds, problems))
    return 0.3 + rng.normal(0, by_seed, (seeds, 1)) + rng.normal(0, by_problem, (1, problems)) + noise


@pytest.mark.parametrize("seeds", [2, 5])
@pytest.mark.parametrize(("by_seed", "by_problem"), [(0.3, 0.1), (0.02, 1.0), (0.2, 1.0), (0.0, 0.0)])
def test_the_wider_interval_covers_new_seeds_and_new_problems(seeds, by_seed, by_problem):
    """The true mean is 0.3: 95 % of the intervals must hold it, while those over seeds alone may miss it often."""
    rng, covered, alone = np.random.default_rng(0), 0, 0
    for _ in range(400):
        rows = crossed(rng, seeds, 40, by_seed, by_problem)
        low, high = over_seeds_and_problems(rows.tolist())
        narrow = over_seeds(rows.mean(1).tolist())
        assert low <= narrow["low"] + 1e-12
        assert high >= narrow["high"] - 1e-12
        covered += low <= 0.3 <= high
        alone += narrow["low"] <= 0.3 <= narrow["high"]
    assert covered >= 0.93 * 400
    if seeds == 5 and by_problem == 1.0:
        assert alone < 0.87 * 400


def test_the_wider_interval_is_that_of_resampling_both():
    """Many seeds and problems: as wide as the bootstrap that draws rows and columns anew (A. B. Owen, 2007)."""
    rng = np.random.default_rng(1)
    rows = crossed(rng, 60, 200, 0.5, 2.0)
    means = [rows[np.ix_(rng.integers(60, size=60), rng.integers(200, size=200))].mean() for _ in range(1000)]
    low, high = over_seeds_and_problems(rows.tolist())
    assert high - low == pytest.approx(np.quantile(means, 0.975) - np.quantile(means, 0.025), rel=0.1)


def test_where_seeds_or_problems_are_too_few_there_is_no_wider_interval():
    assert over_seeds_and_problems([]) is None
    assert over_seeds_and_problems([[0.0, 1.0]]) is None
    assert over_seeds_and_problems([[0.0], [1.0]]) is None
    assert over_seeds_and_problems([[1.0, 1.0], [1.0, 1.0]]) == (1.0, 1.0)


def test_a_run_is_read_from_its_own_files(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(summary(3, (0.4, 0.65, 0.5, 0.6))))
    lines = [json.dumps(record) + "\n" for record in records((0.4, 0.65, 0.5, 0.6))]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    answers = tmp_path / "evaluations"
    answers.mkdir()
    (answers / "step-000000.jsonl").write_text("")
    answer = {"id": "a/1", "question": "one\u2028two", "single": {"reason": "correct"}, "refined": {"reason": "wrong"}}
    (answers / "step-000003.jsonl").write_text(json.dumps(answer, ensure_ascii=False) + "\n", encoding="utf-8")
    run = read_run(tmp_path, "igrpo/s-grpo")
    assert (run.method, run.seed, run.rollouts, run.collapsed) == ("igrpo/s-grpo", 3, 640, False)
    assert (run.before("single"), run.after("single"), run.best("single")) == (0.4, 0.6, 0.65)
    assert (run.before("refined"), run.after("refined")) == (pytest.approx(0.45), pytest.approx(0.65))
    assert [(p.step, p.rollouts, p.sampled_tokens) for p in run.points] == [
        (0, 0, 0),
        (1, 213, 50),
        (2, 427, 110),
        (3, 640, 180),
    ]
    assert (run.sampled_tokens, run.learning_tokens, run.backbone_tokens) == (180, 60, 90)
    assert run.seconds == 5.0  # neither loading nor evaluating
    assert run.right == {"single": {"a/1": True}, "refined": {"a/1": False}}
    (tmp_path / "metrics.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(RunFolderError, match="3 of 4 evaluations"):
        read_run(tmp_path, "igrpo")
    (tmp_path / "metrics.jsonl").write_text('{"kind": ')
    with pytest.raises(RunFolderError, match="cannot be read"):
        read_run(tmp_path, "igrpo")


@pytest.mark.parametrize(
    ("accuracies", "stopped", "collapsed"),
    [
        ((0.4, 0.7, 0.6), None, False),  # exactly ten points below the best
        ((0.4, 0.7, 0.59), None, True),
        ((0.4, 0.42, 0.39), None, True),  # below its start
        ((0.4, 0.5, 0.5), "the sampler and the policy have parted", True),
    ],
)
def test_what_counts_as_a_collapse(accuracies, stopped, collapsed):
    assert a_run("grpo", 0, *accuracies, stopped=stopped).collapsed is collapsed


def some_runs() -> list[Run]:
    ends = {"grpo": (0.5, 0.6, 0.3), "igrpo": (0.6, 0.65, 0.7)}
    return [a_run(name, seed, 0.4, after) for name, finals in ends.items() for seed, after in enumerate(finals)]


def a_result(runs: list[Run]) -> dict:
    return {
        "command": "igrpo-lite compare grpo igrpo",
        "baseline": "grpo",
        "seeds": [0, 1, 2],
        "settings": {"max_steps": 3},
        "versions": {"torch": ["2"]},
        "notes": notes(runs),
        "missing": {"igrpo-3-steps-seed-3": "not run yet"},
        "table": table(runs),
        "paired": paired(runs, "grpo"),
    }


def test_tables_from_synthetic_runs():
    runs = some_runs()
    result = a_result([*runs[:3][::-1], *runs[3:]])  # the order in which runs end is no matter
    rows, differences = result["table"], result["paired"]
    assert rows["grpo"]["single"]["after"]["values"] == [0.5, 0.6, 0.3]
    assert rows["igrpo"]["single"]["change"]["mean"] == pytest.approx(0.25)
    assert rows["igrpo"]["refined"]["after"]["mean"] == pytest.approx(0.70)
    assert [point["rollouts"] for point in rows["igrpo"]["curve"]] == [0, 640]
    assert (rows["grpo"]["collapses"], rows["igrpo"]["collapses"]) == (1, 0)
    assert (rows["grpo"]["rollouts"], rows["grpo"]["learning_tokens"]) == (640, 60)
    assert differences.keys() == {"igrpo"}
    assert differences["igrpo"]["single"]["values"] == pytest.approx([0.1, 0.05, 0.4])
    assert differences["igrpo"]["single"]["problems"] is None  # no answers are known
    text = markdown(result)
    assert "| `igrpo` | 65.0 [52.6, 77.4] | 70.0 [57.6, 82.4] | +18.3 [-28.7, +65.4] |" in text
    assert "| `igrpo` | single | 40.0 ± 0.0 [40.0, 40.0] | 65.0 ± 5.0 [52.6, 77.4] |" in text
    assert "| `grpo` | 3 | 1 | 640 | 180 | 60 | 90 | 5 |" in text
    assert "| `igrpo` | single | +18.3 [-28.7, +65.4] |  | +10.0, +5.0, +40.0 |" in text
    assert "**Left out, not run yet:** igrpo-3-steps-seed-3" in text


def test_only_equal_seeds_are_paired():
    runs = [a_run("grpo", 1, 0.4, 0.5), a_run("grpo", 2, 0.4, 0.7), *(a_run("igrpo", s, 0.4, 0.6) for s in (0, 1))]
    found = paired(runs, "grpo")["igrpo"]
    assert (found["seeds"], found["single"]["values"]) == ([1], [pytest.approx(0.1)])
    assert paired(runs[2:], "grpo") == {}


def test_pairs_know_which_problems_were_right():
    rng = np.random.default_rng(3)
    answers = rng.random((2, 3, 40)) < np.array([0.5, 0.7])[:, None, None]
    runs = [
        a_run(
            name, seed, 0.4, float(row.mean()), right={m: dict(enumerate(row.tolist())) for m in ("single", "refined")}
        )
        for name, rows in zip(("grpo", "igrpo"), answers, strict=True)
        for seed, row in enumerate(rows)
    ]
    found = paired(runs, "grpo")["igrpo"]["single"]["problems"]
    wanted = over_seeds_and_problems((answers[1].astype(float) - answers[0]).tolist())
    assert (found["low"], found["high"]) == pytest.approx(wanted)
    assert notes(runs) == []
    runs[0].right["single"][99] = True
    assert paired(runs, "grpo")["igrpo"]["single"]["problems"] is None
    assert "different held-out problems" in notes(runs)[0]


def test_seeds_that_end_alike_are_no_certainty():
    alike = [a_run("grpo", 0, 0.4, 0.5), a_run("grpo", 1, 0.4, 0.5)]
    others = [a_run("igrpo", 0, 0.4, 0.5), a_run("igrpo", 1, 0.4, 0.6)]
    (note,) = notes([*alike, *others])
    assert note.startswith("All seeds of grpo ended with the same accuracy")
    assert notes([alike[0], *others]) == []  # one seed has no interval


def test_terminal_and_pipe_show_the_same_numbers():
    result = a_result(some_runs())
    shown = {}
    for terminal in (True, False):
        colours = "truecolor" if terminal else "auto"
        console = Console(file=io.StringIO(), width=100, force_terminal=terminal, color_system=colours)
        show(result, console)
        shown[terminal] = console.file.getvalue()
        for cell in ("65.0 [52.6, 77.4]", "+18.3", "1 of 3", "grpo"):
            assert cell in " ".join(shown[terminal].split())
    assert "\x1b[" in shown[True]
    assert "\x1b[" not in shown[False]


def test_the_picture_has_a_line_and_a_band_for_each_method(tmp_path):
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    ends = {"grpo": (0.2, 0.3), "igrpo": (0.6, 0.9)}  # far apart, so that no band lies on another
    runs = [
        a_run(name, seed, low + seed / 20, high + seed / 20) for name, (low, high) in ends.items() for seed in (0, 1)
    ]
    draw(a_result(runs), tmp_path / "out.png")
    pixels = imread(tmp_path / "out.png")[..., :3]
    for colour, there in zip(COLOURS, (True, True, False), strict=False):
        solid = np.array(to_rgb(colour))
        band = 1 - 0.15 * (1 - solid)
        for shade in (solid, band):
            assert bool((np.abs(pixels - shade).max(-1) < 0.01).sum() > 200) is there


@pytest.mark.parametrize(
    "names", [["grpo", "igrpo"], ["grpo", *(f"igrpo+single_stage_share=0.{n}+x" for n in range(5))]]
)
@pytest.mark.parametrize("ending", ["", "+draft_placement=multi-turn"])
def test_the_pictures_legend_fits_its_width(names, ending, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    runs = [a_run(f"{name}{ending if number else ''}", 0, 0.2, 0.3) for number, name in enumerate(names)]
    draw(a_result(runs), tmp_path / "out.png")
    (figure,) = drawn
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
