"""The engine's weights and the policy's: one copy of the base, and the adapter written straight into the engine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM

pytest.importorskip("vllm")

from models import make_model
from vllm_parts import (
    MAX_MODEL_LEN,
    alive,
    gap,
    make_policy,
    make_prompts,
    make_sampler,
    model_folder,
    move,
    requests,
    shared_sampler,
)

from igrpo_lite.errors import SamplerError
from igrpo_lite.sampling import vllm, vllm_engine, vllm_internals
from igrpo_lite.sampling.base import Request
from igrpo_lite.sampling.parity import probe
from igrpo_lite.sampling.vllm import VllmSampler
from igrpo_lite.sampling.vllm_policy import adapter_layers, base_parameters, set_aside
from igrpo_lite.types import Completion

TOLERANCE = 1e-4


@pytest.fixture
def sampler() -> VllmSampler:
    return shared_sampler()


def long_requests() -> list[Request]:
    return requests(make_prompts(2, 100), 2, limit=12)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind ``tensors``."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def engine_parameters(sampler: VllmSampler) -> list[Tensor]:
    model = vllm_internals._runner(sampler.engine.llm).model
    return [p.data for p in model.parameters()]


def fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(base_parameters(model).items()):
        digest.update(name.encode() + parameter.detach().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    tokens = torch.tensor([make_prompts(1, 60)[0].ids])
    model.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_push_moves_the_engine_exactly_as_the_policy(sampler):
    wanted = long_requests()
    before = sampler.run(wanted)
    assert gap(sampler, wanted, before) < TOLERANCE
    for seed in (2, 3):
        move(sampler.policy, seed)
        assert gap(sampler, wanted, before) > 0.1, "a change that matters"
        sampler.load_adapter()
        after = sampler.run(wanted)
        assert gap(sampler, wanted, after) < TOLERANCE
    assert [c.ids for c in after] != [c.ids for c in before]


@pytest.mark.parametrize(
    ("invalidate", "stale"),
    [
        (lambda sampler: None, True),
        (lambda sampler: setattr(sampler, "version", sampler.version + 1), False),
        (lambda sampler: sampler.engine.llm.llm_engine.reset_prefix_cache(), False),
    ],
    ids=["neither", "salt", "reset"],
)
def test_keys_and_values_of_the_old_adapter_would_be_noticed(
    sampler: VllmSampler, invalidate: Callable[[VllmSampler], None], stale: bool
):
    """New adapter, same LoRA name and id: vLLM finds the prompt in its cache unless one of the two is done."""
    wanted = long_requests()
    sampler.run(wanted)
    move(sampler.policy, 4)
    sampler._push()
    invalidate(sampler)
    cached = sampler.cached_tokens
    difference = gap(sampler, wanted)
    assert (difference > 0.01) if stale else (difference < TOLERANCE)
    assert sampler.cached_tokens > cached, "requests of one version share their prompt"


def test_the_parity_probe_passes_and_fails_where_it_should(sampler, monkeypatch):
    temperatures = [1.0, 0.7]
    assert probe(sampler.policy, sampler, make_prompts(6), temperatures).failure() is None
    assert gap(sampler, long_requests()) < TOLERANCE, "the probe takes its step back"
    monkeypatch.setattr(sampler, "_push", lambda: None)
    assert "did not follow" in str(probe(sampler.policy, sampler, make_prompts(6), temperatures).failure())


def test_a_push_leaves_the_policys_tensors_alone(sampler):
    before = {name: p.detach().clone() for name, p in sampler.policy.adapter_parameters()}
    assert sampler.layers[0].scale == 2.0
    for _ in range(3):
        sampler.load_adapter()
    assert all(torch.equal(p, before[name]) for name, p in sampler.policy.adapter_parameters())


def test_scores_follow_the_adapter(sampler):
    wanted = long_requests()
    rows = [(r.prompt.ids, c.ids) for r, c in zip(wanted, sampler.run(wanted), strict=True)]
    before = sampler.score(rows)
    move(sampler.policy, 5)
    sampler.load_adapter()
    changes = [abs(a - b) for x, y in zip(before, sampler.score(rows), strict=True) for a, b in zip(x, y, strict=True)]
    assert max(changes) > 0.1


def test_with_the_adapter_off_the_base_is_sampled(sampler):
    wanted = long_requests()
    adapted = sampler.run(wanted)
    with sampler.policy.model.disable_adapter():
        sampler.load_adapter()
        base = sampler.run(wanted)
        assert gap(sampler, wanted, base) < TOLERANCE
        assert gap(sampler, wanted, adapted) > 0.1
    sampler.load_adapter()
    assert [c.ids for c in sampler.run(wanted)] == [c.ids for c in adapted]


def test_ranks_that_vllm_has_no_place_for_are_named(sampler):
    with pytest.raises(SamplerError, match="512 at most, not 600"):
        make_sampler(model="tiny", lora_r=600)
    assert alive(sampler), "nothing is closed for what cannot start"


def test_bfloat16_weights_are_shared_as_well():
    sampler = make_sampler(model="tiny", dtype="bfloat16")
    base = [p.data for p in sampler.policy.model.get_base_model().parameters() if not p.requires_grad]
    assert sampler.notes == []
    assert storage_bytes([*engine_parameters(sampler), *base]) < 1.05 * sampler._options.weight_bytes
    assert gap(sampler, long_requests()) < 0.5  # rounding noise of two implementations, on an adapter this strong


def test_gemma_2_caps_its_scores_in_both(tmp_path):
    """The policy as SDPA would compute it, without the cap, is another model than vLLM's."""
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"head_dim": 32, "intermediate_size": 96, "vocab_size": 575, "max_position_embeddings": 1024}
    shape |= {"sliding_window": 256, "query_pre_attn_scalar": 4, "eos_token_id": 2, "pad_token_id": 0}
    config = Gemma2Config(**shape, attn_logit_softcapping=1.0)
    folder = model_folder(tmp_path, "narrow heads")
    torch.manual_seed(1)
    made = Gemma2ForCausalLM(config)
    for parameter in made.parameters():
        parameter.data.mul_(3.0 if parameter.dim() == 2 else 1.0)
    made.save_pretrained(folder)
    sampler = make_sampler(model=str(folder))
    assert gap(sampler, long_requests()) < TOLERANCE
    for layer in sampler.policy.model.get_base_model().model.layers:
        layer.self_attn.attn_logit_softcapping = 1e6
    assert gap(sampler, long_requests()) > 0.1


def test_one_copy_of_a_24m_model_in_training(tmp_path):
    """Bytes, forward pass, gradients, and steps of a real optimizer with a push after each."""
    folder = model_folder(tmp_path / "24m", "24m")
    policy, prompts, config = make_policy(model=str(folder), lora_r=8, lora_alpha=16)
    model = policy.model.get_base_model()
    before, slopes, frozen = policy.model(torch.tensor([[5, 6, 7]])).logits, gradients(policy.model), fingerprint(model)
    sampler = VllmSampler(policy, prompts, config, MAX_MODEL_LEN, max_num_seqs=8)
    assert sampler.notes == []

    base = [p.data for p in model.parameters() if not p.requires_grad]
    assert 90e6 < sampler._options.weight_bytes < 100e6
    assert storage_bytes([*base, *engine_parameters(sampler)]) < 1.05 * sampler._options.weight_bytes

    torch.testing.assert_close(policy.model(torch.tensor([[5, 6, 7]])).logits, before, rtol=1e-5, atol=1e-5)
    for name, slope in gradients(policy.model).items():
        torch.testing.assert_close(slope, slopes[name], rtol=1e-4, atol=1e-6)

    optimizer = torch.optim.AdamW([p for _, p in policy.adapter_parameters()], lr=0.02)
    wanted = long_requests()[::2]
    for _ in range(3):
        old = sampler.run(wanted)
        gradients(policy.model)
        optimizer.step()
        sampler.load_adapter()
        assert gap(sampler, wanted, old) > 1e-3
        assert gap(sampler, wanted) < TOLERANCE
    assert fingerprint(model) == frozen
    sampler.close()
    assert fingerprint(model) == frozen


def storages(tensors: Iterable[Tensor]) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors}


@pytest.mark.parametrize(("asleep", "shut_down"), [(False, "done"), (True, "fails")])
def test_the_policy_leaves_the_engines_memory_before_that_is_freed(sampler, monkeypatch, asleep, shut_down):
    """As on a GPU: weights to main memory, memory back only if it sleeps, engine gone, weights back."""
    model = sampler.policy.model.get_base_model()
    frozen, engines = fingerprint(model), storages(engine_parameters(sampler))
    own = storages(base_parameters(model).values())
    assert own <= engines
    events: list[str] = []

    def spy(event: str, original: Callable[..., object], fails: bool) -> Callable[..., object]:
        def called(*arguments: object) -> object:
            assert not storages(base_parameters(model).values()) & engines, event
            events.append(event)
            result = original(*arguments)
            if fails:
                raise RuntimeError(f"{event}: no memory")
            return result

        return called

    @contextmanager
    def aside(*arguments: Any) -> Iterator[None]:
        with set_aside(*arguments):
            try:
                yield
            finally:
                assert sampler.engine.llm is None
                events.append("weights back")

    llm = sampler.engine.llm
    monkeypatch.setattr(sampler.engine, "sleeps", "kv")
    monkeypatch.setattr(sampler.engine, "asleep", asleep)
    monkeypatch.setattr(vllm, "set_aside", aside)
    monkeypatch.setattr(llm, "wake_up", spy("wake", lambda: None, True))
    monkeypatch.setattr(vllm_internals, "shut_down", spy("shut down", vllm_internals.shut_down, shut_down == "fails"))
    if shut_down == "fails":
        with pytest.raises(SamplerError, match="could not be closed: shut down: no memory"):
            sampler.close()
    else:
        sampler.close()
    assert events == [*["wake"] * asleep, "shut down", "weights back"]
    assert vllm_engine._running is None
    assert fingerprint(model) == frozen
    sampler.close()
    assert len(events) == 2 + asleep, "nothing is done twice"


def test_an_engine_is_freed_though_the_weights_cannot_be_moved(sampler, monkeypatch):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    sampler.died = RuntimeError("an illegal access")
    monkeypatch.setattr(sampler.engine, "sleeps", "kv")
    with monkeypatch.context() as patched:
        patched.setattr(vllm, "set_aside", full)
        with pytest.raises(SamplerError, match=r"closed, after it died \(an illegal access\): no memory"):
            sampler.close()
    assert sampler.engine.llm is None
    assert vllm_engine._running is None
    sampler.rebuild()
    assert gap(sampler, long_requests()) < TOLERANCE


def test_errors_between_runs_are_the_engines_death(sampler, monkeypatch):
    """Sleep and wake fail as they may on a GPU; an adapter slot has another shape; requests stay in the engine."""

    def stuck(*_: object, **__: object) -> None:
        raise RuntimeError("stuck")

    def stop(request: Request, completion: Completion) -> list[Request]:
        raise KeyError

    slots = list(sampler._slots)
    monkeypatch.setattr(sampler.engine, "sleeps", "all")
    for name in ("sleep", "wake_up"):
        monkeypatch.setattr(sampler.engine.llm, name, stuck)
    calls = {
        "released its memory": sampler.sleep,
        "woke up": sampler.wake,
        "took the adapter": sampler.load_adapter,
    }
    for doing, call in calls.items():
        sampler.engine.asleep = doing == "woke up"
        sampler._slots = [(layer, a[:1], b) for layer, a, b in slots] if call == sampler.load_adapter else slots
        with pytest.raises(SamplerError, match=f"died while it {doing}: ") as caught:
            call()
        assert sampler.died is caught.value.__cause__ is not None
        assert not isinstance(sampler.died, SamplerError)
        for later in (sampler.sleep, sampler.wake, sampler.load_adapter, lambda: sampler.run([])):
            with pytest.raises(SamplerError, match="died before"):
                later()
        sampler.died = None

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    sampler.engine.asleep = False
    sampler._slots = slots
    monkeypatch.setattr(sampler.engine.llm.llm_engine, "abort_request", stuck)
    with pytest.raises(KeyError):
        sampler.run([Request(make_prompts(1)[0], i, 1 + 99 * i) for i in (0, 1)], stop)
    with pytest.raises(SamplerError, match=r"died before \(stuck\)"):
        sampler.run([])

    with monkeypatch.context() as patched:
        patched.setattr(vllm_internals, "share_base", full)
        with pytest.raises(SamplerError, match="could not be started anew: no memory"):
            sampler.rebuild()
    with pytest.raises(SamplerError, match=r"died before \(no memory\)"):
        sampler.run(requests(make_prompts(1), 1))


def test_weights_that_were_set_aside_come_back_as_they_were():
    model = make_model("llama")
    frozen, before = fingerprint(model), [p.data for p in base_parameters(model).values()]
    replaced = next(iter(base_parameters(model).values()))
    block = replaced.data.clone()
    with set_aside(model, torch.device("cpu")):
        assert not storages(base_parameters(model).values()) & storages(before)
        replaced.data = block
    assert fingerprint(model) == frozen
    assert replaced.data_ptr() == block.data_ptr(), "the engine's from now on"


def test_weights_that_do_not_fit_into_main_memory_stay_where_they_are(monkeypatch):
    model = make_model("llama")
    before = {name: p.data_ptr() for name, p in base_parameters(model).items()}
    memory = psutil.virtual_memory()
    size = sum(p.numel() * p.element_size() for p in base_parameters(model).values())
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=size))
    said = r"0\.0 GiB of weights .* only 0\.0 GiB of it are free: .*--sampler transformers"
    with pytest.raises(SamplerError, match=said), set_aside(model, torch.device("cpu")):
        pytest.fail("they were moved")
    assert {name: p.data_ptr() for name, p in base_parameters(model).items()} == before
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=2 * size))
    with set_aside(model, torch.device("cpu")):
        pass


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_r": 3, "lora_alpha": 7, "lora_layers": "last 1"},
        {"lora_r": 40, "lora_alpha": 5, "lora_target_modules": ["q_proj", "v_proj", "down_proj"]},
    ],
    ids=["last layer", "some matrices"],
)
def test_adapters_on_parts_of_a_model(tmp_path, settings):
    sampler = make_sampler(model=str(model_folder(tmp_path / "untied", "untied")), **settings)
    assert sampler.notes == []
    assert len(sampler.layers) == (7 if "lora_layers" in settings else 9)
    for seed in (1, 2):
        move(sampler.policy, seed, std=0.3)
        sampler.load_adapter()
        assert gap(sampler, long_requests()) < TOLERANCE


def test_where_vllm_is_built_differently_it_costs_memory_and_time_only(monkeypatch):
    def unknown(*_: object) -> None:
        raise vllm_internals.Unexpected("no lora_manager")

    monkeypatch.setattr(vllm_internals, "adapter_slots", unknown)
    monkeypatch.setattr(vllm_internals, "plain_cpu_weights", nullcontext)
    sampler = make_sampler(model="tiny")
    assert len(sampler.notes) == 2
    assert "in memory twice" in sampler.notes[0]
    assert "no lora_manager" in sampler.notes[1]
    before = {name: p.detach().clone() for name, p in sampler.policy.adapter_parameters()}
    wanted = long_requests()
    assert gap(sampler, wanted) < TOLERANCE
    move(sampler.policy, 6)
    sampler.load_adapter()
    assert gap(sampler, wanted) < TOLERANCE
    move(sampler.policy, 1)
    assert all(torch.equal(p, before[name]) for name, p in sampler.policy.adapter_parameters())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, "lora_magnitude_vector"),
        ({"target_modules": ["q_proj"], "lora_bias": True}, "lora_B.bias"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_embedding_A"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head.lora_A"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, "norm"),
    ],
)
def test_adapters_that_vllm_has_no_place_for_are_named(config, what):
    policy = get_peft_model(make_model("llama"), LoraConfig(r=4, **config))
    with pytest.raises(SamplerError, match=what):
        adapter_layers(policy)
