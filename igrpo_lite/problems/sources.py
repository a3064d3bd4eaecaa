"""The sources that ``data``, ``eval_data`` and ``decontaminate`` name, checked before anything is loaded.

A source is a synthetic set, the short name of a public set, ``NAME=path`` (a local copy of a public set: its columns,
your file), a file, or a hub id. Several of them, with commas between, make a mixture: ``gsm8k:3,svamp=SVAMP.json:1``.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from igrpo_lite.config import DataOptions
from igrpo_lite.errors import DataError
from igrpo_lite.problems import synthetic
from igrpo_lite.problems.files import SUFFIXES
from igrpo_lite.problems.mirrors import files_of, mirror_findings
from igrpo_lite.problems.registry import PublicSet, find_id, find_set, suggestions

Kind = Literal["synthetic", "file", "hub"]

SYNTHETIC_TRAIN = 4000
"""Training problems of a synthetic set unless ``max_problems`` says otherwise."""
SYNTHETIC_MOST: dict[str, int] = {"train": 20_000, "validation": 5_000, "test": 5_000}
"""Most problems of a synthetic set. The sets are finite and drawn without repetition, so that near their end drawing
takes forever (``multiplication`` has about 32,000 for training and 8,000 in each of the others)."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE_LIKE = (".txt", ".md", ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".xlsx", ".xls", ".arrow", ".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class Source:
    """One place to load problems from.

    Attributes:
        kind: what it is.
        name: name of a synthetic set, path of a file or folder, or hub id.
        config: configuration of a hub set.
        split: split of a synthetic or hub set or of a folder; ``None``: the one there is, a test split before others.
        entry: the public set whose columns it has, if any.
        weight: its weight in a mixture; ``None``: none was given.
    """

    kind: Kind
    name: str
    config: str | None = None
    split: str | None = None
    entry: PublicSet | None = None
    weight: float | None = field(default=None, compare=False)

    @property
    def path(self) -> Path:
        return Path(self.name).expanduser()

    @property
    def has_splits(self) -> bool:
        """Whether there are splits to choose from: of a hub set, or of a folder."""
        return self.kind == "hub" or (self.kind == "file" and self.entry is not None and self.path.is_dir())

    @property
    def files(self) -> list[Path]:
        """The files that hold it; raises :class:`DataError` where a folder has no such split."""
        return files_of(self.path, self.entry, self.split)

    @property
    def label(self) -> str:
        """The name in short, used in problem ids and on the screen."""
        if self.kind != "file":
            return self.name
        return f"{self.entry.name}/{self.split}" if self.entry is not None and self.has_splits else self.path.stem

    @property
    def takes_columns(self) -> bool:
        """Whether ``question_column`` and ``answer_column`` are for it in a mixture: those of public sets are known."""
        return self.kind != "synthetic" and self.entry is None

    @property
    def known(self) -> PublicSet | None:
        """The public set whose splits and configuration it has: not that of a hub copy, which has its own."""
        return None if self.entry is None or (self.kind == "hub" and self.name != self.entry.hub_id) else self.entry

    def same_place(self, other: Source) -> bool:
        """Whether both name the same rows."""
        if self.kind == other.kind == "file":
            return [path.resolve() for path in self.files] == [path.resolve() for path in other.files]
        return (self.kind, self.name, self.config, self.split) == (other.kind, other.name, other.config, other.split)


def parse(key: str, text: str) -> tuple[list[Source], list[str]]:
    """The sources that ``text`` names, without splits and configurations, and all findings on the text.

    The name of an existing file or folder is one source, even with commas and colons in it.
    """
    parts = [text] if _exists(text) else [part.strip() for part in text.split(",")]
    sources: list[Source] = []
    findings = []
    for part in parts:
        name, weight = _weighed(part)
        if weight is not None and not (weight > 0 and math.isfinite(weight)):
            findings.append(f"{key}: {part}: the weight after the last colon must be a positive number")
        source = _named(name)
        if isinstance(source, str):
            findings.append(f"{key}: {source}")
        else:
            sources.append(replace(source, weight=weight))
    twice = sorted({source.name for source in sources if sources.count(source) > 1})
    findings += [f"{key}: {name} is named twice; write it once, with a weight" for name in twice]
    if key == "decontaminate" and any(source.weight is not None for source in sources):
        findings.append(f"{key}: {text}: a weight means nothing here; leave it out")
    return sources, findings


def train_sources(options: DataOptions) -> list[Source]:
    """Where the training problems come from. Call it once :func:`data_findings` is empty."""
    return _sound(_train(options))


def held_out_sources(options: DataOptions) -> list[Source]:
    """Where the held-out problems come from; empty: from the rows of the training sources themselves."""
    trained = train_sources(options)
    first = trained[0]
    if options.eval_data is None:
        own = first.kind == "synthetic" or (first.has_splits and options.eval_split not in (None, first.split))
        return [replace(first, split=options.eval_split or "validation")] if own and len(trained) == 1 else []
    held_out = _sound(_held_out(options, first))
    return [] if len(held_out) == len(trained) == 1 and held_out[0].same_place(first) else held_out


def decontamination_sources(options: DataOptions) -> list[Source]:
    """The sets of ``decontaminate``, each with the split to evaluate on."""
    return _sound(_decontaminate(options))


def data_findings(options: DataOptions) -> list[str]:
    """What is wrong with the data settings as far as names and folders tell; empty when nothing is.

    Nothing is read or downloaded, and no heavy package is imported.
    """
    trained, findings = _train(options)
    findings = findings + _held_out(options, trained[0] if trained else None)[1] + _decontaminate(options)[1]
    if findings:
        return findings
    held_out = held_out_sources(options)
    if options.eval_data is None:  # another split of the same folder
        findings = _file_findings("eval_split", held_out)
    return findings + _idle_findings(options, trained, held_out)


def short_name(data: str) -> str:
    """The setting in short, fit for a file name: ``gsm8k:3,svamp=SVAMP.json:1`` is ``gsm8k+svamp``."""
    sources = parse("data", data)[0]
    names = [source.entry.name if source.entry is not None else Path(source.name).stem for source in sources]
    return "+".join(names) or Path(data).stem


def _sound(found: tuple[list[Source], list[str]]) -> list[Source]:
    sources, findings = found
    if findings:
        raise DataError(findings)
    return sources


def _train(options: DataOptions) -> tuple[list[Source], list[str]]:
    sources, findings = parse("data", options.data)
    config, split = (options.data_config, options.data_split) if len(sources) == 1 else (None, "train")
    placed = [_placed(source, config, split, train=True) for source in sources]
    return placed, findings + _file_findings("data", placed)


def _held_out(options: DataOptions, first: Source | None) -> tuple[list[Source], list[str]]:
    if options.eval_data is None:
        return [], []
    sources, findings = parse("eval_data", options.eval_data)
    # There is one setting for the configuration: it is the training set's where that is on the hub.
    own = len(sources) == 1 and (first is None or first.kind != "hub" or sources[0].name == first.name)
    config = options.data_config if own else None
    placed = [_placed(source, config, options.eval_split) for source in sources]
    return placed, findings + _file_findings("eval_data", placed)


def _decontaminate(options: DataOptions) -> tuple[list[Source], list[str]]:
    found = [parse("decontaminate", text) for text in options.decontaminate]
    sources = [source for group, _ in found for source in group]
    placed = [_placed(source, None, "test" if source.kind == "synthetic" else None) for source in sources]
    findings = [finding for _, group in found for finding in group]
    return placed, findings + _file_findings("decontaminate", placed)


def _placed(source: Source, config: str | None, asked: str | None, train: bool = False) -> Source:
    """The source with configuration and split: those asked for, otherwise those that are known of the public set."""
    known = source.known
    if source.kind == "synthetic":
        return replace(source, split="train" if train else asked or "validation")
    if not source.has_splits:
        return source
    if known is None:
        split = asked
    elif train:
        split = (known.train or known.evaluate) if asked in (None, "train") else asked
    else:
        split = asked or known.evaluate or known.train
    return replace(source, split=split, config=config or (known.config if known is not None else None))


def _file_findings(key: str, sources: Sequence[Source]) -> list[str]:
    files = [source for source in sources if source.kind == "file"]
    return [f"{key}: {finding}" for file in files for finding in mirror_findings(file.path, file.entry, file.split)]


def _idle_findings(options: DataOptions, trained: Sequence[Source], held_out: Sequence[Source]) -> list[str]:
    """Settings that these sources ignore or cannot meet."""
    findings = []
    one, split = len(trained) == 1, options.eval_split
    name = options.data if one else "a mixture"
    asked = [key for key in ("question_column", "answer_column") if getattr(options, key) is not None]
    if options.data_config is not None and not any(source.kind == "hub" for source in [*trained[:one], *held_out]):
        reason = "is no hub data set, so it has no configurations" if one else "takes each set's own configuration"
        findings.append(f"data_config: {name} {reason}; leave it unset")
    if options.data_split != "train" and not (one and trained[0].has_splits):
        reason = "is no hub data set, so there are no splits" if one else "takes each set's training split"
        findings.append(f"data_split: {name} {reason}; leave it unset")
    if all(source.kind == "synthetic" for source in [*trained, *held_out]):
        reason = f"the synthetic set {options.data} has no columns to choose"
        findings += [f"{key}: {reason}; leave it unset" for key in asked]
    elif not one and not any(source.takes_columns for source in trained):
        findings += [f"{key}: the columns of every set in the mixture are known; leave it unset" for key in asked]
    if split is not None:
        if not held_out and not one:
            findings.append("eval_split: a mixture has no splits of its own; name held-out problems with --eval-data")
        elif split not in ("validation", "test") and any(source.kind == "synthetic" for source in held_out):
            findings.append(f"eval_split: {split}: a synthetic set is evaluated on validation or test")
        elif any(source.kind == "file" and not source.has_splits for source in held_out or trained):
            findings.append("eval_split: files have no splits; leave it unset, or name another file with --eval-data")
    most = SYNTHETIC_MOST["train"]
    if [source.kind for source in trained] == ["synthetic"] and (options.max_problems or 0) > most:
        findings.append(f"max_problems: a synthetic set gives at most {most:,} training problems")
    most = SYNTHETIC_MOST["test"]
    if any(source.kind == "synthetic" for source in held_out) and options.eval_size > most:
        findings.append(f"eval_size: a synthetic set gives at most {most:,} held-out problems")
    return findings


def _weighed(part: str) -> tuple[str, float | None]:
    """A part of a mixture as its name and its weight, if it ends in a colon and a number."""
    name, colon, weight = part.rpartition(":")
    if not colon or not name or _exists(part):
        return part, None
    try:
        return name.strip(), float(weight)
    except ValueError:
        return part, None


def _named(name: str) -> Source | str:
    """The source of a name, or what is wrong with it."""
    if name in synthetic.GENERATORS:
        return Source("synthetic", name)
    if (entry := find_set(name)) is not None:
        return Source("hub", entry.hub_id, entry=entry)
    set_name, equals, path = name.partition("=")
    if equals and re.fullmatch(r"[\w.-]+", set_name) and not _exists(name):
        entry = find_set(set_name)
        if entry is None:
            return f"{name}: there is no public set {set_name} (igrpo-lite data ls){_nearest(set_name)}"
        return Source("file", path, entry=entry) if path else f"{name}: the path after = is missing"
    if _looks_like_file(name):
        return Source("file", name)
    if _HUB_ID.fullmatch(name):
        entry = find_id(name)
        official = entry is not None and entry.hub_id.lower() == name.lower()
        return Source("hub", entry.hub_id if entry is not None and official else name, entry=entry)
    sets = ", ".join(synthetic.GENERATORS)
    return (
        f"{name or '(empty)'} is no synthetic set ({sets}), no public set (igrpo-lite data ls), no file "
        f"({', '.join(SUFFIXES)}) and no hub id (owner/name){_nearest(name)}"
    )


def _exists(name: str) -> bool:
    return bool(name.strip()) and os.path.exists(os.path.expanduser(name))  # Path.exists raises for what is too long


def _looks_like_file(value: str) -> bool:
    if not value:
        return False
    if Path(value).suffix.lower() in (*SUFFIXES, *_FILE_LIKE) or _exists(value):
        return True
    return value.startswith((".", "/", "~")) or "\\" in value or value.count("/") > 1


def _nearest(value: str) -> str:
    try:
        files = [entry.name for entry in Path.cwd().iterdir() if entry.suffix.lower() in SUFFIXES]
    except OSError:
        files = []
    known = {name: name for name in synthetic.GENERATORS} | suggestions() | {Path(name).stem: name for name in files}
    near = list(dict.fromkeys(known[name] for name in difflib.get_close_matches(value.lower(), known, n=2, cutoff=0.6)))
    return f"; did you mean {' or '.join(near)}?" if near else ""
