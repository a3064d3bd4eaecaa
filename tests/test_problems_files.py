"""Reading files: every format round trips, every broken file is named by what is wrong and where."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from real_data import real_data

from igrpo_lite.errors import DataError
from igrpo_lite.problems.files import read_file

ROWS = [{"question": "What is 1 + 1?", "answer": "2"}, {"question": "Was ist 2 · 2,\u2028bitte?", "answer": "4"}]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def refused(path: Path, max_bad_rows: int = 0) -> list[str]:
    with pytest.raises(DataError) as caught:
        read_file(path, max_bad_rows)
    return caught.value.problems


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "A.JSONL"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    table = read_file(write(tmp_path / name, lines(ROWS)))
    assert [row.values for row in table.rows] == ROWS
    assert [(row.index, row.where) for row in table.rows] == [(0, f"{name}:1"), (1, f"{name}:2")]


@pytest.mark.parametrize(
    "document",
    [
        ROWS,
        {"data": ROWS},
        {"version": "1.0", "data": ROWS},
        {"name": "set", "problems": ROWS},
        {"train": ROWS},
    ],
)
def test_json_documents(tmp_path: Path, document: object) -> None:
    table = read_file(write(tmp_path / "a.json", json.dumps(document, indent=1)))
    assert [row.values for row in table.rows] == ROWS
    assert table.rows[1].where == "a.json, row 2"


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.csv", ";"), ("a.tsv", "\t")])
def test_csv(tmp_path: Path, name: str, delimiter: str) -> None:
    rows = [*ROWS, {"question": 'a "quoted" one,\nover two lines; with\ttab', "answer": "1,5"}]
    with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["question", "answer"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    table = read_file(tmp_path / name)
    assert [row.values for row in table.rows] == rows
    assert [row.where for row in table.rows] == [f"{name}:2", f"{name}:3", f"{name}:4"]


def test_csv_with_pandas_index_and_long_field(tmp_path: Path) -> None:
    text = ",question,answer\n0,q," + "x" * 200_000 + "\n\n1,r,2\n"
    table = read_file(write(tmp_path / "a.csv", text))
    assert [set(row.values) for row in table.rows] == [{"question", "answer"}] * 2
    assert table.rows[1].where == "a.csv:4"


def test_parquet(tmp_path: Path) -> None:
    rows = [{**row, "turns": [{"role": "user", "content": "x"}], "number": 2.5} for row in ROWS] * 800
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    table = read_file(tmp_path / "a.parquet")
    assert [row.values for row in table.rows] == rows
    assert table.rows[-1].where == "a.parquet, row 1600"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_byte_order_mark_and_windows_line_ends(tmp_path: Path, name: str) -> None:
    text = "question,answer\nq,2\n" if name.endswith("csv") else '{"question": "q", "answer": "2"}\n'
    text += "r,3\n" if name.endswith("csv") else '{"question": "r", "answer": "3"}\n'
    path = write(tmp_path / name, b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert [row.values for row in read_file(path).rows] == [
        {"question": "q", "answer": "2"},
        {"question": "r", "answer": "3"},
    ]


def test_blank_lines_count_as_lines_but_not_as_rows(tmp_path: Path) -> None:
    table = read_file(write(tmp_path / "a.jsonl", '\n{"a": 1}\n  \n\n{"a": 2}'))
    assert [(row.index, row.where) for row in table.rows] == [(0, "a.jsonl:2"), (1, "a.jsonl:5")]
    assert not table.bad


BROKEN = b'{"a": 1}\n{"a": 2\n[3]\n\nnull\n{"a": "\xe9"}\n{"a": 6}\n{"a": 7}}\n'


def test_broken_lines_are_named(tmp_path: Path) -> None:
    findings = refused(write(tmp_path / "a.jsonl", BROKEN), max_bad_rows=4)
    assert findings[:5] == [
        "a.jsonl:2: not JSON: Expecting ',' delimiter (column 1)",
        "a.jsonl:3: the row is [3], not an object with columns",
        "a.jsonl:5: the row is null, not an object with columns",
        "a.jsonl:6: not UTF-8 (byte 0xe9 at position 8 of the line)",
        "a.jsonl:8: not JSON: Extra data (column 9)",
    ]
    assert findings[5] == ("a.jsonl: 5 of 7 rows cannot be read; fix them, or go on without them with --max-bad-rows 5")


def test_broken_lines_can_be_allowed(tmp_path: Path) -> None:
    table = read_file(write(tmp_path / "a.jsonl", BROKEN), max_bad_rows=5)
    assert [(row.index, row.values["a"]) for row in table.rows] == [(0, 1), (5, 6)]
    assert len(table.bad) == 5
    assert table.total == 7


def test_only_the_first_broken_lines_are_named(tmp_path: Path) -> None:
    findings = refused(write(tmp_path / "a.jsonl", '{"a": 1}\n' + "{\n" * 30), 3)
    assert len(findings) == 6
    assert "30 of 31 rows" in findings[-1]
    assert "--max-bad-rows 30" in findings[-1]


def test_file_of_nothing_but_broken_lines(tmp_path: Path) -> None:
    assert "is it in the format" in refused(write(tmp_path / "a.jsonl", "hello\nworld\n"), 10)[-1]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", "", "the file is empty"),
        ("a.jsonl", "\n \n", "no rows in it"),
        ("a.json", "  ", "a.json:1: not JSON: Expecting value"),
        ("a.json", "[]", "no rows in it"),
        ("a.csv", "question,answer\n", "no rows in it"),
        ("a.txt", "q", "the suffix `.txt` is not known"),
        ("a", "q", "the suffix `` is not known"),
        ("a.json", '[\n{"a": 1},\n{"a" 2}\n]', "a.json:3: not JSON: Expecting ':' delimiter (column 6)"),
        ("a.json", '{"q": "x", "a": 1}', "must hold a list of objects, or one such list in an object"),
        ("a.json", "3", "must hold a list of objects"),
        ("a.json", '{"q": ["x", "y"], "a": [1]}', "must hold a list of objects"),
        ("a.json", "[" * 200_000, "nested too deeply"),
        ("a.json", f'[{{"q": {"1" * 5000}}}]', "not JSON: Exceeds the limit"),
        ("a.jsonl", f'{{"q": {"1" * 5000}}}\n{{"q": 1}}', "a.jsonl:1: not JSON: Exceeds the limit"),
        ("a.jsonl", json.dumps(ROWS, indent=1), ".jsonl: one object per line"),
        ("a.jsonl", b"\xff\xfe{\x00}\x00", "a.jsonl:1: not UTF-8 (byte 0xff at position 1 of the line)"),
        ("a.csv", "q,q,a\n1,2,3\n", "names q more than once"),
        ("a.csv", 'q,a\n1,2\n"x,3\n4,5\n', "a.csv:3: a quote opened in this row is never closed"),
        ("a.csv", b"q,a\n1,2\n\xe9,3\n", "a.csv:3: not UTF-8 (byte 0xe9)"),
        ("a.csv", "q,a\n1,2\n1,2,3\n", "a.csv:3: 3 fields where the header has 2"),
        ("a.csv", 'q,a\n1,2\n"x"y,3\n', "a.csv:3: not CSV: ',' expected after '\"'"),
        ("a.parquet", "PAR1 no", "is not a readable parquet file"),
    ],
)
def test_refused(tmp_path: Path, name: str, content: str | bytes, expected: str) -> None:
    findings = refused(write(tmp_path / name, content))
    assert expected in "\n".join(findings)
    assert all("\n" not in finding for finding in findings)


def test_missing_file_suggests_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k_train.jsonl", "{}")
    write(tmp_path / "notes.txt", "x")
    assert refused(tmp_path / "gsm8k-train.jsonl")[0].endswith("no such file; did you mean gsm8k_train.jsonl?")
    assert refused(tmp_path / "x.csv")[0].endswith("that folder has gsm8k_train.jsonl")
    assert "does not exist" in refused(tmp_path / "no" / "x.csv")[0]
    assert refused(tmp_path)[0].endswith("is a folder; name a file in it: gsm8k_train.jsonl")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gsm8k_train.jsonl", 7473),
        ("gsm8k_test.jsonl", 1319),
        ("SVAMP.json", 1000),
        ("minerva_math_test.jsonl", 272),
        ("aime24_test.jsonl", 30),
    ],
)
def test_real_sets(name: str, count: int) -> None:
    table = read_file(real_data(name))
    assert (len(table.rows), table.bad) == (count, [])
