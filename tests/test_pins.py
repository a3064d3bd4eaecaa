"""Sets of versions: which suits a machine, and that they lie within what every package asks for."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from doctor_parts import A100, METADATA, P100, SET_A, T4, V100, WORKS
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from igrpo_lite.environment import pins as module
from igrpo_lite.environment.diagnosis import problems
from igrpo_lite.environment.facts import Driver, Facts, Gpu, Torch
from igrpo_lite.environment.known_bad import KNOWN_BAD
from igrpo_lite.environment.pins import INSTALL, SETS, Choice, choose, main, missing, pins, suited
from igrpo_lite.versions import VLLM

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path.name for path in SETS.glob("*.txt"))
B200 = Gpu(0, "NVIDIA B200", (10, 0))
OLD_DRIVER = Gpu(0, "NVIDIA A100-SXM4-40GB")


@pytest.mark.parametrize(
    ("gpu", "cuda", "changes", "file", "words"),
    [
        (A100, "13.0", {}, "a.txt", "CUDA 13.0 and the GPU has compute capability 8.0"),
        (B200, "13.2", {}, "a.txt", "10.0"),
        (T4, "13.0", {}, "b.txt", "7.5 is below 8.0"),
        (T4, "12.4", {}, "b-cu129.txt", "CUDA 12.4 at most"),
        (A100, "12.2", {}, "b-cu129.txt", "CUDA 12.2 at most"),
        (B200, "12.8", {}, "b-cu129.txt", "CUDA 12.8"),
        (OLD_DRIVER, "11.4", {}, "", "update it to 525"),
        (OLD_DRIVER, "12.0", {}, "b-cu129.txt", "CUDA 12.0"),
        (V100, "13.0", {}, "c-cu126.txt", "need compute capability 7.5, not 7.0"),
        (V100, "12.4", {}, "c-cu126.txt", "7.0"),
        (P100, "12.4", {}, "", "on Kaggle a T4 instead of a P100"),
        (A100, "13.0", {"vllm": False}, "c.txt", "not wanted"),
        (T4, "12.4", {"vllm": False}, "c-cu126.txt", "not wanted"),
        (B200, "12.8", {"vllm": False}, "", "needs a driver for CUDA 13"),
        (A100, "13.0", {"system": "Windows", "machine": "AMD64"}, "c-cu130.txt", "Windows on AMD64"),
        (A100, "12.6", {"system": "Windows", "machine": "AMD64"}, "c-cu126.txt", "Windows"),
        (A100, "13.0", {"machine": "aarch64"}, "c.txt", "aarch64"),
        (A100, "13.0", {"python": "3.14.1"}, "c.txt", "not 3.14.1"),
        (A100, "13.0", {"python": "3.10.12"}, "", "Python 3.11 or newer, and this is 3.10.12"),
        (None, "", {}, "cpu.txt", "no NVIDIA GPU"),
        (T4, "", {}, "cpu.txt", "does not say which CUDA"),
    ],
)
def test_the_set_for_a_machine(gpu, cuda, changes, file, words):
    machine = {"system": "Linux", "machine": "x86_64", "python": "3.12.3"} | changes
    choice = choose(**machine, gpu=gpu, cuda=cuda)
    assert choice.file == file
    assert words in choice.reason
    assert words in str(choice)
    assert not file or choice.path.is_file()


def test_every_set_can_be_chosen_and_is_described():
    assert set(FILES) == {"a.txt", "b.txt", "b-cu129.txt", "c.txt", "c-cu126.txt", "c-cu130.txt", "cpu.txt"}
    for name in FILES:
        text = (SETS / name).read_text(encoding="utf-8")
        assert text.startswith(("# Set ", "# No GPU"))
        assert name == "cpu.txt" or "not run on a GPU" in text or "-r " in text


@pytest.mark.parametrize("file", FILES)
def test_a_set_lies_within_our_own_ranges(file):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = [Requirement(text) for text in (*project["dependencies"], f"vllm{VLLM}", *extras["unsloth"])]
    pinned = pins(file)
    for requirement in asked:
        found = pinned.get(canonicalize_name(requirement.name))
        assert found is None or found in requirement.specifier, f"{requirement}, but {found}"
    assert {"torch", "transformers", "peft", "datasets"} <= pinned.keys()


@pytest.mark.parametrize("file", ["a.txt", "b.txt"])
def test_a_set_suits_what_its_packages_ask_for(file):
    """By the metadata of Unsloth, TRL and vLLM's plugin; vLLM's own is that of the release in set A."""
    pinned = pins(file)
    for asker in ("unsloth", "unsloth-zoo", "trl", "vllm-bnb-plugin", *(["vllm"] if file == "a.txt" else [])):
        for text in METADATA[asker]:
            requirement = Requirement(text)
            found = pinned.get(canonicalize_name(requirement.name))
            if found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
                assert found in requirement.specifier, f"{asker}: {requirement}, but {found}"
    assert ("vllm-bnb-plugin" in pinned) == (Version(pinned["vllm"]) >= Version("0.28"))


def test_set_a_is_the_one_that_the_doctor_is_tested_with():
    assert pins("a.txt").items() <= SET_A.items()


@pytest.mark.parametrize(
    ("file", "like"), [("b-cu129.txt", "b.txt"), ("c-cu126.txt", "c.txt"), ("c-cu130.txt", "c.txt")]
)
def test_another_build_has_the_same_versions(file, like):
    build = file.removesuffix(".txt").partition("-")[2]
    assert {name: found.partition("+")[0] for name, found in pins(file).items()} == pins(like)
    assert {found.partition("+")[2] for found in pins(file).values()} == {"", build}
    indexes = re.findall(r"(?m)^--extra-index-url (\S+)", (SETS / file).read_text(encoding="utf-8"))
    assert all(index.endswith(build) for index in indexes)
    assert f"https://download.pytorch.org/whl/{build}" in indexes


def test_the_extras_are_within_the_supported_versions_and_take_those_of_set_a():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    taken = {(one := Requirement(text)).name: one.specifier for text in (*extras["vllm"], *extras["unsloth"])}
    releases = [f"0.{minor}.{patch}" for minor in range(40) for patch in range(4)]
    assert {r for r in releases if r in taken["vllm"]} < {r for r in releases if r in SpecifierSet(VLLM)}
    # On every vLLM that it takes, the plugin for 4-bit weights is needed, and does no harm.
    assert min(r for r in map(Version, releases) if r in taken["vllm"]) >= Version("0.28")
    for package, specifier in taken.items():
        assert pins("a.txt")[canonicalize_name(package)] in specifier


@pytest.mark.parametrize("page", ["docs/rollouts.md", "CHANGELOG.md", "benchmarks/README.md"])
def test_pages_name_the_supported_versions_of_vllm(page):
    first, before = (Version(one.version) for one in sorted(SpecifierSet(VLLM), key=lambda one: one.version))
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    named = re.findall(r"\b(0\.2\d)\b.{0,99}? to (0\.3\d)\b", text)
    assert named == [(str(first), f"0.{before.minor - 1}")]


def test_no_advice_replaces_an_images_torch_by_pips_choice():
    """By an extra with vLLM or Unsloth, or by torch, vLLM or igrpo-lite with what they ask for, without our set."""
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
    found = {}
    for file in (*files, *(ROOT / "igrpo_lite").rglob("*.py")):
        for line in re.findall(r"pip install[^\n;#`)]*", file.read_text(encoding="utf-8")):
            wild = re.search(r"\[[^\]]*(vllm|unsloth)|[ '\"](torch|vllm)\b|[ '\"]\.(?=$|[ '\"\[])", line)
            if wild and not re.search(r"--no-deps|whl/cpu|-c constraints", line):
                found[file.name] = line
    assert found.keys() == {"diagnosis.py"}  # where there is no GPU


def test_the_doctors_repairs_name_the_same_versions():
    plugin = next(row.repair for row in KNOWN_BAD if "vllm-bnb-plugin" in row.without)
    assert f"vllm-bnb-plugin=={pins('a.txt')['vllm-bnb-plugin']}" in plugin


def test_constraints_hold_the_same_versions_as_set_c():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = dict(line.split("==") for line in lines if "==" in line)
    for file in ("c.txt", "cpu.txt"):
        assert {name: tested[name] for name in pins(file)} == pins(file)


def machine(gpu: Gpu | None, cuda: str, installed: dict[str, str]) -> Facts:
    """With the back ends that are installed working."""
    return Facts(
        "3.12.3",
        "Linux",
        "x86_64",
        packages={"igrpo-lite": "0.1.0", **installed},
        requires=METADATA,
        driver=Driver("580.65", cuda, (gpu,) if gpu else ()),
        torch=Torch(installed.get("torch", "2.11.0"), "12.9", available=True, devices=(gpu,) if gpu else ()),
        back_ends={"transformers-16bit": WORKS, "vllm": WORKS, "unsloth": WORKS},
    )


def test_the_doctor_has_nothing_to_say_about_the_versions_of_set_b():
    pinned = pins("b-cu129.txt")
    rest = {"numpy": "2.3.5", "triton": "3.6.0", "numba": "0.65.0", "huggingface-hub": "1.33.0"}
    rest |= {"flashinfer-python": "0.6.14", "xformers": "0.0.35"}
    facts = replace(
        machine(T4, "12.4", {**pinned, **rest, "certifi": "2026.10.19"}),
        requires={
            name: texts for name, texts in METADATA.items() if name not in ("vllm", "vllm-bnb-plugin", "igrpo-lite")
        }
        | {"igrpo-lite": our_own()},
    )
    about_versions = [p for p in problems(facts) if re.search(r"but it must be|not installed", p.what)]
    assert about_versions == []
    assert suited(facts).file == "b-cu129.txt"
    assert missing("b-cu129.txt", facts.versions()) == []


def our_own() -> tuple[str, ...]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].items()
    return tuple(f"{text}; extra == '{extra}'" for extra, texts in extras for text in texts)


def test_the_doctor_installs_from_the_set_that_suits():
    facts = replace(machine(T4, "12.4", {"torch": "2.11.0"}), back_ends={"transformers-16bit": WORKS})
    facts = replace(facts, back_ends={**facts.back_ends, "vllm": replace(WORKS, state="not installed")})
    repair = next(p.repair for p in problems(facts, ["vllm"]) if "vllm was asked for" in p.what)
    assert repair == INSTALL
    old = replace(facts, driver=Driver("525.1", "12.0", (V100,)), torch=replace(facts.torch, devices=(V100,)))
    repair = next(p.repair for p in problems(old, ["vllm"]) if "vllm was asked for" in p.what)
    assert repair.startswith("there is none for this machine: vLLM and torch's builds for CUDA 13 need")


def test_what_is_missing_is_said_by_version():
    assert missing("c.txt", {**pins("c.txt"), "torch": "2.13.0+cu130"}) == []
    found = missing("c.txt", {**pins("c.txt"), "torch": "2.10.0+cu126", "peft": ""})
    assert found == ["torch 2.10.0+cu126 instead of 2.13.0", "peft 0.21.2"]
    assert missing("a.txt", pins("a.txt") | {"torch": "2.13.0+cu126"}) == [
        "torch 2.13.0+cu126 instead of 2.13.0 for CUDA 13"
    ]
    assert missing("cpu.txt", pins("cpu.txt") | {"torch": "2.13.0+cu126"}) == []
    windows = pins("c-cu130.txt")
    assert missing("c-cu130.txt", windows) == []
    assert missing("c-cu130.txt", windows | {"torch": "2.13.0"}) == ["torch 2.13.0 instead of 2.13.0+cu130"]


def test_pip_takes_another_build_for_another_version_where_it_must():
    choice = Choice("a.txt", "")
    there = pins("a.txt") | {"torch": "2.13.0+cpu"}
    (word,) = [word for word in choice.command(there) if "torch" in word]
    assert "2.13.0+cpu" in Requirement("torch==2.13.0").specifier
    assert "2.13.0+cpu" not in Requirement(word).specifier
    assert "2.13.0" in Requirement(word).specifier
    assert not any("===" in word for word in choice.command(there | {"torch": "2.13.0+cu130"}))


def test_it_runs_on_the_standard_library_alone():
    """A notebook starts it before anything else is installed."""
    script = (
        "import sys; from igrpo_lite.environment.pins import main; main([])\n"
        "rooms = {name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)\n"
        "print(sorted(n for n in rooms if not n.startswith('_') and n not in ('igrpo_lite', 'sitecustomize')))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"


def test_in_a_fresh_clone_igrpo_lite_comes_first(monkeypatch, capsys):
    def nothing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(module, "version", nothing)
    monkeypatch.setattr(module, "requires", nothing)
    assert main(["--install"]) == 2
    assert "pip install --no-deps ." in capsys.readouterr().out


COLAB = "NVIDIA-SMI 550.54.15  Driver Version: 550.54.15  CUDA Version: 12.4", "0, Tesla T4, GPU-1, 15360, 15000, 7.5"
KAGGLE_P100 = COLAB[0], "0, Tesla P100-PCIE-16GB, GPU-1, 16384, 16000, 6.0"


def test_a_colab_t4_gets_set_b_and_pip_runs_once(smi, monkeypatch, capfd):
    smi(*COLAB)
    calls = []
    code = 0

    def pip(command, **options):
        calls.append(command)
        return subprocess.CompletedProcess(command, code)

    assert main([]) == 0
    told = capfd.readouterr().out
    assert "Tesla T4, compute capability 7.5" in told
    assert "set B (b-cu129.txt), as the driver runs CUDA 12.4 at most" in told
    assert "not tested on a GPU yet" in told
    real = subprocess.run
    monkeypatch.setattr(
        module.subprocess, "run", lambda command, **o: pip(command, **o) if "pip" in command else real(command, **o)
    )
    assert main(["--install"]) == 0
    assert calls[0][1:4] == ["-m", "pip", "install"]
    assert str(SETS / "b-cu129.txt") in calls[0]
    assert any(word.startswith("igrpo-lite==") for word in calls[0])
    assert "Restart the runtime" in capfd.readouterr().out
    code = 1
    assert main(["--install"]) == 1
    assert "--without-vllm takes set C" in capfd.readouterr().out
    assert main(["--without-vllm"]) == 0
    assert "set C (c-cu126.txt)" in capfd.readouterr().out


def test_what_cannot_load_beside_the_set_is_taken_away_again(smi, monkeypatch, capfd):
    smi("Driver Version: 580.65  CUDA Version: 13.0", "0, NVIDIA L4, GPU-1, 23034, 22000, 8.9")
    calls = []
    real = subprocess.run

    def run(command, **options):
        if "pip" not in command:
            return real(command, **options)
        calls.append(command[3:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(module.subprocess, "run", run)
    assert main(["--install"]) == 0
    assert "set A" in capfd.readouterr().out
    assert [call[0] for call in calls] == ["install", "uninstall"]
    assert calls[1][-1] == "xformers"
    assert not any("xformers" in pins(file) for file in FILES)


def test_a_p100_is_refused_in_a_sentence(smi, capfd):
    smi(*KAGGLE_P100)
    assert main(["--install"]) == 3
    assert "on Kaggle a T4 instead of a P100" in capfd.readouterr().out


def test_a_machine_without_gpu_that_has_everything_is_left_alone(monkeypatch, capfd):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(module, "ask_driver", Driver)
    assert main(["--install"]) == 0
    assert "all packages of the set are installed" in capfd.readouterr().out
