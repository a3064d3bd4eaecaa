"""Log-probabilities of chosen tokens from a frozen head, without ever holding ``[tokens, vocabulary]``.

The vocabulary goes by in tiles that stay in the processor's cache; maximum, sum and mean of the softmax are carried
along, and so is its mean of the head's rows, as in FlashAttention with the head as keys and values. Since the head is
frozen and every row asks for one number, the row's whole gradient is then there,
``d logprob / d hidden = (W[target] - softmax(z) W) / temperature``, and kept as ``[N, H]``: no gradient of the head's
weight, and nothing to compute again in the backward pass, where other chunked heads run the head a second time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from igrpo_lite.policy.heads import Head

TILES = {"cuda": (4096, 8192), "cpu": (512, 1024)}
"""Rows and vocabulary entries whose logits are held at once, by kind of device: 128 MiB, and as much again for their
exponentials; or 2 MiB, which a processor's caches hold. Other devices are treated as CUDA."""


def head_logprobs(head: Head, hidden: Tensor, targets: Tensor, temperatures: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy (nats, without gradient) of each row, float32 ``[N]``.

    Args:
        head: frozen; its logits are divided by ``temperatures`` ``[N]``.
        hidden: the state that predicts each token, ``[N, H]``; gradients reach it through the log-probability.
        targets: token ids, ``[N]``.
    """
    logprobs, entropies = _ChunkedHead.apply(hidden, head, targets, temperatures)
    return logprobs, entropies


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, targets: Tensor, temperatures: Tensor) -> tuple[Tensor, Tensor]:
        logprobs, entropies = torch.empty_like(temperatures), torch.empty_like(temperatures)
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        rows, _ = TILES.get(hidden.device.type, TILES["cuda"])
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            softmax = _Softmax(hidden[chunk], head, targets[chunk, None], temperatures[chunk, None], slopes is not None)
            logprobs[chunk], entropies[chunk] = softmax.logprobs(), softmax.entropies()
            if slopes is not None:
                slopes[chunk] = softmax.slopes()
        if slopes is not None:
            ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return (slopes * gradients[0][:, None]).to(slopes.dtype), None, None, None


class _Softmax:
    """The softmax of some rows, tile by tile of the vocabulary; ``[n, 1]`` but ``mean``, which is ``[n, H]``.

    Relative to the largest logit so far: the sum of the exponentials, the sum of them times the logits, and, without
    the target, their sum and the sum of them times the head's rows. With the target in it, a likely token's gradient
    would be the difference of two nearly equal vectors, of which bfloat16 leaves nothing.
    """

    def __init__(self, hidden: Tensor, head: Head, target: Tensor, temperature: Tensor, slopes: bool) -> None:
        self.head, self.temperature, self.target = head, temperature, target
        self.highest = torch.full_like(temperature, -torch.inf)
        self.sum, self.others, self.product = (torch.zeros_like(temperature) for _ in range(3))
        self.chosen, self.bend = torch.zeros_like(temperature), torch.ones_like(temperature)
        self.mean = hidden.new_zeros(hidden.shape, dtype=torch.float32) if slopes else None
        _, columns = TILES.get(hidden.device.type, TILES["cuda"])
        for first in range(0, head.weight.shape[0], columns):
            weight = head.weight[first : first + columns]
            bias = None if head.bias is None else head.bias[first : first + columns]
            logits = head.shape_(project(hidden, weight, bias))
            self._add(logits, weight, first)

    def _add(self, logits: Tensor, weight: Tensor, first: int) -> None:
        bend = self.head.slope(logits) if self.mean is not None else None
        local = self.target - first
        here = (local >= 0) & (local < logits.shape[1])
        local = local.clamp(0, logits.shape[1] - 1)
        if bend is not None:
            self.bend = torch.where(here, bend.gather(1, local), self.bend)
        logits.div_(self.temperature)
        self.chosen = torch.where(here, logits.gather(1, local), self.chosen)
        highest = torch.maximum(self.highest, logits.amax(dim=1, keepdim=True))
        # Before the first tile it is -inf, whose product with 0 is no number.
        moved = (self.highest - highest).clamp_(min=-1e4)
        shrink = moved.exp()
        logits -= highest
        exponentials = logits.exp()
        self.product = (self.product + self.sum * moved) * shrink + torch.linalg.vecdot(exponentials, logits)[:, None]
        self.sum = self.sum * shrink + exponentials.sum(dim=1, keepdim=True)
        self.highest = highest
        if self.mean is not None:
            exponentials.scatter_(1, local, exponentials.gather(1, local).masked_fill_(here, 0.0))
            self.others = self.others * shrink + exponentials.sum(dim=1, keepdim=True)
            weights = exponentials if bend is None else exponentials.mul_(bend)
            accumulate(self.mean.mul_(shrink), weights, weight)

    def logprobs(self) -> Tensor:
        return (self.chosen - self.highest - self.sum.log())[:, 0]

    def entropies(self) -> Tensor:
        return (self.sum.log() - self.product / self.sum)[:, 0]

    def slopes(self) -> Tensor:
        assert self.mean is not None
        target = self.head.weight[self.target[:, 0]].float().mul_(self.bend)
        return (self.others * target - self.mean).mul_(self.head.factor / (self.sum * self.temperature))


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``hidden [n, H]`` through some rows ``[v, H]`` of the head, in float32 whatever their type."""
    if weight.dtype == torch.float32:
        logits = hidden.float() @ weight.T
    elif hidden.device.type == "cuda":
        logits = torch.mm(hidden.to(weight.dtype), weight.T, out_dtype=torch.float32)
    else:
        logits = hidden.float() @ weight.float().T
    return logits if bias is None else logits.add_(bias)


def accumulate(total: Tensor, weights: Tensor, rows: Tensor) -> None:
    """``total [n, H] += weights [n, v] @ rows [v, H]``, summed in float32."""
    if rows.dtype != torch.float32 and total.device.type == "cuda":
        total += torch.mm(weights.to(rows.dtype), rows, out_dtype=torch.float32)
    else:
        total.addmm_(weights, rows.float())
