"""Held-out evaluation with the bundled model: greedy, sampled, refined; in training and by ``igrpo-lite eval``."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_parts import small_config, tiny_parts

from igrpo_lite.answers.answers import EXPLICIT, Verdict, verdict
from igrpo_lite.answers.checker import AnswerChecker
from igrpo_lite.cli import main
from igrpo_lite.config import RewardOptions
from igrpo_lite.evaluation.evaluate import Sampling, evaluate
from igrpo_lite.evaluation.passrate import pass_rates
from igrpo_lite.evaluation.statistics import wilson
from igrpo_lite.problems.synthetic import load
from igrpo_lite.rewards.scorer import Scorer
from igrpo_lite.sampling.base import Request, request_seed
from igrpo_lite.training import train
from igrpo_lite.workbench import Workbench


@pytest.fixture(scope="module")
def parts() -> Iterator[Workbench]:
    made = tiny_parts(small_config(eval_size=12))
    yield made
    made.close()


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_problem_is_answered_greedily_and_refined_from_its_own_draft(parts):
    evaluation = evaluate(parts.held_out, parts.sampler, parts.prompts, 48)
    again = evaluate(parts.held_out[::-1], parts.sampler, parts.prompts, 48)
    assert [a.record() for a in again.answered[::-1]] == [a.record() for a in evaluation.answered]
    for answered in evaluation.answered:
        first = parts.prompts.first(answered.problem.question)
        (single,) = parts.sampler.run([Request(first, 1, 48, 0.0)])
        second = parts.prompts.second(answered.problem.question, first, single.ids)
        (refined,) = parts.sampler.run([Request(second, 2, 48, 0.0)])
        assert (answered.single.completion.ids, answered.refined.completion.ids) == (single.ids, refined.ids)
        assert answered.single.verdict == verdict(single.text, answered.problem.answer, single.truncated)
        assert (answered.samples, answered.from_best) == ((), None)


def test_the_result_is_what_the_records_say(parts):
    evaluation = evaluate(parts.held_out, parts.sampler, parts.prompts, 22)  # so short that some are cut
    result = evaluation.result()
    n = len(parts.held_out)
    for stage in ("single", "refined"):
        found = [answer.record()[stage] for answer in evaluation.answered]
        right = [one["reason"] == "correct" for one in found]
        strict = [one["reason"] == "correct" and one["source"] in EXPLICIT for one in found]
        assert evaluation.right(refined=stage == "refined") == right
        for name, outcomes in ((stage, right), (f"{stage}_strict", strict)):
            expected = wilson(sum(outcomes), n)
            assert result[name] == {name: getattr(expected, name) for name in ("accuracy", "n", "low", "high")}
        ended = [one["tokens"] for one in found if one["finish"] == "stop"]
        assert 0 < len(ended) < n
        assert result[f"{stage}_truncated"] == (n - len(ended)) / n
        assert result[f"{stage}_no_answer"] == [one["reason"] for one in found].count("no_answer") / n
        assert result[f"{stage}_length"] == pytest.approx(sum(one["tokens"] for one in found) / n)
        assert result[f"{stage}_ended_length"] == pytest.approx(sum(ended) / len(ended))
    cut = evaluate(parts.held_out[:2], parts.sampler, parts.prompts, 1).result()
    assert (cut["single_truncated"], cut["single_ended_length"]) == (1.0, None)
    assert json.loads(json.dumps(result)) == result


def test_samples_the_vote_and_the_best_draft_by_brute_force(parts):
    sampling = Sampling(samples=5, temperature=1.0, top_p=0.9, best_of=3, seed=4)
    evaluation = evaluate(parts.held_out, parts.sampler, parts.prompts, 48, sampling=sampling)
    plain = evaluate(parts.held_out, parts.sampler, parts.prompts, 48)
    # Not the last bit of log-probabilities, which on some CPUs depends on the shape of the batch.
    for mine, other in zip(evaluation.answered, plain.answered, strict=True):
        for one, two in ((mine.single, other.single), (mine.refined, other.refined)):
            assert (one.completion.ids, one.verdict) == (two.completion.ids, two.verdict)
            assert one.completion.logprobs == pytest.approx(two.completion.logprobs, abs=1e-4)
    correct, votes = [], []
    for answered in evaluation.answered:
        problem, first = answered.problem, parts.prompts.first(answered.problem.question)
        seeds = [request_seed(4, "evaluation", problem.id, number) for number in range(5)]
        drawn = parts.sampler.run([Request(first, seed, 48, 1.0, None, 0.9) for seed in seeds])
        assert [sample.completion.ids for sample in answered.samples] == [one.ids for one in drawn]
        right = [verdict(one.text, problem.answer, one.truncated).reason == "correct" for one in drawn]
        _, _, best = min((drawn[i].truncated, not right[i], i) for i in range(3))
        second = parts.prompts.second(problem.question, first, drawn[best].ids)
        (refined,) = parts.sampler.run([Request(second, 0, 48, 0.0)])
        assert answered.from_best is not None
        assert answered.from_best.completion.ids == refined.ids
        correct.append(sum(right))
        counts = Counter(sample.verdict.answer for sample in answered.samples if sample.verdict.answer is not None)
        winners = [answer for answer in counts if counts[answer] == max(counts.values())]  # whole numbers: by text
        votes.append(sum(answer == problem.answer for answer in winners) / len(winners) if winners else 0.0)
    assert 0 < sum(correct) < 5 * len(correct)
    assert len({0.0, 1.0} & set(votes)) == 2
    measures = evaluation.sampled()
    assert measures["avg@5"] == measures["pass@1"] == [c / 5 for c in correct]
    assert measures["maj@5"] == pytest.approx(votes)
    assert measures["pass@4"] == pytest.approx([1 - math.comb(5 - c, 4) / 5 for c in correct])
    assert list(measures) == ["avg@5", "avg@5_strict", "maj@5", "pass@1", "pass@2", "pass@4"]
    assert evaluation.greedy()["refined_best_of_3"] == [a.from_best.right for a in evaluation.answered]
    assert evaluation.result()["avg@5"]["accuracy"] == pytest.approx(sum(correct) / 5 / len(correct))


def test_vllm_answers_the_same_in_one_run():
    pytest.importorskip("vllm")
    from vllm_parts import make_policy, shared_sampler

    from igrpo_lite.sampling.replica import Replica
    from igrpo_lite.sampling.transformers import TransformersSampler

    vllm = shared_sampler()
    prompts = make_policy(model="tiny")[1]
    problems = load("two-step", "test", 6)
    sampling = Sampling(samples=3, best_of=2)
    found = evaluate(problems, vllm, prompts, 48, sampling=sampling)
    ours = TransformersSampler(Replica(vllm.policy.model), vllm.tokenizer, vllm.stop_ids)
    expected = evaluate(problems, ours, prompts, 48)
    for mine, theirs in zip(found.answered, expected.answered, strict=True):
        assert mine.record()["single"] == theirs.record()["single"]
        assert mine.record()["refined"] == theirs.record()["refined"]
        assert (len(mine.samples), mine.from_best is None) == (3, False)
    again = evaluate(problems, vllm, prompts, 48, sampling=sampling)
    assert [a.record() for a in again.answered] == [a.record() for a in found.answered]


class Counting(AnswerChecker):
    """The real checker, with a count of what it was asked at once."""

    def __init__(self) -> None:
        super().__init__(second_opinion=False)
        self.batches: list[int] = []

    def judge(self, items: Sequence[tuple[str, str, bool]]) -> list[Verdict]:
        self.batches.append(len(items))
        return super().judge(items)


def test_a_checker_gets_all_answers_at_once(parts):
    n = len(parts.held_out)
    with Counting() as checker:
        evaluation = evaluate(parts.held_out, parts.sampler, parts.prompts, 48, checker, Sampling(samples=2))
        assert checker.batches[0] == 4 * n  # greedy, refined and two samples; then the pairs of wrong answers
        assert len(checker.batches) == 2
    exact = evaluate(parts.held_out, parts.sampler, parts.prompts, 48, sampling=Sampling(samples=2))
    assert evaluation.answered == exact.answered
    done: list[tuple[int, int]] = []
    best = Sampling(best_of=2)
    evaluate(parts.held_out, parts.sampler, parts.prompts, 8, None, best, lambda *counts: done.append(counts))
    assert done == [(i, 5 * n) for i in range(1, 5 * n + 1)]


def test_pass_rates_are_the_scorers_word_on_samples_that_depend_on_nothing_else(parts):
    problems = parts.train[:6]
    with Scorer(RewardOptions(reward_funcs=["accuracy"]), "boxed") as scorer:
        config = small_config(max_completion_length=30, seed=9)
        arguments: tuple[Any, ...] = (parts.sampler, parts.prompts, config, 4, scorer.score)
        whole = pass_rates(problems, *arguments)
        for alone, found in zip(pass_rates(problems[3:], *arguments), whole[3:], strict=True):
            assert [c.ids for c in alone.completions] == [c.ids for c in found.completions]
            assert (alone.problem, alone.rate, alone.truncated) == (found.problem, found.rate, found.truncated)
    assert [found.problem for found in whole] == problems
    for found in whole:
        right = [verdict(c.text, found.problem.answer, c.truncated).reason == "correct" for c in found.completions]
        assert (len(right), found.rate) == (4, sum(right) / 4)
        assert found.informative == (0 < sum(right) < 4)
        assert found.truncated == sum(c.finish == "length" for c in found.completions) / 4
        assert found.length == sum(len(c.ids) for c in found.completions) / 4
    assert max(len({c.ids for c in found.completions}) for found in whole) > 1
    assert 0 < sum(found.rate for found in whole) < len(whole)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A short run whose adapter answers some questions in another way."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = {"max_steps": 3, "num_generations": 12, "prompts_per_step": 6, "learning_rate": 5e-3, "eval_size": 24}
    return folder, train(small_config(output_dir=str(folder), **settings))


def test_eval_command_measures_a_run_against_its_base(run, tmp_path, capsys):
    folder, summary = run
    words = ["--adapter", str(folder / "adapter"), "--samples", "2", "--best-of", "3", "--show-flips", "2"]
    assert main(["eval", str(folder), *words, "--output", str(tmp_path / "found")]) == 0
    out, err = capsys.readouterr()
    assert "on these very problems" not in err
    found = json.loads((tmp_path / "found" / "results.json").read_text(encoding="utf-8"))
    for ours, theirs in (("base", "before"), ("adapted", "after")):
        for measure in ("single", "refined"):
            assert found[ours][measure] == summary[theirs][measure]
    base, adapted = (records(tmp_path / "found" / f"{name}.jsonl") for name in ("base", "adapted"))
    assert [one["id"] for one in base] == [one["id"] for one in adapted]
    pairs = [[one["single"]["reason"] == "correct" for one in pair] for pair in zip(base, adapted, strict=True)]
    change = found["change"]["single"]
    assert (change["gained"], change["lost"]) == (pairs.count([False, True]), pairs.count([True, False]))
    assert change["gained"] + change["lost"] > 0
    assert f"{change['gained']} flipped right, {change['lost']} flipped wrong; exact McNemar test p = " in out
    assert f"{100 * change['difference']:+.1f} ({100 * change['low']:+.1f}, {100 * change['high']:+.1f})" in out
    assert "n = 24 held-out problems: +/- 20.0 points at most" in out
    assert "nor best of 3: refined from the best draft by the gold answer (an oracle)" in out
    shown = [line for line in out.splitlines() if " -> " in line]
    assert len(shown) == min(2, change["gained"]) + min(2, change["lost"])
    assert all(len(one["samples"]) == 3 and one["refined_best"]["text"] for one in base)
    shares = found["change"]["avg@3"]
    rights = [[sum(s["reason"] == "correct" for s in one["samples"]) for one in side] for side in (base, adapted)]
    assert shares["difference"] == pytest.approx((sum(rights[1]) - sum(rights[0])) / 3 / 24)
    assert "\x1b" not in out
    assert all(line == line.rstrip() for line in out.splitlines())


def test_a_run_that_is_not_there_is_no_hub_id(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine" / "first-run").mkdir(parents=True)
    (tmp_path / "mine" / "first-run" / "config.yaml").touch()
    monkeypatch.chdir(tmp_path)
    for name, hint in (
        ("mine/first-rnu", "did you mean mine/first-run?"),
        ("mine/other", "mine holds first-run"),
        ("runs/none", "runs holds no run"),
    ):
        assert main(["eval", name]) == 2
        assert capsys.readouterr().err == f"error: {name}: no such folder; {hint}\n"


def test_only_what_is_asked_for_is_measured(run, tmp_path, capsys):
    folder, _ = run
    output = tmp_path / "results.json"
    assert main(["eval", str(folder), "--no-base", "--eval-size", "6", "--output", str(output)]) == 0
    found = json.loads(output.read_text(encoding="utf-8"))
    assert "base" not in found
    assert (found["change"], found["adapted"]["single"]["n"], found["n"]) == ({}, 6, 6)
    assert found["adapter"] == str(folder / "best")
    assert list(tmp_path.iterdir()) == [output]
    out, err = capsys.readouterr()
    assert "with adapter" in out
    assert "McNemar" not in out
    assert "note: this adapter was chosen by its accuracy on these very problems" in err
    assert main(["eval", str(folder), "--no-base", "--eval-size", "2", "--eval-split", "test"]) == 0
    assert "on these very problems" not in capsys.readouterr().err


def test_a_file_of_which_a_tenth_is_measured_says_so(tmp_path, capsys):
    data = tmp_path / "sums.jsonl"
    rows = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["eval", "tiny", "--eval-size", "20", "--max-completion-length", "4"]
    assert main([*words, "--data", str(data)]) == 0
    out, err = capsys.readouterr()
    assert "n = 4 held-out problems" in out
    assert "note: 4 held-out problems, not 20: at most a tenth of what training may use is held out; name a" in err
    assert main([*words, "--eval-data", str(data)]) == 0
    out, err = capsys.readouterr()
    assert "n = 20 held-out problems" in out
    assert "note:" not in err


def test_every_mistake_is_named_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("taken.txt").write_text("mine")
    words = ["--samples", "-1", "--sample-temperature", "0", "--sample-top-p", "1.5", "--no-base", "--show-flips", "1"]
    assert main(["eval", "tiny", *words, "--output", "taken.txt", "--eval-size", "0"]) == 2
    lines = capsys.readouterr().err.splitlines()
    told = (
        "eval_size: ",
        "--samples: must be 0 or more, not -1",
        "--sample-temperature: must be above 0, not 0",
        "--sample-top-p: must be above 0 and at most 1, not 1.5",
        "--no-base: there is no adapter, so nothing would be measured",
        "--show-flips: answers flip from the base to an adapter",
        "--output taken.txt: a file of that name is there",
    )
    assert len(lines) == len(told)
    assert all(any(line.startswith(f"error: {words}") for line in lines) for words in told)
    assert main(["eval", "tiny", "--temperature", "0.6"]) == 2
    assert "did you mean --sample-temperature?" in capsys.readouterr().err
