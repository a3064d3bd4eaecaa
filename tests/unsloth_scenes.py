"""What the tests of the Unsloth back end do, each in a process of its own (:mod:`unsloth_parts`).

Nothing heavy is imported above: what is imported first is a part of what is tested.
"""

from __future__ import annotations

import inspect
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

SETTINGS: dict[str, Any] = {
    "backend": "unsloth",
    "load_in_4bit": True,
    "output_dir": "run",
    "num_generations": 4,
    "prompts_per_step": 2,
    "max_completion_length": 24,
    "max_problems": 40,
    "eval_size": 2,
    "max_steps": 1,
    "learning_rate": 1e-2,
    "warmup_ratio": 0.0,
    "lora_r": 8,
    "progress": "off",
}


def a_run() -> None:
    """A GRPO run of ours on Unsloth's CPU branch: load in 4 bits, sample, learn, save, load again."""
    from igrpo_lite.config.resolve import resolve
    from igrpo_lite.policy.backends import enter

    config = resolve(SETTINGS)
    assert enter(config).name == "unsloth"
    unsloth = sys.modules["unsloth"]
    assert unsloth.DEVICE_TYPE == "cpu"

    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import BitsAndBytesConfig

    from igrpo_lite.errors import ModelError
    from igrpo_lite.policy.four_bit import keep_trainable
    from igrpo_lite.policy.loading import load_policy
    from igrpo_lite.training import train

    summary = train(config)
    assert (summary["steps"], summary["stopped"]) == (1, None), summary
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    (parity,) = [record for record in records if record["kind"] == "parity"]
    assert parity["mean"] < 1e-4 < 0.5 < parity["moved"]
    (step,) = [record for record in records if record["kind"] == "step"]
    assert step["grad_norm"] > 0

    ids = torch.arange(3, 40)[None]
    fresh, saved = load_policy(config, 0, context=300), load_policy(config, 0, Path("run/adapter"), context=300)
    assert type(saved.model.get_base_model().get_submodule("model.layers.0.mlp.up_proj.base_layer")).__name__ == (
        "Linear4bit"
    )
    adapter = saved.model.peft_config["default"]
    assert (adapter.r, adapter.lora_alpha) == (config.lora_r, config.lora_alpha or config.lora_r)
    with torch.no_grad():
        logits = saved.model(input_ids=ids).logits
        assert not torch.equal(fresh.model(input_ids=ids).logits, logits)
        plain = AutoPeftModelForCausalLM.from_pretrained(
            "run/adapter",
            dtype=torch.float32,
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
            ),
        )
        keep_trainable(plain)
        same(logits, plain(input_ids=ids).logits, 1e-3)
        with saved.model.disable_adapter():
            same(saved.model(input_ids=ids).logits, fresh.model(input_ids=ids).logits, 1e-5)
    assert [name for name, _ in fresh.adapter_parameters()]
    sampled_alike(config, saved)

    with pytest.raises(ModelError, match="works with unsloth already"):
        load_policy(config.model_copy(update={"backend": "transformers"}), 0)
    assert load_policy(config.model_copy(update={"backend": "auto"}), 0).backend == "unsloth"


def sampled_alike(config: Any, policy: Any) -> None:
    """Unsloth's ``generate()`` and our transformers sampler give the same completions."""
    from igrpo_lite.policy.prompting import prompt_builder
    from igrpo_lite.sampling.base import Request
    from igrpo_lite.sampling.choice import make_sampler
    from igrpo_lite.sampling.generate import GenerateSampler
    from igrpo_lite.sampling.replica import Replica
    from igrpo_lite.sampling.transformers import TransformersSampler

    prompts = prompt_builder(config)
    theirs, notes = make_sampler(config, policy, prompts, 300)
    assert isinstance(theirs, GenerateSampler)
    assert any("generate()" in note for note in notes)
    ours = TransformersSampler(Replica(policy.model), prompts.tokenizer, theirs.stop_ids.tolist())
    questions = [prompts.first("Ana has 3 stamps and buys 4. How many?"), prompts.first("2+2?")]
    wanted = [Request(questions[i % 2], i, 16) for i in range(6)]
    for one, other in zip(theirs.run(wanted), ours.run(wanted), strict=True):
        assert one.ids == other.ids
        assert all(abs(a - b) < 1e-4 for a, b in zip(one.logprobs, other.logprobs, strict=True))


def same(found: Any, expected: Any, tolerance: float) -> None:
    assert float((found - expected).abs().max()) < tolerance, float((found - expected).abs().max())


def gpu_branch() -> Any:
    """The real classes of Unsloth's GPU branch, imported on a machine without one (``UNSLOTH_ALLOW_CPU=1``)."""
    from igrpo_lite.config import ModelOptions
    from igrpo_lite.policy.unsloth_import import prepare

    unsloth = prepare(ModelOptions(backend="unsloth"))
    assert unsloth.DEVICE_TYPE == "cuda"
    return unsloth


def contract() -> None:
    """What the GPU branch takes, and what its forward pass gives."""
    unsloth = gpu_branch()
    signatures(unsloth)
    hidden_states()


def signatures(unsloth: Any) -> None:
    """Every keyword that we pass is one that is taken, and what we read is still written."""
    import torch
    import unsloth.models.llama as llama
    from unsloth_zoo import vllm_lora_request, vllm_utils

    from igrpo_lite.config.resolve import resolve
    from igrpo_lite.policy.backends import FAST, LoadRequest
    from igrpo_lite.policy.loading import _read_config
    from igrpo_lite.policy.unsloth import adapter_arguments, loading_arguments

    config = resolve(SETTINGS)
    request = LoadRequest(config, _read_config(config), torch.device("cuda"), torch.bfloat16, 0, context=300)
    torch.cuda.mem_get_info = lambda device: (8 * 2**30, 15 * 2**30)  # type: ignore[assignment]
    loaded = inspect.signature(unsloth.FastLanguageModel.from_pretrained).parameters
    engine = inspect.signature(vllm_utils.load_vllm).parameters
    passed = loading_arguments(request, fast=True)
    assert passed["max_seq_length"] == 300
    assert 0.1 <= passed["gpu_memory_utilization"] <= 0.9
    unknown = passed.keys() - loaded.keys() - engine.keys()
    assert not unknown, unknown
    assert loading_arguments(request, fast=False).keys() <= loaded.keys()

    base = stock_model()
    taken = inspect.signature(unsloth.FastLanguageModel.get_peft_model).parameters
    unknown = adapter_arguments(request, base).keys() - taken.keys()
    assert not unknown, unknown

    handed = inspect.signature(vllm_utils.load_lora).parameters
    assert list(handed)[:3] == ["model", "save_directory", "load_tensors"]
    fields = set(vllm_lora_request.LoRARequest.__struct_fields__)
    assert {"lora_name", "lora_int_id", "lora_path", "lora_tensors", "lora_config"} <= fields
    assert not vllm_lora_request.LoRARequest.__struct_config__.frozen  # we put copies of the tensors there
    source = inspect.getsource(llama)
    for name in ("UNSLOTH_RETURN_HIDDEN_STATES", "llm.shared_weights = True", "model.vllm_engine = llm"):
        assert name in source, name
    sleeping = inspect.getsource(vllm_utils.patch_vllm_enable_sleep_mode)
    assert "data.tag == 'weights'" in sleeping  # which therefore stay where they are, under the policy
    source = inspect.getsource(vllm_utils) + inspect.getsource(sys.modules["unsloth.models._utils"])
    for name in (
        "UNSLOTH_VLLM_MERGED_ROLLOUT",
        "UNSLOTH_VLLM_STANDBY",
        "UNSLOTH_VLLM_STANDBY_UTIL_OVERRIDE",
        "UNSLOTH_VLLM_NO_FLASHINFER",
        "UNSLOTH_DISABLE_STATISTICS",
    ):
        assert f'"{name}"' in source, name
    assert not vllm_utils._merged_rollout_enabled()
    patched = inspect.getsource(sys.modules["unsloth.models.loader"])
    assert all(f'"{kind}"' in patched for kind in FAST)
    for name in ("for_training", "for_inference"):
        assert callable(getattr(unsloth.FastLanguageModel, name))


def stock_model() -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from igrpo_lite.tiny import MODEL_DIR

    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)


def hidden_states() -> None:
    """Unsloth's real forward pass of a causal language model, over a stock backbone, gives hidden states when asked."""
    import os

    import torch
    from unsloth.models.llama import CausalLM_fast_forward

    from igrpo_lite.errors import ModelError
    from igrpo_lite.policy.heads import BACKBONE, check_split, split_heads
    from igrpo_lite.policy.logprobs import RowLayout, chosen_logprobs
    from igrpo_lite.policy.tree import Branch
    from igrpo_lite.policy.unsloth import HiddenStates

    model = stock_model()
    branches = [Branch((5, 6, 7), ids, (0, len(ids) - 1)) for ids in ((8, 9), (8, 11, 12, 13), (14,))]
    expected = chosen_logprobs(model, branches, RowLayout()).logprobs
    type(model).forward = CausalLM_fast_forward(None)
    setattr(model, BACKBONE, HiddenStates(model))
    assert isinstance(split_heads(model)[0], HiddenStates)
    found = chosen_logprobs(model, branches, RowLayout()).logprobs
    same(found, expected, 1e-4)
    assert "UNSLOTH_RETURN_HIDDEN_STATES" not in os.environ
    assert model(input_ids=torch.tensor([[3, 4, 5]])).logits.shape[-1] == model.config.vocab_size
    assert check_split(model)
    found.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0

    model.model.forward = partial(cut, model.model.forward)  # as beyond max_seq_length
    with pytest.raises(ModelError, match="instead of hidden states"):
        chosen_logprobs(model, branches, RowLayout())


def cut(forward: Any, input_ids: Any, **settings: Any) -> Any:
    return forward(input_ids=input_ids[:, :3], **settings)


def an_engine() -> None:
    """Our sampler on a real vLLM engine (its CPU build), to which Unsloth's real code hands the adapter."""
    gpu_branch()

    import torch
    from unsloth_zoo import vllm_utils
    from vllm_parts import make_prompts, move

    from igrpo_lite.config.resolve import resolve
    from igrpo_lite.errors import SamplerError
    from igrpo_lite.policy.backends import LoadRequest, model_path
    from igrpo_lite.policy.loading import Policy, _read_config, load_tokenizer, stop_ids
    from igrpo_lite.policy.plain import TransformersBackend
    from igrpo_lite.policy.prompting import prompt_builder
    from igrpo_lite.sampling import vllm_engine
    from igrpo_lite.sampling.choice import make_sampler
    from igrpo_lite.sampling.parity import probe
    from igrpo_lite.sampling.unsloth import UnslothSampler

    config, cpu = resolve({"lora_alpha": 32, "lora_r": 16, "max_num_seqs": 16}), torch.device("cpu")
    model: Any = TransformersBackend().load(LoadRequest(config, _read_config(config), cpu, torch.float32, 0)).model
    vllm_engine.load_vllm(cpu)
    vllm_utils.patch_vllm_lora_tokenizer()
    vllm_utils.patch_vllm_lora_load_tensors()
    vllm_utils.LORA_REQUEST_ID = 1
    options = vllm_engine.EngineOptions(
        model=model_path("tiny"), revision=None, dtype=torch.float32, device=cpu, lora_rank=16, max_model_len=320,
        max_num_seqs=16, share_base=False,
    )  # fmt: skip
    model.vllm_engine = vllm_engine.start(options, model.config).llm
    model.load_lora = partial(vllm_utils.load_lora, model)
    tokenizer = load_tokenizer(config)
    ends = stop_ids(model.get_base_model(), tokenizer)
    policy = Policy(model, tokenizer, cpu, ends, "unsloth", model.vllm_engine)
    move(policy, 1)
    before = {name: p.detach().clone() for name, p in policy.adapter_parameters()}
    sampler, _ = make_sampler(config, policy, prompt_builder(config), 319)
    assert isinstance(sampler, UnslothSampler)
    parity = probe(policy, sampler, make_prompts(4), [1.0, 0.7])
    assert parity.failure() is None, parity
    assert all(torch.equal(before[name], p) for name, p in policy.adapter_parameters())  # vLLM scales what it is given
    used = sampler.lora_request.lora_int_id
    sampler.rebuild()
    assert sampler.lora_request.lora_int_id == used + 1
    with policy.model.disable_adapter():
        sampler.load_adapter()
        assert probe_base(policy, sampler, make_prompts(2)) < 1e-4
    with pytest.raises(SamplerError, match="room for 320 tokens"):
        make_sampler(config, policy, prompt_builder(config), 2000)
    sampler.close()
    vllm_engine._running.close()  # ours, which this test started


def probe_base(policy: Any, sampler: Any, prompts: Any) -> float:
    from vllm_parts import gap, requests

    return gap(sampler, requests(prompts, 2))
