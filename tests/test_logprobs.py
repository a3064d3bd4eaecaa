"""Log-probabilities, entropies and gradients of the update against the plainest computation there is."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, VOCAB, make_policy

from igrpo_lite.policy import logprobs as lp

FULL_ATTENTION = [family for family in FAMILIES if family not in ("mistral-window", "gemma2")]


def make_group(seed: int, lengths: list[int], prompt: int = 12) -> tuple[list[int], list[list[int]]]:
    r = random.Random(seed)
    return [r.randrange(VOCAB) for _ in range(prompt)], [[r.randrange(VOCAB) for _ in range(n)] for n in lengths]


def one_by_one(policy, prompt, completion, temperature):
    """Full logits of one unpadded sequence: the oracle."""
    logits = policy(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].float() / temperature
    logprobs = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, torch.tensor(completion)[:, None])[:, 0], entropy


def adapter_gradients(policy):
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("family", "layout"),
    [(family, lp.shared_prefix) for family in FULL_ATTENTION] + [(family, lp.rows) for family in FAMILIES],
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equal_to_separate_sequences(family, layout, temperature):
    policy = make_policy(family)
    prompt, completions = make_group(0, [5, 1, 14, 14, 9])
    completions[3] = completions[2]  # a duplicate
    weights = [torch.randn(len(c)) for c in completions]

    policy.zero_grad()
    expected = [one_by_one(policy, prompt, c, temperature) for c in completions]
    sum((logprobs * w).sum() for (logprobs, _), w in zip(expected, weights, strict=True)).backward()
    gradients = adapter_gradients(policy)

    policy.zero_grad()
    found = lp.completion_logprobs(policy.get_base_model(), prompt, completions, temperature, layout)
    total = 0.0
    for row, ((logprobs, entropy), weight) in enumerate(zip(expected, weights, strict=True)):
        n = len(completions[row])
        torch.testing.assert_close(found.logprobs[row, :n], logprobs, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(found.entropies[row, :n], entropy, rtol=1e-5, atol=2e-5)
        assert found.mask[row].tolist() == [True] * n + [False] * (14 - n)
        total = total + (found.logprobs[row, :n] * weight).sum()
    total.backward()
    for name, gradient in adapter_gradients(policy).items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-4 * float(gradients[name].abs().max()))


def test_layout_is_chosen_by_what_the_model_can():
    for family in FULL_ATTENTION:
        assert lp.best_layout(make_policy(family).get_base_model()) is lp.shared_prefix
    assert lp.best_layout(make_policy("mistral-window").get_base_model()) is lp.rows
    assert lp.best_layout(make_policy("gemma2").get_base_model()) is lp.rows
    recomputed = make_policy("llama").get_base_model()
    recomputed.gradient_checkpointing_enable()
    assert lp.best_layout(recomputed) is lp.rows


def test_gradient_checkpointing_gives_the_same_gradients():
    prompt, completions = make_group(1, [6, 3, 8])
    gradients = []
    for checkpointed in (False, True):
        policy = make_policy("qwen2").train()
        if checkpointed:
            policy.gradient_checkpointing_enable()
            policy.enable_input_require_grads()
        lp.completion_logprobs(policy.get_base_model(), prompt, completions, 1.0, lp.rows).logprobs.sum().backward()
        gradients.append(adapter_gradients(policy))
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-5, atol=1e-6)


def test_chunked_head_equals_one_piece(monkeypatch):
    prompt, completions = make_group(2, [9, 4, 13])
    results = []
    for chunk in (1024, 5):
        monkeypatch.setattr(lp, "HEAD_CHUNK_TOKENS", chunk)
        policy = make_policy("llama")
        found = lp.completion_logprobs(policy.get_base_model(), prompt, completions, 0.9)
        (found.logprobs**2).sum().backward()
        results.append((found.logprobs.detach(), found.entropies, adapter_gradients(policy)))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])
    for name in results[0][2]:
        scale = float(results[0][2][name].abs().max())
        torch.testing.assert_close(results[0][2][name], results[1][2][name], rtol=1e-4, atol=1e-5 * scale)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 10_000))
def test_both_layouts_agree_on_any_group(prompt_length, lengths, seed):
    policy = _POLICY
    prompt, completions = make_group(seed, lengths, prompt_length)
    with torch.no_grad():
        a = lp.completion_logprobs(policy.get_base_model(), prompt, completions, 1.0, lp.shared_prefix)
        b = lp.completion_logprobs(policy.get_base_model(), prompt, completions, 1.0, lp.rows)
    torch.testing.assert_close(a.logprobs, b.logprobs, rtol=1e-5, atol=2e-5)


_POLICY = make_policy("qwen3")
