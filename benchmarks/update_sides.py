"""What benchmarks/update.py compares: our update, TRL's, and heads alone, on one set of random weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # else TRL reports every trainer that is made
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import trl.trainer.utils as trl_utils
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config
from trl import GRPOConfig, GRPOTrainer

from igrpo_lite.algorithms.learning import learning_sequences, totals
from igrpo_lite.algorithms.rollout import Rollout
from igrpo_lite.algorithms.tokens.base import LearningSequence
from igrpo_lite.config import RunConfig
from igrpo_lite.config.defaults import ENTROPY_SHARE
from igrpo_lite.planning.models import find_model
from igrpo_lite.policy.attention import register
from igrpo_lite.policy.chunked_head import head_logprobs
from igrpo_lite.policy.heads import Head
from igrpo_lite.policy.loading import Policy, adapter_layers, linear_names, load_tokenizer
from igrpo_lite.policy.logprobs import RowLayout
from igrpo_lite.training.update import PolicyUpdate

_NOT_REENTRANT = {"use_reentrant": False}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A Qwen2, or with ``head_dim`` a Qwen3, with a tied head."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    head_dim: int | None = None

    def config(self) -> Any:
        sizes: dict[str, Any] = {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 32_768,
            "tie_word_embeddings": True,
            # Wider than usual, so that distributions differ from each other and wrong positions show.
            "initializer_range": 1.5 / self.hidden**0.5,
            "bos_token_id": None,
            "eos_token_id": None,
        }
        return Qwen2Config(**sizes) if self.head_dim is None else Qwen3Config(**sizes, head_dim=self.head_dim)


def _preset(name: str) -> ModelShape:
    found = find_model(name).shape
    head_dim = found.head_dim if found.qk_norm else None
    return ModelShape(
        found.vocab, found.hidden, found.layers, found.heads, found.kv_heads, found.intermediate, head_dim
    )


QWEN = {name: _preset(name) for name in ("qwen2-1.5b", "qwen3-4b")}


class Contender(Protocol):
    """Calling it runs forward and backward. Then it knows its loss and gradients, and how much it ran."""

    loss: float
    tokens: int
    head_rows: int

    def __call__(self) -> None: ...

    def gradients(self) -> list[Tensor]: ...

    def clear(self) -> None:
        """Let go of the gradients."""


class Models:
    """Our policy and TRL's trainer on the same frozen weights and equal adapters.

    Args:
        dtype: of the frozen weights; with bfloat16 TRL runs under autocast, as its default ``bf16`` says.
        folder: where TRL may write.
        lora_layers: as in the settings.
    """

    def __init__(
        self,
        shape: ModelShape,
        device: torch.device,
        dtype: torch.dtype,
        folder: Path,
        lora_layers: str = "all",
        checkpointing: bool = False,
    ) -> None:
        self.shape, self.device, self.dtype, self.checkpointing = shape, device, dtype, checkpointing
        base = self._base(register(shape.config()))
        adapter = _adapter(base, lora_layers)
        torch.manual_seed(1)
        model = get_peft_model(base, adapter)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
        self.policy = Policy(model, load_tokenizer(RunConfig()), device, (0,))  # type: ignore[arg-type]
        theirs = self._base("sdpa")
        for ours, other in zip(_frozen(base), theirs.parameters(), strict=True):
            other.data = ours.data
        self.trainer = self._trainer(theirs, adapter, folder)
        for ours, other in zip(trainable(model), trainable(self.trainer.model), strict=True):
            other.data.copy_(ours.data)
        if checkpointing:
            model.gradient_checkpointing_enable(_NOT_REENTRANT)  # as training does
            self.trainer.model.gradient_checkpointing_enable(_NOT_REENTRANT)  # as transformers' Trainer.train() does

    def _base(self, attention: str) -> Any:
        torch.manual_seed(0)
        config = self.shape.config()
        with self.device:
            return AutoModelForCausalLM.from_config(config, dtype=self.dtype, attn_implementation=attention)

    def _trainer(self, model: Any, adapter: LoraConfig, folder: Path) -> Any:
        args = GRPOConfig(
            output_dir=str(folder),
            use_cpu=self.device.type == "cpu",
            bf16=self.dtype == torch.bfloat16,
            gradient_checkpointing=self.checkpointing,
            gradient_checkpointing_kwargs=dict(_NOT_REENTRANT) if self.checkpointing else None,
            report_to="none",
            beta=0.0,
            loss_type="grpo",
            num_generations=2,  # of no consequence: it generates nothing here
            per_device_train_batch_size=2,
        )
        trainer = GRPOTrainer(
            model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=args,
            train_dataset=Dataset.from_dict({"prompt": ["not used"]}),
            processing_class=self.policy.tokenizer,
            peft_config=adapter,
        )
        trainer.model.train()
        if self.dtype != torch.float32:
            trainer.accelerator.prepare_model(trainer.model)  # puts the autocast there, as training does
        return trainer


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _frozen(base: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in base.named_parameters() if "lora_" not in name]


def _adapter(base: Any, lora_layers: str) -> LoraConfig:
    layers = adapter_layers(lora_layers, base.config.num_hidden_layers)
    return LoraConfig(
        r=16,
        lora_alpha=16,
        target_modules=linear_names(base),
        layers_to_transform=layers,
        task_type="CAUSAL_LM",
    )


def run_config(models: Models, **settings: Any) -> RunConfig:
    """Settings of one update; nothing is clipped, and random completions have no sampler to be compared with."""
    fixed = {"algorithm": "grpo", "importance_sampling_mode": "none", "max_grad_norm": 1e9, "update_tokens": 2**24}
    return RunConfig(**(fixed | {"gradient_checkpointing": models.checkpointing} | settings))


class Ours:
    """Our whole update but its optimizer step: tokens are chosen and trees built anew in every call.

    Args:
        rows: right-padded rows instead of token trees.
    """

    def __init__(self, models: Models, rollouts: Sequence[Rollout], config: RunConfig, rows: bool = False) -> None:
        self.rollouts = rollouts
        self.update = PolicyUpdate(models.policy, config)
        self.update.optimizer = self.kept = _GradientsOnly(self.update.parameters)  # type: ignore[assignment]
        if rows:
            self.update.layout = RowLayout()
        self.loss, self.tokens, self.head_rows = 0.0, 0, 0

    def __call__(self) -> None:
        self.clear()
        stats = self.update.step(self.rollouts, step=0, learning_rate=0.0)
        self.loss, self.tokens, self.head_rows = stats.loss, stats.backbone_tokens, stats.head_tokens

    def gradients(self) -> list[Tensor]:
        return self.kept.gradients

    def clear(self) -> None:
        self.kept.gradients = []


class _GradientsOnly(torch.optim.Optimizer):
    """Leaves the weights alone and keeps what they would have been moved with."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self.gradients: list[Tensor] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]


class Trl:
    """``GRPOTrainer._compute_loss`` and backward on the tensors of the same sequences.

    Selected tokens become TRL's ``tool_mask``, and with ``entropy`` its ``top_entropy_quantile``: it then computes what
    it always computes, but gives the same loss.

    Args:
        rows: of a micro-batch; unset: all at once.
        every_position: on a CPU, let the head score prompt and padding too, as TRL does there.
    """

    def __init__(
        self,
        models: Models,
        rollouts: Sequence[Rollout],
        config: RunConfig,
        rows: int | None = None,
        every_position: bool = False,
    ) -> None:
        self.trainer, self.config, self.every_position = models.trainer, config, every_position
        sequences = learning_sequences(rollouts, config, step=0)
        whole = _tensors(sequences, config, models.device)
        starts = range(0, len(sequences), rows or len(sequences))
        self.batches = [
            {name: t if t.dim() == 0 else t[start : start + starts.step] for name, t in whole.items()}
            for start in starts
        ]
        self.loss = 0.0
        size, width = whole["prompt_mask"].shape[0], whole["prompt_mask"].shape[1] + whole["completion_mask"].shape[1]
        self.tokens = size * width
        self.head_rows = size * (width - 1) if every_position else int(whole["completion_mask"].sum())

    def __call__(self) -> None:
        trainer, config = self.trainer, self.config
        self.clear()
        trainer.current_gradient_accumulation_steps = len(self.batches)
        trainer.loss_type = "dapo" if config.tokens == "t-spmo" else "grpo"
        trainer.top_entropy_quantile = ENTROPY_SHARE if config.tokens == "entropy" else 1.0
        # This one question decides on positions; the kernel below it asks a copy of its own whether there is a GPU.
        # TRL 1.15 does not ask it: it always scores as 1.16 does on CUDA.
        asked = hasattr(trl_utils, "_use_triton") and not self.every_position
        cuda = patch.object(trl_utils, "_use_triton", lambda device: True) if asked else nullcontext()
        self.loss = 0.0
        for batch in self.batches:
            with cuda:
                loss = trainer._compute_loss(trainer.model, batch)
            loss.backward()
            self.loss += float(loss.detach())

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in trainable(self.trainer.model) if p.grad is not None]

    def clear(self) -> None:
        self.trainer.model.zero_grad(set_to_none=True)


def _tensors(sequences: Sequence[LearningSequence], config: RunConfig, device: torch.device) -> dict[str, Tensor]:
    """What ``_generate_and_score_completions`` gives: prompts padded on the left, completions on the right."""
    prompts = [torch.tensor(s.prompt.ids) for s in sequences]
    completions = [torch.tensor(s.completion.ids) for s in sequences]
    found = {
        "prompt_ids": pad_sequence(prompts, batch_first=True, padding_side="left"),
        "prompt_mask": pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left"),
        "completion_ids": pad_sequence(completions, batch_first=True),
        "completion_mask": pad_sequence([torch.ones_like(c) for c in completions], batch_first=True),
        "num_items_in_batch": torch.tensor(totals(sequences).tokens),
    }
    if config.tokens in ("all", "entropy"):
        found["advantages"] = torch.tensor([s.learning.advantages[0] for s in sequences])
    else:
        found["tool_mask"] = torch.zeros_like(found["completion_mask"])
        found["advantages"] = torch.zeros(found["completion_mask"].shape)
        for row, sequence in enumerate(sequences):
            chosen = list(sequence.learning.indices)
            found["tool_mask"][row, chosen] = 1
            found["advantages"][row, chosen] = torch.tensor(sequence.learning.advantages)
    return {name: tensor.to(device) for name, tensor in found.items()}


class HeadAlone:
    """A head on random states: ``kind`` is ``ours``, ``trl`` (its chunked kernel) or ``naive`` (log_softmax)."""

    def __init__(self, kind: str, weight: Tensor, rows: int) -> None:
        random = torch.Generator().manual_seed(0)
        vocab, width = weight.shape
        self.kind, self.head = kind, Head(nn.Linear(width, vocab, bias=False, device="meta"))
        self.head.module.weight = nn.Parameter(weight, requires_grad=False)
        self.hidden = torch.randn(rows, width, generator=random).to(weight).requires_grad_()
        self.targets = torch.randint(vocab, (rows,), generator=random).to(weight.device)
        self.factors = torch.randn(rows, generator=random).to(weight.device)
        self.loss, self.tokens, self.head_rows = 0.0, 0, rows

    def __call__(self) -> None:
        self.clear()
        loss = (getattr(self, f"_{self.kind}")() * self.factors).sum()
        loss.backward()
        self.loss = float(loss.detach())

    def gradients(self) -> list[Tensor]:
        assert self.hidden.grad is not None
        return [self.hidden.grad]

    def clear(self) -> None:
        self.hidden.grad = None

    def _ours(self) -> Tensor:
        return head_logprobs(self.head, self.hidden, self.targets, torch.ones_like(self.factors))[0]

    def _trl(self) -> Tensor:
        return trl_utils._ChunkedLogProbFunction.apply(
            self.hidden,
            self.head.weight,
            None,
            self.targets,
            1.0,
            trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE,
            None,
            1.0,
            ("log_probs", "entropy"),
        )[0]

    def _naive(self) -> Tensor:
        logits = (self.hidden @ self.head.weight.T).float()
        return logits.log_softmax(dim=-1).gather(1, self.targets[:, None])[:, 0]
