"""The machine around the GPU: system, hosted notebooks, memory, disks, environment variables."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from igrpo_lite.environment.facts import Disk, Memory

_VARIABLES = re.compile(
    r"(CUDA|NVIDIA|PYTORCH|TORCH|TORCHDYNAMO|TORCHINDUCTOR|TRITON|HF|HUGGING|HUGGINGFACE|TRANSFORMERS|VLLM|UNSLOTH|OMP)_.*"
    r"|(HTTP|HTTPS|ALL|NO)_PROXY|PYTHONPATH|LD_LIBRARY_PATH|XDG_CACHE_HOME|SSL_CERT_FILE|REQUESTS_CA_BUNDLE|WSL_DISTRO_NAME"
)
_SECRETS = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL|AUTH")
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def host_kinds(
    environ: Mapping[str, str], release: str, exists: Callable[[str], bool] = os.path.exists
) -> frozenset[str]:
    """Which of ``wsl``, ``colab``, ``kaggle`` and ``container`` this is.

    Args:
        release: the kernel's, as ``platform.release()`` gives it.
    """
    kinds = {
        "wsl": "microsoft" in release.lower(),
        "colab": any(map(environ.get, ("COLAB_RELEASE_TAG", "COLAB_BACKEND_VERSION"))),
        "kaggle": any(map(environ.get, ("KAGGLE_KERNEL_RUN_TYPE", "KAGGLE_URL_BASE"))),
        "container": exists("/.dockerenv") or exists("/run/.containerenv"),
    }
    return frozenset(kind for kind, there in kinds.items() if there)


def read_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment variables that change what happens; of secrets only that they are set."""
    return {
        name.upper(): "(set)" if _SECRETS.search(name.upper()) else re.sub(r"//[^/@\s]*@", "//(set)@", environ[name])
        for name in sorted(environ)
        if _VARIABLES.fullmatch(name.upper())
    }


def read_memory() -> Memory | None:
    """Main memory; ``None`` without psutil."""
    try:
        import psutil  # type: ignore[import-untyped]
    except ImportError:
        return None
    machine = psutil.virtual_memory()
    total, free = int(machine.total), int(machine.available)
    for limit_file, used_file in _CGROUPS:
        limit, used = _number(limit_file), _number(used_file)
        if limit is not None and used is not None and limit < total:
            return Memory(limit, max(0, min(free, limit - used)))
    return Memory(total, free)


def read_disk(what: str, path: Path) -> Disk:
    """Room and right to write where ``path`` is or would be made."""
    there = path.expanduser().absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        free: int | None = shutil.disk_usage(there).free
    except OSError:
        free = None
    return Disk(what, str(path.expanduser().absolute()), free, os.access(there, os.W_OK))


def read_shm() -> int | None:
    """Free shared memory in bytes, where there is such a thing."""
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return None


def _number(file: str) -> int | None:
    try:
        return int(Path(file).read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None
