"""What ``data`` and ``eval_data`` name: a synthetic set, a file, or a hub id; and what can be said before loading."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from igrpo_lite.config import DataOptions
from igrpo_lite.errors import DataError
from igrpo_lite.problems import synthetic
from igrpo_lite.problems.files import SUFFIXES, file_findings
from igrpo_lite.problems.hub import suggestions

Kind = Literal["synthetic", "file", "hub"]

SYNTHETIC_TRAIN = 4000
"""Training problems of a synthetic set unless ``max_problems`` says otherwise."""
SYNTHETIC_MOST: dict[str, int] = {"train": 20_000, "validation": 5_000, "test": 5_000}
"""Problems that may be asked of a synthetic set. The sets are finite and drawn without repetition: near their end the
draw would take for ever (``multiplication`` has about 32,000 for training and 8,000 in each of the others)."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE_LIKE = (".txt", ".md", ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".xlsx", ".xls", ".arrow", ".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class Source:
    """One place to load problems from; ``config`` is for hub sets, ``split`` for hub and synthetic sets."""

    kind: Kind
    name: str
    config: str | None = None
    split: str | None = None

    @property
    def path(self) -> Path:
        return Path(self.name).expanduser()

    @property
    def label(self) -> str:
        """The name in short, used in problem ids and on the screen."""
        return self.path.stem if self.kind == "file" else self.name


def train_source(options: DataOptions) -> Source:
    """Where the training problems come from. Call it once :func:`data_findings` is empty."""
    kind = _kind_of("data", options.data)
    split = options.data_split if kind == "hub" else "train" if kind == "synthetic" else None
    return Source(kind, options.data, options.data_config, split)


def held_out_source(options: DataOptions) -> Source | None:
    """Where the held-out problems come from; ``None``: from the rows of the training source itself."""
    train = train_source(options)
    if options.eval_data is None:
        if train.kind == "synthetic" or (train.kind == "hub" and options.eval_split not in (None, train.split)):
            return Source(train.kind, train.name, train.config, options.eval_split or "validation")
        return None
    kind = _kind_of("eval_data", options.eval_data)
    if kind == "synthetic":
        return Source(kind, options.eval_data, None, options.eval_split or "validation")
    if kind == "file":
        same = train.kind == "file" and Path(options.eval_data).expanduser().resolve() == train.path.resolve()
        return None if same else Source(kind, options.eval_data)
    # There is one setting for the configuration: it is the training set's where that is on the hub.
    config = options.data_config if train.kind != "hub" or options.eval_data == train.name else None
    held_out = Source(kind, options.eval_data, config, options.eval_split)
    return None if held_out == train else held_out


def data_findings(options: DataOptions) -> list[str]:
    """Everything wrong with the data settings that a look at names and folders can tell; empty when nothing is.

    Nothing is read or downloaded and no heavy package is imported, so it can run before a model loads.
    """
    findings = _name_findings("data", options.data)
    if options.eval_data is not None:
        findings += _name_findings("eval_data", options.eval_data)
    if findings:
        return findings
    train, held_out = train_source(options), held_out_source(options)
    kinds = {train.kind} | ({held_out.kind} if held_out is not None else set())
    if train.kind != "hub":
        if options.data_config is not None and "hub" not in kinds:
            findings.append(
                f"data_config: {options.data} is no hub data set, so it has no configurations; leave it unset"
            )
        if options.data_split != "train":
            findings.append(f"data_split: {options.data} is no hub data set, so there are no splits; leave it unset")
    if kinds == {"synthetic"}:
        for key in ("question_column", "answer_column"):
            if getattr(options, key) is not None:
                findings.append(f"{key}: the synthetic set {options.data} has no columns to choose; leave it unset")
    findings += _split_findings(options, train, held_out)
    findings += _size_findings(options, train, held_out)
    return findings


def _split_findings(options: DataOptions, train: Source, held_out: Source | None) -> list[str]:
    split = options.eval_split
    if split is None:
        return []
    if held_out is not None and held_out.kind == "synthetic" and split not in ("validation", "test"):
        return [f"eval_split: {split}: a synthetic set is evaluated on validation or test"]
    if (held_out or train).kind == "file":
        return ["eval_split: files have no splits; leave it unset, or name the held-out file with --eval-data"]
    return []


def _size_findings(options: DataOptions, train: Source, held_out: Source | None) -> list[str]:
    findings = []
    if train.kind == "synthetic" and (options.max_problems or 0) > SYNTHETIC_MOST["train"]:
        findings.append(f"max_problems: a synthetic set gives at most {SYNTHETIC_MOST['train']:,} training problems")
    if held_out is not None and held_out.kind == "synthetic" and options.eval_size > SYNTHETIC_MOST["test"]:
        findings.append(f"eval_size: a synthetic set gives at most {SYNTHETIC_MOST['test']:,} held-out problems")
    return findings


def _kind_of(key: str, value: str) -> Kind:
    findings = _name_findings(key, value)
    if findings:
        raise DataError(findings)
    if value in synthetic.GENERATORS:
        return "synthetic"
    return "file" if _looks_like_file(value) else "hub"


def _name_findings(key: str, value: str) -> list[str]:
    if value in synthetic.GENERATORS:
        return []
    if _looks_like_file(value):
        return [f"{key}: {finding}" for finding in file_findings(Path(value).expanduser())]
    if _HUB_ID.fullmatch(value):
        return []
    sets = ", ".join(synthetic.GENERATORS)
    return [
        f"{key}: {value or '(empty)'} is no synthetic set ({sets}), no file ({', '.join(SUFFIXES)}) "
        f"and no hub id (owner/name){_nearest(value)}"
    ]


def _looks_like_file(value: str) -> bool:
    path = Path(value).expanduser()
    if not value:
        return False
    if path.suffix.lower() in (*SUFFIXES, *_FILE_LIKE) or path.exists():
        return True
    return value.startswith((".", "/", "~")) or "\\" in value or value.count("/") > 1


def _nearest(value: str) -> str:
    try:
        files = [entry.name for entry in Path.cwd().iterdir() if entry.suffix.lower() in SUFFIXES]
    except OSError:
        files = []
    known = {name: name for name in synthetic.GENERATORS} | suggestions() | {Path(name).stem: name for name in files}
    near = difflib.get_close_matches(value.lower(), known, n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(known[name] for name in near)}?" if near else ""
