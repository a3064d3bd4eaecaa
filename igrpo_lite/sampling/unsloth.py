"""Sampling with the vLLM engine that Unsloth made together with the model: one copy of the frozen weights for both."""

from __future__ import annotations

import os
from tempfile import TemporaryDirectory
from typing import Any

from igrpo_lite.errors import SamplerError
from igrpo_lite.sampling.vllm import VllmSampler
from igrpo_lite.sampling.vllm_engine import Engine


class UnslothSampler(VllmSampler):
    """:class:`VllmSampler` on ``policy.engine``, to which Unsloth hands the adapter as tensors.

    The engine lives as long as the process: the policy's weights are its own, so it is neither started nor freed here.
    Not run on a GPU so far (docs/backends.md).

    Raises:
        SamplerError: an engine that was started for shorter sequences, or an adapter that it cannot hold.
    """

    def rebuild(self) -> None:
        """Nothing is made anew; the policy's adapter is loaded.

        Raises:
            SamplerError: an engine that died.
        """
        self.load_adapter()

    def close(self) -> None:
        """Let go of the engine, asleep where it can sleep; the policy keeps its weights."""
        if self.engine.llm is not None and self.died is None:
            self.sleep()
        self.engine.llm = None
        self._folder.cleanup()

    def _start(self) -> None:
        llm = self.policy.engine
        length = int(llm.llm_engine.vllm_config.model_config.max_model_len)
        if length < self.max_model_len:
            raise SamplerError(
                f"Unsloth's vLLM has room for {length} tokens in a sequence, but a prompt and its completion may need "
                f"{self.max_model_len}: set another --kv-cache-gib, or lower --max-completion-length"
            )
        self._folder = TemporaryDirectory(prefix="igrpo-lite-adapter-")
        self._slots = []
        self.engine = Engine(llm, self._options, 0, [])
        # Unsloth's allocator leaves the weights where they are when the engine sleeps.
        self.engine.sleeps = "all" if os.environ.get("UNSLOTH_VLLM_STANDBY", "0") != "0" else "no"
        self.died = None
        self.load_adapter()
        self._warm_up()

    def _push(self) -> None:
        model: Any = self.policy.model
        # A new id each time, under which vLLM knows neither an older adapter nor a KV cache of one.
        request = model.load_lora(self._folder.name, load_tensors=True)
        # Copies: vLLM scales B in place, and where the engine is in float32 too, that B would be the policy's own.
        request.lora_tensors = {name: tensor.detach().clone() for name, tensor in request.lora_tensors.items()}
        self.lora_request = request
