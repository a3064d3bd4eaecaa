"""GPUs that people train on: memory as seen by torch, bandwidth and arithmetic, with a source for each.

``tflops`` is the dense 16-bit tensor rate with float32 sums, which training uses: half of what is usually quoted for
GeForce cards (float16 sums), a quarter of the sparse figures. Where no source gives it, it is derived: tensor cores x
256 operations x boost clock, halved for float32 sums.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace

from igrpo_lite.errors import ConfigError

GIB = 2**30
OLDEST = (7, 0)
"""Compute capability below which nothing here runs."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        aliases: other names; the first is the shortest.
        memory_gib: as torch reports it, which is less than the box says.
        capability: CUDA compute capability.
        bandwidth: of its memory, GB/s; ``None`` for a GPU that is not in :data:`GPUS`.
        tflops: see above; ``None`` likewise.
    """

    name: str
    aliases: tuple[str, ...]
    memory_gib: float
    capability: tuple[int, int]
    bandwidth: float | None
    tflops: float | None
    source: str = ""
    note: str = ""

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * GIB)

    @property
    def bfloat16(self) -> bool:
        """Computes in bfloat16; ``torch.cuda.is_bf16_supported()`` also says yes where it is emulated."""
        return self.capability >= (8, 0)

    @property
    def refusal(self) -> str:
        """Why nothing runs on it; empty where something does."""
        if self.capability >= OLDEST:
            return ""
        major, minor = self.capability
        return (
            f"{self.name} has compute capability {major}.{minor}; Triton and vLLM need 7.0, and torch's present builds "
            "have no code for it: choose another GPU, on Kaggle and Colab a T4"
        )


# name, aliases, GiB, capability, GB/s, TFLOPS, source, note
GPUS: tuple[Gpu, ...] = (
    Gpu("T4", ("t4",), 14.741, (7, 5), 320, 65, "sysrqmts.com", "Colab, Kaggle (one of its two); no bfloat16"),
    Gpu("P100", ("p100",), 15.895, (6, 0), 732, 18.7, "github.com/Kaggle/kaggle-cli/issues/1151", "Kaggle; too old"),
    Gpu("L4", ("l4",), 22.161, (8, 9), 300, 121, "lightning-fabric 2.6.6", "Colab Pro"),
    Gpu("RTX 3060 12GB", ("3060", "rtx3060"), 11.75, (8, 6), 360, 25.5, "topcpu.net; rate derived"),
    Gpu("RTX 3070", ("3070", "rtx3070"), 7.78, (8, 6), 448, 40.6, "techpowerup.com; rate derived", "8 GB"),
    Gpu("RTX 4060", ("4060", "rtx4060"), 7.78, (8, 9), 272, 30.2, "fpsbench.com; rate derived", "8 GB"),
    Gpu("RTX 3090", ("3090", "rtx3090"), 23.5, (8, 6), 936, 71, "holynerdvana.blogspot.com"),
    Gpu("RTX 4090", ("4090", "rtx4090"), 23.635, (8, 9), 1008, 165, "gist.github.com/mikasenghaas"),
    Gpu("RTX 5090", ("5090", "rtx5090"), 31.362, (12, 0), 1792, 209.5, "spheron.network; rate derived", "CUDA 12.8+"),
    Gpu("A10G", ("a10g", "g5"), 22.20, (8, 6), 600, 70, "baseten.co", "AWS g5"),
    Gpu("A100 40GB", ("a100-40", "a100-sxm4-40gb"), 39.39, (8, 0), 1555, 312, "sysrqmts.com"),
    Gpu(
        "A100 80GB",
        ("a100-80", "a100", "a100-sxm4-80gb", "a100-80gb-pcie"),
        *(79.15, (8, 0), 1935, 312, "llmbook.apartsin.com, appendix G", "PCIe's bandwidth; SXM has 2,039 GB/s"),
    ),
    Gpu("H100 PCIe", ("h100-pcie",), 79.11, (9, 0), 2000, 756, "lightning-fabric 2.6.6"),
    Gpu("H100 SXM", ("h100", "h100-sxm", "h100-80gb-hbm3"), 79.11, (9, 0), 3350, 989, "lightning-fabric 2.6.6"),
    Gpu("H200", ("h200",), 139.8, (9, 0), 4800, 989, "lightning-fabric 2.6.6", "nvidia-smi says 143,771 MiB"),
)
"""From the smallest to the largest kind of use; two T4 are not one of 30 GB. Memory of the 3070, A10G, A100 80GB and
H100: as issues of users show it."""


def find_gpu(name: str) -> Gpu:
    """The GPU of a name or alias, however it is spelt.

    Raises:
        ConfigError: no such GPU, or one that is too old to train on.
    """
    wanted = _plain(name)
    for gpu in GPUS:
        if wanted in {_plain(alias) for alias in (gpu.name, *gpu.aliases)}:
            if gpu.refusal:
                raise ConfigError(f"gpu: {gpu.refusal}")
            return gpu
    names = {_plain(alias): gpu.aliases[0] for gpu in GPUS for alias in (gpu.name, *gpu.aliases)}
    near = difflib.get_close_matches(wanted, list(names), n=1, cutoff=0.65)
    advice = f"did you mean {names[near[0]]}?" if near else f"it may be {', '.join(gpu.aliases[0] for gpu in GPUS)}"
    raise ConfigError(f"gpu: {name!r} is not among those that are known; {advice}")


def gpu_of(name: str, total_bytes: int, capability: tuple[int, int]) -> Gpu:
    """A GPU as it was detected: memory and capability as found, the rest from the table where its name is in it.

    Args:
        name: as the driver gives it, like ``NVIDIA GeForce RTX 3070``.
    """
    found, memory = _plain(name), total_bytes / GIB
    likeness = {
        gpu: max((len(alias) for alias in map(_plain, (gpu.name, *gpu.aliases)) if alias in found), default=0)
        for gpu in GPUS
        if gpu.capability == capability and abs(gpu.memory_gib / memory - 1) < 0.15
    }
    best = max(likeness, key=lambda gpu: likeness[gpu], default=None)
    if best is None or not likeness[best]:
        return Gpu(name, (), memory, capability, None, None, "detected", "not in the table")
    return replace(best, memory_gib=memory)


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())
