"""What benchmarks/update.py measures: groups of completions, who runs them, and which ratios are of interest."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any, Literal

from igrpo_lite.algorithms.rollout import Rollout
from igrpo_lite.types import Completion, Group, Problem, Prompt, Score


@dataclass(frozen=True, slots=True)
class Side:
    """One way to do the update.

    Attributes:
        tokens, lora_layers: as in the settings.
        rows: ours only: right-padded rows instead of trees.
        micro_batch: TRL's rows at once; ours gets as many tokens. Unset: the whole group.
        every_position: TRL's head as it is on a CPU.
    """

    by: Literal["ours", "trl"] = "ours"
    tokens: str = "all"
    lora_layers: str = "all"
    rows: bool = False
    micro_batch: int | None = None
    every_position: bool = False


@dataclass(frozen=True, slots=True)
class Ratio:
    """Two sides of a case; ``what`` names the mechanism and the baseline. Goals are upper bounds."""

    side: str
    baseline: str
    what: str
    time: float | None = None
    peak: float | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """One group of completions of a shape, who runs it, and what is compared.

    Attributes:
        prompt, response: tokens at full size. In stage 2 the prompt holds a draft of ``response`` tokens.
        scale: of the lengths on a CPU.
        lengths: ``equal``; ``uneven``, log-normal; ``branching``, equal with shared beginnings.
        large: the large vocabulary. CUDA models have no other, so there these cases are left out.
    """

    name: str
    prompt: int
    response: int
    scale: float
    sides: dict[str, Side]
    ratios: tuple[Ratio, ...]
    group: int = 8
    lengths: str = "equal"
    large: bool = False


OURS, TRL = Side(), Side("trl")
FULL_TOKENS = "all tokens once, frozen head vs rows (TRL 1.16)"


def _full_tokens(name: str, prompt: int, response: int, scale: float, **more: Any) -> Case:
    ratio = Ratio("ours", "trl", FULL_TOKENS, time=1.0, peak=1.0)
    return Case(name, prompt, response, scale, {"ours": OURS, "trl": TRL}, (ratio,), **more)


CASES = (
    Case(
        "stage2-a",
        256 + 768,
        768,
        1 / 4,
        {"ours": OURS, "trl": TRL},
        (Ratio("ours", "trl", "shared prompt vs repeated rows (TRL 1.16)", 0.50, 0.55),),
    ),
    Case(
        "stage2-a-rows",
        256 + 768,
        768,
        1 / 8,
        {"ours": OURS, "ours-rows": Side(rows=True), "trl": TRL},
        (
            Ratio("ours", "ours-rows", "shared prompt vs repeated rows (ours)"),
            Ratio("ours-rows", "trl", "frozen head alone: repeated rows on both sides (TRL 1.16)"),
        ),
    ),
    Case(
        "stage2-a-cpu",
        256 + 768,
        768,
        1 / 8,
        {"ours": OURS, "trl-cpu": Side("trl", every_position=True)},
        (Ratio("ours", "trl-cpu", "shared prompt vs repeated rows (TRL 1.16 as it is on a CPU)", 0.50, 0.55),),
    ),
    Case(
        "stage2-a-uneven",
        256 + 768,
        768,
        1 / 8,
        {"ours": OURS, "trl": TRL},
        (Ratio("ours", "trl", "shared prompt, no padding vs repeated, padded rows (TRL 1.16)", 0.50, 0.55),),
        lengths="uneven",
    ),
    Case(
        "stage2-a-small-batches",
        256 + 768,
        768,
        1 / 8,
        {"ours": Side(micro_batch=2), "trl": Side("trl", micro_batch=2)},
        (Ratio("ours", "trl", "shared prompt vs rows, 2 rows' tokens at a time on both sides (TRL 1.16)"),),
    ),
    Case(
        "stage2-a-v152k",
        256 + 768,
        768,
        1 / 8,
        {"ours": OURS, "trl": TRL},
        (Ratio("ours", "trl", "shared prompt vs repeated rows (TRL 1.16)", 0.50, 0.55),),
        large=True,
    ),
    _full_tokens("grpo-a", 256, 768, 1 / 4),
    _full_tokens("grpo-a-g4", 256, 768, 1 / 8, group=4),
    _full_tokens("grpo-a-g16", 256, 768, 1 / 8, group=16),
    _full_tokens("grpo-b", 1024, 3072, 1 / 16),
    _full_tokens("grpo-long-answer", 64, 1536, 1 / 2, group=4),
    _full_tokens("grpo-long-prompt", 1536, 256, 1 / 8),
    _full_tokens("grpo-long-answer-v152k", 64, 1536, 1 / 16, group=4, large=True),
    _full_tokens("grpo-long-prompt-v152k", 1536, 256, 1 / 8, large=True),
    Case(
        "s-grpo-b",
        1024,
        3072,
        1 / 8,
        {
            "full": OURS,
            "full-rows": Side(rows=True),
            "s-grpo": Side(tokens="s-grpo"),
            "s-grpo-rows": Side(tokens="s-grpo", rows=True),
        },
        (
            Ratio("s-grpo-rows", "full-rows", "truncation after last chosen token vs our full update, both rows", 0.40),
            Ratio("s-grpo", "full", "truncation after last chosen token vs our full update, both trees", 0.30),
            Ratio("s-grpo", "full-rows", "truncation and shared prompt vs our full update in rows", 0.30),
        ),
    ),
    Case(
        "t-spmo-a",
        256,
        768,
        3 / 8,
        {"t-spmo": Side(tokens="t-spmo"), "full": OURS, "trl": TRL},
        (
            Ratio("t-spmo", "full", "branching nodes and their ancestors vs our full update", 0.10),
            Ratio("t-spmo", "trl", "branching nodes and their ancestors vs all tokens (TRL 1.16)", 0.10),
        ),
        lengths="branching",
    ),
    Case(
        "entropy-a",
        256,
        768,
        1 / 8,
        {"entropy": Side(tokens="entropy"), "full": OURS},
        (Ratio("entropy", "full", "a first pass without gradient, then 20 % of head rows vs our full update"),),
    ),
    Case(
        "lora-last-third-a",
        256,
        768,
        1 / 4,
        {"last-third": Side(lora_layers="last third"), "full": OURS},
        (Ratio("last-third", "full", "adapters in the last third of layers vs in all layers (ours)"),),
    ),
)

HEADS = "heads"
HEAD_ROWS = {"cpu": (1024, 256), "cuda": (4096, 4096)}  # small and large vocabulary


def make_rollout(prompt: int, response: int, group: int, lengths: str, vocab: int) -> Rollout:
    """A group of random token ids; half of it is right."""
    rng = random.Random(0)
    ids = tuple(rng.randrange(vocab) for _ in range(prompt))
    if lengths == "branching":
        completions = [branching(rng, response, vocab) for _ in range(group)]
    else:
        wanted = [response] * group
        if lengths == "uneven":  # the median is a third of the limit
            wanted = [round(math.exp(rng.gauss(math.log(response / 3), 0.7))) for _ in range(group)]
        completions = [tuple(rng.randrange(vocab) for _ in range(min(max(n, 1), response))) for n in wanted]
    rewards = [float(index % 2) for index in range(group)]
    rng.shuffle(rewards)
    return Rollout(
        Group(
            Problem("random", "", ""),
            "stage1",
            Prompt("", ids),
            tuple(Completion(c, "", (0.0,) * len(c), "stop") for c in completions),
            tuple(Score(reward, {}, "") for reward in rewards),
        )
    )


def branching(rng: random.Random, length: int, vocab: int, root: int = 0) -> tuple[int, ...]:
    """A completion whose tokens are nearly certain four times of five and else choices of three.

    What is likely where depends on the tokens before it and ``root`` alone, so that completions share beginnings as
    samples of a model do: eight of them have all parted after about 24 tokens, sixteen after 34.
    """
    state, ids = root, []
    for _ in range(length):
        place = random.Random(state)
        fork = place.random() < 0.2
        options = place.sample(range(vocab), 3)
        token = rng.choices(options, (0.6, 0.3, 0.1) if fork else (0.99, 0.008, 0.002))[0]
        ids.append(token)
        state = hash((state, token))
    return tuple(ids)
