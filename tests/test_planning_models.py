"""Presets against transformers' own classes and PEFT, and shapes read from configurations."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from planning_parts import adapted, meta_model, transformers_config

from igrpo_lite.errors import ConfigError, ModelError
from igrpo_lite.planning.gpus import GPUS, find_gpu, gpu_of
from igrpo_lite.planning.memory import NF4_BYTES, adapted_layers, weight_bytes
from igrpo_lite.planning.models import MODELS, find_model, hub_id
from igrpo_lite.planning.shapes import read_shape, shape_of
from igrpo_lite.policy.loading import adapter_layers
from igrpo_lite.tiny import MODEL_DIR

# Parameters, and GiB in 16 bits and in NF4, counted once on the models' own configurations.
COUNTED = {
    "qwen2-0.5b": (494_032_768, 0.92, 0.43),
    "qwen2-1.5b": (1_543_714_304, 2.88, 1.06),
    "qwen2.5-0.5b": (494_032_768, 0.92, 0.43),
    "qwen2.5-1.5b": (1_543_714_304, 2.88, 1.06),
    "qwen2.5-3b": (3_085_938_688, 5.75, 1.91),
    "qwen2.5-7b": (7_615_616_512, 14.19, 5.17),
    "qwen2.5-math-1.5b": (1_543_714_304, 2.88, 1.06),
    "qwen2.5-math-7b": (7_615_616_512, 14.19, 5.17),
    "r1-1.5b": (1_777_088_000, 3.31, 1.50),
    "r1-7b": (7_615_616_512, 14.19, 5.17),
    "qwen3-0.6b": (596_049_920, 1.11, 0.50),
    "qwen3-1.7b": (1_720_574_976, 3.20, 1.26),
    "qwen3-4b": (4_022_468_096, 7.49, 2.47),
    "qwen3-8b": (8_190_735_360, 15.26, 5.66),
    "llama3.2-1b": (1_235_814_400, 2.30, 0.96),
    "llama3.2-3b": (3_212_749_824, 5.98, 2.09),
    "llama3.1-8b": (8_030_261_248, 14.96, 5.31),
    "gemma3-1b": (999_885_952, 1.86, 0.90),
    "gemma3-4b": (3_880_263_168, 7.23, 2.79),
    "phi4-mini": (3_836_021_760, 7.15, 2.69),
    "smollm2-135m": (134_515_008, 0.25, 0.10),
    "smollm2-360m": (361_821_120, 0.67, 0.24),
    "smollm2-1.7b": (1_711_376_384, 3.19, 0.96),
    "smollm3-3b": (3_075_098_624, 5.73, 1.84),
}
DISTINCT = {replace(model.shape, context=0): model for model in reversed(MODELS)}


def test_every_preset_is_counted():
    assert {model.alias for model in MODELS} == COUNTED.keys()
    for model in MODELS:
        parameters, sixteen, four = COUNTED[model.alias]
        assert model.shape.parameters == parameters
        assert weight_bytes(model.shape, 2, False) / 2**30 == pytest.approx(sixteen, abs=0.005)
        assert weight_bytes(model.shape, 2, True) / 2**30 == pytest.approx(four, abs=0.005)
    assert pytest.approx(0.5159, abs=5e-5) == NF4_BYTES


@pytest.mark.parametrize("model", DISTINCT.values(), ids=lambda model: model.alias)
def test_parameters_are_those_of_transformers_classes(model):
    """On the meta device: all weights, and with two layers those that PEFT adds."""
    real = meta_model(model.alias, model.shape)
    assert sum(parameter.numel() for parameter in real.parameters()) == model.shape.parameters
    shape = replace(model.shape, layers=2)
    for targets in ("all-linear", ["q_proj", "v_proj"], ["o_proj", "down_proj"]):
        names = [targets] if isinstance(targets, str) else targets
        if shape.fused and "q_proj" in names:
            continue
        learned = adapted(meta_model(model.alias, shape), targets)
        trainable = sum(parameter.numel() for parameter in learned.parameters() if parameter.requires_grad)
        assert trainable == shape.lora_parameters(16, names)


@pytest.mark.parametrize("model", DISTINCT.values(), ids=lambda model: model.alias)
def test_a_configuration_gives_the_shape_back(model, tmp_path):
    """Also as transformers saves it, which leaves out what a class has by default."""
    transformers_config(model.alias, model.shape).save_pretrained(tmp_path)
    assert find_model(str(tmp_path)).shape == model.shape


def test_entries_that_are_left_out_are_asked_of_transformers(tmp_path):
    """As in google/gemma-3-4b-it: most of the text part are the class's defaults, which are that very model's."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    config = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(config | {"text_config": text | {"sliding_window": 1024}}))
    expected = find_model("gemma3-4b").shape
    assert read_shape(tmp_path / "config.json", "model") == expected


def test_the_bundled_model():
    shape = find_model(str(MODEL_DIR)).shape
    assert (shape.layers, shape.tied, shape.biases, shape.exact) == (4, True, "qkv", True)


LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 97,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    ("entries", "attribute", "value"),
    [
        ({}, "kv_heads", 4),
        ({}, "head_dim", 16),
        ({"head_dim": 32}, "head_dim", 32),
        ({"attention_bias": True}, "biases", "all"),
        ({"mlp_bias": True}, "mlp_bias", True),
        ({"model_type": "mistral", "sliding_window": 8}, "window", 8),
        ({"model_type": "mistral", "sliding_window": None}, "window", None),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": False}, "window", None),
        ({"model_type": "something new"}, "exact", False),
    ],
)
def test_configurations_of_the_llama_kind(entries, attribute, value):
    assert getattr(shape_of(LLAMA | entries), attribute) == value


def test_what_cannot_be_planned_for(tmp_path):
    with pytest.raises(ModelError, match="mixture of experts"):
        shape_of(LLAMA | {"num_experts": 8})
    with pytest.raises(ModelError, match="nothing about vocab_size"):
        shape_of({key: value for key, value in LLAMA.items() if key != "vocab_size"})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        find_model(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        find_model(str(tmp_path / "empty"))
    with pytest.raises(ModelError, match="none of w_qkv is in this model; it has q_proj"):
        find_model("qwen2-1.5b").shape.adapted(["w_qkv"])


def test_names():
    assert hub_id("qwen2-1.5b") == "Qwen/Qwen2-1.5B-Instruct"
    assert hub_id("someone/something") == "someone/something"
    base = find_model("Qwen/Qwen2-1.5B")
    assert (base.shape.context, base.shape.parameters) == (131072, 1_543_714_304)
    assert find_model("unsloth/Llama-3.2-1B-Instruct").shape == find_model("llama3.2-1b").shape
    four_bit = find_model("llama3.1-8b")
    assert four_bit.four_bit == "unsloth/Llama-3.1-8B-Instruct-bnb-4bit"
    assert four_bit.four_bit_dynamic == "unsloth/Llama-3.1-8B-Instruct-unsloth-bnb-4bit"
    assert find_model("smollm3-3b").four_bit == ""
    assert find_model("phi4-mini").targets == ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    names = [name.lower() for model in MODELS for name in model.ids]
    assert len(set(names)) == len(names)
    assert all(model.family for model in MODELS)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("qwen2-1.5", "did you mean qwen2-1.5b?"),
        ("Qwen/Qwen2-1.5B-Instructed", "did you mean Qwen/Qwen2-1.5B-Instruct?"),
        ("someone/else", "hf download someone/else config.json"),
        ("what", "see igrpo-lite models"),
    ],
)
def test_unknown_names(name, said):
    with pytest.raises(ModelError, match=re.escape(said)):
        find_model(name)


def test_a_cached_hub_model(tmp_path, monkeypatch):
    """A configuration that the Hugging Face cache already holds, laid out as the hub's client does."""
    snapshot = tmp_path / "models--someone--small" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text(json.dumps(LLAMA))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert find_model("someone/small").shape == shape_of(LLAMA)


@pytest.mark.parametrize("spec", ["all", "last half", "last third", "last-quarter", "last 1", "last 99"])
@pytest.mark.parametrize("layers", [1, 4, 26, 28])
def test_layers_are_those_that_loading_adapts(spec, layers):
    expected = adapter_layers(spec, layers)
    assert adapted_layers(spec, layers) == (layers if expected is None else len(expected))


def test_gpus_by_name():
    assert find_gpu("T4").bfloat16 is False
    assert find_gpu("NVIDIA GeForce RTX 3090") == find_gpu("3090") == find_gpu("rtx-3090")
    assert find_gpu("a100").name == "A100 80GB"
    with pytest.raises(ConfigError, match=r"P100 has compute capability 6\.0; .* choose another GPU"):
        find_gpu("p100")
    with pytest.raises(ConfigError, match=r"did you mean 4090\?"):
        find_gpu("rtx 4091")
    for gpu in GPUS:
        assert gpu.source
        assert (gpu.capability < (7, 0)) == bool(gpu.refusal)


@pytest.mark.parametrize(
    ("name", "gib", "capability", "row"),
    [
        ("Tesla T4", 14.75, (7, 5), "T4"),
        ("NVIDIA GeForce RTX 3060", 11.76, (8, 6), "RTX 3060 12GB"),
        ("NVIDIA A100-SXM4-40GB", 39.5, (8, 0), "A100 40GB"),
        ("NVIDIA A100 80GB PCIe", 79.25, (8, 0), "A100 80GB"),
        ("NVIDIA H100 PCIe", 79.1, (9, 0), "H100 PCIe"),
        ("NVIDIA H100 80GB HBM3", 79.1, (9, 0), "H100 SXM"),
        ("NVIDIA H200", 139.8, (9, 0), "H200"),
        ("NVIDIA L40S", 44.4, (8, 9), None),
        ("NVIDIA GeForce RTX 3060", 5.8, (8, 6), None),
        ("NVIDIA B300", 270.0, (10, 3), None),
    ],
)
def test_gpus_as_drivers_name_them(name, gib, capability, row):
    found = gpu_of(name, int(gib * 2**30), capability)
    assert found.memory_gib == pytest.approx(gib)
    assert found.capability == capability
    assert found.name == (row or name)
    assert (found.bandwidth is None) == (row is None)
