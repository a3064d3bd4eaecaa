"""Rows of one local file: JSONL, JSON, CSV, TSV or parquet.

Text files are read with the standard library, not with ``datasets``, so that a broken line can be named by its number.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from igrpo_lite.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""Suffixes of the files that can be read."""

_SHOWN = 5
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its place among all rows of the table (from 0), where a person finds it, and its values by column."""

    index: int
    where: str
    values: dict[str, Any]


@dataclass(slots=True)
class Table:
    """The rows of one source.

    Attributes:
        name: the source as shown on the screen.
        rows: those that could be read.
        bad: place and reason of each that could not.
        total: rows there are, readable or not.
        skipped: columns that are not kept, for their size.
    """

    name: str
    rows: list[Row] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    total: int = 0
    skipped: Collection[str] = ()

    def add(self, where: str, value: Any) -> None:
        """Append a row, or note it as a bad one when it is not an object with columns."""
        if isinstance(value, dict):
            kept = {name: cell for name, cell in value.items() if name not in self.skipped} if self.skipped else value
            self.rows.append(Row(self.total, where, kept))
            self.total += 1
        else:
            self.refuse(where, f"the row is {_kind(value)}, not an object with columns")

    def refuse(self, where: str, reason: str) -> None:
        """Note a row that cannot be read."""
        self.bad.append(f"{where}: {reason}")
        self.total += 1


def read_file(path: Path, max_bad_rows: int = 0, skipped: Collection[str] = ()) -> Table:
    """All rows of one file.

    Blank lines and a byte order mark are skipped, columns in ``skipped`` not kept. Rows that cannot be read are left
    out and listed in ``Table.bad``.

    Raises:
        DataError: the file is missing, empty, of another kind or unreadable as a whole, or has more than
            ``max_bad_rows`` bad rows; the first of these are named with line number and reason.
    """
    findings = file_findings(path)
    if findings:
        raise DataError(findings)
    table = Table(path.name, skipped=skipped)
    try:
        _READERS[path.suffix.lower()](path, table)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not table.total:
        raise DataError(f"{path}: no rows in it; it needs a question and an answer per row")
    refuse_bad_rows(table, max_bad_rows)
    return table


def refuse_bad_rows(table: Table, max_bad_rows: int) -> None:
    """Raise :class:`DataError` naming the first bad rows when there are more than ``max_bad_rows`` or no others."""
    count = len(table.bad)
    if count <= max_bad_rows and count < table.total:
        return
    shown = f", the first {_SHOWN} are named above" if count > _SHOWN else ""
    total = f"{table.name}: {count} of {table.total} rows cannot be read{shown}"
    if count == table.total:
        raise DataError([*table.bad[:_SHOWN], f"{total}; is it really in the format its name says?"])
    raise DataError([*table.bad[:_SHOWN], f"{total}; mend them, or go on without them with --max-bad-rows {count}"])


def file_findings(path: Path) -> list[str]:
    """What is wrong with a data file as far as a look at the folder tells; empty when nothing is."""
    known = ", ".join(SUFFIXES)
    if path.is_dir():
        inside = _data_files(path)
        hint = f"name a file in it: {', '.join(inside[:_SHOWN])}" if inside else f"it holds no data file ({known})"
        return [f"{path}: is a folder; {hint}"]
    if not path.exists():
        return [f"{path}: no such file{_nearest(path)}"]
    if path.suffix.lower() not in SUFFIXES:
        return [f"{path}: the suffix `{path.suffix}` is not known; the file must be one of {known}"]
    if path.stat().st_size == 0:
        return [f"{path}: the file is empty"]
    return []


def _nearest(path: Path) -> str:
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    if folder != path.absolute().parent:
        return f"; the folder {path.parent} does not exist"
    names = _data_files(folder)
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.4)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; that folder has {', '.join(names[:_SHOWN])}" if names else "; that folder has no data file"


def _data_files(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() in SUFFIXES and entry.is_file())
    except OSError:
        return []


def _read_lines(path: Path, table: Table) -> None:
    with path.open("rb") as file:  # bytes: only \n ends a line; text mode would hide which line is not UTF-8
        for number, line in enumerate(file, 1):
            if number == 1:
                _refuse_utf16(path, line)
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                _read_line(f"{path.name}:{number}", line, table)
    if table.bad and not table.rows and _is_json_document(path):
        raise DataError(f"{path}: is one JSON value over several lines, not one object per line; rename it to .json")


def _read_line(where: str, line: bytes, table: Table) -> None:
    try:
        table.add(where, json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        table.refuse(where, f"not UTF-8 (byte 0x{line[error.start]:02x} at position {error.start + 1} of the line)")
    except json.JSONDecodeError as error:
        table.refuse(where, f"not JSON: {error.msg} (column {error.colno})")
    except (ValueError, RecursionError) as error:
        table.refuse(where, _too_much(error))


def _is_json_document(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return True


def _read_json(path: Path, table: Table) -> None:
    text = _text(path)
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):  # JSON lines are often named .json
            return _read_lines(path, table)
        raise DataError(f"{path.name}:{error.lineno}: not JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {_too_much(error)}") from error
    for number, value in enumerate(_document_rows(path, document), 1):
        table.add(f"{path.name}, row {number}", value)


def _too_much(error: Exception) -> str:
    """Why Python does not read what is JSON; of digits it reads 4,300, since the time grows with their square."""
    return "nested too deeply" if isinstance(error, RecursionError) else "a number of more than 4,300 digits"


def _document_rows(path: Path, document: Any) -> list[Any]:
    if isinstance(document, list):
        return document
    if isinstance(document, dict):
        lists = {name: value for name, value in document.items() if isinstance(value, list)}
        of_objects = [name for name, value in lists.items() if value and all(isinstance(row, dict) for row in value)]
        if "data" in lists and (len(document) == 1 or "data" in of_objects):
            return lists["data"]
        if len(lists) == len(document) > 1 or (len(document) == 1 and lists and not of_objects):
            return _transpose(path, lists)
        if len(of_objects) == 1:
            return lists[of_objects[0]]
    raise DataError(
        f'{path}: holds {_kind(document)}; it must be a list of objects, {{"data": [objects]}}, or lists by column name'
    )


def _transpose(path: Path, columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    sizes = {name: len(values) for name, values in columns.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise DataError(f"{path}: its columns have different lengths ({listed}), so the rows cannot be told")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _read_csv(path: Path, table: Table) -> None:
    text = _text(path)
    # The module's limit of 128 KiB per field is shorter than some recorded solutions; it can only be set globally.
    csv.field_size_limit(max(csv.field_size_limit(), 1 << 27))
    header: list[str] | None = None
    for where, cells in _csv_rows(path, text, table):
        if header is None:
            header = _header(path, cells)
        elif len(cells) != len(header):
            table.refuse(where, f"{len(cells)} fields where the header has {len(header)}")
        else:
            # A column without a name is the index that pandas writes.
            table.add(where, {name: cell for name, cell in zip(header, cells, strict=True) if name})


def _csv_rows(path: Path, text: str, table: Table) -> Iterator[tuple[str, list[str]]]:
    # strict: otherwise a quote that is never closed swallows the rest of the file into one field, silently.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(path, text), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise DataError(f"{path.name}:{line}: a quote opened in this row is never closed") from error
            table.refuse(f"{path.name}:{line}", f"not CSV: {error}")
        else:
            if any(cell.strip() for cell in cells):
                yield f"{path.name}:{line}", cells


def _delimiter(path: Path, text: str) -> str:
    if path.suffix.lower() == ".tsv":
        return "\t"
    header = text.lstrip().partition("\n")[0]
    return ";" if ";" in header and "," not in header else ","  # what spreadsheets write where the comma is decimal


def _header(path: Path, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise DataError(f"{path}: the header names {', '.join(twice)} more than once; column names must differ")
    return names


def _text(path: Path) -> str:
    data = path.read_bytes()
    _refuse_utf16(path, data)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = data[error.start]
        raise DataError(f"{path.name}:{line}: not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8") from error


def _refuse_utf16(path: Path, data: bytes) -> None:
    if data.startswith(_UTF16):
        raise DataError(f"{path}: is UTF-16 (Windows PowerShell writes that); save the file as UTF-8")


def _read_parquet(path: Path, table: Table) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{path}: parquet needs pyarrow: pip install pyarrow") from error
    try:
        with parquet.ParquetFile(path) as file:
            names = [name for name in file.schema_arrow.names if name not in table.skipped]
            for batch in file.iter_batches(batch_size=1000, columns=names):
                for values in batch.to_pylist():
                    table.add(f"{path.name}, row {table.total + 1}", values)
    except (pyarrow.ArrowException, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: is not a readable parquet file: {reason}") from error


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), f"a {type(value).__name__}")


_READERS: dict[str, Callable[[Path, Table], None]] = {
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
