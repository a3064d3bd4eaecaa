"""Which engine samples: the one that the configuration names, or the best that is there."""

from __future__ import annotations

import importlib.util

from igrpo_lite.config import RunConfig
from igrpo_lite.errors import SamplerError
from igrpo_lite.policy.loading import Policy
from igrpo_lite.prompts import PromptBuilder
from igrpo_lite.sampling.base import Sampler
from igrpo_lite.sampling.replica import Replica
from igrpo_lite.sampling.transformers import TransformersSampler


def make_sampler(
    config: RunConfig, policy: Policy, prompts: PromptBuilder, max_model_len: int
) -> tuple[Sampler, list[str]]:
    """The sampler of a policy, and sentences for the user about the choice and what it costs.

    Completions end with the model's own end tokens or with its chat template's.

    Args:
        max_model_len: tokens of the longest prompt and its completion together.

    Raises:
        SamplerError: vLLM was asked for and cannot be started.
    """
    notes: list[str] = []
    if config.sampler == "vllm" or (config.sampler == "auto" and policy.device.type == "cuda" and _has_vllm()):
        from igrpo_lite.sampling.vllm import make_vllm_sampler

        try:
            sampler = make_vllm_sampler(policy, prompts, config, max_model_len)
            return sampler, sampler.notes
        except SamplerError as error:
            if config.sampler == "vllm":
                raise
            notes.append(f"sampling with transformers, which is slower: {error}")
    elif config.sampler == "auto" and policy.device.type == "cuda":
        notes.append("sampling with transformers; vLLM is faster on a GPU: pip install 'igrpo-lite[vllm]'")
    ends = sorted({*policy.stop_ids, *prompts.end_of_turn()})
    return TransformersSampler(Replica(policy.model), prompts.tokenizer, ends, config.max_num_seqs), notes


def _has_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None
