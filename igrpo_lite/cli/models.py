"""``igrpo-lite models``: the models with a short name."""

from __future__ import annotations

import json as json_module
from typing import Annotated, Any

from cyclopts import Parameter

from igrpo_lite.planning.gpus import GIB
from igrpo_lite.planning.memory import weight_bytes
from igrpo_lite.planning.models import MODELS, Model

Json = Annotated[bool, Parameter(help="Everything that is known, as JSON.", negative=(), show_default=False)]


def models(*, json: Json = False) -> None:
    """List the models that have a short name, with their size; any hub id or local folder works beside them."""
    if json:
        print(json_module.dumps([_all(model) for model in MODELS], indent=2))
        return
    print(f"{'name':19}{'hub id':44}{'weights':>9}{'16 bit':>9}{'4 bit':>9}{'KV/token':>10}{'context':>9}")
    for model in MODELS:
        shape = model.shape
        sizes = [f"{weight_bytes(shape, 2, four_bit) / GIB:.2f}" for four_bit in (False, True)]
        print(
            f"{model.alias:19}{model.hub_id:44}{shape.parameters / 1e9:>7.2f} B{sizes[0]:>9}{sizes[1]:>9}"
            f"{shape.kv_bytes() / 1024:>6.0f} KiB{shape.context:>9}"
        )
    print("weights in GiB: 16 bits, and NF4 (--load-in-4bit); igrpo-lite plan says what a run takes")


def _all(model: Model) -> dict[str, Any]:
    shape = model.shape
    return {
        "alias": model.alias,
        "hub_id": model.hub_id,
        "same_shape": dict(model.also),
        "four_bit": model.four_bit or None,
        "four_bit_dynamic": model.four_bit_dynamic or None,
        "ungated": model.ungated or None,
        "parameters": shape.parameters,
        "layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "context": shape.context,
        "lora_target_modules": list(model.targets),
    }
