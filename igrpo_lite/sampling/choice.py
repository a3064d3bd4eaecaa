"""Which engine samples: the one that the configuration names, or the best that is there."""

from __future__ import annotations

import importlib.util

from igrpo_lite.config import RunConfig
from igrpo_lite.environment.pins import INSTALL
from igrpo_lite.errors import SamplerError
from igrpo_lite.policy.four_bit import is_packed
from igrpo_lite.policy.loading import Policy
from igrpo_lite.prompts import PromptBuilder
from igrpo_lite.sampling.base import Sampler
from igrpo_lite.sampling.replica import Replica
from igrpo_lite.sampling.transformers import TransformersSampler

_PACKED = (
    "vLLM would load the weights a second time, and pack them into 4 bits in another way than has been done for the "
    "policy"
)


def make_sampler(
    config: RunConfig, policy: Policy, prompts: PromptBuilder, max_model_len: int
) -> tuple[Sampler, list[str]]:
    """The sampler of a policy, and sentences for the user about how it was loaded, the choice and what it costs.

    Completions end with the model's own end tokens or with its chat template's.

    Args:
        max_model_len: tokens of the longest prompt and its completion together.

    Raises:
        SamplerError: vLLM was asked for and cannot be started.
    """
    notes = list(policy.notes)
    ends = sorted({*policy.stop_ids, *prompts.end_of_turn()})
    if policy.backend == "unsloth":
        sampler, more = _unsloth_sampler(config, policy, prompts, max_model_len, ends)
        return sampler, notes + more
    packed = is_packed(policy.model.config)
    if config.sampler == "vllm" and packed:
        raise SamplerError(
            f"sampler: {_PACKED}; use --backend unsloth, whose vLLM shares the policy's weights, or --sampler "
            "transformers"
        )
    on_gpu = config.sampler == "auto" and policy.device.type == "cuda"
    if config.sampler == "vllm" or (on_gpu and has_vllm() and not packed):
        from igrpo_lite.sampling.vllm import make_vllm_sampler

        try:
            vllm_sampler = make_vllm_sampler(policy, prompts, config, max_model_len)
            return vllm_sampler, notes + vllm_sampler.notes
        except SamplerError as error:
            if config.sampler == "vllm":
                raise
            notes.append(f"sampling with transformers, which is slower: {error}")
    elif on_gpu and packed:
        notes.append(f"sampling with transformers, which is slower: {_PACKED}; --backend unsloth has one copy for both")
    elif on_gpu:
        notes.append(f"sampling with transformers; vLLM is faster on a GPU: {INSTALL}")
    return TransformersSampler(Replica(policy.model), prompts.tokenizer, ends, config.max_num_seqs), notes


def _unsloth_sampler(
    config: RunConfig, policy: Policy, prompts: PromptBuilder, max_model_len: int, ends: list[int]
) -> tuple[Sampler, list[str]]:
    if policy.engine is not None:
        from igrpo_lite.sampling.unsloth import UnslothSampler

        sampler = UnslothSampler(policy, prompts, config, max_model_len, max_num_seqs=config.max_num_seqs)
        return sampler, sampler.notes
    if config.sampler == "vllm":
        raise SamplerError(
            "sampler: Unsloth has started no vLLM with its model, which it does on a CUDA GPU only; use --sampler "
            "transformers, or --backend transformers"
        )
    from igrpo_lite.sampling.generate import GenerateSampler

    notes = ["sampling with Unsloth's own generate(), which is slow; with vLLM on a CUDA GPU it is fast"]
    return GenerateSampler(policy, prompts.tokenizer, ends, config.max_num_seqs), notes


def has_vllm() -> bool:
    """Whether vLLM is installed, for a CUDA GPU or a CPU."""
    return importlib.util.find_spec("vllm") is not None
