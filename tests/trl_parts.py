"""For tests of the adapter over TRL: a trainer on the bundled model, and stage 1 and its prompts by brute force."""

from __future__ import annotations

import copy
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer

from igrpo_lite.answers import verdict
from igrpo_lite.problems import synthetic
from igrpo_lite.tiny import MODEL_DIR
from igrpo_lite.trl import IGRPOConfig, IGRPOTrainer

SETTINGS: dict[str, Any] = {
    "num_drafts": 3,
    "num_generations": 2,
    "per_device_train_batch_size": 4,
    "max_completion_length": 28,
    "temperature": 1.6,  # the tiny model is sure of itself; drafts are to differ, and some to be cut
    "loss_type": "grpo",
    "reward_weights": [1.0, 0.5],
    "learning_rate": 1e-2,
    "max_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
}
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
SYSTEM = {"role": "system", "content": "Solve."}
tokenizer = cache(lambda: AutoTokenizer.from_pretrained(MODEL_DIR))


def rows(conversational: bool = True, count: int = 12) -> list[dict[str, Any]]:
    made = []
    for problem in synthetic.load("two-step", "train", count):
        prompt: Any = [SYSTEM, {"role": "user", "content": problem.question}]
        made.append({"prompt": prompt if conversational else f"Question: {problem.question}", "answer": problem.answer})
    return made


def quirk(text: str) -> float | None:
    """A second reward, without sense but of the text alone, that sometimes abstains."""
    number = zlib.crc32(text.encode()) % 8
    return None if number == 0 else number / 8


def text_of(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


def right(text: str, answer: str) -> float:
    return float(verdict(text, answer, False).reason == "correct")


def total(text: str, answer: str) -> float:
    """The weighted sum of both rewards."""
    return right(text, answer) + 0.5 * (quirk(text) or 0.0)


def rewards(calls: list[dict[str, Any]]) -> list[Any]:
    """Two reward functions, of which the first notes down what it was given."""

    def accuracy(prompts, completions, completion_ids, answer, log_metric, log_extra, **others):
        texts = [text_of(completion) for completion in completions]
        call = {"prompts": prompts, "texts": texts, "ids": completion_ids, "answers": answer, "others": set(others)}
        calls.append(copy.deepcopy(call))
        log_metric("rows", float(len(prompts)))
        log_extra("length", [len(ids) for ids in completion_ids])
        return [right(text, gold) for text, gold in zip(texts, answer, strict=True)]

    def quirky(completions, **_):
        return [quirk(text_of(completion)) for completion in completions]

    return [accuracy, quirky]


def as_async(function: Any) -> Any:
    async def waited(**arguments: Any) -> Any:
        return function(**arguments)

    return waited


class Watched(IGRPOTrainer):
    """Notes down what TRL is given, what it makes of it, and the group size that it would tell a vLLM server."""

    def _generate(self, prompts):
        size = self.num_generations if self.model.training else self.num_generations_eval
        self.__dict__.setdefault("sizes", []).append(size)
        return super()._generate(prompts)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.__dict__.setdefault("seen", []).append((inputs, {name: value.clone() for name, value in output.items()}))
        return output


def trainer_of(
    folder: Path, data: Any = None, funcs: Any = None, eval_dataset: Any = None, way: str = "", **settings: Any
) -> Watched:
    """A trainer whose adapter is not zero; ``calls`` is what its rewards were given."""
    calls: list[dict[str, Any]] = []
    funcs = funcs or rewards(calls)
    train_dataset: Any = Dataset.from_list(data or rows())
    if way == "async":
        funcs[1] = as_async(funcs[1])
    made = Watched(
        model=str(MODEL_DIR),
        reward_funcs=funcs,
        args=IGRPOConfig(**SETTINGS | {"output_dir": str(folder)} | settings),
        train_dataset=train_dataset.to_iterable_dataset() if way == "stream" else train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer(),
        peft_config=None if way == "full" else LORA,
    )
    made.calls = calls
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return made


def sample(trainer: Watched) -> dict[str, torch.Tensor]:
    """One generation batch, without an update."""
    trainer.model.train()
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def unpadded(output: dict[str, torch.Tensor], part: str) -> list[list[int]]:
    pairs = zip(output[f"{part}_ids"], output[f"{part}_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in pairs]


def rendered(prompt: Any, draft: str | None) -> list[int]:
    """The prompt of stage 2 written out by hand."""
    question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    user = question if draft is None else f"{question}\n\nDraft:\n{draft}\n\nWrite a better solution."
    if isinstance(prompt, str):
        return tokenizer()(user)["input_ids"]
    messages = [SYSTEM, {"role": "user", "content": user}]
    text = tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


def drafts_of(call: dict[str, Any], count: int) -> list[list[tuple[list[int], str, float]]]:
    """Ids, text and weighted reward of each draft, by group."""
    scored = [total(text, answer) for text, answer in zip(call["texts"], call["answers"], strict=True)]
    flat = list(zip(call["ids"], call["texts"], scored, strict=True))
    return [flat[start : start + count] for start in range(0, len(flat), count)]


def best(group: list[tuple[list[int], str, float]]) -> str:
    whole = [draft for draft in group if draft[0][-1] == tokenizer().eos_token_id] or group
    return max(whole, key=lambda draft: draft[2])[1]  # max takes the first of equals


def check_step(trainer: Watched, step: int, drafts: int = 3, group: int = 2) -> None:
    """One generation batch: rewards saw the data's own prompts, the model the best draft of each group."""
    first, second = trainer.calls[2 * step : 2 * step + 2]
    inputs, output = trainer.seen[step]
    own = [row["prompt"] for row in inputs[::group]]
    assert first["prompts"] == [prompt for prompt in own for _ in range(drafts)]
    assert second["prompts"] == [row["prompt"] for row in inputs]
    assert second["answers"] == [row["answer"] for row in inputs]
    chosen = [best(drafts) for drafts in drafts_of(first, drafts)]
    expected = [rendered(prompt, draft.strip()) for prompt, draft in zip(own, chosen, strict=True)]
    assert unpadded(output, "prompt") == [ids for ids in expected for _ in range(group)]
    assert unpadded(output, "completion") == second["ids"]
