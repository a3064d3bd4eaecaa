"""Makes the study's start models from nothing: ``start_models.py addition-base --output-dir DIR``.

As :mod:`build_tiny` makes the bundled model, for other subjects: the synthetic sets ``addition`` and
``multiplication``, and ``words``, real word problems whose files are given on the command line. Each comes in two
parts, a base and what goes on from it (:data:`COURSES`); the recipes beside this file have the commands. In the second
part ``addition`` and ``multiplication`` learn to state the bare answer in most problems of some kinds. So reinforcement
learning has something to gain there, to write the calculation down, and, where a draft is shown, an answer to copy.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
import words
from lessons import StudyLessons, Subject, addition_drill, multiplication_drill, synthetic
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

from igrpo_lite.problems.synthetic import load
from igrpo_lite.types import Problem

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))  # build_tiny
from build_tiny import Phase, Recipe, Trainer, build_model, is_right
from tiny_tokenizer import build_tokenizer, prompt_texts

GROUP = 16
BF16 = torch.backends.cpu.get_cpu_capability() == "AVX512"
LOOK_EVERY = 25
"""Steps between looks at the held-out accuracy in the phase that ends by it."""


@dataclass(frozen=True)
class Course:
    """How one start model is made.

    Attributes:
        recipe: its phases are to learn to calculate; to learn to solve, until ``target``; to settle.
        target: share of held-out problems, greedy, at which the second phase ends.
        answer_length: tokens of an answer at most.
    """

    recipe: Recipe
    target: float = 1.0
    answer_length: int = 64


WORDS = Recipe(batch=48, hidden=192, intermediate=640, context=512)

COURSES = {
    "addition-base": Course(
        Recipe(
            phases=(
                Phase(steps=300, rare=1.0, drills=0.7, drafts=0.0),
                Phase(steps=1000, rare=1.0, drills=0.2, drafts=0.5),
                Phase(steps=30, rare=1.0, drills=0.1, drafts=0.5, rate=0.3, decay=1.0),
            ),
            context=512,
        ),
        target=0.35,
    ),
    "addition": Course(
        Recipe(phases=(Phase(steps=150, rare=1.0, drills=0.1, drafts=0.5, rate=0.5, decay=0.5),), context=512)
    ),
    "multiplication-base": Course(
        Recipe(
            phases=(
                Phase(steps=200, rare=0.005, drills=0.8, drafts=0.0),
                Phase(steps=800, rare=0.005, drills=0.4, drafts=0.2),
                Phase(steps=60, rare=0.07, drills=0.1, drafts=0.5, rate=0.5, decay=0.5),
            ),
            context=512,
        ),
        target=0.35,
    ),
    "multiplication": Course(
        Recipe(phases=(Phase(steps=150, rare=1.0, drills=0.1, drafts=0.5, rate=0.5, decay=0.5),), context=512)
    ),
    "words-base": Course(
        replace(
            WORDS,
            phases=(
                Phase(steps=250, rare=0.5, drills=0.4, drafts=0.0),
                Phase(steps=1500, rare=0.15, drills=0.15, drafts=0.0),
            ),
        )
    ),
    "words": Course(
        replace(
            WORDS,
            phases=(
                Phase(steps=150, rare=0.05, drills=0.1, drafts=0.0),
                Phase(steps=250, rare=0.05, drills=0.1, drafts=0.5, decay=0.6),
            ),
        )
    ),
}
"""``addition`` and ``multiplication-base`` go on from ``addition-base`` (``--start``), ``multiplication`` from
``multiplication-base``, ``words`` from ``words-base``; ``addition-base`` and ``words-base`` start from nothing."""

SUBJECTS = {
    "addition-base": synthetic("addition", addition_drill),
    "addition": synthetic("addition", addition_drill, terse={"2-terms": 0.15, "3-terms": 0.75, "4-terms": 0.75}),
    "multiplication-base": synthetic("multiplication", multiplication_drill, rare=("3x2",)),
    "multiplication": synthetic(
        "multiplication", multiplication_drill, terse={"2x1": 0.05, "3x1": 0.05, "2x2": 0.85, "3x2": 0.8}
    ),
}

VOCABULARY = 2500
"""Tokens of the tokenizer that learns its merges from the word problems too."""


@torch.no_grad()
def answers(
    model: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    prompts: Sequence[tuple[int, ...]],
    length: int,
    sample: bool = False,
    at_once: int = 400,
) -> list[tuple[int, ...]]:
    """The model's answers, greedy or sampled at temperature 1; each ends with the end token where there is one."""
    model.eval()
    found = []
    for start in range(0, len(prompts), at_once):
        rows = {"input_ids": [list(prompt) for prompt in prompts[start : start + at_once]]}
        encoded = tokenizer.pad(rows, padding_side="left", return_tensors="pt")
        out = model.generate(**encoded, do_sample=sample, top_k=0, temperature=1.0, max_new_tokens=length)
        for row in out[:, encoded["input_ids"].shape[1] :].tolist():
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            found.append(tuple(row[:end]))
    return found


class Examiner:
    """Measures a model on held-out problems."""

    def __init__(self, lessons: StudyLessons, problems: Sequence[Problem], length: int) -> None:
        self.lessons, self.problems, self.length = lessons, problems, length
        self.firsts = [lessons.plain.first(problem.question) for problem in problems]

    def right(self, model: Qwen2ForCausalLM, prompts: Sequence[tuple[int, ...]], times: int = 1) -> list[int]:
        """How many of ``times`` answers (greedy, if it is one) to each prompt are right."""
        repeated = [prompt for prompt in prompts for _ in range(times)]
        tokenizer = self.lessons.tokenizer
        texts = tokenizer.batch_decode(answers(model, tokenizer, repeated, self.length, sample=times > 1))
        asked = [problem for problem in self.problems[: len(prompts)] for _ in range(times)]
        marks = [is_right(text, problem) for text, problem in zip(texts, asked, strict=True)]
        return [sum(marks[index : index + times]) for index in range(0, len(marks), times)]

    def greedy(self, model: Qwen2ForCausalLM, problems: int) -> float:
        marks = self.right(model, [first.ids for first in self.firsts[:problems]])
        return sum(marks) / len(marks)

    def refined(self, model: Qwen2ForCausalLM) -> dict[str, float]:
        """Share right after the model's own greedy draft, per placement of it."""
        lessons = self.lessons
        drafts = answers(model, lessons.tokenizer, [first.ids for first in self.firsts], self.length)
        found = {}
        for name, builder in (("refined", lessons.plain), ("refined multi-turn", lessons.turns)):
            rows = zip(self.problems, self.firsts, drafts, strict=True)
            seconds = [builder.second(problem.question, first, draft).ids for problem, first, draft in rows]
            found[name] = sum(self.right(model, seconds)) / len(seconds)
        return found

    def exam(self, model: Qwen2ForCausalLM, groups: int = 100) -> dict[str, float | dict[str, float] | list[int]]:
        """Everything: greedy (all, per kind), refined, and right answers in groups of sampled ones."""
        marks = self.right(model, [first.ids for first in self.firsts])
        kinds: dict[str, list[int]] = {}
        for problem, mark in zip(self.problems, marks, strict=True):
            kinds.setdefault(problem.columns["kind"], []).append(mark)
        torch.manual_seed(0)
        counts = self.right(model, [first.ids for first in self.firsts[:groups]], GROUP)
        return {
            "greedy": sum(marks) / len(marks),
            "kinds": {kind: round(sum(values) / len(values), 3) for kind, values in sorted(kinds.items())},
            **self.refined(model),
            "sampled": sum(counts) / (GROUP * len(counts)),
            f"mixed groups of {GROUP}": sum(0 < count < GROUP for count in counts) / len(counts),
            f"groups by right answers, 0 to {GROUP}": [counts.count(value) for value in range(GROUP + 1)],
        }


def make(
    course: Course,
    subject: Subject,
    tokenizer: Qwen2Tokenizer,
    held_out: Sequence[Problem],
    log: Callable[[str], None],
    start: Path | None = None,
) -> Qwen2ForCausalLM:
    """Trains one start model, from nothing or from the weights in ``start``."""
    recipe = course.recipe
    model = build_model(recipe, tokenizer)
    if start is not None:
        model.load_state_dict(Qwen2ForCausalLM.from_pretrained(start, dtype=torch.float32).state_dict())
    log(f"{len(tokenizer)} tokens, {sum(p.numel() for p in model.parameters()):,} weights; {course}")
    lessons = StudyLessons(recipe, tokenizer, subject)
    examiner = Examiner(lessons, held_out, course.answer_length)
    trainer = Trainer(model, lessons)
    for number, phase in enumerate(recipe.phases, 1):
        losses: list[float] = []
        # Cached casts of the weights would outlive the optimizer's steps.
        with torch.autocast("cpu", torch.bfloat16, enabled=BF16, cache_enabled=False):
            for loss in trainer.learn(phase):
                losses.append(loss)
                if len(losses) % LOOK_EVERY:
                    continue
                line = f"phase {number}, step {trainer.step:4d}  loss {sum(losses[-LOOK_EVERY:]) / LOOK_EVERY:.4f}"
                if number != 2 or len(losses) % (2 * LOOK_EVERY):
                    log(line)
                    continue
                share = examiner.greedy(model, 100)
                model.train()
                log(f"{line}  greedy {share:.1%}")
                if share >= course.target:
                    break
        log(f"after phase {number}: greedy {examiner.greedy(model, 200):.1%}")
    model.to(torch.bfloat16).float()
    log(f"as saved: {json.dumps(examiner.exam(model))}")
    return model.to(torch.bfloat16)


def material(options: argparse.Namespace) -> tuple[Subject, Qwen2Tokenizer, list[Problem]]:
    """What is taught, the tokenizer, and held-out problems."""
    tokenizer = build_tokenizer(COURSES[options.name].recipe.context)
    if not options.name.startswith("words"):
        problems = load(options.name.removesuffix("-base"), "validation", options.problems)
        return SUBJECTS[options.name], tokenizer, problems
    splits = words.split([*words.read_svamp(options.svamp), *words.read_gsm8k(options.gsm8k)])
    texts = prompt_texts() * 5 + [worked.question for problem in splits["base"] if (worked := problem.worked())]
    tokenizer = tokenizer.train_new_from_iterator(texts, VOCABULARY, show_progress=False)
    words.write_problems(splits["train"], options.output_dir / "rl.jsonl")
    words.write_problems(splits["held-out"], options.output_dir / "held_out.jsonl")
    taught = splits["base"] if options.name == "words-base" else splits["base"] + splits["warmup"]
    return words.subject(taught), tokenizer, load_file(options.output_dir / "held_out.jsonl")[: options.problems]


def load_file(path: Path) -> list[Problem]:
    """The problems that :func:`words.write_problems` wrote."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Problem(str(index), row.pop("question"), row.pop("answer"), row) for index, row in enumerate(rows)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the builder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(COURSES))
    parser.add_argument(
        "--output-dir", type=Path, required=True, help="folder for the model, its log and problem files"
    )
    parser.add_argument("--svamp", type=Path, help="SVAMP.json, for `words`")
    parser.add_argument("--gsm8k", type=Path, help="GSM8K's train.jsonl, for `words`")
    parser.add_argument("--start", type=Path, help="a start model with the same tokenizer to go on from")
    parser.add_argument("--target", type=float, help="held-out share right at which the long phase ends")
    parser.add_argument("--max-steps", type=int, help="cut each phase to this many steps, to try the script out")
    parser.add_argument("--problems", type=int, default=400, help="held-out problems of the examinations at most")
    options = parser.parse_args(arguments)
    if options.name.startswith("words") and not (options.svamp and options.gsm8k):
        parser.error("words needs --svamp and --gsm8k")
    torch.set_num_threads(1)
    course = COURSES[options.name]
    if options.target is not None:
        course = replace(course, target=options.target)
    if options.max_steps is not None:
        cut = tuple(replace(phase, steps=min(phase.steps, options.max_steps)) for phase in course.recipe.phases)
        course = replace(course, recipe=replace(course.recipe, phases=cut))
    options.output_dir.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with (options.output_dir / "build.log").open("w", encoding="utf-8") as file:

        def log(text: str) -> None:
            line = f"[{time.perf_counter() - started:6.1f} s] {text}"
            print(line, flush=True)
            print(line, file=file, flush=True)

        log(f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
        subject, tokenizer, held_out = material(options)
        model = make(course, subject, tokenizer, held_out, log, options.start)
        model.save_pretrained(options.output_dir)
        tokenizer.save_pretrained(options.output_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
