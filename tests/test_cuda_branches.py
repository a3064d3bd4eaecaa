"""Branches that ask torch.cuda, on a machine without it: each call of torch.cuda is replaced, all else is real.

What they ask of a GPU and what they do with the answer; docs/backends.md lists every such branch and its test.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from igrpo_lite.config.resolve import resolve
from igrpo_lite.export.exporting import _Job
from igrpo_lite.policy import loading
from igrpo_lite.policy.prompting import prompt_builder
from igrpo_lite.policy.relief import make_room
from igrpo_lite.sampling import choice
from igrpo_lite.sampling.transformers import TransformersSampler
from igrpo_lite.sampling.vllm_engine import preserved_rng
from igrpo_lite.training import checkpoint
from igrpo_lite.training.memory import memory

ROOT = Path(__file__).parents[1]
CUDA = torch.device("cuda", 0)
GIB = 2**30


class Generators:
    """The states of two GPUs' random number generators."""

    def __init__(self):
        self.states = [torch.tensor([1, 2], dtype=torch.uint8), torch.tensor([3, 4], dtype=torch.uint8)]

    def read(self, device=0):
        return self.states[getattr(device, "index", device)].clone()

    def write(self, state, device=0):
        self.states[getattr(device, "index", device)] = state.clone()

    def write_all(self, states):
        self.states = [state.clone() for state in states]

    def values(self):
        return [state.tolist() for state in self.states]


@pytest.fixture
def generators(monkeypatch):
    found = Generators()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", found.read)
    monkeypatch.setattr(torch.cuda, "set_rng_state", found.write)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [found.read(0), found.read(1)])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", found.write_all)
    return found


def test_a_checkpoint_holds_every_gpus_random_state(generators, monkeypatch):
    state = checkpoint._random_state()
    expected = random.random(), float(np.random.random()), float(torch.rand(())), generators.values()
    generators.write(torch.zeros(2, dtype=torch.uint8), 1)
    checkpoint._set_random_state(state)
    assert (random.random(), float(np.random.random()), float(torch.rand(())), generators.values()) == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # resumed on a machine without one
    checkpoint._set_random_state(state)


def test_vllm_leaves_the_gpus_generator_as_it_was(generators):
    before = generators.values()
    with preserved_rng(CUDA):
        generators.write(torch.zeros(2, dtype=torch.uint8), 0)
    assert generators.values() == before


def test_auto_takes_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert loading.pick_device("auto").type == "cuda"


def test_a_gpus_memory_is_recorded_and_its_cache_freed(monkeypatch):
    freed = []
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2 * 2**20)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(True))
    found = memory(CUDA)
    assert (found["device"], found["device_peak"]) == (3, 2)
    make_room(torch.device("cpu"))
    assert not freed
    make_room(CUDA)
    assert freed


@pytest.mark.parametrize(("free", "place"), [(2 * GIB, "cuda"), (GIB, "cpu")])
def test_merged_weights_that_a_gpu_has_no_room_for_are_checked_on_the_cpu(monkeypatch, free, place):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 3 * GIB))
    said = []
    export = SimpleNamespace(device=CUDA, base=SimpleNamespace(merged_bytes=GIB), say=said.append)
    assert _Job._place(export).type == place
    assert bool(said) == (place == "cpu")


def test_auto_samples_with_vllm_on_a_gpu_and_says_why_not(monkeypatch):
    config = resolve({"model": "tiny", "device": "cpu"})
    policy = replace(loading.load_policy(config, 0), device=CUDA)
    prompts = prompt_builder(config)
    if choice.has_vllm():  # a build for CPUs, which refuses
        sampler, notes = choice.make_sampler(config, policy, prompts, 320)
        assert isinstance(sampler, TransformersSampler)
        assert re.search("sampling with transformers, which is slower: this vLLM .* is built for cpu", notes[-1])
    monkeypatch.setattr(choice, "has_vllm", lambda: False)
    assert "vLLM is faster on a GPU" in choice.make_sampler(config, policy, prompts, 320)[1][-1]
    monkeypatch.setattr(choice, "is_packed", lambda config: True)
    assert "--backend unsloth has one copy for both" in choice.make_sampler(config, policy, prompts, 320)[1][-1]


ASKS = re.compile(r"(?<!`)torch\.cuda\.|[=!]= \"cuda\"|get_device_capability\(|DEVICE_TYPE|backends\.cuda")


def test_the_documentation_lists_every_module_with_a_branch_for_gpus():
    package = ROOT / "igrpo_lite"
    asking = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if ASKS.search(re.sub(r'"""[\s\S]*?"""', "", path.read_text(encoding="utf-8")))
    }
    table = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8").partition("## Every branch for a GPU")[2]
    listed = {
        name for row in re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE) for name in re.findall(r"`(.*?)`", row)
    }
    assert asking <= listed
    assert all((package / name).is_file() for name in listed)
    assert all((ROOT / "tests" / name).is_file() for name in re.findall(r"`(test_\w+\.py)`", table))
