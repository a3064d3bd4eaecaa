"""Loading: what is trained, what stays frozen, what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from models import FAMILIES, make_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from igrpo_lite.config import ModelOptions
from igrpo_lite.errors import ModelError
from igrpo_lite.policy import loading
from igrpo_lite.policy.heads import check_split, split_heads
from igrpo_lite.policy.loading import adapter_layers, load_policy, load_tokenizer, pick_device, pick_dtype
from igrpo_lite.tiny import MODEL_DIR


@pytest.mark.parametrize("family", FAMILIES)
def test_backbone_and_head_are_the_model(family):
    model = make_model(family)
    assert check_split(model)
    backbone, head = split_heads(model)
    ids = torch.randint(90, (2, 9))
    with torch.no_grad():
        logits = head(backbone(input_ids=ids).last_hidden_state)
    torch.testing.assert_close(logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_only_the_adapter_is_trainable_and_alpha_defaults_to_rank():
    policy = load_policy(ModelOptions(lora_r=4), seed=0)
    names = [name for name, _ in policy.adapter_parameters()]
    assert names
    assert all("lora_" in name for name in names)
    config = policy.model.peft_config["default"]
    assert (config.r, config.lora_alpha) == (4, 4)
    assert policy.tokenizer.eos_token_id in policy.stop_ids
    assert torch.get_num_threads() == 1


def test_the_adapter_depends_on_the_seed_alone():
    torch.manual_seed(123)
    first = dict(load_policy(ModelOptions(), seed=7).adapter_parameters())
    torch.rand(10)
    second = dict(load_policy(ModelOptions(), seed=7).adapter_parameters())
    other = dict(load_policy(ModelOptions(), seed=8).adapter_parameters())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_dropout_is_off_in_sampling_and_update_alike(tmp_path):
    """Noise between the policy that samples and the one that is scored would pass for a change of the policy."""
    config = GPT2Config(
        vocab_size=575, n_positions=256, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.3, attn_pdrop=0.3
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(tmp_path)
    policy = load_policy(ModelOptions(model=str(tmp_path), lora_target_modules=["c_attn"]), 0)
    policy.model.train()
    ids = torch.tensor([[4, 5, 6, 7]])
    assert torch.equal(policy.model(input_ids=ids).logits, policy.model(input_ids=ids).logits)


def test_dtype_by_device():
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    assert pick_device("cpu").type == "cpu"


def test_bad_devices_and_models_are_named(tmp_path):
    with pytest.raises(ModelError, match="device 'toaster'"):
        pick_device("toaster")
    with pytest.raises(ModelError, match="nowhere/at-all"):
        load_policy(ModelOptions(model="nowhere/at-all"), 0)
    shutil.copytree(MODEL_DIR, tmp_path / "no-weights", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ModelError, match="no-weights"):
        load_policy(ModelOptions(model=str(tmp_path / "no-weights")), 0)


def test_not_a_causal_language_model(tmp_path):
    BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    ).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(tmp_path)
    with pytest.raises(ModelError):
        load_policy(ModelOptions(model=str(tmp_path)), 0)


def test_recurrent_layers_are_refused(tmp_path):
    shutil.copytree(MODEL_DIR, tmp_path / "hybrid")
    file = tmp_path / "hybrid" / "config.json"
    config = json.loads(file.read_text())
    config["layer_types"] = ["linear_attention", *["full_attention"] * (config["num_hidden_layers"] - 1)]
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="linear_attention"):
        load_policy(ModelOptions(model=str(tmp_path / "hybrid")), 0)


def test_a_tokenizer_without_end_is_refused(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["eos_token"] = None
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        load_tokenizer(ModelOptions(model=str(tmp_path)))


def test_lora_targets_that_do_not_exist():
    with pytest.raises(ModelError, match="lora_target_modules"):
        load_policy(ModelOptions(lora_target_modules=["no_such_layer"]), 0)


@pytest.mark.parametrize(
    ("spec", "layers", "expected"),
    [
        ("all", 24, None),
        ("last half", 24, range(12, 24)),
        ("last third", 24, range(16, 24)),
        ("last-third", 28, range(19, 28)),
        ("last quarter", 24, range(18, 24)),
        ("last 5", 24, range(19, 24)),
        ("last 12", 24, range(12, 24)),
        ("last 99", 24, range(24)),
        ("last quarter", 1, range(1)),
        ("last third", 4, range(3, 4)),
    ],
)
def test_layers_that_get_an_adapter(spec, layers, expected):
    assert adapter_layers(spec, layers) == (None if expected is None else list(expected))


def adapted(policy):
    return {name.split(".lora_")[0] for name, _ in policy.adapter_parameters()}


def test_an_adapter_on_the_last_layers_is_the_whole_one_without_the_others():
    everywhere, last = (load_policy(ModelOptions(lora_layers=spec), 0) for spec in ("all", "last half"))
    assert adapted(last) == {name for name in adapted(everywhere) if ".layers.2." in name or ".layers.3." in name}
    assert 0 < len(adapted(last)) == len(adapted(everywhere)) / 2
    one = load_policy(ModelOptions(lora_layers="last 1", lora_target_modules=["q_proj", "v_proj"]), 0)
    assert {name.partition(".layers.")[2] for name in adapted(one)} == {"3.self_attn.q_proj", "3.self_attn.v_proj"}


def test_layers_of_other_names_and_kinds(tmp_path):
    """GPT-2 calls its layers ``h``, and its linear layers are not ``nn.Linear``."""
    GPT2LMHeadModel(GPT2Config(vocab_size=575, n_positions=64, n_embd=32, n_layer=3, n_head=2)).save_pretrained(
        tmp_path
    )
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(tmp_path)
    policy = load_policy(ModelOptions(model=str(tmp_path), lora_layers="last 1"), 0)
    found = {name.partition("transformer.")[2] for name in adapted(policy)}
    assert found == {"h.2.attn.c_attn", "h.2.attn.c_proj", "h.2.mlp.c_fc", "h.2.mlp.c_proj"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"]])
def test_an_adapter_on_the_output_layer_is_refused(tmp_path, tied, targets):
    shutil.copytree(MODEL_DIR, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(tmp_path / "model")
    options = ModelOptions(model=str(tmp_path / "model"), lora_target_modules=targets)
    with pytest.raises(ModelError, match="lora_target_modules: the output layer"):
        load_policy(options, 0)
    assert adapted(load_policy(options.model_copy(update={"lora_target_modules": ["q_proj"]}), 0))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cudnns_attention_is_off_before_a_model_reaches_a_gpu(device, monkeypatch):
    """Loads for a GPU as far as a machine without one can: to the first tensor that goes there."""
    monkeypatch.setattr(loading, "pick_device", lambda name: torch.device(device))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    found = []

    def to(module, place):
        found.append((place.type, torch.backends.cuda.cudnn_sdp_enabled()))
        raise RuntimeError("no such device")

    monkeypatch.setattr(PreTrainedModel, "to", to)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        with pytest.raises(RuntimeError, match="no such device"):
            load_policy(ModelOptions(), 0)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    assert found == [(device, device == "cpu")]
