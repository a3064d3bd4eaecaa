"""The chunked head against plain log_softmax, and what it allocates, watched operation by operation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from models import make_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from igrpo_lite.policy import chunked_head
from igrpo_lite.policy.chunked_head import accumulate, head_logprobs, project
from igrpo_lite.policy.heads import Head, check_split, split_heads

ROWS, WIDTH, VOCAB = 23, 8, 5000

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scaled": {"factor": 0.25},
    "capped": {"cap": 3.0},
    "all of it": {"bias": True, "factor": 1.5, "cap": 5.0},
}


def make_head(bias: bool = False, dtype: torch.dtype = torch.float32, **shape: float) -> Head:
    linear = nn.Linear(WIDTH, VOCAB, bias=bias).to(dtype)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.mul_(6.0)  # far from uniform
    return Head(linear.requires_grad_(False), **shape)


def make_rows(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(ROWS, WIDTH).to(dtype).requires_grad_()
    return hidden, torch.randint(VOCAB, (ROWS,)), 0.5 + torch.rand(ROWS)


def in_full(head: Head, hidden: Tensor, targets: Tensor, temperatures: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, in float64 and in one piece."""
    logits = hidden.double() @ head.weight.double().T
    if head.bias is not None:
        logits = logits + head.bias.double()
    logits = logits * head.factor
    if head.cap is not None:
        logits = head.cap * torch.tanh(logits / head.cap)
    log_softmax = torch.log_softmax(logits / temperatures.double()[:, None], dim=-1)
    return log_softmax.gather(1, targets[:, None])[:, 0], -(log_softmax.exp() * log_softmax).sum(-1)


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Largest difference relative to the largest value."""
    found, expected = found.detach(), expected.detach()
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


class Allocations(TorchDispatchMode):
    """Every tensor that an operation makes, views of its inputs aside."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.products: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.shapes.append(tuple(tensor.shape))
                if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                    self.products.append(tuple(tensor.shape))
        return made

    @property
    def largest(self) -> int:
        return max(torch.Size(shape).numel() for shape in self.shapes)


@contextmanager
def tiles_of(rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patched:
        patched.setitem(chunked_head.TILES, "cpu", (rows, columns))
        yield


@pytest.mark.parametrize(("rows", "columns"), [(1, 1000), (4, 333), (ROWS, VOCAB), (1000, 1024), (3, 10**6)])
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_to_log_softmax_in_one_piece(
    shape: str, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, (hidden, targets, temperatures) = make_head(**SHAPES[shape]), make_rows()
    weights = torch.randn(ROWS)
    expected, entropies = in_full(head, hidden, targets, temperatures)
    (slope,) = torch.autograd.grad((expected * weights).sum(), hidden)
    with tiles_of(rows, columns, monkeypatch):
        found = head_logprobs(head, hidden, targets, temperatures)
        (found[0] * weights).sum().backward()
    assert found[0].dtype == found[1].dtype == torch.float32
    assert_near(found[0], expected, 1e-6)
    assert_near(found[1], entropies, 1e-6)
    assert hidden.grad is not None
    assert_near(hidden.grad, slope, 1e-5)
    assert not found[1].requires_grad
    assert head.weight.grad is None


def test_slopes_are_finite_differences() -> None:
    """Independent of any autograd formula: steps in random directions, the values in float64."""
    head, (hidden, targets, temperatures) = make_head(**SHAPES["all of it"]), make_rows()
    head_logprobs(head, hidden, targets, temperatures)[0].sum().backward()
    assert hidden.grad is not None
    for _ in range(5):
        direction = torch.randn(ROWS, WIDTH, dtype=torch.float64)
        ahead, behind = (
            in_full(head, hidden.detach().double() + step * direction, targets, temperatures)[0].sum()
            for step in (1e-5, -1e-5)
        )
        assert float((hidden.grad * direction).sum()) == pytest.approx(float(ahead - behind) / 2e-5, rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_more_than_a_tile_of_logits_at_once(
    shape: str, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, (hidden, targets, temperatures) = make_head(dtype=dtype, **SHAPES[shape]), make_rows(dtype)
    with tiles_of(rows, 512, monkeypatch):
        with Allocations() as forward:
            logprobs, _ = head_logprobs(head, hidden, targets, temperatures)
        with Allocations() as backward:
            logprobs.sum().backward()
    tile_of_weights = 512 * WIDTH if dtype == torch.bfloat16 else 0  # in float32, where a processor accumulates
    assert forward.largest == max(rows * 512, ROWS * WIDTH, tile_of_weights)
    assert (VOCAB, WIDTH) not in forward.shapes + backward.shapes
    # The head ran once over each row, and not again in the backward pass.
    assert sum(shape[0] * shape[1] for shape in forward.products if shape[1] != WIDTH) == ROWS * VOCAB
    assert backward.products == []
    assert backward.largest == ROWS * WIDTH


def test_the_watch_sees_what_a_plain_head_allocates() -> None:
    head, (hidden, targets, temperatures) = make_head(), make_rows()
    head.weight.requires_grad_(True)
    with Allocations() as seen:
        in_full(head, hidden, targets, temperatures)[0].sum().backward()
    assert (ROWS, VOCAB) in seen.shapes
    assert (VOCAB, WIDTH) in seen.shapes


def test_without_gradient_nothing_is_kept() -> None:
    head, (hidden, targets, temperatures) = make_head(), make_rows()
    expected = head_logprobs(head, hidden, targets, temperatures)
    with torch.no_grad(), Allocations() as seen:
        found = head_logprobs(head, hidden.detach(), targets, temperatures)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert not found[0].requires_grad
    assert (ROWS, WIDTH) not in seen.shapes  # no slopes


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_weights_are_accumulated_in_float32(shape: str) -> None:
    head, (hidden, targets, temperatures) = make_head(dtype=torch.bfloat16, **SHAPES[shape]), make_rows(torch.bfloat16)
    expected, entropies = in_full(head, hidden, targets, temperatures)
    (slope,) = torch.autograd.grad(expected.sum(), hidden)
    found = head_logprobs(head, hidden, targets, temperatures)
    found[0].sum().backward()
    assert_near(found[0], expected, 1e-6)
    assert_near(found[1], entropies, 1e-6)
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    assert_near(hidden.grad, slope, 2e-2)


def test_logits_far_apart_stay_finite() -> None:
    head, (hidden, targets, temperatures) = make_head(), make_rows()
    with torch.no_grad():
        hidden *= 1e4
    logprobs, entropies = head_logprobs(head, hidden, targets, temperatures)
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert all(bool(values.isfinite().all()) for values in (logprobs, entropies, hidden.grad))


_SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def model_with_head(name: str) -> PreTrainedModel:
    if name == "bias":
        model = PhiForCausalLM(PhiConfig(**_SHAPE)).eval()
        with torch.no_grad():
            model.lm_head.bias.normal_()
        return model
    if name == "multiplied":
        return CohereForCausalLM(CohereConfig(**_SHAPE, logit_scale=0.5)).eval()
    if name == "divided":
        return GraniteForCausalLM(GraniteConfig(**_SHAPE, logits_scaling=4.0)).eval()
    return make_model({"tied": "qwen2", "untied": "llama", "capped": "gemma2"}[name])


@pytest.mark.parametrize("name", ["tied", "untied", "bias", "multiplied", "divided", "capped"])
def test_heads_of_real_architectures(name: str) -> None:
    """Against the model's own forward pass, in which the gradient reaches the input embeddings through everything."""
    model = model_with_head(name).requires_grad_(False)
    assert check_split(model)
    backbone, head = split_heads(model)
    embeddings = torch.randn(1, 9, model.config.hidden_size, requires_grad=True)
    targets, temperatures = torch.randint(97, (9,)), 0.5 + torch.rand(9)
    logits = model(inputs_embeds=embeddings, use_cache=False).logits[0].float()
    expected = torch.log_softmax(logits / temperatures[:, None], -1).gather(1, targets[:, None])[:, 0]
    (slope,) = torch.autograd.grad(expected.sum(), embeddings)
    hidden = backbone(inputs_embeds=embeddings, use_cache=False).last_hidden_state[0]
    found = head_logprobs(head, hidden, targets, temperatures)[0]
    found.sum().backward()
    assert embeddings.grad is not None
    assert_near(found, expected, 1e-5)
    assert_near(embeddings.grad, slope, 1e-5)


def test_gradients_of_likely_tokens_are_exact() -> None:
    """Where the target has nearly all probability, its gradient is a small difference of large vectors."""
    head, (hidden, _, temperatures) = make_head(), make_rows()
    with torch.no_grad():
        hidden *= 20
        targets = (hidden @ head.weight.T).argmax(dim=1)
    exact = hidden.detach().double().requires_grad_()
    expected, _ = in_full(head, exact, targets, temperatures)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    head_logprobs(head, hidden, targets, temperatures)[0].sum().backward()
    assert hidden.grad is not None
    likely = expected.exp() > 0.99
    assert int(likely.sum()) >= 5
    for found, wanted in zip(hidden.grad[likely], slope[likely], strict=True):
        assert float((found - wanted).norm()) < 1e-3 * float(wanted.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_cuda_products_are_made_in_the_heads_type_and_summed_in_float32(dtype):
    """On fake CUDA tensors: the branches, shapes and types of a GPU, without numbers."""
    with FakeTensorMode():
        hidden, weight, bias, states = (
            torch.empty(shape, device="cuda", dtype=kind)
            for shape, kind in [((5, 8), torch.float32), ((9, 8), dtype), ((9,), dtype), ((5, 9), torch.float32)]
        )
        for given in (None, bias):
            logits = project(hidden, weight, given)
            assert (logits.device.type, logits.dtype, logits.shape) == ("cuda", torch.float32, (5, 9))
        total = torch.zeros(5, 8, device="cuda")
        accumulate(total, states, weight)
        assert (total.device.type, total.dtype, total.shape) == ("cuda", torch.float32, (5, 8))
