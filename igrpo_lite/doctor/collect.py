"""Collect the facts: what takes long runs at the same time."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from time import monotonic

from igrpo_lite.doctor.backends import judged, started, torch_of
from igrpo_lite.environment.facts import Facts
from igrpo_lite.environment.hardware import ask_driver
from igrpo_lite.environment.host import host_kinds, read_disk, read_memory, read_shm, read_variables
from igrpo_lite.environment.hub import HubQuestion, cache_folder
from igrpo_lite.environment.packages import read_packages


def collect(network: bool = True, timeout: float = 120.0, runs: Path = Path("runs")) -> Facts:
    """All facts about this machine and this Python environment; never raises for what it finds.

    Args:
        network: whether the hub may be asked.
        timeout: seconds that the trials of the back ends may take, all at once.
        runs: where run folders are going to be made.
    """
    hub = HubQuestion(network)
    driver, memory = ask_driver(), read_memory()  # before the trials take some of it
    until = monotonic() + timeout
    with started() as trials:
        packages, requires = read_packages()
        reports = {name: trial.result(until) for name, trial in trials.items()}
    return Facts(
        python=platform.python_version(),
        system=platform.system(),
        machine=platform.machine(),
        kinds=host_kinds(os.environ, platform.release()),
        packages=packages,
        requires=requires,
        driver=driver,
        torch=torch_of(reports.get("transformers-16bit", {})),
        back_ends=judged(reports),
        variables=read_variables(os.environ),
        memory=memory,
        shm_bytes=read_shm(),
        disks=(read_disk("downloaded models", cache_folder()), read_disk("run folders", runs)),
        hub=hub.answer(),
    )
