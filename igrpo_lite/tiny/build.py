"""Makes the bundled model from nothing: ``python -m igrpo_lite.tiny.build --output-dir DIR``.

A small Llama learns from worked solutions of the ``warmup`` split, in the very prompts that reinforcement learning
uses afterwards (stage 1, and stage 2 with right and wrong drafts), and stops early, while it is still learning: what
it lacks is arithmetic, not the form of a solution.
"""

from __future__ import annotations

import argparse
import platform
import random
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from igrpo_lite.problems.synthetic import TWO_STEP_KINDS, Worked, load, split_of
from igrpo_lite.prompts import STAGE2_TEMPLATES, SYSTEM_PROMPTS, PromptBuilder
from igrpo_lite.tiny.tokenizer import START, build_tokenizer, save_tokenizer
from igrpo_lite.types import Problem

Row = tuple[tuple[int, ...], tuple[bool, ...]]
"""Token ids of a text and which of them are to be learned."""

_STEP = re.compile(r"(\d+)([+*-])(\d+)=(\d+)")
_BOX = re.compile(r"\\boxed\{(\d+)\}")
_APPLY = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


@dataclass(frozen=True)
class Recipe:
    """All that decides what the built model is.

    Attributes:
        weights: how often each problem kind is practised, relative to the others.
        draft_start: step from which some batches are stage-2 prompts; drafts from the start slow the learning.
        draft_share: share of stage-2 batches from then on.
        multi_turn: share of the stage-2 batches whose draft is a turn of its own.
        right_drafts: share of stage-2 drafts that are right.
        decay: last part of the steps over which both learning rates fall to zero.
    """

    seed: int = 0
    steps: int = 350
    batch: int = 64
    weights: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TWO_STEP_KINDS, 1.0))
    drill_steps: int = 200
    drill_share: float = 0.5
    drill_rest: float = 0.3
    drill_length: int = 8
    draft_start: int = 250
    draft_share: float = 0.4
    multi_turn: float = 0.25
    right_drafts: float = 0.5
    muon_lr: float = 0.02
    adamw_lr: float = 2e-3
    lr_warmup: int = 50
    decay: float = 0.0
    hidden: int = 128
    layers: int = 4
    bias: bool = False
    intermediate: int = 384
    context: int = 1024


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with random weights that fits the tokenizer."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.hidden // 32,
        num_key_value_heads=recipe.hidden // 64,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        attention_bias=recipe.bias,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
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

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> None:
        self.recipe = recipe
        self.tokenizer = tokenizer
        self.random = random.Random(f"lessons/{recipe.seed}")
        system = SYSTEM_PROMPTS["boxed"]
        self.plain = PromptBuilder(tokenizer, system, STAGE2_TEMPLATES["plain"], "plain")
        self.turns = PromptBuilder(tokenizer, system, STAGE2_TEMPLATES["multi-turn"], "multi-turn")

    def worked(self, even: bool = False) -> Worked:
        """One problem of the warm-up split, its kind drawn evenly or by the recipe's weights."""
        kinds, weights = zip(*self.recipe.weights.items(), strict=True)
        kind = self.random.choices(kinds, None if even else weights)[0]
        while True:
            worked = TWO_STEP_KINDS[kind](self.random)
            if worked is not None and split_of(worked) == "warmup":
                return worked

    def drill(self) -> Row:
        """A line of single calculations, of which only the results are learned."""
        r, ids, learned = self.random, list(self.tokenizer.encode(START)), [False]
        for _ in range(self.recipe.drill_length):
            left, operation, right, result = _STEP.fullmatch(r.choice(self.worked(even=True).steps)).groups()  # type: ignore[union-attr]
            for text, learn in ((f"{left}{operation}{right}=", False), (result, True), ("; ", True)):
                piece = self.tokenizer.encode(text, add_special_tokens=False)
                ids += piece
                learned += [learn] * len(piece)
        return tuple(ids), tuple(learned)

    def answer(self, text: str) -> tuple[int, ...]:
        return (*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id)

    def batch(self, step: int) -> list[Row]:
        """Rows of one step: all of stage 1, or all of stage 2 with one placement of the draft."""
        recipe, r = self.recipe, self.random
        if r.random() < (recipe.drill_share if step < recipe.drill_steps else recipe.drill_rest):
            return [self.drill() for _ in range(recipe.batch)]
        second = step >= recipe.draft_start and r.random() < recipe.draft_share
        builder = self.turns if r.random() < recipe.multi_turn else self.plain
        rows = []
        for _ in range(recipe.batch):
            worked = self.worked()
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


def batch_loss(model: LlamaForCausalLM, rows: list[Row]) -> Tensor:
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


def train(model: LlamaForCausalLM, lessons: Lessons) -> Iterator[tuple[int, float]]:
    """Learns for the recipe's steps; yields each step's number (from 1) and loss once its update is done."""
    recipe = lessons.recipe
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(matrices, lr=recipe.muon_lr, momentum=0.95, weight_decay=0.0)
    adamw = torch.optim.AdamW(others, lr=recipe.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0)
    decay_steps = max(1.0, recipe.decay * recipe.steps)
    model.train()
    for step in range(recipe.steps):
        factor = min(1.0, (step + 1) / recipe.lr_warmup)
        if recipe.decay:
            factor = min(factor, (recipe.steps - step) / decay_steps)
        muon.param_groups[0]["lr"] = recipe.muon_lr * factor
        adamw.param_groups[0]["lr"] = recipe.adamw_lr * factor
        loss = batch_loss(model, lessons.batch(step))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
        yield step + 1, loss.item()


@torch.no_grad()
def answer_all(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[tuple[int, ...]], sample: bool = False
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


def evaluate(model: LlamaForCausalLM, lessons: Lessons, problems: list[Problem]) -> dict[str, float]:
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
        log(f"recipe {asdict(recipe)}")
        tokenizer = build_tokenizer(recipe.context)
        model = build_model(recipe, tokenizer)
        log(f"{len(tokenizer)} tokens, {sum(p.numel() for p in model.parameters()):,} weights")
        lessons = Lessons(recipe, tokenizer)
        losses: list[float] = []
        for step, loss in train(model, lessons):
            losses.append(loss)
            if step % log_every == 0 or step == recipe.steps:
                recent = losses[-log_every:]
                log(f"step {step:4d}  loss {sum(recent) / len(recent):.4f}")
        model.to(torch.bfloat16)
        model.save_pretrained(output_dir)
        (output_dir / "model.safetensors").chmod(0o644)
        save_tokenizer(tokenizer, output_dir)
        if problems:
            held_out = load("two-step", "validation", problems)
            log(f"% right of {problems} validation problems: {evaluate(model.float(), lessons, held_out)}")
        size = sum(path.stat().st_size for path in output_dir.iterdir())
        log(f"{size:,} bytes in {output_dir.name}/")


def main(arguments: list[str] | None = None) -> int:
    """Command line of the builder."""
    parser = argparse.ArgumentParser(prog="python -m igrpo_lite.tiny.build", description=__doc__)
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the model; its log lands beside it")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--problems", type=int, default=400, help="validation problems of the final evaluation")
    args = parser.parse_args(arguments)
    build(Recipe(seed=args.seed, steps=args.steps), args.output_dir, args.problems)
    return 0


if __name__ == "__main__":
    sys.exit(main())
