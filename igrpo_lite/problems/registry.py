"""Public sets of mathematics problems by short name; the facts are in ``public_sets.toml``.

They come from the task files of lm-evaluation-harness and lighteval, the code of open-r1, open-rs and M2PO, and the
cards on https://huggingface.co/datasets; ``source`` says which. Licences are what those places state; read the card
before you pass data on.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Form = Literal["hash", "boxed", "plain", "float-int", "list0"]
"""How a column holds the gold answer: after the last ``####``; in the last ``\\boxed{}``; as it stands; as a number
like ``142.0`` for 142; as the first item of a list, in dollar signs or not (:mod:`igrpo_lite.problems.gold`)."""

STREAMED_ROWS = 20_000
"""Rows read of a very large set."""


@dataclass(frozen=True, slots=True)
class PublicSet:
    """One public set.

    Attributes:
        name: short name.
        hub_id: where it is on the Hugging Face hub.
        splits: rows by split, ``None`` where the number was not confirmed.
        questions: columns of the question (``A+B``: joined), the first that a copy has is taken; none: found by name.
        answers: columns of the gold answer with their form, likewise.
        config: configuration, where the hub has several.
        train: split to train on; ``None``: it is a set to evaluate on.
        evaluate: split to evaluate on; ``None``: it has none of its own.
        licence: what its card or its source states.
        max_completion_length: tokens that most solutions fit into, a suggestion.
        large: so large that only the first :data:`STREAMED_ROWS` rows are read, streamed.
        skipped: columns that are not read, for their size.
        aliases: further short names.
        also: hub ids of copies, which have the same columns or others of these.
        source: where the facts are from.
        note: what to know before using it.
    """

    name: str
    hub_id: str
    splits: Mapping[str, int | None] = field(hash=False)
    questions: tuple[str, ...] = ()
    answers: tuple[tuple[str, Form], ...] = ()
    config: str | None = None
    train: str | None = None
    evaluate: str | None = None
    licence: str = "see the card"
    max_completion_length: int = 2048
    large: bool = False
    skipped: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    source: str = ""
    note: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that files of the set may have, lower case with underscores, the short name first."""
        names = (self.name, *self.aliases, self.hub_id.partition("/")[2])
        return tuple(dict.fromkeys(name.lower().replace("-", "_") for name in names))


def _public_set(name: str, facts: dict[str, Any]) -> PublicSet:
    splits = {split: None if rows == "?" else rows for split, rows in facts.pop("splits").items()}
    answers = tuple(facts.pop("answers", {}).items())
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in facts.items()}
    return PublicSet(name, splits=splits, answers=answers, **values)


_FACTS = tomllib.loads(Path(__file__).with_name("public_sets.toml").read_text(encoding="utf-8"))

PUBLIC_SETS: dict[str, PublicSet] = {name: _public_set(name, facts) for name, facts in _FACTS.items()}
"""Every public set by short name."""

_BY_NAME = {name.lower(): entry for entry in PUBLIC_SETS.values() for name in (entry.name, *entry.aliases)}
_BY_ID = {hub_id.lower(): entry for entry in PUBLIC_SETS.values() for hub_id in (entry.hub_id, *entry.also)}


def find_set(name: str) -> PublicSet | None:
    """The public set of a short name; upper case and underscores do not matter."""
    return _BY_NAME.get(name.lower().replace("_", "-"))


def find_id(hub_id: str) -> PublicSet | None:
    """The public set with this hub id, or of which this is a copy."""
    return _BY_ID.get(hub_id.lower())


def suggestions() -> dict[str, str]:
    """What a mistyped name may have meant, lower case, each with what to write instead."""
    last = {entry.hub_id.partition("/")[2].lower(): entry.name for entry in PUBLIC_SETS.values()}
    return last | {name: entry.name for name, entry in _BY_NAME.items()}
