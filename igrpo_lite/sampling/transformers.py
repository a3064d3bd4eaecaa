"""A plain sampler on transformers models, for CPU, CUDA and MPS.

Faster than ``generate()`` where rollouts of a group are sampled: each prompt is prefilled once however many completions
it gets, finished sequences leave the batch at once, and waiting or follow-up requests take their place.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from inspect import signature
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from igrpo_lite.policy.heads import split_heads
from igrpo_lite.sampling.base import HoldsNothing, OnFinished, Poll, Request
from igrpo_lite.sampling.replica import Replica
from igrpo_lite.sampling.slots import PrefixKV, SlotCache
from igrpo_lite.types import Completion

_PREFILL_TOKENS = 8192
_LAST_UNIFORM = 1.0 - 2.0**-22  # below 1 also after rounding to float32, so that inversion never passes the last token


class TransformersSampler(HoldsNothing):
    """Implements :class:`igrpo_lite.sampling.base.Sampler` on the policy's own transformers model.

    Results depend on a request's seed and prompt only, not on what else is in the batch (up to floating-point ties
    between batch shapes). ``cached_tokens`` are those of requests that shared another's prefill.

    Args:
        replica: gives the module to run and follows the policy's adapter.
        tokenizer: decodes completions.
        stop_ids: tokens that end a completion.
        max_num_seqs: sequences decoded at the same time.
    """

    def __init__(
        self, replica: Replica, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], max_num_seqs: int = 128
    ) -> None:
        self.replica = replica
        self.tokenizer = tokenizer
        self.max_num_seqs = max_num_seqs
        self.device = replica.device
        self.stop_ids = torch.tensor(sorted(set(stop_ids)), device=self.device)
        self.decode_steps = 0
        self.sampled_tokens = 0
        self.prefill_tokens = 0
        self.cached_tokens = 0

    def load_adapter(self) -> None:
        self.replica.refresh()

    @torch.no_grad()
    def run(
        self, requests: Sequence[Request], on_finished: OnFinished | None = None, poll: Poll | None = None
    ) -> list[Completion]:
        with self.replica as model:
            return _Run(self, model, on_finished).drain(requests, poll)


class _Run:
    """One call of :meth:`TransformersSampler.run`: the waiting queue and the batch being decoded."""

    def __init__(self, sampler: TransformersSampler, model: PreTrainedModel, on_finished: OnFinished | None) -> None:
        self.sampler = sampler
        self.on_finished = on_finished
        self.backbone, self.head = split_heads(model)
        # transformers 5.24 calls "cache" what 5.17 knows as "past_key_values" only, and 5.40 is to drop the old name.
        self.cache_name = "cache" if "cache" in signature(self.backbone.forward).parameters else "past_key_values"
        self.windows = _attention_windows(model.config.get_text_config())
        self.device = sampler.device
        self.cache = SlotCache(sampler.max_num_seqs, self.device)
        self.waiting: deque[Request] = deque()
        self.wanted: Counter[tuple[int, ...]] = Counter()  # waiting requests by prompt
        self.prefixes: dict[tuple[int, ...], tuple[PrefixKV, Tensor]] = {}
        self.rows = _Rows(sampler.max_num_seqs, self.device)
        self.completions: dict[int, Completion] = {}

    def drain(self, requests: Sequence[Request], poll: Poll | None) -> list[Completion]:
        self.submit(requests)
        while True:
            idle = not (self.waiting or self.cache.live)
            if poll is not None:
                self.submit(list(poll(idle)))
            if idle and not self.waiting:
                break
            free = self.sampler.max_num_seqs - self.cache.live
            # Joining costs a forward pass of its own, so single free slots are gathered while others still decode.
            if self.waiting and (
                not self.cache.live or free >= min(len(self.waiting), self.sampler.max_num_seqs // 8 + 1)
            ):
                self.admit(free)
            else:
                self.step()
            self.collect()
        return [self.completions[id(request)] for request in requests]

    def submit(self, requests: Sequence[Request]) -> None:
        self.waiting.extend(requests)
        self.wanted.update(request.prompt.ids for request in requests)

    def admit(self, free: int) -> None:
        """Prefill waiting prompts and sample the first token of their completions."""
        taken = [self.waiting.popleft() for _ in range(min(free, len(self.waiting)))]
        known = sum(len(request.prompt.ids) for request in taken) + self.sampler.prefill_tokens
        self.prefill(taken)
        self.sampler.cached_tokens += known - self.sampler.prefill_tokens
        logits = []
        for ids, group in groupby(request.prompt.ids for request in taken):
            count = len(list(group))
            prefix, last = self.prefixes[ids]
            self.cache.append(prefix, count)
            logits.append(last.expand(count, -1))
            self.wanted[ids] -= count
            if not self.wanted[ids]:
                del self.wanted[ids], self.prefixes[ids]
        self.rows.append(taken)
        self.rows.sample(torch.cat(logits), slice(self.cache.live - len(taken), self.cache.live))

    def prefill(self, requests: Sequence[Request]) -> None:
        """Keys, values and last logits of every prompt that is not held yet, right-padded, in bounded chunks."""
        reserve = max(len(request.prompt.ids) + request.max_tokens for request in (*requests, *self.waiting))
        prompts = sorted({request.prompt.ids for request in requests} - self.prefixes.keys(), key=len)
        while prompts:
            rows = max(1, _PREFILL_TOKENS // len(prompts[-1]))
            chunk, prompts = prompts[:rows], prompts[rows:]
            width = len(chunk[-1])
            padded = torch.zeros(len(chunk), width, dtype=torch.long)
            for row, prompt in enumerate(chunk):
                padded[row, : len(prompt)] = torch.tensor(prompt)
            # Made without the model's configuration, so that sliding layers too keep every token, as slots do.
            cache = DynamicCache()
            # Causal: what pads on the right cannot be seen from the left.
            output = self.backbone(input_ids=padded.to(self.device), use_cache=True, **{self.cache_name: cache})
            hidden = output.last_hidden_state
            ends = torch.tensor([len(prompt) - 1 for prompt in chunk], device=self.device)
            logits = self.head(hidden[torch.arange(len(chunk), device=self.device), ends])
            for row, prompt in enumerate(chunk):
                self.prefixes[prompt] = (PrefixKV(cache, row, len(prompt), reserve), logits[row])
            self.sampler.prefill_tokens += int(ends.sum()) + len(chunk)

    def step(self) -> None:
        """One more token for every live row."""
        cache, live = self.cache, self.cache.live
        masks = {kind: cache.mask(window) for kind, window in self.windows.items()}
        mask: Any = masks if len(masks) > 1 else next(iter(masks.values()))
        output = self.backbone(
            input_ids=self.rows.last[:live, None],
            position_ids=cache.positions,
            attention_mask=mask,
            use_cache=True,
            **{self.cache_name: cache},
        )
        cache.advance()
        self.rows.sample(self.head(output.last_hidden_state[:, -1]), slice(0, live))
        self.sampler.decode_steps += 1

    def collect(self) -> None:
        """Take finished rows out of the batch and hand them over."""
        rows, live = self.rows, self.cache.live
        stopped = torch.isin(rows.last[:live], self.sampler.stop_ids)
        ended = (stopped | (rows.count[:live] >= rows.limit[:live])).nonzero()[:, 0].tolist()
        if not ended:
            return
        finished = [(rows.requests[row], self.completion(row, bool(stopped[row]))) for row in ended]
        moves = _moves(ended, live)
        self.rows.remove(moves, live - len(ended))
        self.cache.remove(moves, live - len(ended))
        for request, completion in finished:
            self.completions[id(request)] = completion
            if self.on_finished is not None:
                self.submit(list(self.on_finished(request, completion)))

    def completion(self, row: int, stopped: bool) -> Completion:
        count = int(self.rows.count[row])
        self.sampler.sampled_tokens += count
        ids = self.rows.ids[row, :count].tolist()
        text = self.sampler.tokenizer.decode(ids, skip_special_tokens=True)
        logprobs = tuple(self.rows.logprobs[row, :count].tolist())
        return Completion(tuple(ids), text, logprobs, "stop" if stopped else "length")


class _Rows:
    """What each slot has sampled so far, and the random numbers it will use."""

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self.device = device
        self.requests: list[Request] = []
        self.last = torch.zeros(num_slots, dtype=torch.long, device=device)
        self.count = torch.zeros(num_slots, dtype=torch.long, device=device)
        self.limit = torch.zeros(num_slots, dtype=torch.long, device=device)
        self.temperature = torch.ones(num_slots, device=device)
        self.ids = torch.zeros(num_slots, 0, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(num_slots, 0, device=device)
        self.uniforms = torch.zeros(num_slots, 0, device=device)

    def append(self, requests: Sequence[Request]) -> None:
        longest = max(request.max_tokens for request in requests)
        if longest > self.ids.shape[1]:
            more = (0, longest - self.ids.shape[1])
            self.ids, self.logprobs, self.uniforms = (pad(t, more) for t in (self.ids, self.logprobs, self.uniforms))
        new = slice(len(self.requests), len(self.requests) + len(requests))
        self.requests.extend(requests)
        self.count[new] = 0
        self.limit[new] = torch.tensor([request.max_tokens for request in requests], device=self.device)
        self.temperature[new] = torch.tensor([request.temperature for request in requests], device=self.device)
        uniforms = np.zeros((len(requests), self.uniforms.shape[1]), dtype=np.float32)
        for row, request in enumerate(requests):
            # Philox is counter-based: one independent, portable stream a seed, whatever the batch or device.
            uniforms[row, : request.max_tokens] = np.random.Generator(np.random.Philox(key=request.seed)).random(
                request.max_tokens
            )
        self.uniforms[new] = torch.from_numpy(uniforms).to(self.device).clamp_(max=_LAST_UNIFORM)

    def sample(self, logits: Tensor, rows: slice) -> None:
        """Next token of ``rows`` from logits ``[rows, V]``, by inversion of the distribution function."""
        temperature = self.temperature[rows, None]
        greedy = temperature == 0
        logprobs = torch.log_softmax(logits / torch.where(greedy, 1.0, temperature), dim=-1)
        self._cut_off(logprobs, self.requests[rows])
        column = self.count[rows, None]
        token = _invert(logprobs.exp(), self.uniforms[rows].gather(1, column))
        if any(request.temperature == 0 for request in self.requests[rows]):
            token = torch.where(greedy, logits.argmax(dim=-1, keepdim=True), token)
        self.ids[rows] = self.ids[rows].scatter(1, column, token)
        self.logprobs[rows] = self.logprobs[rows].scatter(1, column, logprobs.gather(1, token))
        self.last[rows] = token[:, 0]
        self.count[rows] += 1

    def _cut_off(self, logprobs: Tensor, requests: Sequence[Request]) -> None:
        """Apply ``top_p`` to the rows ``[rows, V]`` that ask for it; the others keep every bit."""
        cut = [row for row, r in enumerate(requests) if r.top_p < 1 and r.temperature > 0]
        if cut:
            top_p = torch.tensor([[requests[row].top_p] for row in cut], device=self.device)
            logprobs[cut] = cut_off(logprobs[cut], top_p)

    def remove(self, moves: Sequence[tuple[int, int]], live: int) -> None:
        if moves:
            source, target = torch.tensor(moves, device=self.device).T
            for state in (self.last, self.count, self.limit, self.temperature, self.ids, self.logprobs, self.uniforms):
                state[target] = state[source]
            for old, new in moves:
                self.requests[new] = self.requests[old]
        del self.requests[live:]


def _invert(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The token that each of ``uniforms [rows, 1]`` falls on, ``[rows, 1]``; never one of probability 0."""
    cdf = torch.cumsum(probabilities, dim=-1)
    token = torch.searchsorted(cdf, uniforms * cdf[:, -1:], right=True).clamp_(max=cdf.shape[-1] - 1)
    impossible = probabilities.gather(1, token) == 0
    if impossible.any():
        # CUDA adds up in parallel and rounds each sum in its own way: some rise where nothing was added, others fall.
        rising = cdf.masked_fill(probabilities == 0, 0.0).cummax(dim=-1).values
        token = torch.where(impossible, torch.searchsorted(rising, uniforms * rising[:, -1:], right=True), token)
    return token


def cut_off(logprobs: Tensor, top_p: Tensor) -> Tensor:
    """Renormalised log-probabilities ``[rows, V]`` of the tokens that are kept, the others at minus infinity.

    Kept are the likeliest up to a total of ``top_p [rows, 1]``, the token that passes it included; so at least one.
    Equal tokens count in the order of their ids.
    """
    ordered, order = logprobs.sort(dim=-1, descending=True, stable=True)
    before = ordered.exp().cumsum(dim=-1) - ordered.exp()
    outside = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, (before >= top_p) & (top_p < 1))
    return torch.log_softmax(logprobs.masked_fill(outside, -torch.inf), dim=-1)


def _moves(ended: Sequence[int], live: int) -> list[tuple[int, int]]:
    """Which surviving rows at the back fill which holes in front, as (source, target)."""
    kept = live - len(ended)
    gone = set(ended)
    sources = [row for row in range(kept, live) if row not in gone]
    return list(zip(sources, [row for row in ended if row < kept], strict=True))


def _attention_windows(config: Any) -> dict[str, int | None]:
    """Attention window by layer type (``None``: everything before); one entry where all layers are alike."""
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [])
    if not kinds:
        return {"all": window}
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(kinds)}
