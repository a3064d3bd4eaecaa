"""What the update does when memory is full, and when float16 overflows: nothing is lost, and the user is told."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import make_model
from tiny_parts import small_config, tiny_parts
from update_parts import adapter_gradients, assert_same, config_of, restored, rollouts_of, run_update

from igrpo_lite.config.resolve import resolve
from igrpo_lite.errors import ModelError, UpdateError
from igrpo_lite.policy import loading
from igrpo_lite.policy import unsloth as unsloth_backend
from igrpo_lite.policy.backends import LoadRequest
from igrpo_lite.policy.relief import is_out_of_memory
from igrpo_lite.sampling import vllm_engine
from igrpo_lite.training import train
from igrpo_lite.training import update as update_module
from igrpo_lite.training.update import MAX_OVERFLOWS, PolicyUpdate

LIMITED = r"""
import json, resource, sys
import psutil, torch
torch.set_num_threads(1)
from tiny_parts import tiny_parts
from update_parts import adapter_gradients, config_of
from igrpo_lite.algorithms.rollout import RolloutCollector
from igrpo_lite.training.update import PolicyUpdate
from igrpo_lite.errors import UpdateError

share, tokens = float(sys.argv[1]), int(sys.argv[2])
config = config_of("grpo", update_tokens=tokens)
parts = tiny_parts(config)
rollouts = RolloutCollector(parts.sampler, parts.scorer, parts.prompts, config, 0).collect(parts.train[:32] * 8, 0)
update, caught = PolicyUpdate(parts.policy, config), []
update.optimizer.register_step_pre_hook(lambda *_: caught.append(adapter_gradients(parts.policy)))
update.step(rollouts[:8], 0, 1e-9)  # all that is allocated once is allocated now
update.update_tokens, before = tokens, psutil.Process().memory_info().vms
resource.setrlimit(resource.RLIMIT_AS, (before + int(share * 2**20), resource.RLIM_INFINITY))
try:
    stats = update.step(rollouts, 1, 1e-9)
except UpdateError as error:
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(json.dumps({"error": str(error), "tokens": update.update_tokens}))
else:
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    norms = {name: float(g.double().norm()) for name, g in caught[-1].items()}
    print(json.dumps({"tokens": update.update_tokens, "norms": norms, "sequences": stats.learning_sequences,
                      "learning": stats.learning_tokens, "steps": len(caught)}))
parts.scorer.close()
"""


def limited(mib: float, tokens: int) -> dict:
    """One update in a process that may take ``mib`` MiB more than it has."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(mib), str(tokens)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
def test_full_memory_halves_the_tokens_and_keeps_the_rollouts():
    """The kernel really refuses the memory; what was learned is the same in the end."""
    free, tight = limited(1 << 16, 1 << 20), limited(256, 1 << 20)
    assert free["tokens"] == 1 << 20
    assert tight["tokens"] < free["tokens"]
    assert (tight["sequences"], tight["learning"], tight["steps"]) == (free["sequences"], free["learning"], 2)
    largest = max(free["norms"].values())
    assert all(abs(tight["norms"][name] - norm) < 1e-4 * largest for name, norm in free["norms"].items())


def test_what_counts_as_full_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


class Weights:
    """Stands in for what a failed engine leaves behind."""


class Loader:
    """Fails as Unsloth does: with an error of its own while it handles vLLM's, in whose frames the weights are."""

    def __init__(self, again="No available memory"):
        self.again = again
        self.weights = []  # how many of each earlier try are still there

    def from_pretrained(self, **arguments):
        gc.collect()
        left = sum(weights() is not None for weights in self.weights)
        if left or len(self.weights) > 1:
            raise RuntimeError(f"{left} still there: {self.again}")
        try:
            self._start()
        except ValueError as error:
            raise RuntimeError(str(error)) from None
        return make_model("qwen2"), None

    def _start(self):
        weights = Weights()
        self.weights.append(weakref.ref(weights))
        if len(self.weights) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def get_peft_model(self, base, **arguments):
        return base


@pytest.fixture
def request_with_vllm(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * 2**30, 15 * 2**30))
    monkeypatch.setattr(unsloth_backend, "make_room", lambda device: gc.collect())
    config = resolve({"kv_cache_gib": 4, "max_num_seqs": 24})
    return LoadRequest(config, loading._read_config(config), torch.device("cuda"), torch.float16, 3, context=700)


def test_the_first_try_is_gone_before_the_second(request_with_vllm):
    """vLLM refuses to start beside what is left of an engine that sleeps."""
    loader = Loader()
    _, notes = unsloth_backend._load(loader, request_with_vllm, fast=True)
    assert len(loader.weights) == 2
    assert "runs with --kv-cache-gib 1.00" in notes[0]


def test_a_second_try_that_vllm_refuses_tells_to_start_again(request_with_vllm, monkeypatch):
    """That smaller keys and values do not fit either, nobody knows then."""
    refusal = "CuMem allocator can only be used for one instance per process."
    monkeypatch.setattr(unsloth_backend, "forget", lambda error: None)
    with pytest.raises(ModelError, match=r"out of memory.*one instance.*start again with --kv-cache-gib 1\.00$"):
        unsloth_backend._load(Loader(refusal), request_with_vllm, fast=True)
    told = vllm_engine._refusal(
        SimpleNamespace(__version__="0.31"),
        SimpleNamespace(model="tiny"),
        ValueError("No available memory"),
        AssertionError(refusal),
        2**30,
    )
    assert "start again with --kv-cache-gib 1.00" in told
    assert "even with" not in told


@pytest.fixture(scope="module")
def full():
    made = tiny_parts(config_of("igrpo-joint"))
    yield made
    made.scorer.close()


def test_in_the_end_activations_are_recomputed(full, collect, monkeypatch):
    """Memory that is full however few completions there are at a time; the gradient is the same, and stays so."""
    config, scored = config_of("igrpo-joint"), update_module.chosen_logprobs
    (expected,), _ = run_update(config, full.policy, collect("igrpo-joint"))
    model = full.policy.model.get_base_model()
    tried = []

    def needs_checkpoints(*arguments):
        tried.append(model.is_gradient_checkpointing)
        if not tried[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return scored(*arguments)

    monkeypatch.setattr(update_module, "chosen_logprobs", needs_checkpoints)
    update = PolicyUpdate(full.policy, config)
    caught = []
    update.optimizer.register_step_pre_hook(lambda *_: caught.append(adapter_gradients(full.policy)))
    try:
        with restored(full.policy):
            update.step(collect("igrpo-joint"), 0, 1e-9)
        assert tried.count(False) > 3  # half, a quarter ...
        assert (update.checkpointing, update.state()["checkpointing"]) == (True, True)
        assert update.update_tokens == config.update_tokens, "there is room again"
        asked = PolicyUpdate(full.policy, config_of("igrpo-joint", gradient_checkpointing=True))
        assert asked.checkpointing
        assert not asked.state()["checkpointing"], "another GPU may do without"
        assert_same(caught[0], expected)
        model.gradient_checkpointing_disable()
        resumed = PolicyUpdate(full.policy, config)
        resumed.load_state(update.state())
        assert model.is_gradient_checkpointing
        assert resumed.checkpointing
        monkeypatch.setattr(update_module, "chosen_logprobs", lambda *_: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(UpdateError, match=r"memory in the update.*; halve --max-completion-length \(now \d+\), or"):
            resumed.step(collect("igrpo-joint"), 1, 1e-9)
    finally:
        model.gradient_checkpointing_disable()
        full.policy.model.eval()


@pytest.fixture(scope="module")
def half():
    made = tiny_parts(config_of("igrpo-joint", dtype="float16"))
    yield made
    made.scorer.close()


@pytest.fixture(scope="module")
def collect(full):
    return rollouts_of(full)


def test_float16_learns_what_float32_does(full, half, collect):
    config = config_of("igrpo", importance_sampling_mode="none", max_grad_norm=1e9)
    (expected,), _ = run_update(config, full.policy, collect("igrpo"))
    (found,), stats = run_update(config, half.policy, collect("igrpo"))
    assert not stats.skipped
    assert {p.dtype for _, p in half.policy.adapter_parameters()} == {torch.float32}
    assert half.policy.model.get_base_model().dtype == torch.float16
    one, other = (torch.cat([g.flatten() for _, g in sorted(grads.items())]) for grads in (expected, found))
    assert float(torch.nn.functional.cosine_similarity(one, other, dim=0)) > 0.999
    assert float(other.norm()) == pytest.approx(float(one.norm()), rel=0.02)


def test_an_overflow_skips_the_step_and_lowers_the_scale(half, collect):
    update = PolicyUpdate(half.policy, config_of("igrpo"))
    update.load_state({"scaler": update.scaler.state_dict() | {"scale": 2.0**30}})
    before = {name: p.detach().clone() for name, p in half.policy.adapter_parameters()}
    with restored(half.policy):
        stats = update.step(collect("igrpo"), 0, 1e-2)
        assert (stats.skipped, stats.grad_norm, update.overflows) == (True, None, 1)
        assert all(torch.equal(p, before[name]) for name, p in half.policy.adapter_parameters())
        assert update.scaler.get_scale() == 2.0**29
        update.load_state({"overflows": 1, "scaler": update.scaler.state_dict() | {"scale": 2.0**10}})
        stats = update.step(collect("igrpo"), 1, 1e-2)
        assert (stats.skipped, update.overflows) == (False, 0)
        assert any(not torch.equal(p, before[name]) for name, p in half.policy.adapter_parameters())


def test_overflow_after_overflow_stops_the_run_with_advice(half, collect):
    update = PolicyUpdate(half.policy, config_of("igrpo"))
    update.load_state({"scaler": update.scaler.state_dict() | {"scale": 2.0**60}})
    with restored(half.policy):
        for _ in range(MAX_OVERFLOWS - 1):
            assert update.step(collect("igrpo"), 0, 1e-2).skipped
        with pytest.raises(UpdateError, match=r"5 steps in a row.*--dtype float32"):
            update.step(collect("igrpo"), 0, 1e-2)
    assert not adapter_gradients(half.policy)


def test_without_a_scaled_loss_nothing_changes(full, collect):
    """Scaling by a power of two is exact, so this also says that nothing else happens on the way."""
    config = config_of("igrpo")
    (found,), _ = run_update(config, full.policy, collect("igrpo"))
    assert not PolicyUpdate(full.policy, config).scaler.is_enabled()
    (again,), _ = run_update(config, full.policy, collect("igrpo"))
    assert_same(found, again, tolerance=0)


def test_a_float16_run_resumes_with_its_scale(tmp_path):
    config = small_config(dtype="float16", output_dir=str(tmp_path / "run"), max_steps=2, algorithm="grpo")
    train(config)
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000002" / "state.json").read_text())
    assert state["update"]["scaler"]["scale"] == 2.0**12
    summary = train(config.model_copy(update={"max_steps": 4}))
    assert (summary["steps"], summary["stopped"]) == (4, None)
