"""Worked examples in the prompt: where they come from, how they are written, where they stand."""

from __future__ import annotations

import json
import random

import pytest
from real_data import real_data
from tiny_parts import small_config
from transformers import AutoTokenizer

from igrpo_lite.answers.answers import verdict
from igrpo_lite.cli import main
from igrpo_lite.errors import DataError
from igrpo_lite.evaluation.compare import compare
from igrpo_lite.evaluation.few_shot import worked_examples, worked_solution
from igrpo_lite.problems.loading import load_problems
from igrpo_lite.prompts import STAGE2_TEMPLATES, SYSTEM_PROMPTS, PromptBuilder
from igrpo_lite.tiny import MODEL_DIR
from igrpo_lite.types import Problem

SHOTS = (("What is 1 + 2?", "1+2=3; \\boxed{3}"), ("What is 4 + 5?", "4+5=9; \\boxed{9}"))
QUESTION = "What is 20 + 3?"


def builder(placement="plain", template=True, system=SYSTEM_PROMPTS["boxed"], **options) -> PromptBuilder:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    tokenizer.chat_template = tokenizer.chat_template if template else None
    return PromptBuilder(tokenizer, system, STAGE2_TEMPLATES[placement], placement, **options)


def turns(text: str) -> list[str]:
    return [turn.partition("<|im_end|>")[0] for turn in text.split("<|im_start|>")[1:]]


@pytest.mark.parametrize("placement", ["plain", "multi-turn"])
def test_examples_are_earlier_turns_and_all_else_stays(placement):
    plain, shown = builder(placement), builder(placement, shots=SHOTS)
    expected = [f"{role}\n{text}" for shot in SHOTS for role, text in zip(("user", "assistant"), shot, strict=True)]
    first = turns(plain.first(QUESTION).text)
    assert turns(shown.first(QUESTION).text) == [first[0], *expected, *first[1:]]
    draft = plain.tokenizer.encode("20+3=23; \\boxed{23}", add_special_tokens=False)
    second = turns(plain.second(QUESTION, plain.first(QUESTION), draft).text)
    assert turns(shown.second(QUESTION, shown.first(QUESTION), draft).text) == [second[0], *expected, *second[1:]]


def test_without_a_chat_template_an_example_looks_like_what_follows():
    prompt = builder(template=False, system="Solve.", shots=SHOTS[:1]).first(QUESTION)
    assert prompt.text == ("Solve.\n\nWhat is 1 + 2?\n\nSolution:\n1+2=3; \\boxed{3}\n\nWhat is 20 + 3?\n\nSolution:\n")
    assert builder(template=False, system="Solve.").first(QUESTION).text == "Solve.\n\nWhat is 20 + 3?\n\nSolution:\n"


@pytest.mark.parametrize("style", ["boxed", "tags"])
def test_examples_from_gsm8k(style):
    config = small_config(data=str(real_data("gsm8k_train.jsonl")), eval_size=100, max_problems=None)
    problems = load_problems(config, 0).train
    shots = worked_examples(problems, 8, style)
    assert len(set(shots)) == 8
    assert worked_examples(random.Random(1).sample(problems, len(problems)), 3, style) == shots[:3]
    golds = {problem.question: problem.answer for problem in problems}
    for question, solution in shots:
        assert "<<" not in solution
        assert "####" not in solution
        found = verdict(solution, golds[question], False)
        assert (found.reason, found.source) == ("correct", "box" if style == "boxed" else "tag")
    worked = sum(worked_solution(problem, style) is not None for problem in problems)
    assert worked > 0.99 * len(problems)


def test_headings_stay_and_a_box_is_not_written_twice():
    text = "#### Step 1\nWe add 3 and 4.\n#### Step 2\nSo 3 + 4 = 7, that is \\boxed{7}."
    assert worked_solution(Problem("p", "q", "7", {"solution": text}), "boxed") == text
    assert worked_solution(Problem("p", "q", "8", {"solution": text}), "boxed") is None


def test_an_answer_alone_is_no_worked_solution():
    texts = ("18", "#### 18", "The final answer is \\boxed{18}.", "First 3 + 4 = 7, then 7 + 4 = 11, which is 11.")
    problems = [Problem(text, text, "18", {"answer": text}) for text in texts]
    with pytest.raises(DataError, match="--few-shot 2: only 0 of 4 training problems have a worked solution"):
        worked_examples(problems, 2, "boxed")
    config = small_config(data=str(real_data("SVAMP.json")), max_problems=None)
    with pytest.raises(DataError, match="--few-shot 1: only 0 of"):
        compare(config, None, shots=1)


def test_the_users_own_column_comes_first(tmp_path, monkeypatch, capsys):
    rows = [
        {"question": f"What is {a} + {b}?", "key": f"We add {b} to {a}, which makes {a + b}.\n#### {a + b}"}
        for a in range(20, 24)
        for b in range(20, 25)
    ]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    words = ["--data", "mine.jsonl", "--answer-column", "key", "--eval-size", "2", "--output", "found"]
    assert main(["eval", "tiny", *words, "--few-shot", "2", "--max-prompt-length", "110"]) == 0
    assert "nor the worked examples in every prompt: 2" in capsys.readouterr().out
    found = json.loads((tmp_path / "found" / "results.json").read_text(encoding="utf-8"))
    assert (found["shots"], found["n"]) == (2, 2)  # questions are filtered by their own length, not the examples'
    assert main(["eval", "tiny", *words, "--few-shot", "19"]) == 2
    assert "--few-shot 19: only 18 of 18 training problems" in capsys.readouterr().err
    assert main(["eval", "tiny", *words, "--few-shot", "15", "--max-completion-length", "250"]) == 2
    context, examples = capsys.readouterr().err.splitlines()[-2:]
    assert "the model's context is 1024 tokens" in context
    assert examples == "error: --few-shot 15: the worked examples are part of every prompt; use fewer"
