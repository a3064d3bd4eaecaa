"""Makes the bundled model from nothing: ``python tools/build_tiny.py --output-dir DIR``.

A small Qwen2 learns from worked solutions of the ``warmup`` split, in the very prompts that reinforcement learning
uses afterwards (stage 1, and stage 2 with right and wrong drafts). Every demonstration is a full, right solution; but
two kinds of problems are practised very little (see :data:`RARE`). So the built model writes full solutions and mostly
calculates well, and what it lacks is the choice of the right operation in those two kinds.
"""

from __future__ import annotations

import argparse
import platform
import random
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from tiny_tokenizer import START, build_tokenizer
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from igrpo_lite.problems.synthetic import TWO_STEP_KINDS, Worked, load, split_of
from igrpo_lite.prompts import STAGE2_TEMPLATES, SYSTEM_PROMPTS, PromptBuilder
from igrpo_lite.types import Problem

Row = tuple[tuple[int, ...], tuple[bool, ...]]
"""Token ids of a text and which of them are to be learned."""

_STEP = re.compile(r"(\d+)([+*-])(\d+)=(\d+)")
_BOX = re.compile(r"\\boxed\{(\d+)\}")
_APPLY = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


@dataclass(frozen=True)
class Phase:
    """A stretch of the warm-up.

    Attributes:
        rare: how often the kinds in :data:`RARE` are practised, where every other kind counts 1.
        drills: share of batches that are lines of single calculations.
        drafts: share of the other batches that are stage-2 prompts; from the start they would slow the learning.
        rate: factor of the learning rates.
        decay: last part of the steps, over which the learning rates fall to zero.
    """

    steps: int
    rare: float
    drills: float
    drafts: float
    rate: float = 1.0
    decay: float = 0.0


RARE = ("two-find", "boxes-more")
"""Kinds whose last step adds. The warm-up hardly practises them, so the model takes away there out of habit: which
operation a problem asks for is what reinforcement learning, practising all kinds alike, has to teach it."""

PHASES: tuple[Phase, ...] = (
    Phase(steps=325, rare=0.005, drills=0.7, drafts=0.0),
    Phase(steps=300, rare=0.005, drills=0.15, drafts=0.6, decay=0.5),
    Phase(steps=40, rare=0.07, drills=0.1, drafts=0.6, rate=0.25),
    Phase(steps=20, rare=0.07, drills=0.1, drafts=0.6, rate=0.2, decay=1.0),
)


@dataclass(frozen=True)
class Recipe:
    """All that decides what the built model is.

    Attributes:
        drill_length: calculations in one line of a drill.
        multi_turn: share of the stage-2 batches whose draft is a turn of its own.
        right_drafts: share of stage-2 drafts that are right.
    """

    seed: int = 0
    phases: tuple[Phase, ...] = PHASES
    batch: int = 64
    drill_length: int = 8
    multi_turn: float = 0.25
    right_drafts: float = 0.5
    muon_lr: float = 0.02
    adamw_lr: float = 2e-3
    lr_warmup: int = 50
    hidden: int = 128
    layers: int = 4
    intermediate: int = 384
    context: int = 1024


def build_model(recipe: Recipe, tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights that fits the tokenizer."""
    torch.manual_seed(recipe.seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.hidden // 32,
        num_key_value_heads=recipe.hidden // 64,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero, and left so: with biases of queries and keys the solutions came later
            parameter.requires_grad_(False)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        top_k=0,
        max_new_tokens=64,
    )
    return model


def wrong_draft(worked: Worked, r: random.Random) -> str:
    """A solution in full form with one mistake, a wrong operation or one wrong digit, carried through to the answer."""
    while True:
        bad = r.randrange(len(worked.steps))
        wrong_operation = r.random() < 0.4
        value: int | None = None
        steps = []
        for index, step in enumerate(worked.steps):
            left, operation, right, _ = _STEP.fullmatch(step).groups()  # type: ignore[union-attr]
            a = int(left) if value is None else value
            if index == bad and wrong_operation:
                operation = r.choice([o for o in _APPLY if o != operation])
            value = _APPLY[operation](a, int(right))
            if index == bad and not wrong_operation:
                value += r.choice((-10, -2, -1, 1, 2, 10))
            steps.append(f"{a}{operation}{right}={value}")
            if not 0 <= value <= 99:
                break
        else:
            if value != worked.answer:
                return "; ".join(steps) + f"; \\boxed{{{value}}}"


class Lessons:
    """Endless batches of warm-up rows for one recipe."""

    def __init__(self, recipe: Recipe, tokenizer: Qwen2Tokenizer) -> None:
        self.recipe = recipe
        self.tokenizer = tokenizer
        self.random = random.Random(f"lessons/{recipe.seed}")
        system = SYSTEM_PROMPTS["boxed"]
        self.plain = PromptBuilder(tokenizer, system, STAGE2_TEMPLATES["plain"], "plain")
        self.turns = PromptBuilder(tokenizer, system, STAGE2_TEMPLATES["multi-turn"], "multi-turn")

    def worked(self, rare: float = 1.0) -> Worked:
        """One problem of the warm-up split; ``rare`` is the weight of the rare kinds."""
        kinds = tuple(TWO_STEP_KINDS)
        kind = self.random.choices(kinds, [rare if kind in RARE else 1.0 for kind in kinds])[0]
        while True:
            worked = TWO_STEP_KINDS[kind](self.random)
            if worked is not None and split_of(worked) == "warmup":
                return worked

    def drill(self) -> Row:
        """A line of single calculations, of which only the results are learned."""
        r, ids, learned = self.random, list(self.tokenizer.encode(START)), [False]
        for _ in range(self.recipe.drill_length):
            left, operation, right, result = _STEP.fullmatch(r.choice(self.worked().steps)).groups()  # type: ignore[union-attr]
            for text, learn in ((f"{left}{operation}{right}=", False), (result, True), ("; ", True)):
                piece = self.tokenizer.encode(text, add_special_tokens=False)
                ids += piece
                learned += [learn] * len(piece)
        return tuple(ids), tuple(learned)

    def answer(self, text: str) -> tuple[int, ...]:
        """Ids of a whole answer, the end token included."""
        return (*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id)

    def batch(self, phase: Phase) -> list[Row]:
        """Rows of one step: all drills, all of stage 1, or all of stage 2 with one placement of the draft."""
        recipe, r = self.recipe, self.random
        if r.random() < phase.drills:
            return [self.drill() for _ in range(recipe.batch)]
        second = r.random() < phase.drafts
        builder = self.turns if r.random() < recipe.multi_turn else self.plain
        rows = []
        for _ in range(recipe.batch):
            worked = self.worked(phase.rare)
            prompt = builder.first(worked.question)
            if second:
                draft = worked.solution if r.random() < recipe.right_drafts else wrong_draft(worked, r)
                prompt = builder.second(worked.question, prompt, self.answer(draft))
            answer = self.answer(worked.solution)
            rows.append((prompt.ids + answer, (False,) * len(prompt.ids) + (True,) * len(answer)))
        return rows


def shared_length(texts: list[tuple[int, ...]], limit: int) -> int:
    """How many of the first ``limit`` ids are the same in all texts."""
    for length in range(limit):
        if any(text[length] != texts[0][length] for text in texts):
            return length
    return limit


def batch_loss(model: Qwen2ForCausalLM, rows: list[Row]) -> Tensor:
    """Mean cross-entropy of the answers' tokens.

    The tokens that all prompts begin with (the system prompt) pass through the model once; their keys and values,
    gradient included, serve every row.
    """
    texts = [text for text, _ in rows]
    shared = shared_length(texts, limit=min(learned.index(True) for _, learned in rows) - 1)
    cache = DynamicCache(config=model.config)
    if shared:
        model.model(input_ids=torch.tensor([texts[0][:shared]]), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(rows))
    width = max(map(len, texts)) - shared - 1
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), -100)
    for index, (text, learned) in enumerate(rows):
        end = len(text) - shared - 1
        ids[index, :end] = torch.tensor(text[shared:-1])
        labels[index, :end] = torch.where(torch.tensor(learned[shared + 1 :]), torch.tensor(text[shared + 1 :]), -100)
    hidden = model.model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
    kept = labels >= 0
    return nn.functional.cross_entropy(model.lm_head(hidden[kept]).float(), labels[kept])


class Trainer:
    """Model, lessons and optimizers of one build: Muon for the layers' matrices, AdamW for all else."""

    def __init__(self, model: Qwen2ForCausalLM, lessons: Lessons) -> None:
        recipe = lessons.recipe
        self.model, self.lessons, self.recipe = model, lessons, recipe
        matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
        chosen = {id(p) for p in matrices}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
        self.muon = torch.optim.Muon(matrices, lr=recipe.muon_lr, momentum=0.95, weight_decay=0.0)
        self.adamw = torch.optim.AdamW(others, lr=recipe.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0)
        self.step = 0

    def learn(self, phase: Phase) -> Iterator[float]:
        """Goes through one phase and yields the loss of each step."""
        self.model.train()
        for step in range(phase.steps):
            left = (phase.steps - step) / (phase.decay * phase.steps) if phase.decay else 1.0
            factor = phase.rate * min(1.0, left, (self.step + 1) / self.recipe.lr_warmup)
            self.muon.param_groups[0]["lr"] = self.recipe.muon_lr * factor
            self.adamw.param_groups[0]["lr"] = self.recipe.adamw_lr * factor
            loss = batch_loss(self.model, self.lessons.batch(phase))
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in (self.muon, self.adamw):
                optimizer.step()
                optimizer.zero_grad()
            self.step += 1
            yield loss.item()


@torch.no_grad()
def answer_all(
    model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, prompts: list[tuple[int, ...]], sample: bool = False
) -> list[tuple[int, ...]]:
    """The model's answers: greedy ones, or samples at temperature 1; each ends with the end token if it was found."""
    model.eval()
    encoded = tokenizer.pad(
        {"input_ids": [list(prompt) for prompt in prompts]}, padding_side="left", return_tensors="pt"
    )
    out = model.generate(**encoded, do_sample=sample, top_k=0, temperature=1.0, max_new_tokens=48)
    answers = []
    for row in out[:, encoded["input_ids"].shape[1] :].tolist():
        end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
        answers.append(tuple(row[:end]))
    return answers


def is_right(text: str, problem: Problem) -> bool:
    """Whether the last boxed number is the answer."""
    found = _BOX.findall(text)
    return bool(found) and found[-1] == problem.answer


def evaluate(model: Qwen2ForCausalLM, lessons: Lessons, problems: list[Problem]) -> dict[str, float]:
    """Percentages right: greedy in one pass (all, per kind), sampled, refined (from the greedy draft), ended."""
    tokenizer = lessons.tokenizer
    firsts = [lessons.plain.first(problem.question) for problem in problems]
    drafts = answer_all(model, tokenizer, [first.ids for first in firsts])
    sampled = answer_all(model, tokenizer, [first.ids for first in firsts], sample=True)
    result: dict[str, list[bool]] = {"greedy": [], "sampled": [], "ended": []}
    for problem, draft, sample in zip(problems, drafts, sampled, strict=True):
        right = is_right(tokenizer.decode(draft), problem)
        result["greedy"].append(right)
        result.setdefault(problem.columns["kind"], []).append(right)
        result["sampled"].append(is_right(tokenizer.decode(sample), problem))
        result["ended"].append(draft[-1] == tokenizer.eos_token_id)
    for name, builder in (("refined", lessons.plain), ("refined-multi-turn", lessons.turns)):
        rows = zip(problems, firsts, drafts, strict=True)
        seconds = [builder.second(problem.question, first, draft).ids for problem, first, draft in rows]
        texts = tokenizer.batch_decode(answer_all(model, tokenizer, seconds))
        result[name] = [is_right(text, problem) for text, problem in zip(texts, problems, strict=True)]
    return {name: round(100 * sum(values) / len(values), 1) for name, values in result.items()}


def build(recipe: Recipe, output_dir: Path, problems: int = 400, log_every: int = 25) -> None:
    """Builds, evaluates and saves the model and its tokenizer; writes ``build.log`` beside ``output_dir``."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir.parent / "build.log").open("w", encoding="utf-8") as file:

        def log(text: str) -> None:
            line = f"[{time.perf_counter() - started:6.1f} s] {text}"
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()

        log(f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
        log(f"recipe {recipe}")
        tokenizer = build_tokenizer(recipe.context)
        model = build_model(recipe, tokenizer)
        log(f"{len(tokenizer)} tokens, {sum(p.numel() for p in model.parameters()):,} weights")
        lessons = Lessons(recipe, tokenizer)
        held_out = load("two-step", "validation", problems)
        trainer = Trainer(model, lessons)
        for number, phase in enumerate(recipe.phases, 1):
            log(f"phase {number}: {phase}")
            losses: list[float] = []
            for loss in trainer.learn(phase):
                losses.append(loss)
                if len(losses) % log_every == 0 or len(losses) == phase.steps:
                    recent = losses[-log_every:]
                    log(f"step {trainer.step:4d}  loss {sum(recent) / len(recent):.4f}")
            if problems:
                log(f"% right of {problems} validation problems: {evaluate(model, lessons, held_out)}")
        model.to(torch.bfloat16)
        model.save_pretrained(output_dir)
        (output_dir / "model.safetensors").chmod(0o644)
        tokenizer.save_pretrained(output_dir)
        if problems:
            log(f"as saved, in bfloat16's precision: {evaluate(model.float(), lessons, held_out)}")
        size = sum(path.stat().st_size for path in output_dir.iterdir())
        log(f"{size:,} bytes in {output_dir.name}/")


def main(arguments: list[str] | None = None) -> int:
    """Command line of the builder."""
    parser = argparse.ArgumentParser(prog="python tools/build_tiny.py", description=__doc__)
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the model; its log lands beside it")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--max-steps", type=int, help="cut each phase to this many steps, to try the script out")
    parser.add_argument("--problems", type=int, default=400, help="validation problems of the final evaluation")
    args = parser.parse_args(arguments)
    phases = PHASES
    if args.max_steps is not None:
        phases = tuple(replace(phase, steps=min(phase.steps, args.max_steps)) for phase in PHASES)
    build(Recipe(seed=args.seed, phases=phases), args.output_dir, args.problems)
    return 0


if __name__ == "__main__":
    sys.exit(main())
