"""The sampler on ``generate()`` draws what the transformers sampler draws, whatever the model's own ideas of it."""

from __future__ import annotations

import pytest
import torch
from tiny_parts import small_config, tiny_parts
from transformers import GenerationConfig

from igrpo_lite.sampling.base import Request
from igrpo_lite.sampling.generate import GenerateSampler
from igrpo_lite.sampling.parity import probe
from igrpo_lite.types import Prompt


@pytest.fixture(scope="module")
def parts():
    found = tiny_parts(small_config())
    found.scorer.close()
    return found


def sampler_of(parts, **settings):
    return GenerateSampler(parts.policy, parts.prompts.tokenizer, parts.sampler.stop_ids.tolist(), **settings)


def requests(parts, count=8, **settings):
    prompts = [parts.prompts.first(problem.question) for problem in parts.train[:3]]
    return [Request(prompts[i % 3], i, 8 + 5 * i, **settings) for i in range(count)]


def assert_alike(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one.ids, one.text, one.finish) == (other.ids, other.text, other.finish)
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5}, {"temperature": 0.0}, {"top_p": 0.6}])
def test_the_same_completions(parts, settings):
    sampler, wanted = sampler_of(parts, max_num_seqs=5), requests(parts, **settings)
    found = sampler.run(wanted)
    assert_alike(found, parts.sampler.run(wanted))
    assert {completion.finish for completion in found} == {"stop", "length"} or settings
    assert sampler.sampled_tokens == sum(len(completion.ids) for completion in found)
    assert sampler.prefill_tokens == sum(len(request.prompt.ids) for request in wanted)


def test_it_samples_from_the_policy_that_learns(parts):
    prompts = [parts.prompts.first(problem.question) for problem in parts.train[:2]]
    assert probe(parts.policy, sampler_of(parts), prompts, [1.0, 0.7], 8).failure() is None


def test_follow_up_requests_and_polled_ones_are_run(parts):
    first, *others = requests(parts, 4)
    extra = [Request(Prompt("", (5, 6, 7)), 77, 6)]
    finished = []

    def on_finished(request, completion):
        finished.append(request)
        return others if request is first else ()

    def poll(idle):
        return extra.pop() and [Request(Prompt("", (5, 6, 7)), 77, 6)] if idle and extra else ()

    (completion,) = sampler_of(parts).run([first], on_finished, poll)
    assert_alike([completion], parts.sampler.run([first]))
    assert len(finished) == 5
    assert {id(request) for request in others} < {id(request) for request in finished}
    assert sampler_of(parts).run([]) == []


def test_the_models_own_settings_of_decoding_are_put_aside_and_back(parts):
    base = parts.policy.model.get_base_model()
    own, base.generation_config = base.generation_config, GenerationConfig(
        eos_token_id=9, repetition_penalty=3.0, top_k=2, suppress_tokens=[5, 6, 7, 8]
    )  # fmt: skip
    kept = base.generation_config
    parts.policy.model.train()
    try:
        found = sampler_of(parts).run(requests(parts, 4))
        assert base.generation_config is kept
        assert parts.policy.model.training
    finally:
        base.generation_config = own
        parts.policy.model.eval()
    assert_alike(found, parts.sampler.run(requests(parts, 4)))
