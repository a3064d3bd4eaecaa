"""Sets of versions that go together on a GPU, which of them suits a machine, and how to install it.

``python -m igrpo_lite.environment.pins`` says it, ``--install`` does it. Both work before anything that igrpo-lite
needs is installed: notebooks begin with ``pip install --no-deps`` of igrpo-lite alone, and with this. The sets are
pip's requirements files in ``sets/``, the only place where their versions stand.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from igrpo_lite import __version__
from igrpo_lite.environment.facts import Capability, Driver, Facts, Gpu, visible
from igrpo_lite.environment.hardware import ask_driver, dtype_for

SETS = Path(__file__).parent / "sets"
NEWEST_PYTHON = (3, 13)
"""With which A and B were resolved."""

CPU = "cpu.txt"

INSTALL = "python -m igrpo_lite.environment.pins --install"
"""What every message advises, and not an extra: pip would take the newest builds of torch and vLLM, which are for CUDA
13 whatever the driver runs."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A set and the reason for it; without a ``file``, why there is none.

    Attributes:
        file: name of the requirements file.
        letter: ``A``, ``B``, ``C``, or empty where there is no GPU.
    """

    file: str
    reason: str

    @property
    def letter(self) -> str:
        return self.file[0].upper() if self.file and self.file != CPU else ""

    @property
    def path(self) -> Path:
        return SETS / self.file

    def command(self, installed: Mapping[str, str]) -> list[str]:
        """All at once, so that pip sees everything; igrpo-lite is there already and only brings what it needs. ``===``
        takes another build of the same version for another version, which ``==`` does not."""
        other = [f"{name}==={pin}" for name, pin in pins(self.file).items() if _other_build(self.file, installed, name)]
        return [sys.executable, "-m", "pip", "install", "-r", str(self.path), *other, f"igrpo-lite=={__version__}"]

    def __str__(self) -> str:
        """For the user: a set by its letter, and the reason."""
        if not self.file:
            return self.reason
        return f"set {self.letter} ({self.file}), as {self.reason}" if self.letter else self.reason


def choose(*, system: str, machine: str, python: str, gpu: Gpu | None, cuda: str, vllm: bool = True) -> Choice:
    """The set for a machine.

    Args:
        system, machine: as :mod:`platform` names them.
        python: version.
        gpu: the one that is going to be used.
        cuda: newest CUDA that its driver runs; empty where that is not known.
        vllm: whether it is wanted; without it always C.
    """
    if _numbers(python) < (3, 11):
        return Choice("", f"igrpo-lite needs Python 3.11 or newer, and this is {python}")
    if gpu is None or not cuda:
        what = "there is no NVIDIA GPU" if gpu is None else "the driver does not say which CUDA it runs"
        return Choice(CPU, f"{what}: torch for the CPU, enough for the bundled model")
    capability = gpu.capability or (8, 0)  # drivers before 510 do not say it; the other checks are about them
    if dtype_for(capability).dtype is None:
        return Choice("", f"{gpu.name}: {dtype_for(capability).reason}")
    driver = _numbers(cuda)[0]
    if driver < 12:
        return Choice("", f"the driver runs CUDA {cuda} at most; update it to 525 or newer, better 580")
    number = "{}.{}".format(*capability)
    if capability < (7, 5):
        return Choice("c-cu126.txt", f"vLLM and torch's builds for CUDA 13 need compute capability 7.5, not {number}")
    if system != "Linux" or machine.lower() not in ("x86_64", "amd64"):
        return _plain(f"A and B are for Linux on x86-64, not {system} on {machine}", system, driver, capability)
    if _numbers(python) > NEWEST_PYTHON:
        return _plain(f"A and B are known to go with Python 3.11 to 3.13, not {python}", system, driver, capability)
    if not vllm:
        return _plain("vLLM is not wanted", system, driver, capability)
    if driver >= 13 and capability >= (8, 0):
        return Choice("a.txt", f"the driver runs CUDA {cuda} and the GPU has compute capability {number}")
    if driver >= 13:
        return Choice("b.txt", f"compute capability {number} is below 8.0")
    return Choice("b-cu129.txt", f"the driver runs CUDA {cuda} at most, and newer vLLMs need CUDA 13")


def pins(file: str) -> dict[str, str]:
    """The versions in a requirements file, by package, with those of the files that it reads; none in no file."""
    found: dict[str, str] = {}
    for line in (SETS / file).read_text(encoding="utf-8").splitlines() if file else ():
        if included := re.match(r"-r (\S+)", line):
            found |= pins(included[1])
        elif pinned := re.match(r"([\w-]+)==(\S+)", line):
            found[pinned[1].replace("_", "-")] = pinned[2]
    return found


def unloadable(file: str) -> list[str]:
    """Packages that those of a set bring with them and that cannot load beside its torch, as its comments say."""
    return re.findall(r"(?m)^# without ([\w-]+)", (SETS / file).read_text(encoding="utf-8")) if file else []


def missing(file: str, installed: Mapping[str, str]) -> list[str]:
    """What of a set is not installed, or in another version or build: ``torch 2.10.0 instead of 2.11.0``. The build
    counts where the set names one (Windows' own torch is for CPUs, and the usual one has no code for a V100), and where
    one for a CPU or for CUDA 12 stands in the place of PyPI's, which is for CUDA 13."""
    found = []
    for package, wanted in pins(file).items():
        there = installed.get(package, "")
        if _other_build(file, installed, package):
            found.append(f"{package} {there} instead of {wanted} for CUDA 13")
        elif (there if "+" in wanted else there.partition("+")[0]) != wanted:
            found.append(f"{package} {there} instead of {wanted}" if there else f"{package} {wanted}")
    return found


def _other_build(file: str, installed: Mapping[str, str], package: str) -> bool:
    version, _, build = installed.get(package, "").partition("+")
    return file != CPU and version == pins(file)[package] and bool(build) and not build.startswith("cu13")


def suited(facts: Facts) -> Choice:
    """The set for a machine by what the doctor knows of it."""
    return choose(
        system=facts.system, machine=facts.machine, python=facts.python, gpu=facts.gpu, cuda=facts.driver.cuda
    )


def main(words: Sequence[str] | None = None) -> int:
    """Say which set suits this machine and what of it is missing; install it if asked to. 3: nothing suits. 2: not
    even igrpo-lite is installed, so that pip would look for it elsewhere."""
    parser = argparse.ArgumentParser("python -m igrpo_lite.environment.pins", description=main.__doc__)
    parser.add_argument("--install", action="store_true", help="run pip, unless all is there")
    parser.add_argument("--without-vllm", action="store_true", help="set C: slower, but fewer packages to go wrong")
    given = parser.parse_args(words)
    driver = ask_driver()
    print("\n".join(_machine(driver)))
    seen = visible(driver.gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    choice = choose(
        system=platform.system(),
        machine=platform.machine(),
        python=platform.python_version(),
        gpu=seen[0] if seen else None,
        cuda=driver.cuda,
        vllm=not given.without_vllm,
    )
    print(choice)
    if not choice.file:
        return 3
    if not _installed(["igrpo-lite"]):
        print("install igrpo-lite itself first: run pip install --no-deps . in its folder")
        return 2
    installed = _installed(pins(choice.file))
    absent = missing(choice.file, installed)
    absent += [name for name in _needed() if name not in pins(choice.file) and name not in _installed([name])]
    command = choice.command(installed)
    if not absent:
        print("all packages of the set are installed")
        return 0
    more = f" and {len(absent) - 8} more" if len(absent) > 8 else ""
    print(f"missing: {', '.join(absent[:8])}{more}")
    if choice.letter:
        print("the packages' metadata says that these versions go together; not tested on a GPU yet")
    print(shlex.join(command), flush=True)
    if not given.install:
        return 0
    code = subprocess.run([*command, "--quiet"]).returncode
    if code == 0 and unloadable(choice.file):
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", *unloadable(choice.file)])
    if code == 0:
        print(
            "installed. Restart the runtime if this notebook has imported torch, numpy or transformers itself; "
            "commands that are run from it are new processes and see the new versions at once"
        )
    elif choice.letter in ("A", "B"):
        print("pip failed. --without-vllm takes set C, which samples with transformers: slower, but it trains")
    return code


def _plain(reason: str, system: str, driver: int, capability: Capability) -> Choice:
    """Set C, in the build of torch that fits."""
    if driver >= 13:
        return Choice("c-cu130.txt" if system == "Windows" else "c.txt", reason)
    if capability >= (10, 0):
        return Choice("", f"{reason}; and without vLLM a GPU of Blackwell needs a driver for CUDA 13 (580 or newer)")
    return Choice("c-cu126.txt", reason)


def _machine(driver: Driver) -> list[str]:
    lines = [f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"]
    if driver.error:
        lines.append(driver.error)
    if driver.version:
        lines.append(f"driver {driver.version}, runs CUDA up to {driver.cuda or '?'}")
    for gpu in visible(driver.gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))[:1]:
        capability = "?" if gpu.capability is None else "{}.{}".format(*gpu.capability)
        lines.append(f"{gpu.name}, compute capability {capability}")
    return lines


def _installed(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _needed() -> list[str]:
    """The packages that igrpo-lite itself needs."""
    names = [re.match(r"[\w.-]+", text) for text in requires("igrpo-lite") or () if "extra ==" not in text]
    return [name[0] for name in names if name]


def _numbers(text: str) -> tuple[int, int]:
    major, minor = [*re.findall(r"\d+", text), "0", "0"][:2]
    return int(major), int(minor)


if __name__ == "__main__":
    sys.exit(main())
