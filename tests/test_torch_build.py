"""What a run says at its start where torch's build and the driver do not go together, before anything is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from igrpo_lite.config.resolve import resolve
from igrpo_lite.environment import torch_build
from igrpo_lite.environment.facts import Torch
from igrpo_lite.environment.pins import INSTALL
from igrpo_lite.environment.torch_build import cuda_trouble, installed_torch
from igrpo_lite.policy.backends import choose

ROOT = Path(__file__).resolve().parents[1]
CUDA_12 = "Driver Version: 550.54.15  CUDA Version: 12.4"
CUDA_13 = "Driver Version: 580.65.06  CUDA Version: 13.0"
T4 = "0, Tesla T4, GPU-1, 15360, 15000, 7.5"
FOR_13 = "torch is built for CUDA 13, but the driver runs CUDA 12 at most"


@pytest.fixture
def torch_for_13(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_build, "installed_torch", lambda: Torch("2.13.0+cu130", "13.0"))


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder with a torch for CUDA 13 that must not be imported."""
    package = tmp_path / "foreign" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('torch was imported')")
    (package / "version.py").write_text(
        "from typing import Optional\n__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\n"
        "hip: Optional[str] = None\n"
    )
    return package.parent


def test_torchs_build_is_read_from_its_files(foreign, monkeypatch):
    assert installed_torch() == Torch(torch.__version__, torch.version.cuda or "", torch.version.hip or "")
    monkeypatch.syspath_prepend(foreign)
    assert installed_torch() == Torch("2.13.0+cu130", "13.0")
    monkeypatch.setattr(sys, "path", [])
    assert installed_torch() is None


@pytest.mark.parametrize(
    ("banner", "torch", "words"),
    [
        (CUDA_12, Torch("2.13.0+cu130", "13.0"), FOR_13),
        (CUDA_13, Torch("2.13.0+cpu"), "torch is built without CUDA"),
        (CUDA_12, Torch("2.11.0+cu129", "12.9"), None),
        (CUDA_13, Torch("2.13.0+cu130", "13.0"), None),
        (CUDA_13, Torch("2.13.0+rocm7.1", "", "7.1"), None),
    ],
)
def test_a_build_against_a_driver(banner, torch, words, smi, monkeypatch):
    smi(banner, T4)
    monkeypatch.setattr(torch_build, "installed_torch", lambda: torch)
    for device in ("auto", "cuda", "cuda:0"):
        found = cuda_trouble(device)
        assert (found is None) == (words is None)
        assert found is None or (words in str(found) and str(found).endswith(f": {INSTALL}"))
    assert cuda_trouble("cpu") is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cuda_trouble("auto") is None


def test_without_a_driver_there_is_nothing_to_say(torch_for_13, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert cuda_trouble("auto") is None


@pytest.mark.parametrize(("verb", "flags"), [("train", "--device=cuda"), ("check", "--sampler=vllm")])
def test_who_asks_for_the_gpu_is_told_before_torch_is_imported(verb, flags, foreign, smi, tmp_path):
    smi(CUDA_12, T4)
    done = subprocess.run(
        [sys.executable, "-m", "igrpo_lite", verb, flags],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (foreign, ROOT)))},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    lines = [line for line in done.stderr.splitlines() if FOR_13 in line]
    setting, value = flags.removeprefix("--").split("=")
    assert lines[0].startswith(f"error: {setting}: {value} cannot be had: {FOR_13}")
    assert lines[0].endswith(f": {INSTALL}; --device cpu does without")
    assert not (tmp_path / "runs").exists()


def test_a_vllm_for_cpus_goes_with_a_torch_for_cpus(refused, smi, monkeypatch):
    smi(CUDA_13, T4)
    monkeypatch.setattr(torch_build, "installed_torch", lambda: Torch("2.13.0+cpu"))
    told = refused(sampler="vllm", data="none.jsonl")  # something else is wrong, so that nothing is started
    assert "none.jsonl" in told
    assert "without CUDA" not in told
    assert "torch is built without CUDA" in refused(device="cuda", data="none.jsonl")


def test_who_leaves_it_open_is_warned_once_before_anything_is_loaded(say, smi, torch_for_13):
    smi(CUDA_12, T4)
    code, lines, printed = say(max_steps=1, eval_steps=1)
    assert code == 0
    text = " ".join(" ".join([*lines, *printed.splitlines()]).split())
    warning = f"warning: the GPU cannot be used: {FOR_13}"
    assert text.count(FOR_13) == 1
    assert -1 < text.index(warning) < text.index("loading ")
    assert INSTALL in text


def test_auto_takes_no_unsloth_where_torch_cannot_use_the_gpu(smi, torch_for_13):
    smi(CUDA_12, T4)
    choice = choose(resolve({"model": "qwen2-1.5b"}))
    assert choice.name == "transformers"
    assert FOR_13 in choice.why
