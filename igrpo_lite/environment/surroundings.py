"""Problems of what surrounds the GPU and the packages: memory, disks, the hub, hosted notebooks, systems."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Literal

from igrpo_lite.environment.facts import Facts, Problem
from igrpo_lite.environment.known_bad import host_notes

_GIB = 2**30
_LITTLE_MEMORY = 2 * _GIB
_LITTLE_ROOM = {"downloaded models": 5 * _GIB, "run folders": 1 * _GIB}  # a 1.5B model in 16 bits takes 3 GB
_LITTLE_SHM = _GIB // 4  # docker gives 64 MiB


def surroundings(facts: Facts, needs: Collection[str] = ()) -> Iterator[Problem]:
    """Findings about memory, disks, hub and host."""
    yield from _memory(facts)
    yield from _disks(facts)
    yield from _hub(facts, needs)
    yield from host_notes(facts)


def _memory(facts: Facts) -> Iterator[Problem]:
    if facts.memory is not None and facts.memory.free_bytes < _LITTLE_MEMORY:
        free = facts.memory.free_bytes / _GIB
        yield Problem(
            "warning", f"only {free:.1f} GiB of main memory are free; a model passes through it when it loads"
        )
    if facts.shm_bytes is not None and facts.shm_bytes < _LITTLE_SHM and "vllm" in facts.versions():
        room = f"{facts.shm_bytes / 2**20:.0f} MiB"
        yield Problem(
            "warning", f"only {room} of shared memory (/dev/shm), which vLLM uses", "docker run --shm-size=1g"
        )


def _disks(facts: Facts) -> Iterator[Problem]:
    moves = {"downloaded models": "export HF_HOME=/a/larger/disk", "run folders": "igrpo-lite train --output-dir DIR"}
    for disk in facts.disks:
        if not disk.writable:
            yield Problem("warning", f"no permission to write {disk.what} to {disk.path}", moves.get(disk.what, ""))
        elif disk.free_bytes is not None and disk.free_bytes < _LITTLE_ROOM.get(disk.what, 0):
            free = disk.free_bytes / _GIB
            yield Problem(
                "warning", f"only {free:.1f} GiB free for {disk.what} ({disk.path})", moves.get(disk.what, "")
            )
        if "wsl" in facts.kinds and disk.path.startswith("/mnt/"):
            what = f"{disk.what} are on a Windows disk ({disk.path}), which is slow from WSL"
            yield Problem("warning", what, moves.get(disk.what, ""))


def _hub(facts: Facts, needs: Collection[str]) -> Iterator[Problem]:
    hub = facts.hub
    if hub is None or hub.state in ("reachable", "not asked"):
        return
    level: Literal["error", "warning", "note"] = "error" if "hub" in needs else "warning"
    only = "only models and data that are already here can be used"
    if hub.state == "offline":
        level = "error" if "hub" in needs else "note"
        yield Problem(level, f"HF_HUB_OFFLINE is set: {only}", "unset HF_HUB_OFFLINE")
    elif "kaggle" in facts.kinds:
        yield Problem(level, f"no network: {only}", "turn on Internet in the notebook's settings")
    else:  # offline, loading does not wait for an answer each time
        what = f"{hub.endpoint} cannot be reached ({hub.detail}): {only}"
        yield Problem(level, what, "export HF_HUB_OFFLINE=1")
