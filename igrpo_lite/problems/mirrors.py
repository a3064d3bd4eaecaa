"""Local copies of a public set: a file, or a folder with one or several files per split."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from igrpo_lite.errors import DataError
from igrpo_lite.problems.files import SUFFIXES, Row, Table, file_findings, read_file
from igrpo_lite.problems.registry import PublicSet

_SHARD = re.compile(r"-\d+-of-\d+$")
_ALL = "all"
_USUAL = ("test", "train", "validation")


def split_files(folder: Path, entry: PublicSet) -> dict[str, list[Path]]:
    """The files of each split in ``folder``, in the order to read them.

    Found are ``train.jsonl``, ``gsm8k_train.jsonl`` and the hub's ``train-00000-of-00002.parquet``, in the folder and,
    as in a clone from the hub, in ``data/`` and the folder of the set's configuration. A file named like the set
    (``SVAMP.json``) holds every split.
    """
    found: dict[str, list[Path]] = {}
    for place in (folder, folder / "data", folder / (entry.config or "data")):
        files = [path for path in place.iterdir() if path.suffix.lower() in SUFFIXES] if place.is_dir() else []
        inside: dict[str, list[Path]] = {}
        for path in sorted(files, key=lambda path: (SUFFIXES.index(path.suffix.lower()), path.name)):
            inside.setdefault(_split_of(path.stem, entry), []).append(path)
        found = inside | found
    return {split: [path for path in paths if _SHARD.search(path.stem)] or paths[:1] for split, paths in found.items()}


def files_of(path: Path, entry: PublicSet | None, split: str | None) -> list[Path]:
    """The files of one split of a local copy: those in the folder, or ``path`` itself where it is a file.

    Raises:
        DataError: the folder has no such split.
    """
    if entry is None or not path.is_dir():
        return [path]
    found = split_files(path, entry)
    # The one split of a set to evaluate on has any name: AIME's is `train` on the hub and `test` in most copies.
    usual = _USUAL if entry.train is None and [split] == list(entry.splits) else ()
    for name in (split, _ALL, *usual):
        if name in found:
            return found[name]
    there = f"it has {', '.join(found)}" if found else f"it needs {split}.jsonl, {entry.name}_{split}.jsonl or the like"
    raise DataError(f"{path}: no split {split} of {entry.name} in this folder; {there}")


def mirror_findings(path: Path, entry: PublicSet | None, split: str | None) -> list[str]:
    """What is wrong with a data file or folder as far as names and sizes tell; empty when nothing is."""
    try:
        return [finding for file in files_of(path, entry, split) for finding in file_findings(file)]
    except DataError as error:
        return error.problems


def read_files(paths: Sequence[Path], max_bad_rows: int, skipped: Collection[str] = ()) -> Table:
    """All rows of several files as one table; see :func:`igrpo_lite.problems.files.read_file`."""
    whole = Table(paths[0].name if len(paths) == 1 else paths[0].parent.name)
    for path in paths:
        table = read_file(path, max_bad_rows, skipped)
        whole.rows += [Row(whole.total + row.index, row.where, row.values) for row in table.rows]
        whole.bad += table.bad
        whole.total += table.total
    return whole


def _split_of(stem: str, entry: PublicSet) -> str:
    """The split in a file's name: what follows the set's name, or all of it."""
    plain = _SHARD.sub("", stem).lower().replace("-", "_")
    for name in sorted(entry.names, key=len, reverse=True):
        if plain == name:
            return _ALL
        if plain.startswith(f"{name}_"):
            return plain.removeprefix(f"{name}_")
    return plain
