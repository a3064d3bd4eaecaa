"""Rows of one local file: JSONL, JSON, CSV, TSV or parquet.

Text files are read with the standard library, not with ``datasets``, which names neither the line of a broken row nor
the reason, and stops at the first.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from igrpo_lite.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""Suffixes of the files that can be read."""

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its index in the table, from 0; the place to show a person; its values by column."""

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
        """Append a row; what is not an object with columns is a bad one."""
        if not isinstance(value, dict):
            return self.refuse(where, f"the row is {json.dumps(value)[:40]}, not an object with columns")
        kept = {name: cell for name, cell in value.items() if name not in self.skipped} if self.skipped else value
        self.rows.append(Row(self.total, where, kept))
        self.total += 1

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
        match path.suffix.lower():
            case ".jsonl" | ".ndjson":
                _read_lines(path, table)
            case ".json":
                _read_json(path, table)
            case ".parquet":
                _read_parquet(path, table)
            case _:
                _read_csv(path, table)
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
    advice = f"; fix them, or go on without them with --max-bad-rows {count}"
    if count == table.total:
        advice = "; is it in the format that its name says (.jsonl: one object per line), as UTF-8?"
    raise DataError([*table.bad[:_SHOWN], total + advice])


def file_findings(path: Path) -> list[str]:
    """What is wrong with a data file as far as its name and size tell; empty when nothing is."""
    known = ", ".join(SUFFIXES)
    if path.is_dir():
        inside = _data_files(path)
        hint = f"name a file in it: {', '.join(inside[:_SHOWN])}" if inside else f"it holds no data file ({known})"
        return [f"{path}: is a folder; {hint}"]
    if not path.exists():
        return [f"{path}: no such file{_nearest(path)}"]
    if path.suffix.lower() not in SUFFIXES:
        return [f"{path}: the suffix `{path.suffix}` is not known; the file must be one of {known}"]
    return [f"{path}: the file is empty"] if path.stat().st_size == 0 else []


def _nearest(path: Path) -> str:
    folder = path.absolute().parent
    if not folder.is_dir():
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
    with path.open("rb") as file:  # bytes: only \n ends a line, and a line that is not UTF-8 can be named
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path.name}:{number}"
            try:
                table.add(where, json.loads(line.decode("utf-8-sig")))
            except UnicodeDecodeError as error:
                byte = f"0x{error.object[error.start]:02x} at position {error.start + 1} of the line"
                table.refuse(where, f"not UTF-8 (byte {byte})")
            except (ValueError, RecursionError) as error:
                table.refuse(where, _not_json(error))


def _read_json(path: Path, table: Table) -> None:
    text = _text(path)
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):  # JSON lines are often named .json
            return _read_lines(path, table)
        raise DataError(f"{path.name}:{error.lineno}: {_not_json(error)}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {_not_json(error)}") from error
    lists = [document] if isinstance(document, list) else []
    if isinstance(document, dict):
        lists = [value for value in document.values() if isinstance(value, list)]
        lists = [document["data"]] if isinstance(document.get("data"), list) else lists
    if len(lists) != 1:
        raise DataError(f'{path}: must hold a list of objects, or one such list in an object, like {{"data": [...]}}')
    for number, value in enumerate(lists[0], 1):
        table.add(f"{path.name}, row {number}", value)


def _not_json(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} (column {error.colno})"
    return "not JSON: nested too deeply" if isinstance(error, RecursionError) else f"not JSON: {error}"


def _read_csv(path: Path, table: Table) -> None:
    text = _text(path)
    # The module's limit of 128 KiB per field is shorter than some recorded solutions; it can only be set globally.
    csv.field_size_limit(max(csv.field_size_limit(), 1 << 27))
    header: list[str] | None = None
    for where, cells in _csv_rows(path, text, table):
        if header is None:
            header = [cell.strip() for cell in cells]
            twice = sorted({name for name in header if name and header.count(name) > 1})
            if twice:
                raise DataError(f"{path}: the header names {', '.join(twice)} more than once; column names must differ")
        elif len(cells) != len(header):
            table.refuse(where, f"{len(cells)} fields where the header has {len(header)}")
        else:
            # A column without a name is the index that pandas writes.
            table.add(where, {name: cell for name, cell in zip(header, cells, strict=True) if name})


def _csv_rows(path: Path, text: str, table: Table) -> Iterator[tuple[str, list[str]]]:
    first = text.lstrip().partition("\n")[0]
    # Spreadsheets write semicolons where the comma is the decimal sign.
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ";" if ";" in first and "," not in first else ","
    # strict: otherwise a quote that is never closed silently swallows the rest of the file into one field.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
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


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = data.count(b"\n", 0, error.start) + 1, data[error.start]
        raise DataError(f"{path.name}:{line}: not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8") from error


def _read_parquet(path: Path, table: Table) -> None:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = [name for name in file.schema_arrow.names if name not in table.skipped]
            for batch in file.iter_batches(batch_size=1000, columns=names):
                for values in batch.to_pylist():
                    table.add(f"{path.name}, row {table.total + 1}", values)
    except (pyarrow.ArrowException, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: is not a readable parquet file: {reason}") from error
