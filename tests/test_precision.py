"""What low-precision weights are computed in: right, smaller, and the same when activations are recomputed."""

from __future__ import annotations

import pytest
import torch
from models import make_model
from peft import LoraConfig, get_peft_model

from igrpo_lite.policy.loading import recompute_activations
from igrpo_lite.policy.logprobs import RowLayout, TreeLayout, chosen_logprobs
from igrpo_lite.policy.precision import low_precision
from igrpo_lite.policy.tree import Branch

LOW = [torch.bfloat16, torch.float16]


def adapted(family, dtype):
    model = make_model(family, scale=2.0).to(dtype)
    torch.manual_seed(2)
    policy = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)).eval()
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.2)
    return policy


def branches():
    generator = torch.Generator().manual_seed(3)
    prompt, *completions = (tuple(torch.randint(3, 90, (n,), generator=generator).tolist()) for n in (30, 20, 25, 25))
    return [Branch(prompt, ids, tuple(range(len(ids)))) for ids in completions]


def learned(policy, layout):
    """Log-probabilities, gradients as one vector, and bytes that the forward pass keeps for the backward pass."""
    policy.zero_grad()
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs = chosen_logprobs(policy.get_base_model(), branches(), layout).logprobs
    (logprobs * torch.linspace(-1, 1, 3)[:, None]).sum().backward()
    frozen = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    found = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert {grad.dtype for grad in found.values()} == {torch.float32}
    vector = torch.cat([found[name].flatten() for name in sorted(found)])
    return logprobs.detach(), vector, sum(size for place, size in kept.items() if place not in frozen)


def distance(found, exact):
    return float((found.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("layout", [TreeLayout(), RowLayout()], ids=lambda layout: type(layout).__name__)
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("dtype", LOW)
def test_as_exact_as_with_the_adapter_in_float32_and_smaller(family, dtype, layout, monkeypatch):
    exact_logprobs, exact, _ = learned(adapted(family, dtype).float(), layout)  # the same rounded weights
    policy = adapted(family, dtype)
    logprobs, gradient, kept = learned(policy, layout)
    with monkeypatch.context() as patched:
        patched.setattr("igrpo_lite.policy.logprobs.low_precision", lambda model: torch.enable_grad())
        plain_logprobs, plain, plainly_kept = learned(policy, layout)
    assert kept < 0.8 * plainly_kept
    assert distance(gradient, exact) < max(1.3 * distance(plain, exact), 1e-3)
    gap, plain_gap = ((found - exact_logprobs).abs().mean() for found in (logprobs, plain_logprobs))
    assert gap < 1.3 * plain_gap


@pytest.mark.parametrize("dtype", LOW)
def test_recomputed_activations_are_the_same(dtype):
    policy = adapted("qwen2", dtype)
    expected = learned(policy, TreeLayout())
    recompute_activations(policy)
    policy.train()
    found = learned(policy, TreeLayout())
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_float32_is_left_alone():
    policy = adapted("qwen2", torch.float32)
    with low_precision(policy.get_base_model()):
        assert not torch.is_autocast_enabled("cpu")


def test_called_without_autocast_the_model_still_works():
    policy = adapted("qwen2", torch.bfloat16)
    ids = torch.arange(3, 20)[None]
    before = policy(input_ids=ids).logits
    with low_precision(policy.get_base_model()):
        inside = policy(input_ids=ids).logits
    assert inside.dtype == torch.bfloat16
    assert torch.equal(policy(input_ids=ids).logits, before)
