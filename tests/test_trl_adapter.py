"""The adapter over TRL's GRPOTrainer at work: real trainer, real tiny model, against brute force."""

from __future__ import annotations

import json
import random
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM
from trl_parts import (
    LORA,
    SETTINGS,
    Watched,
    best,
    check_step,
    drafts_of,
    quirk,
    rendered,
    rows,
    sample,
    text_of,
    tokenizer,
    total,
    trainer_of,
    unpadded,
)

from igrpo_lite.algorithms.drafts import choose_draft
from igrpo_lite.answers import find_answer
from igrpo_lite.config import RolloutOptions
from igrpo_lite.tiny import MODEL_DIR
from igrpo_lite.types import Completion, Score

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("conversational", [True, False], ids=["conversational", "standard"])
def test_stage_2_shows_the_best_draft_and_rewards_see_the_data(tmp_path, conversational):
    trainer = trainer_of(tmp_path, rows(conversational))
    trainer.train()
    assert [len(call["prompts"]) for call in trainer.calls] == [6, 4, 6, 4]
    assert trainer.sizes == [3, 2, 3, 2]
    assert all(call["others"] == {"trainer_state"} for call in trainer.calls)
    for step in range(2):
        check_step(trainer, step)
        output = trainer.seen[step][1]
        scored = torch.tensor([[draft[2] for draft in group] for group in drafts_of(trainer.calls[2 * step + 1], 2)])
        advantages = (scored - scored.mean(1, keepdim=True)) / (scored.std(1, keepdim=True) + 1e-4)
        torch.testing.assert_close(output["advantages"], advantages.flatten())
    differ = [len({text for _, text, _ in group}) for call in trainer.calls[::2] for group in drafts_of(call, 3)]
    assert max(differ) > 1  # else any choice would pass


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_drafts_and_refinements_are_logged_apart(tmp_path):
    trainer = trainer_of(tmp_path, log_completions=True)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    tokens = 0
    for step, log in enumerate(logs):
        first, second = trainer.calls[2 * step : 2 * step + 2]
        for prefix, call, size in (("drafts/", first, 3), ("", second, 2)):
            lengths = [len(ids) for ids in call["ids"]]
            groups = drafts_of(call, size)
            scores = torch.tensor([draft[2] for group in groups for draft in group])
            assert log[f"{prefix}completions/mean_length"] == pytest.approx(mean(lengths))
            assert log[f"{prefix}completions/min_length"] == min(lengths)
            assert log[f"{prefix}completions/max_length"] == max(lengths)
            assert log[f"{prefix}reward"] == pytest.approx(scores.mean().item())
            assert log[f"{prefix}reward_std"] == pytest.approx(scores.std().item())
            quirks = [value for text in call["texts"] if (value := quirk(text)) is not None]
            assert log[f"{prefix}rewards/quirky/mean"] == pytest.approx(mean(quirks))
            assert log[f"{prefix}rewards/quirky/std"] == pytest.approx(torch.tensor(quirks).std().item())
            flat = mean([float(max(g, key=lambda d: d[2])[2] == min(g, key=lambda d: d[2])[2]) for g in groups])
            assert log[f"{prefix}frac_reward_zero_std"] == pytest.approx(flat)
            assert log[f"{prefix}rows"] == len(lengths)
            tokens += sum(lengths)
        inputs, output = trainer.seen[step]
        tokens += output["prompt_mask"].sum().item() + sum(len(rendered(x["prompt"], None)) for x in inputs[::2]) * 3
        assert log["num_tokens"] == tokens
    table = trainer._logs["extra"]
    assert list(table["length"]) == [len(ids) for ids in trainer.calls[-1]["ids"]]
    shown = [best(group).strip() for group in drafts_of(trainer.calls[-2], 3)]
    assert list(table["shown_draft"]) == [text for text in shown for _ in range(2)]
    assert len(list((tmp_path / "completions").glob("*.parquet"))) >= 2


OPTIONS: list[tuple[dict[str, Any], Any]] = [
    ({"truncated_drafts": "allow"}, lambda length: length / 28),
    ({"max_draft_length": 5}, lambda length: length / 28),
]
"""A setting, and a reward of the draft's length with which it makes a difference."""


@pytest.mark.parametrize(("option", "grade"), OPTIONS, ids=[next(iter(option)) for option, _ in OPTIONS])
def test_other_choices_are_those_of_choose_draft(tmp_path, option, grade):
    calls: list[dict[str, Any]] = []

    def format(prompts, completions, completion_ids, **_):
        calls.append({"ids": completion_ids, "texts": [text_of(completion) for completion in completions]})
        return [grade(len(ids)) for ids in completion_ids]

    settings = {"num_drafts": 3, "per_device_train_batch_size": 16, "reward_weights": None, "temperature": 2.0}
    trainer = trainer_of(tmp_path, funcs=format, **settings | option)
    sample(trainer)
    inputs, output = trainer.seen[0]
    chosen = {key: value for key, value in option.items() if key in RolloutOptions.model_fields}
    expected, usual = [], []
    for place, row in enumerate(inputs[::2]):
        drafts, scores = [], []
        for ids, text in list(zip(calls[0]["ids"], calls[0]["texts"], strict=True))[place * 3 : place * 3 + 3]:
            ended = ids[-1] == tokenizer().eos_token_id
            drafts.append(Completion(tuple(ids), text, (), "stop" if ended else "length"))
            answer = find_answer(text)
            scores.append(Score(grade(len(ids)), {"format": grade(len(ids))}, "wrong", answer and answer.text))
        for prompts, options in ((expected, RolloutOptions(**chosen)), (usual, RolloutOptions())):
            choice = choose_draft(drafts, scores, options, random.Random(0))
            ids = drafts[choice.index].ids
            ids = ids[-option.get("max_draft_length", 0) :] if prompts is expected else ids
            text = tokenizer().decode(ids, skip_special_tokens=True).strip()
            prompts.append(rendered(row["prompt"], text))
    assert unpadded(output, "prompt")[::2] == expected
    assert expected != usual  # the option decided something


def test_a_random_choice_is_one_of_the_drafts_and_can_be_had_again(tmp_path):
    trainer = trainer_of(tmp_path, draft_selection="random", truncated_drafts="allow", per_device_train_batch_size=8)
    for _ in range(2):
        torch.manual_seed(3)
        trainer._buffered_inputs = None
        sample(trainer)
    (inputs, output), (_, again) = trainer.seen
    shown = unpadded(output, "prompt")[::2]
    assert shown == unpadded(again, "prompt")[::2]
    places = []
    for row, ids, group in zip(inputs[::2], shown, drafts_of(trainer.calls[0], 3), strict=True):
        places.append([rendered(row["prompt"], text.strip()) for _, text, _ in group].index(ids))
    assert len(set(places)) > 1


def reference(trainer: Watched) -> Any:
    """A model of its own with the trainer's adapter, without TRL's changes to the model."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    model = get_peft_model(model, LORA)
    set_peft_model_state_dict(model, get_peft_model_state_dict(trainer.model))
    return model.train()


def completion_logps(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / SETTINGS["temperature"]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def test_the_gradient_is_of_refinement_tokens_after_the_draft(tmp_path):
    """Clipped objective with KL in two iterations, against sequences that are run one by one."""
    trainer = trainer_of(tmp_path, num_iterations=2, beta=0.3, use_bias_correction_kl=False)
    inputs = sample(trainer)
    model = reference(trainer)
    loss = torch.tensor(0.0)
    pairs = list(zip(unpadded(inputs, "prompt"), unpadded(inputs, "completion"), strict=True))
    for place, (prompt, completion) in enumerate(pairs):
        assert "\n\nDraft:\n" in tokenizer().decode(prompt)
        new = completion_logps(model, prompt, completion)
        with torch.no_grad(), model.disable_adapter():
            ref = completion_logps(model, prompt, completion)
        kept = inputs["completion_mask"][place].bool()
        torch.testing.assert_close(inputs["old_per_token_logps"][place][kept], new.detach(), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(inputs["ref_per_token_logps"][place][kept], ref, atol=2e-5, rtol=1e-4)
        ratio = (new - new.detach()).exp()
        kl = (ref - new).exp() - (ref - new) - 1
        loss = loss + (0.3 * kl - ratio * inputs["advantages"][place]).mean() / len(pairs)
    loss.backward()
    trainer.current_gradient_accumulation_steps = 1
    trainer.compute_loss(trainer.model, inputs).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    assert sum(gradient.norm() for gradient in expected.values()) > 0.1
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=2e-5, rtol=1e-3)


def test_two_iterations_and_accumulation_use_each_batch_as_often_as_trl(tmp_path):
    settings = {"num_iterations": 2, "beta": 0.05, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    trainer = trainer_of(tmp_path, max_steps=4, **settings)
    before = get_peft_model_state_dict(trainer.model)[
        "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    ].clone()
    trainer.train()
    assert len(trainer.seen) == 2
    for step in range(2):
        check_step(trainer, step)
    after = get_peft_model_state_dict(trainer.model)["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"]
    assert not torch.equal(before, after)
    assert trainer.state.log_history[1]["kl"] > 0


@pytest.mark.parametrize("way", ["stream", "full", "async"])
def test_other_ways_to_use_trl(tmp_path, way):
    """A streamed data set; all weights with a reference model; an async reward. Twice two steps from one batch."""
    trainer = trainer_of(tmp_path, way=way, generation_batch_size=8, num_iterations=2, beta=0.1, max_steps=4)
    trainer.train()
    assert len(trainer.seen) == 1
    check_step(trainer, 0)


def test_evaluation_has_both_stages_too(tmp_path):
    settings = {"num_generations_eval": 4, "per_device_eval_batch_size": 8, "max_steps": 1, "eval_strategy": "steps"}
    trainer = trainer_of(tmp_path, eval_dataset=Dataset.from_list(rows(count=3)), eval_steps=1, **settings)
    trainer.train()
    assert [len(call["prompts"]) for call in trainer.calls] == [6, 4, 6, 8, 3, 4]  # eval: 2 prompts, then 1
    assert trainer.sizes == [3, 2, 3, 4, 3, 4]
    trainer.calls, trainer.seen = trainer.calls[2:], trainer.seen[1:]
    for batch in range(2):
        check_step(trainer, batch, drafts=3, group=4)
    log = next(entry for entry in trainer.state.log_history if "eval_reward" in entry)
    batches = [[draft[2] for group in drafts_of(call, 3) for draft in group] for call in trainer.calls[::2]]
    assert log["eval_drafts/reward"] == pytest.approx(mean([mean(batch) for batch in batches]))
    assert log["eval_drafts/rows"] == pytest.approx(4.5)
    assert trainer.num_generations == trainer.args.num_generations == 2
    assert trainer.num_generations_eval == 4


def test_a_resumed_run_equals_one_that_never_stopped(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "draft_selection": "random"}
    whole = trainer_of(tmp_path, **settings)
    whole.train()
    resumed = trainer_of(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [call["ids"] for call in resumed.calls] == [call["ids"] for call in whole.calls[4:]]
    expected = get_peft_model_state_dict(whole.model)
    found = get_peft_model_state_dict(resumed.model)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    tokens = [[entry["num_tokens"] for entry in t.state.log_history if "num_tokens" in entry] for t in (whole, resumed)]
    assert tokens[0] == tokens[1]


RANK = """
import json
import sys

sys.path.insert(0, {tests!r})
import torch

torch.set_num_threads(1)
from peft import get_peft_model_state_dict
from trl_parts import check_step, trainer_of
from igrpo_lite.errors import ConfigError
from igrpo_lite.trl import IGRPOConfig

trainer = trainer_of({folder!r} + "/run", gradient_accumulation_steps=2, per_device_train_batch_size=2)
trainer.train()
for step in range(2):
    check_step(trainer, step)  # also that this rank chose by its own rewards
try:
    IGRPOConfig({folder!r}, num_generations=4, per_device_train_batch_size=2, use_cpu=True)
    refused = ""
except ConfigError as error:
    refused = str(error)
report = dict(
    world=trainer.accelerator.num_processes,
    prompts=[[row["prompt"][-1]["content"] for row in inputs] for inputs, _ in trainer.seen],
    drafts=[call["texts"] for call in trainer.calls[::2]],
    lengths=[len(ids) for ids in trainer.calls[-1]["ids"]],
    table=list(trainer._logs["extra"]["length"]),
    logs=[entry for entry in trainer.state.log_history if "reward" in entry],
    adapter={{name: value.double().sum().item() for name, value in get_peft_model_state_dict(trainer.model).items()}},
    refused=refused,
)
with open({folder!r} + f"/rank-{{trainer.accelerator.process_index}}.json", "w") as file:
    json.dump(report, file)
"""


def test_two_processes_hold_whole_groups_and_learn_the_same(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(RANK.format(tests=str(ROOT / "tests"), folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert [rank["world"] for rank in ranks] == [2, 2]
    for step in range(2):
        shares = [rank["prompts"][step] for rank in ranks]
        assert all(share[0::2] == share[1::2] for share in shares)  # whole groups of 2
        assert len({prompt for share in shares for prompt in share}) == 4
        scored = [total(text, answer_of(prompt)) for rank in ranks for text, prompt in drafts_with_prompts(rank, step)]
        for rank in ranks:
            assert rank["logs"][step]["drafts/reward"] == pytest.approx(mean(scored))
            assert rank["logs"][step]["drafts/rows"] == 6
    assert ranks[0]["adapter"] == ranks[1]["adapter"]
    assert ranks[0]["table"] == ranks[0]["lengths"] + ranks[1]["lengths"]  # logged by a reward, in stage 2 alone
    assert all("per_device_train_batch_size to a multiple of 4" in rank["refused"] for rank in ranks)


def answer_of(question: str) -> str:
    return next(row["answer"] for row in rows() if row["prompt"][-1]["content"] == question)


def drafts_with_prompts(rank: dict[str, Any], step: int) -> list[tuple[str, str]]:
    prompts = [prompt for prompt in rank["prompts"][step][::2] for _ in range(3)]
    return list(zip(rank["drafts"][step], prompts, strict=True))


def test_drafts_that_nothing_scored_are_all_alike(tmp_path):
    settings = {"reward_weights": None, "truncated_drafts": "allow"}
    trainer = trainer_of(tmp_path, funcs=lambda completions, **_: [None] * len(completions), **settings)
    sample(trainer)
    shown = unpadded(trainer.seen[0][1], "prompt")
    assert all(len(ids) > len(rendered(row["prompt"], "")) for ids, row in zip(shown, trainer.seen[0][0], strict=True))
    trainer.log({})
    log = trainer.state.log_history[-1]
    assert log["drafts/reward"] is log["drafts/chosen_reward"] is None
    assert log["drafts/tied"] == 1


def test_the_script_in_the_docs_runs(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "trl.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "script.py").write_text(script)
    monkeypatch.chdir(tmp_path)
    trainer = runpy.run_path("script.py")["trainer"]
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(logs) == 3
    assert all(0 <= log[name] <= 1 for log in logs for name in ("reward", "drafts/reward", "drafts/chosen_reward"))
    assert all(log["drafts/chosen_reward"] >= log["drafts/reward"] for log in logs)
    assert any(value.any() for name, value in get_peft_model_state_dict(trainer.model).items() if "lora_B" in name)
    assert (tmp_path / "tiny-igrpo" / "adapter_model.safetensors").is_file()
    trainer.create_model_card("tiny")
    card = (tmp_path / "tiny-igrpo" / "README.md").read_text()
    assert "trained with iGRPO, a method introduced in [iGRPO: Self-Feedback-Driven LLM Reasoning]" in card
