"""Made-up facts for the doctor's conclusions, and the real metadata of back ends' wheels to draw them from."""

from __future__ import annotations

from importlib.metadata import PathDistribution
from pathlib import Path
from typing import Any

from igrpo_lite.environment.facts import BackEnd, Driver, Facts, Gpu, Torch

GIB = 2**30
T4 = Gpu(0, "Tesla T4", (7, 5), 15 * GIB, 14 * GIB, "GPU-11111111-aaaa")
V100 = Gpu(0, "Tesla V100-SXM2-16GB", (7, 0), 16 * GIB, 16 * GIB, "GPU-22222222-bbbb")
P100 = Gpu(0, "Tesla P100-PCIE-16GB", (6, 0), 16 * GIB, 16 * GIB, "GPU-33333333-cccc")
A100 = Gpu(0, "NVIDIA A100-SXM4-40GB", (8, 0), 40 * GIB, 39 * GIB, "GPU-44444444-dddd")

# Of the wheels on PyPI, without what only needs something that igrpo-lite does not name.
_UNSLOTH_COMMON = (
    "torch<2.15.0,>=2.4.0",
    "datasets!=4.0.*,!=4.1.0,!=4.4.*,!=4.5.0,<5.0.0,>=3.4.1",
    "accelerate>=0.34.1",
    "peft!=0.11.0,>=0.18.0",
    "trl!=0.19.0,<=1.15.0,>=0.18.2",
)
METADATA = {
    "unsloth": (
        *_UNSLOTH_COMMON,
        "unsloth_zoo>=2026.10.9",
        "torchvision",
        'xformers>=0.0.27.post2; ("linux" in sys_platform or sys_platform == "win32") and platform_machine == "x86_64"',
        "bitsandbytes!=0.46.0,!=0.48.0,>=0.45.5",
        'triton>=3.0.0; "linux" in sys_platform',
        "huggingface_hub>=0.34.0",
        "transformers!=4.53.0,!=4.54.0,!=4.55.0,!=4.55.1,!=4.57.0,!=4.57.4,!=4.57.5,!=5.0.0,!=5.1.0,<=5.17.0,>=4.52.4",
        'huggingface-hub==0.36.2; python_version < "3.10" and extra == "studio"',
        "certifi>=2026.10.19",
    ),
    "unsloth-zoo": (*_UNSLOTH_COMMON, 'torchao>=0.13.0; sys_platform != "darwin" or platform_machine != "arm64"'),
    "vllm": (
        "transformers<5.18.0,>=5.10.4",
        "tokenizers>=0.21.1",
        'setuptools<81.0.0,>=77.0.3; python_version >= "3.11"',
        "numba==0.65.0",
        "torch==2.13.0",
        "torchvision==0.28.0",
        "flashinfer-python==0.7.0.post1",
        'pandas; extra == "bench"',
    ),
    "trl": ("accelerate>=1.4.0", "datasets>=4.7.0", "transformers>=4.56.2", 'vllm<=0.31.0,>=0.22.0; extra == "vllm"'),
    "vllm-bnb-plugin": ("vllm", "bitsandbytes>=0.48.1"),
    "xformers": ("torch>=2.10", "numpy"),
    "numba": ("numpy<2.5,>=1.22",),
    "igrpo-lite": (
        "torch>=2.11,<3",
        "transformers>=5.16,<6",
        "tokenizers>=0.22,<1",
        "peft>=0.19,<0.22",
        "accelerate>=1.12,<2",
        "datasets>=4.7,<6",
        "numpy>=2.0,<3",
        "trl>=1.16,<1.17; extra == 'test'",
        "wandb>=0.22,<1; extra == 'trackers'",
        "vllm>=0.31,<0.32; extra == 'vllm'",
        "vllm-bnb-plugin==0.0.3; extra == 'vllm'",
        "unsloth>=2026.10,<2027; extra == 'unsloth'",
        "bitsandbytes>=0.49,<1; extra == 'unsloth'",
        "trl>=1.15,<1.16; extra == 'unsloth'",
        "torch<2.15; extra == 'unsloth'",
        "transformers<5.18; extra == 'unsloth'",
        "datasets<5; extra == 'unsloth'",
        "trl>=1.14,<1.17; extra == 'trl'",
    ),
}

# Set A of docs/install.md, as a resolver found it, without what cannot load beside it.
SET_A = {
    **{"igrpo-lite": "0.1.0", "torch": "2.13.0", "torchvision": "0.28.0", "transformers": "5.17.0", "trl": "1.15.0"},
    **{"vllm": "0.31.0", "vllm-bnb-plugin": "0.0.3", "bitsandbytes": "0.50.2", "flashinfer-python": "0.7.0.post1"},
    **{"unsloth": "2026.10.9", "unsloth-zoo": "2026.10.9", "peft": "0.21.2", "accelerate": "1.15.0", "numba": "0.65.0"},
    **{"datasets": "4.8.5", "tokenizers": "0.23.3", "numpy": "2.3.5", "torchao": "0.18.0"},
    **{"triton": "3.7.1", "huggingface-hub": "1.33.0", "certifi": "2026.10.19", "setuptools": "80.10.2"},
}
WORKS = BackEnd("works")
ABSENT = BackEnd("not installed")
ALL_WORK = dict.fromkeys(("transformers-16bit", "transformers-4bit", "vllm", "unsloth"), WORKS)


def made_up(packages: dict[str, str] | None = None, gpu: Gpu | None = A100, **changes: Any) -> Facts:
    """A machine on which everything works, except for the changes."""
    packages = SET_A if packages is None else packages
    seen = () if gpu is None else (gpu,)
    values: dict[str, Any] = {
        "python": "3.12.11",
        "system": "Linux",
        "machine": "x86_64",
        "packages": packages,
        "requires": {name: texts for name, texts in METADATA.items() if name in packages},
        "driver": Driver("580.65.06", "13.0", seen) if seen else Driver(),
        "torch": Torch("2.13.0+cu130", cuda="13.0", available=bool(seen), devices=seen),
        "back_ends": ALL_WORK,
    }
    return Facts(**values | changes)


def install(folder: Path, name: str, version: str | None, code: str = "", requires: tuple[str, ...] = ()) -> None:
    """A real package: a module and the metadata that ``pip`` would have left beside it."""
    module = folder / name.replace("-", "_")
    module.mkdir(parents=True, exist_ok=True)
    (module / "__init__.py").write_text(code, encoding="utf-8")
    record = folder / f"{name.replace('-', '_')}-{version or '0'}.dist-info"
    record.mkdir()
    lines = ["Metadata-Version: 2.4", f"Name: {name}", *(f"Requires-Dist: {text}" for text in requires)]
    lines += [f"Version: {version}"] if version is not None else []
    (record / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert PathDistribution(record).metadata["Name"] == name
