"""Sampling with a real vLLM engine: against the policy's own log-probabilities and the transformers sampler."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm_parts import (
    MAX_MODEL_LEN,
    alive,
    gap,
    make_policy,
    make_prompts,
    make_sampler,
    model_folder,
    requests,
    shared_sampler,
)

from igrpo_lite.errors import SamplerError
from igrpo_lite.sampling import vllm_engine
from igrpo_lite.sampling.base import Request
from igrpo_lite.sampling.replica import Replica
from igrpo_lite.sampling.transformers import TransformersSampler, cut_off
from igrpo_lite.sampling.vllm import VllmSampler, _CtrlCLater, make_vllm_sampler
from igrpo_lite.sampling.vllm_engine import (
    EngineOptions,
    check_version,
    kv_bytes_per_token,
    kv_cache_bytes,
    lora_rank,
)
from igrpo_lite.training.interrupt import Interrupt
from igrpo_lite.types import Completion, Prompt

TOLERANCE = 1e-4  # float32; two implementations that add up in different orders


@pytest.fixture
def sampler() -> VllmSampler:
    return shared_sampler()


def ids(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [completion.ids for completion in completions]


def unfinished(sampler: VllmSampler) -> int:
    return sampler.engine.llm.llm_engine.get_num_unfinished_requests()


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0, 0.0])
def test_logprobs_are_the_policys_own(sampler, temperature):
    assert gap(sampler, requests(make_prompts(4), 3, temperature=temperature)) < TOLERANCE


def test_scores_are_the_policys_own_up_to_the_longest_sequence(sampler):
    wanted = [*requests(make_prompts(3), 2), Request(make_prompts(1, 200)[0], 5, MAX_MODEL_LEN - 200)]
    completions = sampler.run(wanted)
    scores = sampler.score([(r.prompt.ids, c.ids) for r, c in zip(wanted, completions, strict=True)])
    scored = [replace(c, logprobs=s) for c, s in zip(completions, scores, strict=True)]
    assert gap(sampler, wanted, scored) < TOLERANCE


def test_samples_depend_on_seed_and_prompt_only(sampler):
    wanted = requests(make_prompts(4), 6)  # 24 requests for 16 places
    reference = sampler.run(wanted)
    backwards = sampler.run(wanted[::-1])
    assert ids(backwards[::-1]) == ids(reference)
    assert [sampler.run([request])[0].ids for request in wanted[:5]] == ids(reference[:5])
    assert len(set(ids(reference))) > 20, "seeds of one prompt must differ"


def test_greedy_equals_the_transformers_sampler(sampler):
    wanted = [Request(prompt, 0, 40, 0.0) for prompt in make_prompts(5)]
    policy = sampler.policy
    plain = TransformersSampler(Replica(policy.model, "shared"), policy.tokenizer, sampler.stop_ids)
    for ours, theirs in zip(sampler.run(wanted), plain.run(wanted), strict=True):
        assert (ours.ids, ours.text, ours.finish) == (theirs.ids, theirs.text, theirs.finish)
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=TOLERANCE)


def test_sampling_follows_the_distribution(sampler):
    """800 first tokens against the policy's probabilities: chi-square over the likely tokens."""
    prompt, count = make_prompts(1)[0], 800
    drawn = sampler.run([Request(prompt, seed, 1, 2.0) for seed in range(count)])
    with torch.no_grad():
        logits = sampler.policy.model(input_ids=torch.tensor([prompt.ids])).logits[0, -1]
    probabilities = torch.softmax(logits / 2.0, dim=-1).double()
    counts = torch.bincount(torch.tensor([c.ids[0] for c in drawn]), minlength=len(probabilities)).double()
    likely = probabilities * count > 5
    expected = torch.cat([probabilities[likely], probabilities[~likely].sum()[None]]) * count
    statistic = float(((torch.cat([counts[likely], counts[~likely].sum()[None]]) - expected) ** 2 / expected).sum())
    freedom = int(likely.sum())
    assert freedom > 10
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("top_p", [0.6, 0.9])
def test_cut_off_distributions_are_renormalised_as_in_the_transformers_sampler(sampler, top_p):
    wanted = [replace(r, top_p=top_p) for r in requests(make_prompts(3), 3, temperature=1.5)]
    for request, completion in zip(wanted, sampler.run(wanted), strict=True):
        tokens = torch.tensor([request.prompt.ids + completion.ids])
        with torch.no_grad():
            logits = sampler.policy.model(input_ids=tokens).logits[0, len(request.prompt.ids) - 1 : -1]
        kept = cut_off(torch.log_softmax(logits / 1.5, -1), torch.tensor([[top_p]]))
        expected = kept.gather(1, torch.tensor(completion.ids)[:, None])[:, 0].tolist()
        assert completion.logprobs == pytest.approx(expected, abs=TOLERANCE)


def test_stops_where_the_policy_does_and_nowhere_else(sampler, monkeypatch):
    wanted = requests(make_prompts(4), 4, limit=40)
    free = sampler.run(wanted)
    stop = max({t for c in free for t in c.ids[2:]}, key=lambda t: sum(t in c.ids for c in free))
    monkeypatch.setattr(sampler, "stop_ids", [stop])
    stopped = sampler.run(wanted)
    ends = 0
    for before, after in zip(free, stopped, strict=True):
        cut = before.ids.index(stop) + 1 if stop in before.ids else len(before.ids)
        assert after.ids[:cut] == before.ids[:cut]
        assert after.finish == ("stop" if after.ids[-1] == stop else "length")
        assert after.truncated == (len(after.ids) == 40 and after.ids[-1] != stop)
        assert len(after.logprobs) == len(after.ids)
        ends += stop in after.ids
        assert stop not in after.ids[:-1]
    assert ends > 3


@pytest.mark.parametrize("limit", [1, 2])
def test_shortest_limits(sampler, limit):
    completions = sampler.run(requests(make_prompts(3), 2, limit))
    assert all(len(c.ids) <= limit and c.finish in ("stop", "length") for c in completions)


def test_follow_ups_join_the_running_batch(sampler):
    prompts = make_prompts(4)
    second = {p.ids: prompts[(i + 1) % 4] for i, p in enumerate(prompts)}
    alone = sampler.run([Request(p, 9, 10 + 20 * i) for i, p in enumerate(prompts)])
    after = sampler.run([Request(second[p.ids], 9, 12) for p in prompts])
    seen: dict[tuple[int, ...], Completion] = {}

    def on_finished(request: Request, completion: Completion) -> list[Request]:
        if request.tag == "first":
            return [Request(second[request.prompt.ids], 9, 12, tag=request.prompt.ids)]
        seen[request.tag] = completion
        return []

    before = sampler.decode_steps
    first = sampler.run([Request(p, 9, 10 + 20 * i, tag="first") for i, p in enumerate(prompts)], on_finished)
    assert ids(first) == ids(alone)
    assert [seen[p.ids].ids for p in prompts] == ids(after)
    chains = [len(a.ids) + len(b.ids) for a, b in zip(alone, after, strict=True)]
    assert sampler.decode_steps - before <= max(chains) + 2, "no chain may wait for another one"


def test_poll_is_asked_after_every_step_and_when_idle(sampler):
    waiting = [requests(make_prompts(1), 2)]
    asked: list[bool] = []

    def poll(idle: bool) -> list[Request]:
        asked.append(idle)
        return waiting.pop() if idle and waiting else []

    done: list[Completion] = []
    before = sampler.decode_steps
    sampler.run(requests(make_prompts(1), 1, 5), lambda request, completion: done.append(completion) or (), poll)
    assert len(done) == 3
    assert asked.count(True) == 2
    assert len(asked) == sampler.decode_steps - before + 1
    assert sampler.run([], None, poll) == []


def test_prompts_are_computed_once(sampler):
    prompts = make_prompts(3, 70)
    counts = sampler.prefill_tokens, sampler.cached_tokens, sampler.sampled_tokens
    completions = sampler.run(requests(prompts, 5))
    prefilled, cached, sampled = (
        now - before
        for now, before in zip(
            (sampler.prefill_tokens, sampler.cached_tokens, sampler.sampled_tokens), counts, strict=True
        )
    )
    blocks = [(len(p.ids) - 1) // 32 * 32 for p in prompts]
    assert cached == 4 * sum(blocks)
    assert prefilled + cached == 5 * sum(len(p.ids) for p in prompts)
    assert sampled == sum(len(c.ids) for c in completions)


@contextmanager
def process_untouched() -> Iterator[None]:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    set_num_threads = torch.set_num_threads
    yield
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert torch.set_num_threads is set_num_threads


def test_sampling_leaves_the_process_as_it_was(sampler):
    with process_untouched():
        sampler.run(requests(make_prompts(2), 2))
        sampler.score([((5, 6), (7,))])
    torch.set_num_threads(2)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


def test_interrupts_leave_the_engine_usable(sampler):
    wanted = requests(make_prompts(4), 4, limit=100)
    reference = ids(sampler.run(wanted))

    def stop(request: Request, completion: Completion) -> list[Request]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler.run(wanted, stop)
    assert unfinished(sampler) == 0
    assert ids(sampler.run(wanted)) == reference


def test_ctrl_c_waits_for_the_end_of_a_step(sampler):
    wanted = requests(make_prompts(8, 20), 8, limit=180)
    reference = ids(sampler.run(wanted[:4]))
    for delay in (0.02, 0.05, 0.08):
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            sampler.run(wanted)
        timer.join()
        assert unfinished(sampler) == 0
        assert alive(sampler)
    assert ids(sampler.run(wanted[:4])) == reference
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_takes_effect_at_once():
    with Interrupt() as interrupt, _CtrlCLater():
        signal.raise_signal(signal.SIGINT)
        assert not interrupt.requested, "the engine is in a step"
    assert interrupt.name == "SIGINT"

    with Interrupt() as interrupt:
        reached = []
        with pytest.raises(KeyboardInterrupt), _CtrlCLater():  # noqa: PT012
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            reached.append("the next operation of the step")
        assert not reached
        assert interrupt.requested
        assert signal.getsignal(signal.SIGINT) == interrupt._handle

    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), _CtrlCLater():
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("presses", [0, 1, 2, 3])
def test_every_ctrl_c_is_counted(presses):
    counted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: counted.append(number))
    try:
        with _CtrlCLater():
            for _ in range(presses):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert counted == [signal.SIGINT] * presses


@pytest.mark.parametrize("value", [0.009, 2.01, 50.0])
def test_temperatures_out_of_range_are_refused_before_a_start(sampler, value):
    _, prompts, config = make_policy(temperature=value)
    with pytest.raises(SamplerError, match=rf"from 0\.01 to 2\.0 .* --temperature {value}; .* transformers sampler"):
        make_vllm_sampler(sampler.policy, prompts, config, MAX_MODEL_LEN)
    assert alive(sampler), "nothing is closed for what cannot start"


def test_requests_that_do_not_fit_are_refused(sampler):
    prompt = make_prompts(1, 100)[0]
    good = Request(prompt, 1, 5)
    with pytest.raises(SamplerError, match=f"100 tokens and up to 221 more .* {MAX_MODEL_LEN} together"):
        sampler.run([good, Request(prompt, 1, 221)])
    with pytest.raises(SamplerError, match="0 tokens"):
        sampler.run([good, Request(Prompt("", ()), 1, 5)])
    with pytest.raises(SamplerError, match="temperatures"):
        sampler.run([good, Request(prompt, 1, 5, 0.001)])
    with pytest.raises(SamplerError, match="refused a request: top_p"):
        sampler.run([good, Request(prompt, 1, 5, top_p=7.0)])
    with pytest.raises(SamplerError, match="token id 1000000"):
        sampler.run([good, Request(Prompt("", (10**6,)), 1, 5)])
    with pytest.raises(SamplerError, match="do not fit"):
        sampler.run([good, Request(prompt, 2, 50)], lambda request, completion: [Request(prompt, 1, 221)])
    with pytest.raises(RuntimeError, match="between runs"):
        sampler.run([good], lambda request, completion: sampler.load_adapter())
    assert unfinished(sampler) == 0
    assert len(sampler.run([good])[0].ids) == 5


def test_an_engine_that_dies_is_said_to_and_can_be_rebuilt(sampler):
    wanted = requests(make_prompts(3), 2)
    reference = ids(sampler.run(wanted))
    sampler.engine.llm.llm_engine.remove_lora(1)  # vLLM then looks for the adapter in a file that is not there
    with pytest.raises(SamplerError, match="died while 6 requests were decoding") as caught:
        sampler.run(wanted)
    assert caught.value.__cause__ is not None
    assert not alive(sampler)
    with pytest.raises(SamplerError, match="died before"):
        sampler.run(wanted)
    with process_untouched():
        sampler.rebuild()
    assert ids(sampler.run(wanted)) == reference


def test_one_engine_lives_in_a_process(sampler, tmp_path):
    wanted = requests(make_prompts(2), 2)
    other = make_sampler(model=str(model_folder(tmp_path / "other", "untied")))
    with pytest.raises(SamplerError, match="closed"):
        sampler.run(wanted)
    # Neither top-k nor top-p nor the penalty of its generation config: any of them would change log-probabilities.
    assert gap(other, requests(make_prompts(3), 4)) < TOLERANCE
    other.close()
    other.close()
    with pytest.raises(SamplerError, match="closed"):
        other.run(wanted)


def test_too_little_memory_is_met_once_with_less():
    large = make_sampler(model="tiny", engine={"kv_cache_bytes": 2**45})
    assert "runs with" in large.notes[0]
    assert len(large.run(requests(make_prompts(2), 2))) == 4


def test_too_little_memory_twice_ends_with_advice(monkeypatch):
    monkeypatch.setattr(vllm_engine, "_smaller", lambda *_: 2**44)
    with pytest.raises(SamplerError, match=r"Available memory .* only 16384.00 GiB .* lower --max-num-seqs"):
        make_sampler(model="tiny", engine={"kv_cache_bytes": 2**45})


def test_models_that_vllm_cannot_run_are_refused(tmp_path):
    policy, prompts, config = make_policy(model=str(model_folder(tmp_path / "narrow", "narrow heads")))
    with pytest.raises(SamplerError, match=r"vLLM cannot run model .*head_dim=16"):
        VllmSampler(policy, prompts, config, MAX_MODEL_LEN)
    with pytest.raises(SamplerError, match="max_model_len"):
        VllmSampler(policy, prompts, config, 5000)


def test_engines_elsewhere_are_refused(monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(SamplerError, match="unset it"):
        vllm_engine.load_vllm(torch.device("cpu"))
    with pytest.raises(SamplerError, match="not on mps"):
        vllm_engine.load_vllm(torch.device("mps"))


@pytest.mark.parametrize("version", ["0.26.0", "0.28.0", "0.31.0", "0.31.0+cpu", "0.32.0", "0.32.2.post1"])
def test_supported_versions(version):
    check_version(version)


@pytest.mark.parametrize("version", ["0.11.2", "0.25.9", "0.26.0rc1", "0.33.0", "0.33.0rc1", "1.0", "dev", ""])
def test_other_versions_are_named(version):
    with pytest.raises(SamplerError, match=r">=0\.26,<0\.33.*environment\.pins --install") as caught:
        check_version(version)
    assert f"vLLM {version} " in str(caught.value)


def test_ranks_are_rounded_up():
    assert [lora_rank(r) for r in (1, 2, 8, 9, 16, 200, 320, 512)] == [1, 8, 8, 16, 16, 256, 320, 512]
    with pytest.raises(SamplerError, match="512 at most, not 513"):
        lora_rank(513)


def test_room_for_keys_and_values():
    config = make_policy()[0].model.config
    token = 2 * 4 * 2 * 32 * 4  # keys and values, layers, heads, size, bytes
    assert kv_bytes_per_token(config, torch.float32) == token == 2 * kv_bytes_per_token(config, torch.bfloat16)
    options = EngineOptions(
        model="tiny",
        revision=None,
        dtype=torch.float32,
        device=torch.device("cpu"),
        lora_rank=16,
        max_model_len=320,
        max_num_seqs=16,
    )
    one = kv_cache_bytes(replace(options, max_num_seqs=1), config)
    assert token * 320 <= one < token * 400
    assert kv_cache_bytes(options, config) == 16 * one
    assert one < kv_cache_bytes(replace(options, max_num_seqs=10**6), config) <= 2**30
    assert kv_cache_bytes(replace(options, max_model_len=10**6), config) >= token * 10**6
    assert kv_cache_bytes(replace(options, kv_cache_bytes=one), config) == one
    with pytest.raises(SamplerError, match=r"one sequence of 320 tokens, which needs 0\.8 MiB"):
        kv_cache_bytes(replace(options, kv_cache_bytes=1000), config)
