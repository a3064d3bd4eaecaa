"""Reads ``known_bad.toml``: combinations of versions, GPU and settings that do not work, and notes about hosts."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from igrpo_lite.environment.facts import Facts, Problem
from igrpo_lite.environment.pins import INSTALL


@dataclass(frozen=True, slots=True)
class KnownBad:
    """One combination: it is there if every condition holds.

    Attributes:
        happens: what the user meets.
        repair: the command that ends it; unset: the set of versions that suits the machine.
        source: where this is known from.
        when: versions (PEP 440 specifiers; empty for any) by package, or by one of the names that
            :meth:`Facts.versions` adds.
        without: packages (or such names) that are not there.
        variables: environment variables and what their whole value (empty if unset) looks like, as regular expressions.
        systems: operating systems; empty for all.
        failing: a back end and what its error looks like, as a regular expression.
        level: ``error`` if training cannot work like that, ``warning`` if something that is installed cannot, ``note``
            if it is only a nuisance.
    """

    happens: str
    source: str
    repair: str = INSTALL
    when: Mapping[str, str] = field(default_factory=dict)
    without: Sequence[str] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    systems: Sequence[str] = ()
    failing: Sequence[str] = ()
    level: Literal["error", "warning", "note"] = "warning"

    def matches(self, facts: Facts) -> bool:
        """Whether these facts are an instance of it."""
        versions = facts.versions()
        return (
            all(name in versions and _within(versions[name], spec) for name, spec in self.when.items())
            and not any(name in versions for name in self.without)
            and all(re.fullmatch(form, facts.variables.get(name, "")) for name, form in self.variables.items())
            and (not self.systems or facts.system in self.systems)
            and (not self.failing or self._explains(facts, *self.failing))
        )

    @staticmethod
    def _explains(facts: Facts, name: str, form: str) -> bool:
        back_end = facts.back_ends.get(name)
        return back_end is not None and back_end.state == "broken" and re.search(form, back_end.error) is not None


def matching(facts: Facts) -> list[KnownBad]:
    """The combinations that these facts are an instance of."""
    return [row for row in KNOWN_BAD if row.matches(facts)]


def host_notes(facts: Facts) -> Iterator[Problem]:
    """What to know about the operating system, a hosted notebook, or a build of torch for AMD GPUs."""
    here = {facts.system, *facts.kinds} | ({"ROCm"} if facts.torch is not None and facts.torch.hip else set())
    for row in _TABLES["host"]:
        if row["on"] in here:
            yield Problem("note", row["what"], row.get("repair", ""), row.get("source", ""))


def _within(version: str, specifier: str) -> bool:
    try:
        return SpecifierSet(specifier).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False


_TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
KNOWN_BAD = tuple(KnownBad(**row) for row in _TABLES["known_bad"])
