"""The fingerprint of the frozen weights: blind to the adapter, sharp to one bit of anything else."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from bad_parts import SMALL, assert_same, steps
from models import IdTokenizer, make_model, make_policy
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_parts import small_config, tiny_parts

from igrpo_lite.algorithms.rollout import RolloutCollector
from igrpo_lite.config.resolve import resolve
from igrpo_lite.errors import RunFolderError
from igrpo_lite.policy.fingerprint import base_fingerprint
from igrpo_lite.policy.loading import Policy
from igrpo_lite.tiny import MODEL_DIR
from igrpo_lite.training import train
from igrpo_lite.training.loop import Trainer
from igrpo_lite.training.update import PolicyUpdate

CHANGED = "the frozen weights of the model have changed during the run"


def as_policy(model) -> Policy:
    return Policy(model, IdTokenizer(), torch.device("cpu"), ())


def adapted(model, **settings) -> Policy:
    return as_policy(get_peft_model(model, LoraConfig(**{"r": 2, "target_modules": "all-linear"} | settings)))


def flip(tensor: torch.Tensor, bit: int) -> None:
    """Invert one bit of the last element, whatever its type."""
    tensor.detach().view(-1)[-1:].view(torch.uint8)[0] ^= 1 << bit


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_bit_of_any_tensor_is_seen(family, dtype):
    """The first family has its output layer tied to the embedding."""
    policy = as_policy(make_policy(family).to(dtype))
    before = base_fingerprint(policy)
    adapter = {name for name, _ in policy.adapter_parameters()}
    frozen = [(name, p) for name, p in policy.model.named_parameters() if name not in adapter]
    assert len(frozen) > 10
    seen = set()
    for name, parameter in frozen:
        flip(parameter, 0)
        seen.add(base_fingerprint(policy))
        flip(parameter, 0)
        assert base_fingerprint(policy) == before, name
    assert len(seen - {before}) == len(frozen)


def test_the_adapter_does_not_count():
    prints = {
        base_fingerprint(adapted(make_model("qwen2"), **settings))
        for settings in (
            {},
            {"r": 8},
            {"target_modules": ["q_proj"]},
            {"target_modules": ["v_proj"], "layers_to_transform": [2]},
        )
    }
    policy = adapted(make_model("qwen2"))
    with torch.no_grad():
        for _, parameter in policy.adapter_parameters():
            parameter.normal_()
    assert prints == {base_fingerprint(policy)}
    assert base_fingerprint(adapted(make_model("smollm"))) not in prints


def test_names_shapes_and_types_count():
    before = base_fingerprint(adapted(make_model("llama")))
    swapped = make_model("llama")
    one, other = (layer.mlp for layer in swapped.model.layers[:2])
    one.gate_proj, other.gate_proj = other.gate_proj, one.gate_proj
    assert base_fingerprint(adapted(swapped)) != before
    assert base_fingerprint(adapted(make_model("llama").to(torch.bfloat16))) != before
    wider = make_model("llama")
    wider.lm_head.weight.data = wider.lm_head.weight.data.reshape(2 * wider.config.vocab_size, -1)
    assert base_fingerprint(adapted(wider)) != before


def test_saved_buffers_count_and_may_be_single_numbers():
    model = make_model("llama")
    model.register_buffer("scale", torch.tensor(2.5))
    model.register_buffer("flags", torch.tensor([True, False]))
    model.register_buffer("nothing", torch.empty(0))
    policy = adapted(model)
    before = base_fingerprint(policy)
    for name in ("scale", "flags"):
        flip(getattr(model, name), 0)
        assert base_fingerprint(policy) != before
        flip(getattr(model, name), 0)
    assert base_fingerprint(policy) == before


def test_a_tensor_that_is_a_view_of_another_has_the_same_fingerprint():
    """As when the weights are shared with an engine that keeps them stacked."""
    policy = adapted(make_model("qwen2"))
    before = base_fingerprint(policy)
    for _, parameter in policy.model.named_parameters():
        if not parameter.requires_grad:
            parameter.data = torch.cat([torch.zeros_like(parameter), parameter.data])[len(parameter) :]
    assert base_fingerprint(policy) == before


@pytest.mark.parametrize("settings", [{}, {"algorithm": "grpo", "beta": 0.1, "gradient_checkpointing": True}])
def test_training_leaves_it_alone(settings):
    config = small_config(learning_rate=1e-2, warmup_ratio=0.0, **settings)
    parts = tiny_parts(config)
    before = base_fingerprint(parts.policy)
    update = PolicyUpdate(parts.policy, config)
    collector = RolloutCollector(parts.sampler, parts.scorer, parts.prompts, config, 0)
    adapter = [p.detach().clone() for _, p in parts.policy.adapter_parameters()]
    for step in range(3):
        update.step(collector.collect(parts.train[3 * step : 3 * step + 3], step), step, 1e-2)
        parts.sampler.load_adapter()
    parts.scorer.close()
    assert not all(torch.equal(a, p) for a, (_, p) in zip(adapter, parts.policy.adapter_parameters(), strict=True))
    assert base_fingerprint(parts.policy) == before


# In a run

RUN = SMALL | {"max_steps": 2, "save_steps": 1, "progress": "off"}


def copy_of_the_model(folder):
    """With one weight changed by one bit, and the real one."""
    shutil.copytree(MODEL_DIR, folder)
    (file,) = folder.glob("*.safetensors")
    original = file.read_bytes()
    tensors = load_file(file)
    flip(tensors[sorted(tensors)[3]], 0)
    save_file(tensors, file, metadata={"format": "pt"})
    changed = file.read_bytes()
    file.write_bytes(original)
    return file, original, changed


def test_a_changed_model_is_not_gone_on_with(tmp_path):
    file, original, changed = copy_of_the_model(tmp_path / "model")
    settings = RUN | {"model": str(tmp_path / "model"), "output_dir": str(tmp_path / "run")}
    train(resolve(settings | {"max_minutes": 1e-6}))
    assert steps(tmp_path / "run") == [1]
    samples = (tmp_path / "run" / "samples.jsonl").read_bytes()
    file.write_bytes(changed)
    with pytest.raises(RunFolderError, match=r"the weights of .*model are not those .*run was started with .*--fresh"):
        train(resolve(settings))
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == samples
    file.write_bytes(original)
    assert train(resolve(settings))["steps"] == 2
    straight = resolve(settings | {"output_dir": str(tmp_path / "straight")})
    train(straight)
    assert_same(tmp_path / "straight", tmp_path / "run")


def test_a_checkpoint_that_knows_of_no_fingerprint_is_gone_on_with(tmp_path):
    settings = RUN | {"output_dir": str(tmp_path / "run")}
    train(resolve(settings | {"max_minutes": 1e-6}))
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        state = json.loads((folder / "state.json").read_text())
        for later in ("base", "drafted", "rollouts"):
            del state[later]
        (folder / "state.json").write_text(json.dumps(state))
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["files"]["state.json"]
        (folder / "manifest.json").write_text(json.dumps(manifest))
    summary = train(resolve(settings))
    assert (summary["steps"], summary["stopped"]) == (2, None)


def test_a_base_that_changes_in_mid_run_is_reported(say, tmp_path, monkeypatch):
    step = Trainer._step

    def careless(trainer: Trainer) -> None:
        step(trainer)
        flip(next(p for p in trainer.parts.policy.model.parameters() if not p.requires_grad), 0)

    monkeypatch.setattr(Trainer, "_step", careless)
    code, _, shown = say(max_steps=1, parity_steps=0)
    assert code == 3
    assert CHANGED in " ".join(shown.split())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["stopped_by"] == "diagnosis"
    assert CHANGED in summary["stopped"]
