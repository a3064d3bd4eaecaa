"""Sampling through a model's own ``generate()``: for models that only that can decode, like Unsloth's without vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from igrpo_lite.policy.loading import Policy
from igrpo_lite.policy.precision import low_precision
from igrpo_lite.sampling.base import HoldsNothing, OnFinished, Poll, Request
from igrpo_lite.sampling.transformers import _Rows
from igrpo_lite.types import Completion


class GenerateSampler(HoldsNothing):
    """Implements :class:`igrpo_lite.sampling.base.Sampler` on ``policy.model.generate()``.

    Draws the same tokens as the transformers sampler, from each request's own seed; ``generate()`` is only asked for
    logits. Prompts of equal length go together, so that none is padded: with padding on the left some of Unsloth's
    models answer differently (https://github.com/unslothai/unsloth/issues/3699). Follow-up requests wait for the end of
    a batch.
    """

    def __init__(
        self, policy: Policy, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], max_num_seqs: int = 128
    ) -> None:
        self.policy = policy
        self.tokenizer = tokenizer
        self.max_num_seqs = max_num_seqs
        self.stop_ids = torch.tensor(sorted(set(stop_ids)), device=policy.device)
        self.decode_steps = self.sampled_tokens = self.prefill_tokens = self.cached_tokens = 0

    def load_adapter(self) -> None:
        """The policy itself is run."""

    @torch.no_grad()
    def run(
        self, requests: Sequence[Request], on_finished: OnFinished | None = None, poll: Poll | None = None
    ) -> list[Completion]:
        waiting, completions = list(requests), dict[int, Completion]()
        with _decoding(self.policy.model), low_precision(self.policy.model):
            while True:
                if poll is not None:
                    waiting += poll(not waiting)
                if not waiting:
                    return [completions[id(request)] for request in requests]
                length = len(waiting[0].prompt.ids)
                batch = [request for request in waiting if len(request.prompt.ids) == length][: self.max_num_seqs]
                taken = set(map(id, batch))
                waiting = [request for request in waiting if id(request) not in taken]
                for request, completion in zip(batch, self._batch(batch), strict=True):
                    completions[id(request)] = completion
                    if on_finished is not None:
                        waiting += on_finished(request, completion)

    def _batch(self, requests: Sequence[Request]) -> list[Completion]:
        ids = torch.tensor([request.prompt.ids for request in requests], device=self.policy.device)
        rows = _Rows(len(requests), self.policy.device)
        rows.append(requests)
        self.policy.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max(request.max_tokens for request in requests),
            do_sample=False,
            use_cache=True,
            pad_token_id=self.tokenizer.pad_token_id,
            logits_processor=LogitsProcessorList([_Draw(rows)]),
            stopping_criteria=StoppingCriteriaList([_Ended(rows, self.stop_ids)]),
        )
        self.prefill_tokens += ids.numel()
        self.decode_steps += int(rows.count.max()) - 1
        return [self._completion(rows, row, request) for row, request in enumerate(requests)]

    def _completion(self, rows: _Rows, row: int, request: Request) -> Completion:
        sampled = rows.ids[row, : min(int(rows.count[row]), request.max_tokens)]
        stops = torch.isin(sampled, self.stop_ids).nonzero()
        count = int(stops[0]) + 1 if len(stops) else len(sampled)
        self.sampled_tokens += count
        ids, logprobs = sampled[:count].tolist(), rows.logprobs[row, :count].tolist()
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Completion(tuple(ids), text, tuple(logprobs), "stop" if len(stops) else "length")


class _Draw(LogitsProcessor):
    """Draws the next tokens by itself, and leaves them as the only ones that greedy decoding can take."""

    def __init__(self, rows: _Rows) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.rows.sample(scores.float(), slice(0, len(scores)))
        return torch.full_like(scores, -torch.inf).scatter_(1, self.rows.last[:, None], 0.0)


class _Ended(StoppingCriteria):
    """A row ends with one of our end tokens or at its own limit. What is decoded after that is not read."""

    def __init__(self, rows: _Rows, stop_ids: Tensor) -> None:
        self.rows, self.stop_ids = rows, stop_ids
        self.ended = torch.zeros_like(rows.last, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.ended |= torch.isin(self.rows.last, self.stop_ids) | (self.rows.count >= self.rows.limit)
        return self.ended


@contextmanager
def _decoding(model: Any) -> Iterator[None]:
    """The model in the state for decoding, and without its own ideas of it (top-p, penalties, end tokens)."""
    base, training = model.get_base_model(), model.training
    generation_config, base.generation_config = base.generation_config, GenerationConfig()
    getattr(model, "for_inference", model.eval)()
    try:
        yield
    finally:
        getattr(model, "for_training", model.train)()
        model.train(training)
        base.generation_config = generation_config
