"""``check`` and ``scan``: what they say of the bundled model, of rewards and data that cannot work; their numbers."""

from __future__ import annotations

import json
import random
import re
from itertools import product
from math import comb

import pytest
from tiny_parts import small_config

from igrpo_lite.cli import main
from igrpo_lite.errors import DataError
from igrpo_lite.evaluation.passrate import PassRate
from igrpo_lite.evaluation.preflight import informative_share, judge_rates, preflight
from igrpo_lite.evaluation.scan import scan
from igrpo_lite.types import Completion, Problem, Prompt, Score


def run(words, capsys):
    code = main([str(word) for word in words])
    return code, *capsys.readouterr()


TINY = ["--max-problems", 40, "--eval-size", 8, "--progress", "off"]


def test_nothing_stands_in_the_way_of_the_bundled_model(capsys):
    code, out, _ = run(["check", *TINY, "--problems", 6, "--samples", 4], capsys)
    assert code == 0
    assert "40 of 40 training gold answers verify against themselves" in out
    assert "<|im_start|>user" in out  # prompts with their special tokens
    assert "6 problems x 4 samples" in out
    assert out.splitlines()[-1] == "no problems found"


def test_without_the_model_nothing_is_sampled(capsys):
    code, out, _ = run(["check", *TINY, "--no-load-model", "--json"], capsys)
    found = json.loads(out)
    assert (code, found["failed"]) == (0, False)
    assert [part["title"] for part in found["parts"]] == ["problems", "rewards", "prompts"]
    rewards = found["parts"][1]["numbers"]["rewards"]
    assert rewards == {"right answer": 1.1, "wrong answer": pytest.approx(0.1), "no answer": 0.0, "empty": 0.0}


def test_a_reward_that_pays_for_anything_fails(capsys, tmp_path):
    reward = tmp_path / "rewards.py"
    reward.write_text("def longer(completion):\n    return float(len(completion) < 20)\n")
    code, out, _ = run(
        ["check", *TINY, "--reward-funcs", f"accuracy,{reward}:longer", "--reward-weights", "1,2", "--no-load-model"],
        capsys,
    )
    assert code == 3
    assert "error: a right answer earns 1.00, no more than something else (2.00)" in out


def test_form_that_pays_more_than_the_answer_is_warned_of(capsys):
    words = ["check", "--no-load-model", "--max-problems", "20", "--reward-funcs", "accuracy", "format"]
    for weights, told in ((["0.1", "1"], True), (["1", "1"], False), (["1", "0.1"], False)):
        assert main([*words, "--reward-weights", *weights]) == 0
        assert ("form may rise while accuracy does not" in capsys.readouterr().out.replace("\n", " ")) == told


def test_a_random_reward_is_a_control_and_no_mistake(capsys):
    assert main(["check", "--no-load-model", "--max-problems", "20", "--reward-funcs", "random"]) == 0
    assert "a control" in capsys.readouterr().out


def test_gold_answers_nobody_can_give_fail(capsys, tmp_path):
    data = tmp_path / "odd.jsonl"
    rows = [{"question": f"What is {n} + 1?", "answer": "}" if n % 8 == 3 else str(n + 1)} for n in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = run(["check", "--data", data, "--eval-size", 8, "--progress", "off", "--no-load-model"], capsys)
    assert code == 3
    assert re.search(r"error: \d training gold answers \(1\d\.\d%\) do not verify .*: odd/\d+: '}'", out)


def test_what_does_not_fit_the_context_is_an_error_of_the_check(capsys):
    code, out, _ = run(["check", *TINY, "--max-completion-length", 2000, "--no-load-model"], capsys)
    assert code == 3
    assert "error: the model's context is 1024 tokens" in out


def test_bad_settings_are_refused_at_once(capsys):
    words = ["check", "--problems", 0, "--samples", 0, "--data", "none.jsonl", "--temperature", 0]
    code, _, err = run(words, capsys)
    assert code == 2
    assert [line.split()[1] for line in err.splitlines()] == ["temperature:", "data:", "--problems:", "--samples:"]


REWARDS = """
def fragile(completion):
    return float(completion[-1] == "." and "boxed" in completion and "987654321" not in completion)

def mild(completion):
    return None if "987654321" in completion else float("boxed" in completion)

def silent(completion):
    return None if "boxed" in completion else 0.0

def broken(completion):
    raise ValueError("oh")
"""


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        (
            "fragile",
            0,
            "warning: reward fragile failed in 3 of 14 calls; those completions were scored without it: IndexError",
        ),
        ("mild", 0, "wrong answer: none (mild abstains)"),
        ("silent", 3, "error: every reward abstains on a right answer"),
        ("broken", 3, "broken failed on the first row: ValueError: oh"),
    ],
)
def test_rewards_that_fail_or_abstain_are_told_beside_all_else(name, code, words, capsys, tmp_path):
    (tmp_path / "rewards.py").write_text(REWARDS)
    reward = f"{tmp_path}/rewards.py:{name}"
    found, out, _ = run(["check", *TINY, "--reward-funcs", reward, "--no-load-model"], capsys)
    assert (found, words in out) == (code, True), out
    assert "== problems ==" in out
    assert "== prompts ==" in out


def test_a_reward_that_fails_on_samples_is_told_of(capsys, tmp_path):
    (tmp_path / "rewards.py").write_text(
        "def odd(completion):\n"
        "    if '=' in completion and len(completion) % 2:\n        raise ValueError('odd')\n"
        "    return float('boxed' in completion)\n"
    )
    words = ["check", *TINY, "--reward-funcs", f"accuracy,{tmp_path}/rewards.py:odd"]
    code, out, _ = run([*words, "--problems", 2, "--samples", 2], capsys)
    assert re.search(r"warning: reward odd failed in \d of \d calls", out), out
    code, out, _ = run([*words, "--problems", 24, "--samples", 2], capsys)
    assert code == 3
    assert re.search(r"error: reward .*:odd failed in \d+ of 2\d calls; fix it", out), out


def test_no_control_code_of_a_data_set_reaches_the_screen(capsys, tmp_path):
    data = tmp_path / "odd.jsonl"
    rows = [{"question": f"\x1b[31mWhat\tis {n} + 1?", "answer": str(n + 1)} for n in range(20)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, out, _ = run(["check", "--data", data, "--eval-size", 2, "--no-load-model"], capsys)
    assert "?[31mWhat\tis" in out
    assert "\x1b" not in out


@pytest.mark.parametrize("group", [2, 4, 8])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_equal_pass_rates_give_the_binomials_share(p, group):
    """Counts spread as a binomial says (or less): the share is that of one p."""
    samples = 10
    counts = [round(p * samples)] * 50
    expected = sum(comb(group, k) * p**k * (1 - p) ** (group - k) for k in range(1, group))
    assert informative_share(counts, samples, group) == pytest.approx(expected)


def test_spread_pass_rates_give_the_mean_over_the_spread():
    """Against simulation: pass rates from a Beta distribution, counts from them, groups from them."""
    rng = random.Random(0)
    for a, b in ((0.5, 0.5), (2.0, 1.0), (0.3, 2.0)):
        rates = [rng.betavariate(a, b) for _ in range(20_000)]
        counts = [sum(rng.random() < p for _ in range(4)) for p in rates]
        mixed = sum(1 - p**8 - (1 - p) ** 8 for p in rates) / len(rates)
        assert informative_share(counts, 4, 8) == pytest.approx(mixed, abs=0.02)


def test_problems_always_or_never_solved_teach_nothing():
    assert informative_share([0, 0, 0], 4, 8) == 0.0
    assert informative_share([4, 4], 4, 8) == 0.0
    assert informative_share([0, 4, 0, 4], 4, 8) == pytest.approx(0.0, abs=0.01)


def rated(reasons, truncated=()):
    completions = tuple(Completion((1, 2), "x", (0.0, 0.0), "length" if i in truncated else "stop") for i in range(4))
    scores = tuple(Score(float(r == "correct"), {}, r, None) for r in reasons)
    return PassRate(Problem("a", "q", "1"), Prompt("q", (1,)), completions, scores)


@pytest.mark.parametrize(
    ("rates", "level", "words"),
    [
        ([rated(["wrong"] * 4)], "error", "not one of 4 completions is right: too hard"),
        ([rated(["truncated"] * 4, range(4))], "error", "cut before they end"),
        ([rated(["correct"] * 4)], "error", "nothing left to learn"),
        ([rated(["correct", "wrong", "wrong", "truncated"], (3,))], "warning", "25% of the completions are cut"),
        ([rated(["correct", "no_answer", "no_answer", "wrong"])], "warning", "50% of the completions give no answer"),
        ([rated(["correct"] * 4)] * 3 + [rated(["correct", "correct", "wrong", "correct"])], "warning", "too easy"),
    ],
)
def test_what_the_samples_mean(rates, level, words):
    found = judge_rates(rates, small_config(algorithm="grpo", num_generations=2)).findings
    assert any(finding.level == level and words in finding.text for finding in found), found


def test_good_samples_raise_nothing():
    rates = [rated(reasons) for reasons in product(("correct", "wrong"), repeat=4)]
    assert judge_rates(rates, small_config()).findings == []


def test_a_library_call_gives_the_same_numbers(capsys):
    config = small_config(max_problems=12)
    found = preflight(config, problems=4, samples=3)
    again = preflight(config, problems=4, samples=3)
    numbers = found.parts[-1].numbers
    assert numbers == again.parts[-1].numbers
    assert numbers["samples"] == 12
    assert sum(numbers["reasons"].values()) == 12


def test_scan_keeps_what_is_solved_sometimes(tmp_path, capsys):
    output = tmp_path / "kept.jsonl"
    words = ["scan", *TINY, "--output", output, "--samples", 4, "--keep-from", 0.25, "--keep-to", 0.75]
    code, out, _ = run(words, capsys)
    assert code == 0
    kept = [json.loads(line) for line in output.read_text().splitlines()]
    head, *rates = [json.loads(line) for line in (tmp_path / "kept.rates.jsonl").read_text().splitlines()]
    assert head["settings"]["samples"] == 4
    by_id = {rate["id"]: rate for rate in rates}
    assert len(by_id) == 40
    for rate in rates:
        assert rate["pass_rate"] == rate["reasons"].count("correct") / 4
    assert [row["id"] for row in kept] == [rate["id"] for rate in rates if 0.25 <= rate["pass_rate"] <= 0.75]
    assert all(row["pass_rate"] == by_id[row["id"]]["pass_rate"] for row in kept)
    assert {"question", "answer", "kind", "solution"} <= kept[0].keys()
    assert f"kept {len(kept)}" in out
    # and they are a data set like any other
    code, out, _ = run(["check", "--data", output, "--eval-size", 2, "--progress", "off", "--no-load-model"], capsys)
    assert code == 0


def test_an_interrupted_scan_goes_on(tmp_path):
    config = small_config(max_problems=12, max_num_seqs=4)
    whole = scan(config, tmp_path / "whole.jsonl", samples=2)
    rates = (tmp_path / "whole.rates.jsonl").read_text()
    lines = rates.splitlines(keepends=True)
    (tmp_path / "cut.rates.jsonl").write_text("".join(lines[:5]) + lines[5][:20])  # killed while writing a line
    seen = []
    cut = scan(config, tmp_path / "cut.jsonl", samples=2, on_progress=lambda done, total: seen.append((done, total)))
    assert seen[0][0] > 4
    assert (tmp_path / "cut.rates.jsonl").read_text() == rates
    assert (tmp_path / "cut.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert (cut.kept, cut.too_hard, cut.too_easy) == (whole.kept, whole.too_hard, whole.too_easy)


def test_a_scan_with_other_settings_is_not_continued(tmp_path):
    scan(small_config(max_problems=4), tmp_path / "a.jsonl", samples=2)
    with pytest.raises(DataError, match="other settings"):
        scan(small_config(max_problems=4), tmp_path / "a.jsonl", samples=3)
    (tmp_path / "b.rates.jsonl").write_text("nonsense\n")
    with pytest.raises(DataError, match="not a scan's record"):
        scan(small_config(max_problems=4), tmp_path / "b.jsonl", samples=2)


def test_pass_rates_belong_to_questions_and_answers_not_to_rows(tmp_path):
    data = tmp_path / "sums.jsonl"

    def write(shift):
        question = "Leo has {} eggs, buys 37 and gives away 12. How many eggs are left?"
        rows = [{"question": question.format(n), "sum": n + 25 + shift} for n in range(20, 40)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def scanned():
        config = small_config(data=str(data), answer_column="sum", eval_size=2, max_problems=None)
        scan(config, tmp_path / "kept.jsonl", samples=2, keep=(0.0, 1.0))
        return {row["question"]: row["pass_rate"] for row in map(json.loads, (tmp_path / "kept.jsonl").open())}

    write(1000)  # nothing can be right
    assert set(scanned().values()) == {0.0}
    write(0)
    mended = scanned()
    assert sum(mended.values()) > 0
    lines = (tmp_path / "kept.rates.jsonl").read_text()
    assert scanned() == mended
    assert (tmp_path / "kept.rates.jsonl").read_text() == lines  # all are there


def test_a_scan_writes_over_nothing_but_a_scan(tmp_path, capsys):
    mine = tmp_path / "mine.jsonl"
    rows = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(20)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    mine.write_text(text)
    code, _, err = run(["scan", "--data", mine, "--output", mine], capsys)
    assert (code, err.count("error:"), "no scan has made it" in err) == (2, 1, True)
    (tmp_path / "mine.rates.jsonl").write_text("{}\n")
    code, _, err = run(["scan", "--data", f"gsm8k={mine}", "--output", mine], capsys)
    assert (code, err.count("error:"), "is one of the files to scan" in err) == (2, 1, True)
    assert mine.read_text() == text


def test_a_scan_that_keeps_nothing_says_what_to_do(tmp_path, capsys):
    words = ["--max-completion-length", 2, "--samples", 1]
    code, out, _ = run(["scan", *TINY, *words, "--output", tmp_path / "a.jsonl"], capsys)
    assert code == 0
    assert "empty; widen --keep-from and --keep-to" in out
    assert "train with" not in out


def test_scan_refuses_nonsense(capsys, tmp_path):
    words = ["scan", "--output", tmp_path / "no" / "a.txt", "--samples", 0, "--keep-from", 0.9, "--keep-to", 0.1]
    code, _, err = run(words, capsys)
    assert code == 2
    assert err.count("error:") == 3
