"""What the planner chooses at a run's start: only what is left open, only what changes no result."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from igrpo_lite.config.resolve import resolve
from igrpo_lite.planning.gpus import GIB, find_gpu
from igrpo_lite.planning.suggest import CHOSEN
from igrpo_lite.policy.backends import Choice
from igrpo_lite.training import card as card_module
from igrpo_lite.training.card import fitted, gpu_in_use, without

SETTINGS = {"model": "Qwen/Qwen2-1.5B-Instruct", "data": "gsm8k", "max_completion_length": 512, "load_in_4bit": True}


def test_without_a_gpu_nothing_is_planned():
    config = resolve({"device": "cpu"})
    assert gpu_in_use(config) is None
    found = fitted(config, None)
    assert (found.config, found.notes, found.plan) == (config, (), None)
    assert found.comparison(5) is None


def test_what_is_left_open_is_chosen_so_that_it_fits():
    config = resolve(SETTINGS)
    found = fitted(config, find_gpu("t4"))
    assert found.plan is not None
    assert found.plan.verdict == "fits"
    changed = {name for name in type(config).model_fields if getattr(config, name) != getattr(found.config, name)}
    assert changed
    assert changed <= set(CHOSEN)
    planned = found.plan.setup.config
    assert {name: getattr(planned, name) for name in CHOSEN} == {name: getattr(found.config, name) for name in CHOSEN}


def test_the_plan_is_of_what_is_installed(monkeypatch):
    """With Unsloth rows and its vLLM; 4 bits without it take our own sampler, 16 bits vLLM if it is there."""
    card, sixteen = find_gpu("t4"), SETTINGS | {"load_in_4bit": False}
    for unsloth, vllm, settings, rows, samples in (
        (True, True, SETTINGS, True, True),
        (False, True, SETTINGS, False, False),
        (False, True, sixteen, False, True),
        (False, False, sixteen, False, False),
    ):
        monkeypatch.setattr(
            card_module, "enter", lambda config, name=unsloth: Choice("unsloth" if name else "transformers")
        )
        monkeypatch.setattr(card_module, "has_vllm", lambda found=vllm: found)
        found = fitted(resolve(settings), card)
        assert (found.plan.setup.rows, found.plan.setup.vllm) == (rows, samples)
        assert (found.config.backend, found.config.sampler) == ("auto", "auto")


@pytest.mark.parametrize(
    ("installed", "given"), [("0.30.2", False), ("0.31.0", True), ("0.33.0+cu129", True), ("x", False)]
)
def test_the_kv_cache_is_released_by_the_vllm_that_can(installed, given, monkeypatch):
    monkeypatch.setattr(card_module, "version", lambda name: installed)
    assert card_module.releases_kv_cache(unsloth=False) == given
    monkeypatch.setenv("UNSLOTH_VLLM_STANDBY", "0")
    assert not card_module.releases_kv_cache(unsloth=True)
    monkeypatch.setenv("UNSLOTH_VLLM_STANDBY", "1")
    assert card_module.releases_kv_cache(unsloth=True)


@pytest.mark.parametrize("device", ["auto", "cuda:0"])
def test_the_gpu_is_asked_once_cuda_has_been_started(device, monkeypatch):
    """torch resets no peak before that, and a device with a number does not start it."""
    started = []
    card = SimpleNamespace(name="Tesla T4", total_memory=15 * GIB, major=7, minor=5)

    def needs_cuda(found):
        def asked(given):
            assert started, "Invalid device argument: did you call init?"
            return found

        return asked

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda given: started.append(given) or card)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", needs_cuda(None))
    monkeypatch.setattr(torch.cuda, "mem_get_info", needs_cuda((11 * GIB, 15 * GIB)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", needs_cuda(0))
    found = gpu_in_use(resolve({"device": device}))
    assert (found.name, found.capability) == ("T4", (7, 5))
    assert found.memory_gib == pytest.approx(15 - 4 + 0.6, abs=0.01)


def test_what_others_hold_is_not_planned_with():
    card = find_gpu("3060")
    assert without(card, -GIB) == without(card, GIB // 4) == card
    assert without(card, 3 * GIB).memory_gib == pytest.approx(card.memory_gib - 3)


@pytest.mark.parametrize("name", ["update_tokens", "max_num_seqs"])
def test_what_the_user_set_stays(name):
    config = resolve(SETTINGS | {name: 96})
    assert getattr(fitted(config, find_gpu("t4")).config, name) == 96


def test_a_run_that_cannot_fit_is_told_what_would_help():
    config = resolve(SETTINGS | {"model": "Qwen/Qwen2.5-7B-Instruct", "load_in_4bit": False})
    found = fitted(config, find_gpu("t4"))
    assert found.plan is not None
    assert found.plan.verdict == "no"
    assert "may not fit on this GPU; what helps most: --load-in-4bit" in found.notes[-1]


def test_the_bundled_model_is_planned_too():
    found = fitted(resolve({}), find_gpu("t4"))
    assert found.plan is not None
    assert found.plan.verdict == "fits"


def test_an_unknown_model_is_not_planned_but_trained():
    config = resolve({"model": "someone/unheard-of"})
    found = fitted(config, find_gpu("t4"))
    assert found.config == config
    assert found.plan is None
    assert found.notes[0].startswith("memory is not planned: ")


def test_prediction_and_measurement_are_put_side_by_side():
    found = fitted(resolve(SETTINGS), find_gpu("t4"))
    planned = max(phase.allocated for phase in found.plan.phases)
    assert found.comparison(planned) == {"planned_gib": planned / GIB, "measured_gib": planned / GIB, "ratio": 1.0}
    assert found.comparison(2 * planned)["ratio"] == 0.5
