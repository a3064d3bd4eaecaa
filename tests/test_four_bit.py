"""Frozen weights in 4 bits on a CPU: real QLoRA, held against the same model with its weights unpacked."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from bad_parts import SMALL, assert_same, steps
from tiny_parts import small_config, tiny_parts
from torch import nn
from transformers import AutoModelForCausalLM

from igrpo_lite import inputs
from igrpo_lite.config import ModelOptions
from igrpo_lite.config.resolve import resolve
from igrpo_lite.errors import ModelError, SamplerError
from igrpo_lite.policy.fingerprint import base_fingerprint
from igrpo_lite.policy.four_bit import is_packed
from igrpo_lite.policy.loading import load_policy
from igrpo_lite.policy.logprobs import RowLayout, TreeLayout, best_layout, chosen_logprobs
from igrpo_lite.policy.tree import Branch
from igrpo_lite.sampling.choice import make_sampler
from igrpo_lite.sampling.parity import probe
from igrpo_lite.sampling.replica import Replica
from igrpo_lite.tiny import MODEL_DIR
from igrpo_lite.training import train

bitsandbytes = pytest.importorskip("bitsandbytes", reason="4-bit weights need bitsandbytes")

PACKED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def packed_policy(**settings):
    """With an adapter that is not zero."""
    policy = load_policy(ModelOptions(**{"load_in_4bit": True} | settings), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.adapter_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return policy


def packed_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}


def unpacked(model):
    """The same model with ordinary layers that hold what the packed ones stand for."""
    plain = copy.deepcopy(model)
    for name, layer in packed_layers(model).items():
        parent, _, child = name.rpartition(".")
        weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        linear.weight = nn.Parameter(weight.to(torch.float32), requires_grad=False)
        linear.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        setattr(plain.get_submodule(parent), child, linear)
    return plain


def branches():
    generator = torch.Generator().manual_seed(2)
    prompt, *completions = (tuple(torch.randint(5, 570, (n,), generator=generator).tolist()) for n in (20, 9, 14, 14))
    return [Branch(prompt, ids, tuple(range(len(ids)))) for ids in completions]


def gradients(policy_model, layout):
    policy_model.zero_grad()
    scored = chosen_logprobs(policy_model.get_base_model(), branches(), layout)
    (scored.logprobs * torch.linspace(-1, 1, 3)[:, None]).sum().backward()
    found = {name: p.grad.clone() for name, p in policy_model.named_parameters() if p.grad is not None}
    return scored.logprobs.detach(), found


@pytest.mark.parametrize("layout", [TreeLayout(), RowLayout()], ids=lambda layout: type(layout).__name__)
def test_log_probabilities_and_gradients_are_those_of_the_unpacked_weights(layout):
    model = packed_policy().model
    assert {name.split(".")[-2] for name in packed_layers(model)} == set(PACKED)  # adapted: <name>.base_layer
    assert type(model.get_base_model().get_output_embeddings()) is nn.Linear
    with torch.no_grad():  # on some CPUs bitsandbytes would now pack the weights anew, for good
        model.eval()(input_ids=torch.arange(3, 40)[None])
    logprobs, found = gradients(model, layout)
    expected_logprobs, expected = gradients(unpacked(model), layout)
    torch.testing.assert_close(logprobs, expected_logprobs, rtol=1e-4, atol=1e-4)
    assert found.keys() == expected.keys()
    assert {g.dtype for g in found.values()} == {torch.float32}
    largest = max(float(g.abs().max()) for g in expected.values())
    assert largest > 0
    for name in found:
        assert float((found[name] - expected[name]).abs().max()) < 1e-4 * largest, name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_computes_in_its_type_with_a_float32_adapter(dtype):
    policy = packed_policy(dtype=dtype)
    base = policy.model.get_base_model()
    assert base.dtype == getattr(torch, dtype)
    assert {layer.compute_dtype for layer in packed_layers(base).values()} == {base.dtype}
    assert {p.dtype for _, p in policy.adapter_parameters()} == {torch.float32}
    assert isinstance(best_layout(base), TreeLayout)
    logprobs, found = gradients(policy.model, None)
    expected_logprobs, expected = gradients(unpacked(policy.model).float(), None)
    torch.testing.assert_close(logprobs, expected_logprobs, rtol=0.1, atol=0.1)
    pairs = [(found[name].flatten(), expected[name].flatten()) for name in expected]
    cosine = torch.cosine_similarity(*(torch.cat(side) for side in zip(*pairs, strict=True)), dim=0)
    assert float(cosine) > 0.995


def test_a_choice_of_layers_finds_packed_ones():
    policy = packed_policy(lora_layers="last 1")
    adapted = {name.split(".lora_")[0].partition(".layers.")[2] for name, _ in policy.adapter_parameters()}
    assert adapted == {f"3.{'mlp' if name.endswith(('up_proj', 'gate_proj', 'down_proj')) else 'self_attn'}.{name}"
                       for name in PACKED}  # fmt: skip


# The frozen weights stay as they are


def test_the_fingerprint_sees_packed_weights_and_their_scales():
    policy = packed_policy()
    before = base_fingerprint(policy)
    with torch.no_grad():
        for _, parameter in policy.adapter_parameters():
            parameter.add_(1.0)
        policy.model(input_ids=torch.arange(3, 40)[None])
    assert base_fingerprint(policy) == before == base_fingerprint(packed_policy())
    weight = next(iter(packed_layers(policy.model).values())).weight
    for tensor in (weight.data, weight.quant_state.absmax, weight.quant_state.state2.absmax):
        kept = tensor.clone()
        tensor.view(torch.uint8)[0] ^= 1
        assert base_fingerprint(policy) != before
        tensor.copy_(kept)
    assert base_fingerprint(policy) == before


def test_the_sampler_runs_the_policy_itself_and_follows_it():
    """A merged copy would have to be packed again, which is another model."""
    config = small_config(load_in_4bit=True)
    parts = tiny_parts(config)
    parts.scorer.close()
    assert parts.sampler.replica.kind == "shared"
    before = base_fingerprint(parts.policy)
    prompts = [parts.prompts.first(problem.question) for problem in parts.train[:3]]
    assert probe(parts.policy, parts.sampler, prompts, [1.0, 0.5], 12).failure() is None
    assert base_fingerprint(parts.policy) == before
    with pytest.raises(SamplerError, match="pack them into 4 bits in another way"):
        make_sampler(config.model_copy(update={"sampler": "vllm"}), parts.policy, parts.prompts, 300)


@pytest.mark.parametrize("kind", ["shared", "auto"])
def test_decoding_in_low_precision_computes_as_the_update_does(kind):
    policy = packed_policy(dtype="bfloat16")
    with Replica(policy.model, kind) as model, torch.no_grad():
        assert torch.is_autocast_enabled("cpu")
        inside = model(input_ids=torch.arange(3, 40)[None]).logits
    assert not torch.is_autocast_enabled("cpu")
    assert inside.dtype == torch.bfloat16


# In a run

RUN = SMALL | {"load_in_4bit": True, "max_steps": 2, "save_steps": 1, "progress": "off"}
RUN |= {"max_completion_length": 12, "eval_size": 1, "parity_steps": 0}


def test_a_resumed_run_is_bit_equal(tmp_path):
    settings = RUN | {"learning_rate": 1e-3, "warmup_ratio": 0.0}
    resumed, straight = tmp_path / "resumed", tmp_path / "straight"
    train(resolve(settings | {"output_dir": str(resumed), "max_minutes": 1e-6}))
    assert steps(resumed) == [1]
    for folder in (resumed, straight):
        summary = train(resolve(settings | {"output_dir": str(folder)}))
        assert (summary["steps"], summary["stopped"]) == (2, None)
    assert_same(straight, resumed)
    policies = [load_policy(ModelOptions(load_in_4bit=True), 0, straight / "adapter"), packed_policy()]
    logits = [p.model(input_ids=torch.arange(3, 40)[None]).logits for p in policies]
    assert not torch.equal(*logits)


# Weights that were packed before they were saved


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "tiny-bnb-4bit"
    policy = load_policy(ModelOptions(load_in_4bit=True, dtype="bfloat16"), 0)
    shutil.copytree(MODEL_DIR, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    policy.model.unload().save_pretrained(folder)
    return folder


def test_packed_weights_are_recognised_and_computed_in_the_type_of_this_machine(packed_folder):
    assert json.loads((packed_folder / "config.json").read_text())["quantization_config"]["load_in_4bit"]
    assert inputs.model_findings(ModelOptions(model=str(packed_folder))) == []
    policy = load_policy(ModelOptions(model=str(packed_folder)), 0)
    fresh = load_policy(ModelOptions(load_in_4bit=True, dtype="bfloat16"), 0)
    assert is_packed(policy.model.config)
    assert policy.model.get_base_model().dtype == torch.float32
    assert {layer.compute_dtype for layer in packed_layers(policy.model).values()} == {torch.float32}
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32, torch.uint8}
    ours, theirs = packed_layers(policy.model), packed_layers(fresh.model)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name].weight.data, theirs[name].weight.data)
    one, other = (base_fingerprint(load_policy(ModelOptions(model=str(packed_folder)), 0)) for _ in range(2))
    assert one == other
    gradients(policy.model, None)


@pytest.mark.parametrize(
    ("packing", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "a way of their own: gptq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, "8 bits by bitsandbytes"),
    ],
)
def test_other_packings_are_refused_before_anything_loads(tmp_path, packing, said):
    shutil.copytree(MODEL_DIR, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": packing}))
    options = ModelOptions(model=str(tmp_path / "model"))
    (finding,) = inputs.model_findings(options)
    assert said in finding
    with pytest.raises(ModelError, match=said):
        load_policy(options, 0)


def test_a_missing_package_is_named_first(monkeypatch, packed_folder):
    monkeypatch.setattr(inputs, "find_spec", lambda name: None)
    for options in (
        ModelOptions(load_in_4bit=True),
        ModelOptions(model="unsloth/Qwen2-1.5B-Instruct-bnb-4bit"),
        ModelOptions(model=str(packed_folder)),
    ):
        (finding,) = inputs.model_findings(options)
        assert "pip install 'bitsandbytes" in finding
    (finding,) = inputs.model_findings(ModelOptions(load_in_4bit=True, device="mps"))[:1]
    assert "mps" in finding


def test_without_packing_nothing_is_packed():
    model = load_policy(ModelOptions(), 0).model
    assert not is_packed(model.config)
    assert not packed_layers(model)
    assert AutoModelForCausalLM.from_pretrained(MODEL_DIR).dtype == torch.bfloat16
