"""What the parts of benchmarks/rollout.py share: sizes, findings, models, and completions of lengths that are given."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from igrpo_lite.config import RunConfig
from igrpo_lite.config.resolve import resolve
from igrpo_lite.policy.loading import Policy, load_policy, load_tokenizer
from igrpo_lite.policy.prompting import prompt_builder
from igrpo_lite.sampling.base import OnFinished, Poll, Request, Sampler
from igrpo_lite.sampling.replica import Replica
from igrpo_lite.sampling.transformers import TransformersSampler
from igrpo_lite.sampling.vllm import VllmSampler
from igrpo_lite.types import Completion

MAX_MODEL_LEN = 768  # prompt, a draft of 160 tokens written out and read anew, completion

Law = Callable[[random.Random], int]
"""Draws a completion's length, tokens."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured.

    Attributes:
        layers, hidden: of the random Qwen2 beside the bundled model (8 and 512: 24 M weights).
        prompts, drafts, refinements: problems of a step, and rollouts of each in either stage.
        equal: tokens of each completion, where all are of one length; the bundled model's limit is 48.
        longest: tokens of the longest, where lengths have a heavy tail.
        live: sequences decoded at the same time, with that tail.
        warm_up: steps of each schedule that do not count; the first of ``ahead`` has its own drafts to sample.
        turns: that count, of schedules.
        pushes: of the adapter.
        syncs, syncs_nf4: after which drift is measured.
        group, tokens: rollouts of each of 4 prompts and their tokens, for tokens per second.
        speed_turns: that count there.
        train_group, train_tokens, train_steps: of the whole training step, on 4 prompts; the first does not count.
    """

    layers: int = 8
    hidden: int = 512
    prompts: int = 8
    drafts: int = 4
    refinements: int = 4
    equal: tuple[int, ...] = (48, 128)
    longest: int = 160
    live: tuple[int, ...] = (16, 64)
    warm_up: int = 1
    turns: int = 5
    pushes: int = 50
    syncs: int = 200
    syncs_nf4: int = 200
    group: int = 8
    tokens: int = 128
    speed_turns: int = 3
    train_group: int = 8
    train_tokens: int = 64
    train_steps: int = 4


FULL = Sizes()
QUICK = Sizes(
    layers=2,
    hidden=64,
    prompts=3,
    drafts=2,
    refinements=2,
    equal=(6,),
    longest=12,
    live=(4,),
    turns=1,
    pushes=3,
    syncs=5,
    syncs_nf4=5,
    group=2,
    tokens=8,
    speed_turns=1,
    train_group=2,
    train_tokens=6,
    train_steps=2,
)


@dataclass(frozen=True, slots=True)
class Options:
    """What a part is asked for: ``engines`` to measure schedules on, a folder for models, and the sizes."""

    sizes: Sizes
    engines: Sequence[str]
    folder: Path
    threads: int


@dataclass(frozen=True, slots=True)
class Finding:
    """One number: a ratio to what ``baseline`` names, or a quantity with a unit, beside what it should be.

    Attributes:
        value: its median, smallest and largest.
        goal: at most this; with ``at_least`` at least this; ``None``: no goal was set.
    """

    part: str
    what: str
    baseline: str
    value: dict[str, float]
    goal: float | None = None
    at_least: bool = False
    unit: str = "x"

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        median = self.value["median"]
        return median >= self.goal if self.at_least else median <= self.goal

    def record(self) -> dict[str, Any]:
        return asdict(self) | {"met": self.met}


def constant(length: int) -> Law:
    return lambda rng: length


def heavy_tail(longest: int, mean: float = 30.0) -> Law:
    """8 + Exp(``mean``) tokens, but ``longest`` at most: most completions are short, a few very long."""
    return lambda rng: min(longest, 8 + int(rng.expovariate(1 / mean)))


class GivenLengths:
    """A sampler whose completions are as long as a law says of their requests' seeds; end tokens end none.

    The same request so has the same length on every engine and with every schedule.

    Attributes:
        asked: the requests of the last run, with those that followed.
    """

    def __init__(self, sampler: Sampler, law: Law) -> None:
        self.sampler = sampler
        self.law = law
        self.asked: list[Request] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)

    def run(
        self, requests: Sequence[Request], on_finished: OnFinished | None = None, poll: Poll | None = None
    ) -> list[Completion]:
        self.asked = []

        def finished(request: Request, completion: Completion) -> Iterable[Request]:
            assert on_finished is not None
            return self._cut(on_finished(request, completion))

        def polled(idle: bool) -> Iterable[Request]:
            assert poll is not None
            return self._cut(poll(idle))

        return self.sampler.run(self._cut(requests), on_finished and finished, poll and polled)

    def _cut(self, requests: Iterable[Request]) -> list[Request]:
        cut = [replace(request, max_tokens=self.law(random.Random(request.seed))) for request in requests]
        self.asked += cut
        return cut


def random_model(folder: Path, layers: int, hidden: int, dtype: torch.dtype = torch.float32) -> str:
    """A folder with a random Qwen2 and the bundled model's tokenizer; 8 layers of width 512 are 24 M weights."""
    tokenizer = load_tokenizer(RunConfig())
    heads = max(2, hidden // 64)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    path = folder / f"{layers}-{hidden}-{str(dtype).removeprefix('torch.')}"
    if not path.is_dir():
        Qwen2ForCausalLM(config).to(dtype).save_pretrained(path)
        tokenizer.save_pretrained(path)
    return str(path)


def make_policy(model: str, dtype: str = "float32", std: float = 0.02, device: str = "cpu") -> tuple[Policy, RunConfig]:
    """A policy with an adapter of the default rank, whose B has this standard deviation (0: a fresh one)."""
    config = resolve({"model": model, "dtype": dtype, "device": device, "backend": "transformers"})
    policy = load_policy(config, seed=0)
    fill_adapter(policy, std)
    return policy, config


@torch.no_grad()
def fill_adapter(policy: Policy, std: float = 0.02) -> None:
    """Draw B, which a fresh adapter has at 0."""
    torch.manual_seed(5)
    for name, parameter in policy.adapter_parameters():
        if "lora_B" in name:
            parameter.normal_(std=std)


def make_sampler(
    engine: str,
    policy: Policy,
    config: RunConfig,
    max_num_seqs: int,
    share_base: bool = True,
    max_model_len: int = MAX_MODEL_LEN,
) -> TransformersSampler | VllmSampler:
    """One whose completions end at their token limit only."""
    if engine == "transformers":
        return TransformersSampler(Replica(policy.model), policy.tokenizer, [-1], max_num_seqs)
    sampler = VllmSampler(
        policy, prompt_builder(config), config, max_model_len, max_num_seqs=max_num_seqs, share_base=share_base
    )
    sampler.stop_ids = []
    return sampler


def parameters(policy: Policy) -> int:
    """Frozen weights."""
    return sum(p.numel() for name, p in policy.model.named_parameters() if "lora_" not in name)
