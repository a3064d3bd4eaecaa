"""Log-probabilities of chosen tokens from a frozen head, without ever holding ``[tokens, vocabulary]``.

A chunk's logits live only while the chunk does. Since the head is frozen and every row asks for one number, the row's
whole gradient, ``d logprob / d hidden = (W[target] - softmax(z) W) / temperature``, is made while the logits are there
and kept as ``[N, H]``: no gradient of the head's weight, and nothing to compute again in the backward pass, where other
chunked heads run the head a second time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from igrpo_lite.policy.heads import Head

CHUNK_ELEMENTS = 2**25
"""Logits held at once: 128 MiB in float32, and as much again for their probabilities."""

_PIECE = 8192  # of the vocabulary, where all of it at once would be another copy


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
        wanted = ctx.needs_input_grad[0]
        slopes = torch.empty_like(hidden) if wanted else None
        rows = max(1, CHUNK_ELEMENTS // head.weight.shape[0])
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            temperature, target = temperatures[chunk, None], targets[chunk, None]
            logits = head.shape_(project(hidden[chunk], head))
            bend = head.slope(logits) if wanted else None
            log_softmax = logits.div_(temperature)
            log_softmax -= log_softmax.logsumexp(dim=-1, keepdim=True)
            logprobs[chunk] = log_softmax.gather(1, target)[:, 0]
            probabilities = log_softmax.exp()
            entropies[chunk] = -sum(  # in pieces: at once it would be a third [rows, vocabulary]
                (p * log_p).sum(dim=1)
                for p, log_p in zip(probabilities.split(_PIECE, 1), log_softmax.split(_PIECE, 1), strict=True)
            )
            del logits, log_softmax
            if slopes is not None:
                delta = probabilities.neg_().scatter_add_(1, target, torch.ones_like(temperature))
                delta = delta if bend is None else delta.mul_(bend)
                slopes[chunk] = delta.to(head.weight.dtype) @ head.weight * (head.factor / temperature)
                del delta
            del probabilities, bend  # before the next chunk's logits are made
        if slopes is not None:
            ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return (slopes * gradients[0][:, None]).to(slopes.dtype), None, None, None


def project(hidden: Tensor, head: Head) -> Tensor:
    """``hidden [N, H]`` through the weight and bias of the head, in float32 whatever their type."""
    weight = head.weight
    if weight.dtype == torch.float32:
        logits = hidden.float() @ weight.T
    elif hidden.device.type == "cuda":
        logits = torch.mm(hidden.to(weight.dtype), weight.T, out_dtype=torch.float32)
    else:
        pieces = weight.split(_PIECE)
        logits = torch.cat([hidden.float() @ piece.float().T for piece in pieces], dim=1)
    return logits if head.bias is None else logits.add_(head.bias)
