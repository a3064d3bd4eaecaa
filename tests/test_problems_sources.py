"""What a setting names: public sets, local copies, mixtures; and public sets read from files with their own columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from real_data import real_data

from igrpo_lite.cli import main
from igrpo_lite.config import DataOptions, RunConfig
from igrpo_lite.errors import DataError
from igrpo_lite.problems.gold import read_gold
from igrpo_lite.problems.loading import ProblemSets, load_problems, load_source
from igrpo_lite.problems.registry import PUBLIC_SETS, find_id, find_set
from igrpo_lite.problems.sources import data_findings, held_out_sources, parse, short_name, train_sources


def load(seed: int = 0, **options: Any) -> ProblemSets:
    return load_problems(DataOptions(**options), seed)


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sums(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"question": f"What is {i} + {i}?", "answer": f"so\n#### {2 * i:,}"} for i in range(start, start + count)]


def test_the_registry_is_consistent() -> None:
    names = [name for entry in PUBLIC_SETS.values() for name in (entry.name, *entry.aliases)]
    ids = [hub_id.lower() for entry in PUBLIC_SETS.values() for hub_id in (entry.hub_id, *entry.also)]
    assert len(set(names)) == len(names)
    assert len(set(ids)) == len(ids)
    for name, entry in PUBLIC_SETS.items():
        assert find_set(name.upper().replace("-", "_")) is find_id(entry.hub_id.lower()) is entry
        assert {entry.train, entry.evaluate} - {None} <= entry.splits.keys()
        assert entry.train or entry.evaluate
        assert entry.train != entry.evaluate
        assert entry.source


@pytest.mark.parametrize("name", PUBLIC_SETS)
def test_a_public_set_is_trained_on_and_evaluated_with_its_splits(name: str) -> None:
    entry = PUBLIC_SETS[name]
    options = DataOptions(data=name, eval_data=name.upper())
    (train,), held_out = train_sources(options), held_out_sources(options)
    assert (train.kind, train.name, train.config) == ("hub", entry.hub_id, entry.config)
    assert train.split == (entry.train or entry.evaluate)
    if entry.train and entry.evaluate:
        assert [(other.name, other.split) for other in held_out] == [(entry.hub_id, entry.evaluate)]
    else:  # one split: rows of it are held out
        assert held_out == []
    assert data_findings(options) == []
    assert held_out_sources(DataOptions(data=name)) == []  # never selected on the test set


def test_hub_ids_of_public_sets() -> None:
    (train,) = train_sources(DataOptions(data="OpenAI/GSM8K"))
    assert (train.name, train.config, train.entry) == ("openai/gsm8k", "main", PUBLIC_SETS["gsm8k"])
    copy = DataOptions(data="knoveleng/Minerva-Math", eval_data="yentinglin/aime_2025")
    (train,), (held_out,) = train_sources(copy), held_out_sources(copy)
    assert (train.split, train.config, train.entry) == ("train", None, PUBLIC_SETS["minerva"])  # a copy's own split
    assert (held_out.split, held_out.entry) == (None, PUBLIC_SETS["aime25"])
    (train,) = train_sources(DataOptions(data="math", data_config="algebra", data_split="test"))
    assert (train.config, train.split) == ("algebra", "test")
    other = DataOptions(data="gsm8k", data_config="socratic", eval_data="math500")
    assert held_out_sources(other)[0].config is None


@pytest.mark.parametrize(
    ("text", "kinds", "weights"),
    [
        ("gsm8k", ["hub"], [None]),
        ("gsm8k:3, svamp : 1", ["hub", "hub"], [3.0, 1.0]),
        ("two-step:.5,gsm8k=x/y.jsonl:2e1,a/b", ["synthetic", "file", "hub"], [0.5, 20.0, None]),
        ("runs/key=value/x.jsonl", ["file"], [None]),
        ("C:\\data\\x.jsonl", ["file"], [None]),
    ],
)
def test_mixtures_are_read(text: str, kinds: list[str], weights: list[float | None]) -> None:
    sources, findings = parse("data", text)
    assert findings == []
    assert [source.kind for source in sources] == kinds
    assert [source.weight for source in sources] == weights


def test_an_existing_file_is_one_source_whatever_its_name(tmp_path: Path) -> None:
    for name in ("a,b.jsonl", "x=y.jsonl", "sums.jsonl:2"):
        path = write(tmp_path / name, sums(3))
        assert [source.name for source in parse("data", str(path))[0]] == [str(path)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"data": "gsm8k:0"}, "data: gsm8k:0: the weight after the last colon must be a positive number"),
        ({"data": "gsm8k:nan,svamp"}, "gsm8k:nan: the weight"),
        ({"data": "gsm8k:-1,svamp"}, "gsm8k:-1: the weight"),
        ({"data": "gsm8k,gsm9k"}, "data: gsm9k is no synthetic set"),
        ({"data": "gsm8k,gsm9k"}, "did you mean gsm8k?"),
        ({"data": "gsm8k,,svamp"}, "data: (empty) is no synthetic set"),
        ({"data": "gsm8k,openai/gsm8k:2"}, "data: openai/gsm8k is named twice"),
        ({"data": "gsm9k=x.jsonl"}, "there is no public set gsm9k (igrpo-lite data ls); did you mean gsm8k?"),
        ({"data": "gsm8k="}, "the path after = is missing"),
        ({"data": "gsm8k=nowhere.jsonl"}, "data: nowhere.jsonl: no such file"),
        ({"data": "gsm8k=folder"}, "data: folder: no split train of gsm8k in this folder; it has test"),
        ({"data": "svamp=empty"}, "it needs train.jsonl, svamp_train.jsonl or the like"),
        ({"data": "gsm8k=folder", "data_split": "test", "eval_split": "train"}, "eval_split: folder: no split train"),
        ({"data": "gsm8k,svamp", "data_config": "main"}, "data_config: a mixture takes each set's own configuration"),
        ({"data": "gsm8k,svamp", "data_split": "test"}, "data_split: a mixture takes each set's training split"),
        ({"data": "gsm8k,svamp", "eval_split": "test"}, "eval_split: a mixture has no splits of its own"),
        ({"data": "gsm8k,svamp", "answer_column": "x"}, "answer_column: the columns of every set in the mixture are"),
        ({"eval_data": "gsm8k=folder,two-step", "eval_split": "train"}, "eval_data: folder: no split train"),
        ({"decontaminate": ["math-500", "aime"]}, "decontaminate: aime is no synthetic set"),
        ({"decontaminate": ["gsm8k:2"]}, "decontaminate: gsm8k:2: a weight means nothing here"),
    ],
)
def test_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], expected: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "folder" / "test.jsonl", sums(3))
    (tmp_path / "empty").mkdir()
    findings = data_findings(DataOptions(**options))
    assert len(findings) == 1
    assert expected in findings[0]


def test_findings_of_all_settings_come_together() -> None:
    options = DataOptions(data="gsm8k:0,nothing at all", eval_data="none.jsonl", decontaminate=["x.csv"])
    assert [finding.partition(":")[0] for finding in data_findings(options)] == ["data"] * 2 + [
        "eval_data",
        "decontaminate",
    ]


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("two-step", "two-step"),
        ("openai/gsm8k", "gsm8k"),
        ("HuggingFaceH4/MATH-500", "math500"),
        ("a/b/problems.jsonl", "problems"),
        ("gsm8k:3,svamp=x/SVAMP.json:1", "gsm8k+svamp"),
        ("?", "?"),
    ],
)
def test_short_name(data: str, name: str) -> None:
    assert short_name(data) == name


FILES = {
    "gsm8k_train.jsonl": ("gsm8k", 7473),
    "gsm8k_test.jsonl": ("gsm8k", 1319),
    "SVAMP.json": ("svamp", 1000),
    "minerva_math_test.jsonl": ("minerva", 272),
    "aime24_test.jsonl": ("aime24", 30),
}


@pytest.mark.parametrize("file", FILES)
def test_real_sets_load_whole_with_every_gold_answer(file: str) -> None:
    name, count = FILES[file]
    options = DataOptions(data=f"{name}={real_data(file)}")
    problems, report = load_source(train_sources(options)[0], options)
    assert (report.rows, len(problems), report.unparsed, report.duplicates) == (count, count, 0, 0)
    rows = real_data(file).read_text(encoding="utf-8")
    table = json.loads(rows) if file.endswith(".json") else [json.loads(line) for line in rows.splitlines()]
    for problem, row in zip(problems, table, strict=True):
        if name == "gsm8k":
            assert problem.answer == row["answer"].rpartition("####")[2].strip().replace(",", "")
            assert problem.question == row["question"].strip()
        elif name == "svamp":
            assert float(problem.answer) == row["Answer"]
            assert problem.question == f"{row['Body'].strip()} {row['Question'].strip()}"
        elif name == "aime24":
            assert int(problem.answer) == int(row["answer"])
        else:
            assert problem.answer in row["solution"].rpartition("\\boxed")[2]


def test_both_splits_of_a_folder_are_found() -> None:
    folder = real_data("gsm8k_train.jsonl").parent
    real_data("SVAMP.json"), real_data("minerva_math_test.jsonl")
    sets = load(data=f"gsm8k={folder}", eval_data=f"gsm8k={folder}", eval_size=2000)
    assert (sets.report.parts[0].rows, len(sets.held_out)) == (7473, 1319)
    assert sets.train[0].id == "gsm8k/train/0"
    assert {problem.id.rpartition("/")[0] for problem in sets.held_out} == {"gsm8k/test"}
    assert sets.held_out == load(data=f"gsm8k={folder}", eval_split="test", eval_size=2000).held_out
    assert len(load(data=f"gsm8k={folder}").held_out) == 200  # rows of the training split
    assert load(data=f"gsm8k={folder}", data_split="test").report.parts[0].rows == 1319
    svamp = load(data=f"svamp={folder}", eval_data=f"svamp={folder}")  # one file for all splits: rows are held out
    assert (len(svamp.train), len(svamp.held_out), svamp.report.held_out_parts) == (900, 100, [])
    assert load(data=f"minerva={folder}").report.parts[0].rows == 272  # no training split: the one there is


def test_the_one_split_of_a_set_to_evaluate_on_goes_by_any_name(tmp_path: Path) -> None:
    assert PUBLIC_SETS["aime24"].evaluate == "train"
    rows = [{"problem": f"{i}?", "answer": i} for i in range(3)]
    write(tmp_path / "aime24_test.jsonl", rows), write(tmp_path / "deepscaler_test.jsonl", rows)
    sets = load(data="two-step", eval_data=f"aime24={tmp_path}", decontaminate=[f"aime24={tmp_path}"])
    assert len(sets.held_out) == 3
    assert "no split train" in data_findings(DataOptions(data=f"deepscaler={tmp_path}"))[0]  # not for training
    assert "no split dev" in data_findings(DataOptions(eval_data=f"aime24={tmp_path}", eval_split="dev"))[0]


def test_a_clone_from_the_hub_and_its_shards(tmp_path: Path) -> None:
    for number, rows in enumerate((sums(30), sums(20, 30))):
        file = tmp_path / "main" / f"train-0000{number}-of-00002.parquet"
        file.parent.mkdir(exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    parquet.write_table(pyarrow.Table.from_pylist(sums(9, 100)), tmp_path / "main" / "test-00000-of-00001.parquet")
    write(tmp_path / "socratic" / "train.jsonl", sums(3))
    sets = load(data=f"gsm8k={tmp_path}", eval_data=f"gsm8k={tmp_path}")
    assert [problem.id for problem in sets.train] == [f"gsm8k/train/{i}" for i in range(50)]
    assert [problem.answer for problem in sets.train] == [str(2 * i) for i in range(50)]
    assert len(sets.held_out) == 9
    write(tmp_path / "gsm8k_test.jsonl", sums(4, 200))  # nearer than the folder of the configuration
    write(tmp_path / "gsm8k_test.csv", ["not read: the same split in another format"])
    assert len(load(data=f"gsm8k={tmp_path}", eval_data=f"gsm8k={tmp_path}").held_out) == 4


@pytest.mark.parametrize(
    ("value", "form", "expected"),
    [
        ("5 + 5 = 10\n#### $1,234\n", "hash", "1234"),
        ("#### -3.5", "hash", "-3.5"),
        ("no mark, 72", "hash", None),
        ("#### ", "hash", None),
        ("thus $x = \\boxed{\\frac{1}{2}}$.", "boxed", "\\frac{1}{2}"),
        ("the answer is 3", "boxed", None),
        ("\\frac{1}{2}", "plain", "\\frac{1}{2}"),
        ("x" * 200, "plain", "x" * 200),
        ("x" * 301, "plain", None),
        (142.0, "float-int", "142"),
        ("142.0", "float-int", "142"),
        ("033", "float-int", "33"),
        (0.25, "float-int", "0.25"),
        ("1,000", "float-int", "1000"),
        ("inf", "float-int", None),
        ("two", "float-int", None),
        (["$2\\sqrt{3}$"], "list0", "2\\sqrt{3}"),
        (["$a$, $b$", "$c$"], "list0", "$a$, $b$"),
        ([], "list0", None),
        ("7", "list0", "7"),
        (None, "plain", None),
        ({"ground_truth": "34"}, "plain", "34"),
    ],
)
def test_forms_of_answers(value: Any, form: Any, expected: str | None) -> None:
    assert read_gold(value, form) == expected


def test_copies_with_other_columns(tmp_path: Path) -> None:
    solution = {"problem": "q?", "solution": "so \\boxed{2}"}
    bare = {"question": "r?", "answer": "3", "solution": "so \\boxed{4}"}
    for rows, answer in (([solution, {**solution, "problem": "s?"}], "2"), ([bare, {**bare, "question": "t?"}], "3")):
        sets = load(data=f"minerva={write(tmp_path / 'm.jsonl', rows)}")
        assert {problem.answer for problem in [*sets.train, *sets.held_out]} == {answer}
    recorded = [{"problem": f"{i}?", "answer": str(i), "generations": ["long"], "uuid": "u"} for i in range(4)]
    parquet.write_table(pyarrow.Table.from_pylist(recorded), tmp_path / "o.parquet")
    for path in (write(tmp_path / "o.jsonl", recorded), tmp_path / "o.parquet"):
        assert sorted(load(data=f"openr1-math={path}").train[0].columns) == ["answer", "uuid"]
    odd = [{"text": f"{i}?", "gold": str(i), "pass_rate": i / 10} for i in range(5)]
    path = write(tmp_path / "odd.jsonl", odd)
    sets = load(data=f"gsm8k={path}", question_column="text", answer_column="gold")
    assert {problem.columns["pass_rate"] for problem in [*sets.train, *sets.held_out]} == {i / 10 for i in range(5)}
    with pytest.raises(DataError, match="no column that could be the question"):
        load(data=f"gsm8k={path}")


def noted(expected: str, **settings: Any) -> bool:
    config = RunConfig(**settings)
    return any(expected in line for line in load_problems(config, 0).report.lines())


def test_notes_of_public_sets(tmp_path: Path) -> None:
    rows = [{"problem": f"{i}?", "answer": str(i), "solution": f"\\boxed{{{i}}}"} for i in range(40)]
    path = write(tmp_path / "math500_test.jsonl", rows)
    told = "Qwen2.5-Math knows math500 by heart"
    assert noted(told, model="Qwen/Qwen2.5-Math-1.5B", eval_data=f"math500={path}")
    assert not noted(told, model="Qwen/Qwen3-0.6B", eval_data=f"math500={path}")
    assert not noted(told, model="Qwen/Qwen2.5-Math-1.5B", eval_data=f"aime24={path}")
    assert noted("math500 is a set to evaluate on", data=f"math500={path}")
    assert not noted("is a set to evaluate on", data=f"math={path}")
    assert noted("to math500 often take up to 2,048 tokens", data=f"math500={path}")
    assert not noted("often take", data=f"math500={path}", max_completion_length=2048)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "ls"]) == 0
    listed = capsys.readouterr().out
    assert all(entry.hub_id in listed for entry in PUBLIC_SETS.values())
    path = write(tmp_path / "gsm8k_train.jsonl", [*sums(4), {"question": "s?", "answer": "none"}])
    assert main(["data", "show", f"gsm8k={path},two-step", "--rows", "1"]) == 0
    shown = capsys.readouterr().out
    assert "gsm8k_train.jsonl: 5 rows, 4 problems; question from column question" in shown
    assert "left out 1 rows without a readable gold answer: gsm8k_train.jsonl:5 `none`" in shown
    assert "gsm8k_train/0\nWhat is 0 + 0?\n-> 0\n" in shown
    assert "two-step/train/0" in shown
    assert "gsm8k_train/1" not in shown
    assert main(["data", "show", "gsm8"]) == 2
    assert "did you mean gsm8k?" in capsys.readouterr().err
