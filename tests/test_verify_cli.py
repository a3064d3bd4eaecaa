"""``igrpo-lite verify`` as a user meets it: real files in, a table, an exit code and a file of verdicts out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from igrpo_lite.cli import main

CHAT = [{"role": "user", "content": "1+x?"}, {"role": "assistant", "content": r"\boxed{1+x}"}]
ROWS = [
    {"output": r"so \boxed{18}", "gold": "18", "right": True},
    {"output": "it is 18", "gold": 18.0, "right": "yes"},
    {"output": "it is 17", "gold": "5 + 13\n#### 18", "right": 0},
    {"output": None, "gold": "18", "right": "wrong"},
    {"output": CHAT, "gold": "x+1", "right": 1},
]
FLAGS = ("--completion", "output", "--answer", "gold")
Said = Callable[..., tuple[int, str, list[str]]]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Said:
    monkeypatch.setenv("COLUMNS", "160")

    def typed(*words: Any) -> tuple[int, str, list[str]]:
        code = main(["verify", *map(str, words)])
        shown = capsys.readouterr()
        return code, shown.out, shown.err.splitlines()

    return typed


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_table_counts_verdicts_and_both_accuracies(say: Said, tmp_path: Path) -> None:
    code, out, err = say(written(tmp_path / "rows.jsonl", ROWS), *FLAGS)
    counts = {line.split()[0]: line.split()[1:] for line in out.splitlines()[1:4]}
    assert (code, err) == (0, [])
    assert counts == {"correct": ["3", "60.0"], "wrong": ["1", "20.0"], "no_answer": ["1", "20.0"]}
    assert "of 5 rows: strict 40.0 %" in out
    assert "lenient 60.0 %" in out


def test_what_was_expected_is_compared_and_disagreements_end_with_3(say: Said, tmp_path: Path) -> None:
    path, output = written(tmp_path / "rows.jsonl", ROWS), tmp_path / "verdicts.jsonl"
    code, out, err = say(path, *FLAGS, "--expect", "right")
    assert (code, err) == (0, [])
    assert "expected right: 3 judged right, 0 not\nexpected wrong: 2 judged wrong, 0 right" in out
    code, out, _ = say(path, *FLAGS, "--expect", "right", "--no-math-verify", "--output", output)
    assert code == 3
    assert "expected right: 2 judged right, 1 not" in out
    assert out.splitlines()[-1].split() == ["rows.jsonl:5", "right", "unparsed", "1+x", "x+1"]
    kept = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["reason"] for row in kept] == ["correct", "correct", "wrong", "no_answer", "unparsed"]
    assert kept[1] == {
        "row": 1,
        "where": "rows.jsonl:2",
        "reason": "correct",
        "answer": "18",
        "source": "number",
        "gold": "18",
        "expected": True,
    }


def test_a_csv_file_is_read_too(say: Said, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('output,gold,right\n"\\boxed{1,234}",1234,true\n"\\boxed{7}",8,true\n', encoding="utf-8")
    code, out, _ = say(path, *FLAGS, "--expect", "right")
    assert code == 3
    assert "expected right: 1 judged right, 1 not" in out


def test_wrong_columns_are_named_together_with_the_nearest(say: Said, tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", ROWS)
    code, out, err = say(path, "--completion", "outputs", "--answer", "reference", "--expect", "rigth")
    assert (code, out) == (2, "")
    assert err == [
        "error: --completion outputs: rows.jsonl has no such column; did you mean output?",
        "error: --answer reference: rows.jsonl has no such column; there is output, gold, right",
        "error: --expect rigth: rows.jsonl has no such column; did you mean right?",
    ]


@pytest.mark.parametrize(
    ("change", "flags", "words"),
    [
        ({"gold": None}, (), "rows.jsonl:1: no gold answer in column gold"),
        ({"right": "maybe"}, ("--expect", "right"), "column right holds 'maybe', which is neither true nor false"),
        ({"output": {"a": 1}}, (), "column output holds neither a text nor messages"),
        ({}, ("--output", "none/here.jsonl"), "there is no folder none"),
    ],
)
def test_what_cannot_be_judged_is_named(
    say: Said, tmp_path: Path, change: dict[str, Any], flags: tuple[str, ...], words: str
) -> None:
    code, out, err = say(written(tmp_path / "rows.jsonl", [ROWS[0] | change, *ROWS[1:]]), *FLAGS, *flags)
    assert (code, out) == (2, "")
    assert len(err) == 1
    assert words in err[0]


def test_unreadable_rows_are_named_and_may_be_left_out(say: Said, tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", ROWS)
    path.write_text(path.read_text(encoding="utf-8") + "not JSON\n", encoding="utf-8")
    code, _, err = say(path, *FLAGS)
    assert code == 2
    assert "rows.jsonl:6: not JSON" in err[0]
    assert "--max-bad-rows 1" in err[1]
    code, out, err = say(path, *FLAGS, "--max-bad-rows", "1")
    assert (code, err) == (0, [])
    assert "accuracy of 5 rows" in out


def test_a_missing_file_is_named(say: Said, tmp_path: Path) -> None:
    code, _, err = say(tmp_path / "none.jsonl", *FLAGS)
    assert code == 2
    assert "no such file" in err[0]
