"""GPUs as the driver and torch see them, and the precision that fits each; imports no torch."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
from pathlib import Path
from typing import Literal, NamedTuple

from igrpo_lite.environment.facts import Capability, Driver, Gpu

_SMI_TIMEOUT = 10.0
_FIELDS = ("index", "name", "uuid", "memory.total", "memory.free", "compute_cap")
_DEVICE = Path("/dev/nvidia0")
_WSL_SMI = "/usr/lib/wsl/lib/nvidia-smi"  # not on the path of every WSL distribution


class Precision(NamedTuple):
    """What to compute in on a GPU.

    Attributes:
        dtype: ``None`` if the GPU is too old for what training and sampling run on.
        reason: a sentence for the user; with ``dtype`` ``None`` the refusal.
    """

    dtype: Literal["bfloat16", "float16"] | None
    reason: str


def dtype_for(capability: Capability) -> Precision:
    """The 16-bit precision of a GPU, by its compute capability alone.

    ``torch.cuda.is_bf16_supported()`` is no guide: it also answers yes where bfloat16 is only emulated, as on a T4
    (https://github.com/MakazhanAlpamys/Soup/issues/385).
    """
    number = "{}.{}".format(*capability)
    if capability >= (8, 0):
        return Precision("bfloat16", f"compute capability {number} computes in bfloat16")
    if capability >= (7, 0):
        return Precision("float16", f"compute capability {number} has no bfloat16 units (8.0 and up have)")
    return Precision(
        None,
        f"compute capability {number} is too old: Triton and vLLM need more, and torch's present builds have no code "
        "for it; choose another GPU (on Kaggle a T4 instead of a P100) or --device cpu",
    )


def gpu_facts() -> list[Gpu]:
    """The NVIDIA GPUs of this machine, by ``nvidia-smi``; empty where there are none or the driver does not answer."""
    return list(ask_driver().gpus)


def has_gpu() -> bool:
    """Whether there is an NVIDIA GPU; containers may have its device file and no ``nvidia-smi``."""
    return bool(gpu_facts()) or _DEVICE.exists()


def ask_driver() -> Driver:
    """What ``nvidia-smi`` says about the driver and its GPUs; never raises, and waits at most some seconds."""
    path = shutil.which("nvidia-smi") or (_WSL_SMI if Path(_WSL_SMI).is_file() else None)
    if path is None:
        return Driver()
    banner, error = _output([path])
    version, cuda = _banner(banner)
    if error:
        return Driver(version, cuda, error=error)
    for fields in (_FIELDS, _FIELDS[:-1]):  # drivers before 510 do not know the compute capability
        table, error = _output([path, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"])
        if not error:
            return Driver(version, cuda, tuple(_gpus(table)))
    return Driver(version, cuda, error=error)


def _output(command: list[str]) -> tuple[str, str]:
    """Standard output of a command, and what went wrong."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_SMI_TIMEOUT, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return "", f"nvidia-smi did not answer within {_SMI_TIMEOUT:.0f} s"
    except OSError as error:
        return "", f"nvidia-smi cannot be run: {error}"
    said = " ".join((done.stdout + " " + done.stderr).split())
    return done.stdout, "" if done.returncode == 0 else said[:300] or f"nvidia-smi ended with {done.returncode}"


def _banner(text: str) -> tuple[str, str]:
    """Versions of the driver and of its CUDA; drivers from 610 on call them by other names."""
    driver = re.search(r"(?:Driver|KMD) Version:\s*([\d.]+)", text)
    cuda = re.search(r"CUDA (?:UMD )?Version:\s*(\d+\.\d+)", text)
    return driver.group(1) if driver else "", cuda.group(1) if cuda else ""


def _gpus(table: str) -> list[Gpu]:
    found = []
    for row in csv.reader(table.splitlines(), skipinitialspace=True):
        if len(row) < 5 or not row[0].isdigit():
            continue  # a warning between the lines
        index, name, uuid, total, free = row[:5]
        capability = re.fullmatch(r"(\d+)\.(\d+)", row[5]) if len(row) > 5 else None
        found.append(
            Gpu(
                int(index),
                name,
                (int(capability[1]), int(capability[2])) if capability else None,
                _mebibytes(total),
                _mebibytes(free),
                uuid,
            )
        )
    return found


def _mebibytes(text: str) -> int | None:
    return int(text) * 2**20 if text.isdigit() else None  # else "[N/A]": memory that is shared with the CPU, or a MIG
