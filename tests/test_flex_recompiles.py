"""FlexAttention for several models in one process, at dynamo's level: real guards and graphs, no kernels.

A CPU has no FlexAttention kernel with a backward pass, so graphs are compiled for the backend ``aot_eager``.
"""

from __future__ import annotations

import random
import warnings

import pytest
import torch
import torch._dynamo
import torch.nn.attention.flex_attention as torch_flex
import transformers.integrations.flex_attention as flex_integration
from torch import Tensor, nn
from torch._dynamo.utils import counters

from igrpo_lite.policy import tree_attention
from igrpo_lite.policy.tree import Branch, TokenTree
from igrpo_lite.policy.tree_attention import FlexTrees, SdpaTrees

CPU = torch.device("cpu")
MODELS = [(4, 2, 16), (6, 2, 8), (4, 4, 32)]
"""Query heads, key heads, head size."""


@pytest.fixture(autouse=True)
def compiled_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # set by vLLM on a CPU, read by torch.compile
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(torch_flex.flex_attention, backend="aot_eager")
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex_integration, "WrappedFlexAttention", lambda training: lambda: compiled)
    monkeypatch.setattr(FlexTrees, "exhausted", False)
    yield
    torch._dynamo.reset()


def make_trees(count: int, prompt: int, completions: int, length: int) -> list[TokenTree]:
    rng = random.Random(count + prompt)

    def ids(size: int) -> tuple[int, ...]:
        return tuple(rng.randrange(1000) for _ in range(size))

    prompts = [ids(prompt) for _ in range(count)]
    places = tuple(range(length))
    return [TokenTree([Branch(start, ids(length), places) for _ in range(completions)]) for start in prompts]


def attended(trees: list[TokenTree], shape: tuple[int, int, int], plan: FlexTrees | SdpaTrees) -> list[Tensor]:
    """Output and, where gradients are on, those of query, key and value, for the nodes without padding."""
    heads, kv_heads, width = shape
    module = nn.Module()
    module.num_key_value_groups = heads // kv_heads
    size = sum(map(len, trees))
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(1, size, n, width, generator=generator).transpose(1, 2) for n in (heads, kv_heads, kv_heads)]
    parts = [nn.functional.pad(part, (0, 0, 0, -size % plan.pad)) for part in parts]
    wanted = torch.is_grad_enabled()
    out = plan.attend(module, *(part.requires_grad_(wanted) for part in parts), scaling=None)[:, :size]
    if not wanted:
        return [out]
    return [out.detach(), *(g[:, :, :size] for g in torch.autograd.grad(out.square().sum(), parts))]


def life_of_a_model(shape: tuple[int, int, int]) -> None:
    """Trial, parity probe, updates of ever other sizes; one and several blocks, with and without gradient."""
    for sizes, grad in [
        ((1, 150, 3, 40), True),
        ((4, 60, 1, 16), False),
        ((2, 4, 2, 5), False),
        ((1, 100, 4, 60), True),
        ((2, 77, 4, 30), True),
        ((1, 20, 2, 20), True),
        ((1, 20, 2, 80), True),
    ]:
        trees = make_trees(*sizes)
        with torch.set_grad_enabled(grad):
            found = attended(trees, shape, FlexTrees(trees, CPU))
            expected = attended(trees, shape, SdpaTrees(trees, CPU, torch.float32))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_several_models_in_one_process_keep_flex_attention():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="flex_attention called without torch.compile")  # all scores at once
        for shape in MODELS:
            life_of_a_model(shape)
    graphs = counters["stats"]["unique_graphs"]
    assert 8 < graphs < tree_attention.RECOMPILE_LIMIT / 3, "beyond dynamo's own limit"
    life_of_a_model(MODELS[0])
    assert counters["stats"]["unique_graphs"] == graphs
    assert not FlexTrees.exhausted


def test_beyond_the_limit_trees_use_sdpa_and_say_so(monkeypatch):
    monkeypatch.setattr(tree_attention, "RECOMPILE_LIMIT", 2)
    with pytest.warns(UserWarning, match="FlexAttention was compiled 2 times") as caught:
        life_of_a_model(MODELS[0])
    said = [str(warning.message) for warning in caught]
    assert len([text for text in said if "token trees use SDPA from here on" in text]) == 1
    assert not [text for text in said if "without torch.compile" in text]

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(tree_attention, "flex_runs", lambda *arguments: True)
    plan = tree_attention.plan_trees([], torch.device("cuda"), torch.float32, MODELS[0])
    assert isinstance(plan, SdpaTrees)
