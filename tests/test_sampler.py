"""The plain sampler against generate() and against the model's own log-probabilities."""

from __future__ import annotations

import dataclasses
import math
import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import FAMILIES, VOCAB, IdTokenizer, make_model, make_policy
from peft import LoraConfig, get_peft_model

from igrpo_lite.sampling.base import Request, request_seed
from igrpo_lite.sampling.replica import Replica, can_merge
from igrpo_lite.sampling.transformers import TransformersSampler, _Rows, cut_off
from igrpo_lite.types import Completion, Prompt

STOP = (1, 2, 3)


def make_prompts(count: int, shortest: int = 3, longest: int = 30) -> list[Prompt]:
    r = random.Random(0)
    return [Prompt("", tuple(r.randrange(4, VOCAB) for _ in range(r.randint(shortest, longest)))) for _ in range(count)]


def make_sampler(policy, kind="auto", slots=32, stop=STOP) -> TransformersSampler:
    return TransformersSampler(Replica(policy, kind), IdTokenizer(), stop, slots)


def sampled_requests(prompts: list[Prompt], count: int, limit: int = 20, temperature: float = 1.0) -> list[Request]:
    return [
        Request(prompt, request_seed(0, i, j), limit, temperature)
        for i, prompt in enumerate(prompts)
        for j in range(count)
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["merged", "shared"])
def test_greedy_equals_generate(family, kind):
    policy, prompts = make_policy(family), make_prompts(6)
    completions = make_sampler(policy, kind).run([Request(prompt, 0, 20, 0.0) for prompt in prompts])
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt.ids])
        expected = policy.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=list(STOP),
            pad_token_id=0,
        )[0, ids.shape[1] :]
        assert list(completion.ids) == expected.tolist()
        assert completion.finish == ("stop" if completion.ids[-1] in STOP else "length")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_the_models_own(family, temperature):
    policy, prompts = make_policy(family), make_prompts(4)
    requests = sampled_requests(prompts, 3, temperature=temperature)
    for request, completion in zip(requests, make_sampler(policy).run(requests), strict=True):
        with torch.no_grad():
            logits = policy(input_ids=torch.tensor([request.prompt.ids + completion.ids])).logits[0].float()
        logprobs = torch.log_softmax(logits[len(request.prompt.ids) - 1 : -1] / temperature, dim=-1)
        expected = logprobs.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=1e-4, atol=1e-4)


def test_samples_do_not_depend_on_the_batch():
    policy, prompts = make_policy("qwen2"), make_prompts(5)
    requests = sampled_requests(prompts, 6)
    reference = make_sampler(policy, slots=64).run(requests)
    for slots in (1, 3, 7, 30):
        assert [c.ids for c in make_sampler(policy, slots=slots).run(requests)] == [c.ids for c in reference]
    backwards = make_sampler(policy, slots=4).run(requests[::-1])
    assert [c.ids for c in backwards[::-1]] == [c.ids for c in reference]
    assert len({c.ids for c in reference}) > 20, "seeds of one prompt must differ"


def test_sampling_follows_the_distribution():
    """4,000 first tokens against the model's probabilities: chi-square over the likely tokens."""
    policy, prompt = make_model("llama", scale=1.5), make_prompts(1)[0]
    sampler = make_sampler(_as_policy(policy), slots=256, stop=())
    completions = sampler.run([Request(prompt, request_seed("chi", i), 1, 0.8) for i in range(4000)])
    with torch.no_grad():
        probabilities = torch.softmax(policy(input_ids=torch.tensor([prompt.ids])).logits[0, -1].float() / 0.8, -1)
    counts = torch.bincount(torch.tensor([c.ids[0] for c in completions]), minlength=VOCAB).double()
    likely = probabilities * 4000 > 5
    expected = 4000 * probabilities[likely].double()
    statistic = float(((counts[likely] - expected) ** 2 / expected).sum())
    freedom = int(likely.sum())
    assert freedom > 20
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


def brute_force_cut(left: list[float], top_p: float) -> list[float]:
    """One token after the other, the likeliest first, until they reach ``top_p``."""
    kept, total = [0.0] * len(left), 0.0
    for token in sorted(range(len(left)), key=lambda token: -left[token]):
        if total >= top_p or not left[token]:
            break
        kept[token] = left[token]
        total += left[token]
    return [p / math.fsum(kept) for p in kept]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.sampled_from([0.05, 0.3, 0.5, 0.77, 0.9, 1.0]))
def test_what_is_cut_off_by_brute_force(weights, top_p):
    """Equal weights among them. Where a limit is met exactly, rounding may decide either way."""
    probabilities = [weight / sum(weights) for weight in weights]
    logprobs = torch.tensor([probabilities], dtype=torch.float64).log()
    found = cut_off(logprobs, torch.tensor([[top_p]]).double())[0].exp()
    ways = [torch.tensor(brute_force_cut(probabilities, top_p + sign * 1e-9 * (top_p < 1))) for sign in (-1, 1)]
    equal = [torch.allclose(found, way.double(), rtol=1e-6, atol=1e-9) for way in ways]
    assert all(equal) if torch.equal(*ways) else any(equal)


@pytest.mark.parametrize("top_p", [0.99, 0.9, 0.7, 0.5, 1e-6])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_cut_off_logprobs_are_of_the_distribution_sampled_from(top_p, temperature):
    policy, prompts = make_policy("qwen3"), make_prompts(3)
    requests = [
        dataclasses.replace(request, top_p=top_p) for request in sampled_requests(prompts, 3, temperature=temperature)
    ]
    for request, completion in zip(requests, make_sampler(policy).run(requests), strict=True):
        with torch.no_grad():
            logits = policy(input_ids=torch.tensor([request.prompt.ids + completion.ids])).logits[0].double()
        full = torch.softmax(logits[len(request.prompt.ids) - 1 : -1] / temperature, dim=-1)
        for token, logprob, row in zip(completion.ids, completion.logprobs, full.tolist(), strict=True):
            expected = brute_force_cut(row, top_p)[token]
            assert expected > 0
            assert logprob == pytest.approx(math.log(expected), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("top_p", [0.9, 0.7])
def test_sampling_follows_the_cut_off_distribution(top_p):
    policy, prompt = make_model("llama", scale=1.5), make_prompts(1)[0]
    sampler = make_sampler(_as_policy(policy), slots=256, stop=())
    requests = [Request(prompt, request_seed("cut", i), 1, 0.8, top_p=top_p) for i in range(4000)]
    with torch.no_grad():
        logits = policy(input_ids=torch.tensor([prompt.ids])).logits[0, -1].double() / 0.8
    probabilities = torch.tensor(brute_force_cut(torch.softmax(logits, -1).tolist(), top_p)).double()
    counts = torch.bincount(torch.tensor([c.ids[0] for c in sampler.run(requests)]), minlength=VOCAB).double()
    assert counts[probabilities == 0].sum() == 0
    likely = probabilities * 4000 > 5
    expected = 4000 * probabilities[likely]
    freedom = int(likely.sum())
    assert 5 < freedom < VOCAB
    assert float(((counts[likely] - expected) ** 2 / expected).sum()) < freedom + 4 * (2 * freedom) ** 0.5


def test_what_was_cut_off_is_never_sampled_however_sums_are_rounded(monkeypatch):
    """CUDA's parallel sums need not rise where something is added, nor stay where nothing is."""
    few, sums = 2.0**-20, torch.tensor([[0.0, 0.25, 0.25, 1.0, 1.0]]).repeat(5, 1)
    sums[0, 0] = few  # a first token of probability 0
    sums[1, 2] += few  # one in the middle
    sums[2, 2:] = torch.tensor([0.25 - few, 1.0 - few, 1.0])  # after a fall; and one that ends the sums
    uniforms = torch.tensor([0.0, 0.25 + few / 2, 1.0 - few / 2, 0.25 - few / 2, 0.25])
    logits = torch.tensor([[-40.0, 0.0, -40.0, math.log(3), -40.0]]).repeat(5, 1)
    rows = _Rows(5, torch.device("cpu"))
    rows.append([Request(Prompt("", (4,)), 0, 1, 1.0, top_p=0.9)] * 5)
    rows.uniforms[:, 0] = uniforms
    monkeypatch.setattr(torch, "cumsum", lambda probabilities, dim: sums)
    rows.sample(logits, slice(0, 5))
    assert rows.last.tolist() == [1, 3, 3, 1, 3]
    torch.testing.assert_close(rows.logprobs[:, 0].exp(), torch.tensor([0.25, 0.75, 0.75, 0.25, 0.75]))


def test_cut_off_rows_leave_the_others_as_they_are():
    """Pure and greedy rows keep every bit, whatever stands beside them."""
    policy, prompts = make_policy("qwen2"), make_prompts(3)
    pure = sampled_requests(prompts, 2) + [Request(prompt, 0, 20, 0.0) for prompt in prompts]
    alone = make_sampler(policy).run(pure + sampled_requests(prompts, 2, temperature=0.9))
    beside = [dataclasses.replace(r, top_p=0.8) for r in sampled_requests(prompts, 2, temperature=0.9)]
    mixed = make_sampler(policy).run(pure + beside)
    assert [c.ids for c in mixed[:9]] == [c.ids for c in alone[:9]]
    assert [c.ids for c in mixed[9:]] != [c.ids for c in alone[9:]]
    greedy = [dataclasses.replace(r, top_p=0.8) for r in pure[6:]]
    assert make_sampler(policy).run(greedy) == make_sampler(policy).run(pure[6:])
    first = {(r.seed, r.prompt.ids, r.temperature): c.logprobs[0] for r, c in zip(pure, alone[:9], strict=True)}
    assert first == {(r.seed, r.prompt.ids, r.temperature): c.logprobs[0] for r, c in zip(pure, mixed[:9], strict=True)}


def test_cut_off_samples_do_not_depend_on_the_batch():
    policy, prompts = make_policy("qwen2"), make_prompts(4)
    requests = [
        dataclasses.replace(request, top_p=0.9 if place % 3 else 1.0)
        for place, request in enumerate(sampled_requests(prompts, 5))
    ]
    reference = [c.ids for c in make_sampler(policy, slots=64).run(requests)]
    for slots in (1, 4, 9):
        assert [c.ids for c in make_sampler(policy, slots=slots).run(requests)] == reference


def test_nothing_is_sorted_where_no_row_asks(monkeypatch):
    """The price of a sorted vocabulary is paid only by those who want it."""
    calls, sort = [], torch.Tensor.sort
    monkeypatch.setattr(torch.Tensor, "sort", lambda self, *a, **k: calls.append(self.shape) or sort(self, *a, **k))
    sampler, requests = make_sampler(make_policy("qwen2")), sampled_requests(make_prompts(2), 2)
    sampler.run(requests)
    assert not calls
    sampler.run([dataclasses.replace(requests[0], top_p=0.9), *requests[1:]])
    assert set(calls) == {(1, VOCAB)}


def test_poll_is_asked_between_steps_and_may_go_on_when_all_is_done():
    policy, prompts = make_policy("qwen3"), make_prompts(3)
    sampler, asked, joined = make_sampler(policy, stop=()), [], []
    late = [Request(prompts[1], 3, 6), Request(prompts[2], 4, 6)]

    def poll(idle: bool) -> list[Request]:
        asked.append((idle, sampler.decode_steps))
        if len(asked) == 4:
            return [late[0]]
        return [late[1]] if idle and len(joined) == 2 else []

    def on_finished(request: Request, completion: Completion) -> list[Request]:
        joined.append(request.seed)
        return []

    (first,) = sampler.run([Request(prompts[0], 2, 10)], on_finished, poll)
    assert len(first.ids) == 10
    assert sorted(joined[:2]) == [2, 3]
    assert joined[2:] == [4]
    assert [idle for idle, _ in asked].count(True) == 2, "once to go on, once to end"
    assert asked[-1][0]
    steps = [step for _, step in asked]
    assert all(after - before <= 1 for before, after in pairwise(steps)), "after every step"


def test_shared_prefills_are_counted_as_cached():
    policy, prompts = make_policy("qwen2"), make_prompts(4)
    for slots in (64, 3):
        sampler = make_sampler(policy, slots=slots)
        sampler.run(sampled_requests(prompts, 8))
        assert sampler.prefill_tokens == sum(len(p.ids) for p in prompts)
        assert sampler.prefill_tokens + sampler.cached_tokens == 8 * sum(len(p.ids) for p in prompts)


def test_follow_ups_join_and_are_sampled_alike():
    policy, prompts = make_policy("qwen3"), make_prompts(4)
    alone = {p.ids: make_sampler(policy).run([Request(p, 9, 15)])[0] for p in prompts}
    seen: dict[tuple[int, ...], Completion] = {}

    def on_finished(request: Request, completion: Completion):
        if request.tag == "first":
            return [Request(prompts[(prompts.index(request.prompt) + 1) % 4], 9, 15, tag="second")]
        seen[request.prompt.ids] = completion
        return ()

    first = make_sampler(policy, slots=3).run([Request(p, 9, 15, tag="first") for p in prompts], on_finished)
    assert [c.ids for c in first] == [alone[p.ids].ids for p in prompts]
    assert {ids: c.ids for ids, c in seen.items()} == {ids: c.ids for ids, c in alone.items()}


def test_work_done_is_what_it_must_be():
    """Prompts are prefilled once a group, finished rows cost nothing: counted, not timed."""
    policy, prompts = make_policy("qwen2"), make_prompts(4)
    sampler = make_sampler(policy, slots=64)
    completions = sampler.run(sampled_requests(prompts, 8))
    assert sampler.prefill_tokens == sum(len(p.ids) for p in prompts)
    assert sampler.sampled_tokens == sum(len(c.ids) for c in completions)
    assert sampler.decode_steps == max(len(c.ids) for c in completions) - 1


@pytest.mark.parametrize("limit", [1, 2])
def test_shortest_limits(limit):
    completions = make_sampler(make_policy("llama"), stop=()).run(sampled_requests(make_prompts(3), 2, limit))
    assert all(len(c.ids) == limit and c.truncated for c in completions)


def test_merged_copy_follows_the_adapter_and_leaves_the_base_alone():
    policy = make_policy("qwen2")
    replica = Replica(policy, "merged")
    frozen = {name: p.clone() for name, p in policy.named_parameters() if "lora_" not in name}
    before = [
        c.ids for c in TransformersSampler(replica, IdTokenizer(), STOP).run(sampled_requests(make_prompts(3), 2))
    ]
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.mul_(-1.5)
    replica.refresh()
    requests = sampled_requests(make_prompts(3), 2)
    merged = [c.ids for c in TransformersSampler(replica, IdTokenizer(), STOP).run(requests)]
    shared = [c.ids for c in make_sampler(policy, "shared").run(requests)]
    assert merged == shared != before
    assert all(torch.equal(p, frozen[name]) for name, p in policy.named_parameters() if "lora_" not in name)


def test_a_copy_is_merged_only_where_it_gives_the_policys_numbers():
    assert can_merge(make_policy("llama"))
    assert not can_merge(make_policy("llama").to(torch.bfloat16))
    tied = get_peft_model(make_model("qwen2"), LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    assert not can_merge(tied)
    untied = get_peft_model(make_model("llama"), LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    assert can_merge(untied)
    embedding = get_peft_model(make_model("llama"), LoraConfig(r=2, target_modules=["embed_tokens"]))
    assert not can_merge(embedding)


def test_training_mode_is_restored():
    policy = make_policy("qwen2").train()
    make_sampler(policy, "shared").run(sampled_requests(make_prompts(1), 1))
    assert policy.training


def _as_policy(model):
    """A sampler needs a PEFT model; a fresh adapter changes nothing."""
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).eval()
