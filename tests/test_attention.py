"""Grouped attention against transformers' own, values and gradients."""

from __future__ import annotations

import pytest
import torch
from models import VOCAB, make_model
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from igrpo_lite.policy import causal_attention
from igrpo_lite.policy.attention import GROUPED_SDPA, grouped_attention, register


class Layer(nn.Module):
    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("rows", [1, 3])
def test_equal_to_sdpa(groups, length, rows):
    torch.manual_seed(0)
    query = torch.randn(3, 4, length, 8, requires_grad=True)
    key, value = (torch.randn(3, 4 // groups, 9, 8, requires_grad=True) for _ in range(2))
    mask = torch.rand(rows, 1, length, 9) > 0.3
    mask[..., 0] = True
    outputs, gradients = [], []
    for function in (sdpa_attention_forward, grouped_attention):
        output, _ = function(Layer(groups), query, key, value, mask, scaling=0.3)
        outputs.append(output)
        gradients.append(torch.autograd.grad((output**3).sum(), (query, key, value)))
    torch.testing.assert_close(outputs[0], outputs[1])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_whole_models_agree_with_and_without_a_mask():
    model = make_model("qwen3", attention="sdpa")
    ids = torch.randint(VOCAB, (2, 7))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    expected = [model(input_ids=ids).logits, model(input_ids=ids, attention_mask=mask).logits]
    model.set_attn_implementation(register(model.config))
    assert model.config._attn_implementation == GROUPED_SDPA
    torch.testing.assert_close(model(input_ids=ids).logits, expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        model(input_ids=ids, attention_mask=mask).logits[:, 3:], expected[1][:, 3:], rtol=1e-4, atol=1e-4
    )


def test_capped_scores_are_those_of_plain_attention():
    """Gemma 2's. SDPA knows no cap: transformers 5.17 left it out in silence, 5.24 refuses."""
    model = make_model("gemma2")
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 0.5
    ids = torch.randint(VOCAB, (2, 13))
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[1, 9:] = 0

    def found(**arguments):
        logits = model(input_ids=ids, **arguments).logits[mask.bool()]
        return logits.detach(), *torch.autograd.grad(logits.square().mean(), list(model.parameters()))

    ours = found(), found(attention_mask=mask)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    again = found(attention_mask=mask)
    model.eval()
    model.set_attn_implementation("eager")
    for made, expected in zip((*ours, again), (found(), *[found(attention_mask=mask)] * 2), strict=True):
        for one, other in zip(made, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_scores_are_made_again_in_the_backward_pass():
    query, key = (torch.randn(1, heads, 64, 8, requires_grad=True) for heads in (4, 2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        grouped_attention(Layer(2), query, key, key, None, softcap=50.0)
    assert sum(kept) == query.numel() + 2 * key.numel()


def test_attention_with_sinks_is_refused():
    """What our function would leave out in silence, transformers' own check of SDPA must go on to catch."""
    config = GptOssConfig(num_hidden_layers=1, hidden_size=32, vocab_size=VOCAB, num_local_experts=2)
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        AutoModelForCausalLM.from_config(config, attn_implementation=register(config))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_copied_keys_give_the_same(groups, monkeypatch):
    """As on GPUs below capability 8.0: no call with shared keys is left, values and gradients are the same."""
    torch.manual_seed(0)
    query = torch.randn(2, 4, 6, 8, requires_grad=True)
    key, value = (torch.randn(2, 4 // groups, 6, 8, requires_grad=True) for _ in range(2))
    shared, outputs = [], []
    real = nn.functional.scaled_dot_product_attention

    def sdpa(*arguments, **kwargs):
        shared.append(arguments[0].shape[1] != arguments[1].shape[1])
        return real(*arguments, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", sdpa)
    for copies in (False, True):
        monkeypatch.setattr(causal_attention, "copies_keys", lambda device, copies=copies: copies)
        output, _ = grouped_attention(Layer(groups), query, key, value, None, scaling=0.3)
        outputs.append((output, *torch.autograd.grad((output**3).sum(), (query, key, value))))
    assert shared == [groups > 1, False]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-6)


def test_a_gpu_of_capability_7_5_copies_keys(monkeypatch):
    for capability, copies in (((7, 5), True), ((8, 0), False), ((9, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert causal_attention.copies_keys(torch.device("cuda")) == copies
    assert not causal_attention.copies_keys(torch.device("cpu"))
