"""From data settings to problems: training and held-out share nothing, nothing is dropped uncounted or left to luck."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
from real_data import real_data

from igrpo_lite.config import DataOptions
from igrpo_lite.errors import DataError
from igrpo_lite.problems import synthetic
from igrpo_lite.problems.hub import explain
from igrpo_lite.problems.loading import ProblemSets, load_problems
from igrpo_lite.problems.mixture import question_key
from igrpo_lite.problems.sources import data_findings
from igrpo_lite.types import Problem


def load(seed: int = 0, **options: Any) -> ProblemSets:
    return load_problems(DataOptions(**options), seed)


def refused(**options: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        load(**options)
    return caught.value.problems


def sums(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(start, start + count)]


def write(path: Path, rows: Sequence[Any]) -> str:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def questions(problems: Sequence[Problem]) -> set[str]:
    return {question_key(problem.question) for problem in problems}


def assert_sound(sets: ProblemSets) -> None:
    everything = [*sets.train, *sets.held_out]
    assert sets.train
    assert sets.held_out
    assert len(questions(everything)) == len({problem.id for problem in everything}) == len(everything)
    assert all(problem.question and problem.answer for problem in everything)
    json.dumps([dict(problem.columns) for problem in everything], allow_nan=False)
    assert (sets.report.train_size, sets.report.held_out_size) == (len(sets.train), len(sets.held_out))


def test_gsm8k() -> None:
    sets = load(data=str(real_data("gsm8k_train.jsonl")), eval_data=str(real_data("gsm8k_test.jsonl")))
    assert_sound(sets)
    assert (len(sets.train), len(sets.held_out), sets.report.overlaps[0].count) == (7469, 200, 4)
    first = sets.train[0]
    assert (first.id, first.answer) == ("gsm8k_train/0", "72")
    assert first.question.startswith("Natalia sold clips")
    assert first.columns["answer"].endswith("#### 72")
    assert all(problem.answer.lstrip("-").replace(".", "").replace(",", "").isdigit() for problem in sets.train)
    lines = sets.report.lines()
    assert lines[0] == (
        "gsm8k_train.jsonl: 7,473 rows, 7,473 problems; question from column question, answer from column answer"
    )
    assert lines[-1] == "7,469 training problems; 200 held out (from gsm8k_test.jsonl)"
    assert any(line.endswith("-> 72") for line in lines)


def test_gsm8k_answers_are_those_after_the_hashes() -> None:
    path = real_data("gsm8k_test.jsonl")
    sets = load(data=str(path))
    assert_sound(sets)
    assert (len(sets.train), len(sets.held_out)) == (1319 - 131, 131)
    gold = [json.loads(line)["answer"].rpartition("####")[2].strip().replace(",", "") for line in path.open()]
    for problem in [*sets.train, *sets.held_out]:
        assert problem.answer.replace(",", "") == gold[int(problem.id.rpartition("/")[2])]


def test_svamp() -> None:
    sets = load(data=str(real_data("SVAMP.json")), eval_size=50)
    assert_sound(sets)
    assert len(sets.held_out) == 50
    first = next(problem for problem in [*sets.train, *sets.held_out] if problem.id == "SVAMP/0")
    assert first.question == (
        "Each pack of dvds costs 76 dollars. If there is a discount of 25 dollars on each pack "
        "How much do you have to pay to buy each pack?"
    )
    assert first.answer == "51"
    assert dict(first.columns) == {
        "ID": "chal-1",
        "Equation": "( 76.0 - 25.0 )",
        "Answer": 51.0,
        "Type": "Subtraction",
    }


def test_minerva_and_aime() -> None:
    minerva = load(data=str(real_data("minerva_math_test.jsonl")))
    assert_sound(minerva)
    assert minerva.report.parts[0].answer_column == "solution"
    assert minerva.report.parts[0].unparsed == 0
    assert any(problem.answer == "1.6" for problem in [*minerva.train, *minerva.held_out])
    aime = load(data=str(real_data("aime24_test.jsonl")))
    assert_sound(aime)
    assert len(aime.held_out) == 3
    assert all(0 <= int(problem.answer) <= 999 for problem in [*aime.train, *aime.held_out])


def test_question_columns_of_the_training_set_need_not_be_those_of_the_held_out_set() -> None:
    sets = load(
        data=str(real_data("gsm8k_test.jsonl")),
        eval_data=str(real_data("SVAMP.json")),
        question_column="question",
        answer_column="answer",
    )
    assert_sound(sets)
    (held_out,) = sets.report.held_out_parts
    assert held_out.question_column == "Question"  # asked for by name, case aside
    assert held_out.answer_column == "Answer"


def test_synthetic() -> None:
    sets = load(seed=5)
    assert_sound(sets)
    assert sets.train == synthetic.load("two-step", "train", 4000)
    assert questions(sets.held_out) == questions(synthetic.load("two-step", "validation", 200))
    small = load(data="multiplication", max_problems=7, eval_size=3, eval_split="test")
    assert small.train == synthetic.load("multiplication", "train", 7)
    assert questions(small.held_out) == questions(synthetic.load("multiplication", "test", 3))
    assert small.report.lines()[0] == "multiplication/train: 7 problems"
    other = load(data="two-step", eval_data="addition")
    assert other.held_out[0].id.startswith("addition/validation/")


def test_held_out_rows_depend_on_neither_order_nor_seed_nor_size(tmp_path: Path) -> None:
    rows = sums(100)
    shuffled = random.Random(1).sample(rows, len(rows))
    first = load(data=write(tmp_path / "a.jsonl", rows))
    assert_sound(first)
    assert (len(first.train), len(first.held_out)) == (90, 10)
    second = load(seed=9, data=write(tmp_path / "b.jsonl", shuffled), max_problems=20)
    assert [problem.question for problem in second.held_out] == [problem.question for problem in first.held_out]
    third = load(data=str(tmp_path / "a.jsonl"), eval_size=4)
    assert third.held_out == first.held_out[:4]


def test_max_problems_is_drawn_by_the_seed(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", sums(100))
    drawn = [load(seed=seed, data=data, max_problems=20).train for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[2]) == 20
    indices = [int(problem.id.rpartition("/")[2]) for problem in drawn[0]]
    assert indices == sorted(indices) != list(range(20))
    assert len(load(data=data, max_problems=500).train) == 90


def test_repeated_questions_are_counted(tmp_path: Path) -> None:
    rows = [
        *sums(20),
        {"question": " what is  3 + 3?", "answer": "#### 6"},
        {"question": "What is 4 + 4?", "answer": "#### 9"},
    ]
    sets = load(data=write(tmp_path / "a.jsonl", rows))
    assert_sound(sets)
    assert (sets.report.parts[0].duplicates, sets.report.parts[0].conflicting) == (2, 1)
    assert any("2 repeated questions, 1 of them with another answer" in line for line in sets.report.lines())


def test_held_out_questions_are_taken_out_of_training(tmp_path: Path) -> None:
    data, held_out = write(tmp_path / "a.jsonl", sums(30)), write(tmp_path / "b.jsonl", sums(40, start=20))
    sets = load(data=data, eval_data=held_out, eval_size=5)
    assert_sound(sets)
    assert (len(sets.train), len(sets.held_out), sets.report.overlaps[0].count) == (20, 5, 10)
    assert any(line.startswith("left out 10 training problems that are also in") for line in sets.report.lines())
    whole = write(tmp_path / "c.jsonl", sums(30))
    assert "a.jsonl: every question of it is also in c.jsonl" in refused(data=data, eval_data=whole)[0]
    assert load(data=data, eval_data=data).held_out == load(data=data).held_out


def test_files_of_one_name_get_different_ids(tmp_path: Path) -> None:
    (tmp_path / "held").mkdir()
    sets = load(
        data=write(tmp_path / "math.jsonl", sums(9)), eval_data=write(tmp_path / "held" / "math.jsonl", sums(9, 50))
    )
    assert_sound(sets)
    assert sets.held_out[0].id.startswith("math-2/")


def test_rows_without_an_answer_are_counted(tmp_path: Path) -> None:
    rows: list[Any] = [*sums(20), {"question": "a"}, {"question": "b", "answer": None}, {"question": "c", "answer": ""}]
    sets = load(data=write(tmp_path / "a.jsonl", [*rows, {"question": "d", "answer": [1, 2]}]))
    assert_sound(sets)
    assert sets.report.parts[0].unparsed == 4
    assert sets.report.parts[0].unparsed_examples[0] == "a.jsonl:21 (empty)"
    assert any("4 rows without a readable gold answer" in line and "and 1 more" in line for line in sets.report.lines())


def test_a_row_with_several_gold_answers_is_shown_with_them(tmp_path: Path) -> None:
    sets = load(data=write(tmp_path / "a.jsonl", [*sums(20), {"question": "d", "answer": [1, 2]}]))
    assert sets.report.parts[0].unparsed_examples == ["a.jsonl:21 `[1, 2]`"]


def test_no_answer_at_all(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": "#### "} for i in range(9)]
    finding = refused(data=write(tmp_path / "a.jsonl", rows))[0]
    assert finding.startswith(
        "a.jsonl: no row has a gold answer that can be read in column answer, for example a.jsonl:1"
    )


def test_bad_rows(tmp_path: Path) -> None:
    rows = [*sums(20), "{oops", {"answer": "#### 3"}, {"question": 5, "answer": "#### 3"}]
    data = write(tmp_path / "a.jsonl", rows)
    assert len(refused(data=data)) == 2  # the broken line alone is enough
    findings = refused(data=data, max_bad_rows=2)
    assert findings[1:] == [
        "a.jsonl:22: no question in column question",
        "a.jsonl:23: column question holds int, not text or a conversation",
        "a.jsonl: 3 of 23 rows cannot be read; fix them, or go on without them with --max-bad-rows 3",
    ]
    sets = load(data=data, max_bad_rows=3)
    assert_sound(sets)
    assert len(sets.report.parts[0].bad_rows) == 3
    assert any("left out 3 unreadable rows: a.jsonl:21" in line for line in sets.report.lines())


def test_findings_of_both_sources_come_together(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", [{"text": "x", "answer": "1"}])
    held_out = write(tmp_path / "b.jsonl", ["[", *sums(3)])
    findings = refused(data=data, eval_data=held_out)
    assert len(findings) == 3
    assert "no column that could be the question" in findings[0]
    assert findings[1].startswith("b.jsonl:1: not JSON")


def test_one_problem_is_too_few(tmp_path: Path) -> None:
    assert "one problem is too few" in refused(data=write(tmp_path / "a.jsonl", sums(1)))[0]
    sets = load(data=write(tmp_path / "b.jsonl", sums(2)))
    assert (len(sets.train), len(sets.held_out)) == (1, 1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"data": "twostep"}, "data: twostep is no synthetic set (two-step, multiplication, addition), no public set"),
        ({"data": "twostep"}, "did you mean two-step"),
        ({"data": "gsm-8k"}, "did you mean gsm8k"),
        ({"data": "sums"}, "did you mean sums.jsonl"),
        ({"data": ""}, "data: (empty) is no synthetic set"),
        ({"data": "suns.jsonl"}, "data: suns.jsonl: no such file; did you mean sums.jsonl?"),
        ({"data": "./nowhere/x"}, "does not exist"),
        ({"data": "data/train.jsonl.gz"}, "data/train.jsonl.gz: no such file"),
        ({"data": "."}, "is a folder; name a file in it: sums.jsonl"),
        ({"eval_data": "nothing here"}, "eval_data: nothing here is no synthetic set"),
        ({"data_config": "main"}, "data_config: two-step is no hub data set"),
        ({"data": "sums.jsonl", "data_split": "test"}, "data_split: sums.jsonl is no hub data set"),
        ({"eval_split": "train"}, "a synthetic set is evaluated on validation or test"),
        ({"data": "sums.jsonl", "eval_split": "test"}, "eval_split: files have no splits"),
        ({"question_column": "q"}, "question_column: the synthetic set two-step has no columns"),
        ({"max_problems": 20_001}, "max_problems: a synthetic set gives at most 20,000"),
        ({"eval_size": 5_001}, "eval_size: a synthetic set gives at most 5,000"),
    ],
)
def test_data_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], expected: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "sums.jsonl", sums(3))
    findings = data_findings(DataOptions(**options))
    assert len(findings) == 1
    assert expected in findings[0]
    assert refused(**options) == findings


def test_all_findings_at_once() -> None:
    findings = data_findings(DataOptions(data="x.jsonl", eval_data="y.csv"))
    assert [finding.partition(":")[0] for finding in findings] == ["data", "eval_data"]
    assert len(data_findings(DataOptions(data_config="main", eval_split="train", max_problems=10**6))) == 3


def test_nothing_wrong(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", sums(3))
    for options in (
        {},
        {"data": data, "eval_data": "two-step", "eval_split": "test"},
        {"data": "openai/gsm8k", "data_config": "main", "eval_split": "test"},
        {"data": data, "eval_data": "HuggingFaceH4/MATH-500", "eval_split": "test"},
        {"data": data, "eval_data": "openai/gsm8k", "data_config": "socratic"},
    ):
        assert data_findings(DataOptions(**options)) == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub. You must be authenticated"), "is gated"),
        (DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."), "no such data set"),
        (DataFilesNotFoundError("No (supported) data files found in a/b"), "No (supported) data files found"),
        (ConnectionError("Couldn't reach 'a/b' on the Hub (LocalEntryNotFoundError)"), "check the network"),
        (
            ValueError("Config name is missing.\nPlease pick one among ['x', 'y']\nExample of usage:\n\tcode"),
            "--data-config",
        ),
        (ValueError("Unknown split \"dev\". Should be one of ['train']."), "--data-split or --eval-split"),
        (ValueError("Bad split: dev. Available splits: ['train']"), "--data-split or --eval-split"),
        (RuntimeError("Dataset scripts are no longer supported, but found b.py"), "scripts are no longer supported"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_failures_of_the_hub(monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    sentence = explain("a/b", None, "dev", error)
    assert sentence.startswith("a/b: ")
    assert expected in sentence
    assert "Example" not in sentence
    assert "\n" not in sentence


OFFLINE = """
import json, sys
from pathlib import Path
from igrpo_lite.config import DataOptions
from igrpo_lite.errors import DataError
from igrpo_lite.problems.loading import load_problems
from igrpo_lite.problems.sources import data_findings

work = Path(sys.argv[1])
results = []
assert not data_findings(DataOptions(data="someone/sums"))
assert not {"torch", "datasets", "pyarrow", "transformers"} & set(sys.modules), "a heavy import"

import datasets

# What a download leaves in the cache, made from files: hub sets are then read by the same call as after a download.
built = datasets.load_dataset("json", data_files={s: str(work / f"{s}.jsonl") for s in ("train", "test")})
made = Path(built["train"].cache_files[0]["filename"]).parent
cached = Path(datasets.config.HF_DATASETS_CACHE) / "someone___sums" / "default" / "0.0.0" / "hash"
cached.mkdir(parents=True)
for file in made.iterdir():
    (cached / file.name.replace("json-", "sums-")).write_bytes(file.read_bytes())
info = json.loads((cached / "dataset_info.json").read_text())
(cached / "dataset_info.json").write_text(json.dumps({**info, "config_name": "default", "dataset_name": "sums"}))

for options in json.loads(sys.argv[2]):
    try:
        sets = load_problems(DataOptions(**options), 0)
        ids = [[problem.id for problem in part] for part in (sets.train, sets.held_out)]
        results.append({"ids": ids, "lines": sets.report.lines(), "answer": sets.train[0].answer})
    except DataError as error:
        results.append({"problems": error.problems})
print(json.dumps(results))
"""


def test_hub(tmp_path: Path) -> None:
    """In a process of its own, because ``datasets`` reads its offline setting and its cache's place when imported."""
    write(tmp_path / "train.jsonl", sums(30))
    write(tmp_path / "test.jsonl", sums(10, start=25))
    options: list[dict[str, Any]] = [
        {"data": "openai/gsm8k"},
        {"data": "someone/sums"},
        {"data": "someone/sums", "eval_split": "test"},
        {"data": "someone/sums", "eval_data": "someone/sums"},
        {"data": "someone/sums", "data_split": "dev"},
        {"data": "someone/sums", "data_config": "hard"},
    ]
    root = Path(__file__).resolve().parents[1]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_DATASETS_CACHE": str(tmp_path / "cache" / "datasets"),
        "PYTHONPATH": str(root),
    }
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(tmp_path), json.dumps(options)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert results[0]["problems"] == [
        "openai/gsm8k: not in the local cache, and HF_HUB_OFFLINE forbids the download; "
        "unset it, or give a local file (JSONL, JSON, CSV, parquet) as gsm8k=path"
    ]
    assert [len(part) for part in results[1]["ids"]] == [27, 3]
    assert results[1]["ids"][0][0].startswith("someone/sums/train/")
    assert results[2]["ids"][0] == [f"someone/sums/train/{i}" for i in range(25)]
    assert sorted(results[2]["ids"][1]) == sorted(f"someone/sums/test/{i}" for i in range(10))
    assert results[2]["answer"] == "0"
    assert results[3]["ids"] == results[2]["ids"]  # of a held-out set, the test split is taken when none is named
    assert results[4]["problems"][0].startswith("someone/sums: there is no split dev (Unknown split")
    assert results[5]["problems"][0].startswith("someone/sums: no configuration hard (")
    assert results[5]["problems"][0].endswith("choose with --data-config")
