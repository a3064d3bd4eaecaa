"""The formula of activations against the real modules, tensor by tensor: fake tensors for real shapes, a real model for
what autograd keeps."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from planning_parts import adapted, benchmark_module, counting_only, group, meta_model
from transformers import DynamicCache

from igrpo_lite.planning.activations import QUERY_BLOCK, TILE, Activations, Adapter, activations
from igrpo_lite.planning.memory import prompt_working
from igrpo_lite.planning.models import find_model
from igrpo_lite.planning.shapes import Shape
from igrpo_lite.planning.work import Batch
from igrpo_lite.policy import chunked_head, tree_attention
from igrpo_lite.policy.loading import recompute_activations
from igrpo_lite.policy.logprobs import Layout, RowLayout, TreeLayout, chosen_logprobs

WITHIN = 0.05
# So many tokens that the most is needed inside a block and not in the head, whose arithmetic is another on a CPU.
TREES = (2, 6000, 4, 200)  # branches of two blocks of queries, the second one not full
ROWS = (2, 1500, 4, 100)
SMALL = (2, 300, 4, 200)  # with real numbers


def shape_of(alias: str, layers: int) -> Shape:
    return replace(find_model(alias).shape, layers=layers)


def batch_of(trees: int, prompt: int, leaves: int, leaf: int, rows: bool) -> Batch:
    every = trees * leaves
    scored = every * (leaf + 1)
    if rows:
        return Batch(every * (prompt + leaf), scored, (every, prompt + leaf))
    return Batch(trees * prompt + every * leaf, scored, (trees, prompt), every, prompt, leaf)


def used(base: Any, sizes: tuple[int, int, int, int], layout: Layout) -> dict[str, int]:
    """Bytes of our own update path."""
    branches = group(*sizes)

    def run() -> None:
        chosen_logprobs(base, branches, layout).logprobs.sum().backward()

    return benchmark_module("memory").activation_memory(run, torch.device("cpu"))


def as_on_an_old_gpu(copies: bool) -> AbstractContextManager[Any]:
    return patch("igrpo_lite.policy.causal_attention.copies_keys", return_value=copies)


def formula(
    shape: Shape,
    sizes: tuple[int, int, int, int],
    checkpointing: bool = False,
    *,
    rows: bool = False,
    item: int = 2,
    targets: str | list[str] = "all-linear",
    last: int | None = None,
    copies: bool = False,
) -> Activations:
    names = [targets] if isinstance(targets, str) else targets
    adapter = Adapter(shape.adapted(names), 16, last or shape.layers)
    return activations(shape, adapter, batch_of(*sizes, rows), item=item, checkpointing=checkpointing, copies=copies)


def check(
    alias: str,
    layers: int,
    sizes: tuple[int, int, int, int],
    *,
    rows: bool = False,
    targets: str | list[str] = "all-linear",
    last: int | None = None,
    copies: bool = False,
) -> None:
    """The formula against the real modules, without and with checkpointing."""
    shape, layout = shape_of(alias, layers), RowLayout() if rows else TreeLayout()
    model = adapted(meta_model(alias, shape), targets, last)
    with counting_only(model) as base, as_on_an_old_gpu(copies):
        for checkpointing in (False, True):
            if checkpointing:
                recompute_activations(model)
                model.train()
            found = used(base, sizes, layout)
            expected = formula(shape, sizes, checkpointing, rows=rows, targets=targets, last=last, copies=copies)
            assert expected.kept == pytest.approx(found["kept"], rel=WITHIN)
            assert expected.peak == pytest.approx(found["peak"], rel=WITHIN)


@pytest.mark.parametrize("alias", ["qwen2-1.5b", "qwen3-4b"])
def test_stage_2(alias):
    """A prompt with the draft in it, four refinements; widths are the model's own, layers are all alike."""
    check(alias, 8, (1, 12000, 4, 128))


CASES = {
    "rows": ("qwen2-1.5b", {"rows": True}),
    "rows of Qwen3": ("qwen3-4b", {"rows": True}),
    "Llama": ("llama3.2-1b", {}),
    "windows, four norms": ("gemma3-1b", {"rows": True}),
    "fused layers": ("phi4-mini", {"rows": True}),
    "last layers": ("qwen2-1.5b", {"targets": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"], "last": 1}),
    "queries and values": ("qwen2-1.5b", {"targets": ["q_proj", "v_proj"]}),
    "copied keys": ("qwen3-4b", {"copies": True}),
    "copied keys in rows": ("qwen2-1.5b", {"rows": True, "copies": True}),
    "copied keys, fused layers": ("phi4-mini", {"rows": True, "copies": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_term(case):
    alias, options = CASES[case]
    check(alias, 2, ROWS if options.get("rows") else TREES, **options)


@pytest.mark.parametrize("rows", [False, True], ids=["trees", "rows"])
def test_float32_keeps_no_copies(rows):
    """``kept`` only: while operators are watched, autograd adds gradients up out of place, which float32 shows."""
    shape = shape_of("qwen2-1.5b", 2)
    with counting_only(adapted(meta_model("qwen2-1.5b", shape, torch.float32))) as base:
        found = used(base, TREES, RowLayout() if rows else TreeLayout())
    assert formula(shape, TREES, rows=rows, item=4).kept == pytest.approx(found["kept"], rel=WITHIN)


@pytest.mark.parametrize("rows", [False, True], ids=["trees", "rows"])
@pytest.mark.parametrize("alias", ["qwen2-1.5b", "qwen3-0.6b"])
def test_what_autograd_saves_in_a_real_model(alias, rows):
    """A small model with real numbers: the tensors that autograd itself says it saves, each storage once."""
    shape = Shape(3, 64, 160, 4, 2, 16, 97, True, 2048, biases="qkv" if alias[4] == "2" else "none")
    shape = replace(shape, qk_norm=alias[4] == "3")
    model = adapted(meta_model(alias, shape)).to_empty(device="cpu").eval()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    layout = RowLayout() if rows else TreeLayout()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        chosen_logprobs(model.get_base_model(), group(*SMALL), layout).logprobs.sum().backward()
    assert formula(shape, SMALL, rows=rows).kept == pytest.approx(sum(saved.values()), rel=WITHIN)


@pytest.mark.parametrize(
    ("alias", "copies"), [("qwen2-1.5b", False), ("phi4-mini", False), ("gemma3-1b", False), ("qwen3-0.6b", True)]
)
def test_prompts_without_gradients(alias, copies):
    """The transformers sampler's prefill: eight rows at once, beside the keys and values that it is for."""
    shape, rows, width = shape_of(alias, 2), 8, 512
    model = adapted(meta_model(alias, shape))
    with counting_only(model) as base, as_on_an_old_gpu(copies):
        ids = torch.zeros(rows, width, dtype=torch.long)
        with torch.no_grad(), benchmark_module("memory").LiveStorages() as storages:
            base.get_decoder()(input_ids=ids, past_key_values=DynamicCache(), use_cache=True)
    each = shape.kv_bytes() + prompt_working(shape, 2)
    assert rows * width * each == pytest.approx(storages.peak, rel=WITHIN)


def test_constants_are_the_codes_own():
    assert chunked_head.TILES["cuda"] == TILE
    assert tree_attention.QUERY_BLOCK == QUERY_BLOCK
