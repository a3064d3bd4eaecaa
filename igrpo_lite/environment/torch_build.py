"""Whether the installed torch can use this machine's GPU, by its files and the driver's word alone: what a run asks
before it loads anything."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from igrpo_lite.environment.facts import Facts, Torch
from igrpo_lite.environment.hardware import ask_driver
from igrpo_lite.environment.known_bad import matching


@dataclass(frozen=True, slots=True)
class CudaTrouble:
    """Why a torch cannot use the GPU that is there, and the command that ends it; as text one sentence."""

    torch: Torch
    happens: str
    repair: str

    def __str__(self) -> str:
        return f"{self.happens}: {self.repair}"


def installed_torch() -> Torch | None:
    """Version and build of torch, which is not imported; ``None`` where there is none to be found."""
    spec = PathFinder.find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    if file is None or not file.is_file():
        return None
    text = file.read_text(encoding="utf-8", errors="replace")
    found = dict(re.findall(r"(?m)^(__version__|cuda|hip)\b[^=\n]*=\s*['\"]([^'\"]*)", text))
    return Torch(found.get("__version__", ""), found.get("cuda", ""), found.get("hip", ""))


def cuda_trouble(device: str) -> CudaTrouble | None:
    """What keeps torch from this machine's GPU, of the combinations that the doctor knows; ``None`` where nothing is
    known to, where no GPU is visible, and for a ``device`` that is not ``auto`` or CUDA's."""
    torch = installed_torch() if device == "auto" or device.startswith("cuda") else None
    if torch is None:
        return None
    facts = Facts(
        platform.python_version(),
        platform.system(),
        platform.machine(),
        driver=ask_driver(),
        torch=torch,
        variables={name: os.environ[name] for name in ("CUDA_VISIBLE_DEVICES",) if name in os.environ},
    )
    rows = [row for row in matching(facts) if row.level == "error" and "torch-build" in row.when]
    return CudaTrouble(torch, rows[0].happens, rows[0].repair) if rows else None
