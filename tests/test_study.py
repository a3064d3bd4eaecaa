"""The study's scripts: what the start models practise, the splits of the word problems, the noisy rewards."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from igrpo_lite.config import RewardOptions
from igrpo_lite.config.resolve import load_file, resolve
from igrpo_lite.problems.synthetic import draw, load, split_of
from igrpo_lite.rewards.scorer import Scorer
from igrpo_lite.types import Completion, Prompt
from tests.real_data import real_data

ROOT = Path(__file__).resolve().parents[1]
STUDY = ROOT / "benchmarks" / "study"
EQUATION = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")

Script = Callable[[str], ModuleType]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Imports a script of ``benchmarks/study/`` by name, as it is when it runs from there."""
    monkeypatch.syspath_prepend(str(STUDY))
    return importlib.import_module


def equations(solution: str) -> list[tuple[int, int]]:
    """Value of the left side, by Python, and the written result of every step."""
    found = [match.groups() for match in EQUATION.finditer(solution)]
    return [(int(eval(f"{a}{o.replace('/', '//')}{b}")), int(c)) for a, o, b, c in found]


@pytest.mark.parametrize("name", ["addition", "multiplication"])
def test_a_wrong_draft_has_one_wrong_calculation_and_carries_it_on(script: Script, name: str) -> None:
    lessons, r = script("lessons"), random.Random(0)
    stream = draw(name, "warmup", 0)
    for worked in (next(stream) for _ in range(200)):
        draft = lessons.mistaken(worked, r)
        *_, box = re.findall(r"\\boxed\{(\d+)\}", draft)
        steps = equations(draft)
        assert len(steps) == len(worked.steps)
        assert sum(value != written for value, written in steps) == 1
        assert int(box) == steps[-1][1] != worked.answer


def test_a_wrong_operation_is_calculated_right(script: Script) -> None:
    lessons, r = script("lessons"), random.Random(0)
    stream = draw("addition", "warmup", 0)
    drafts = [lessons.mistaken(next(stream), r, "+-*/") for _ in range(300)]
    other = [draft for draft in drafts if re.search(r"\d[-*/]\d", draft)]
    assert len(other) > 50
    assert all(value == written for draft in other for value, written in equations(draft))


@pytest.mark.parametrize("name", ["addition-base", "addition", "multiplication"])
def test_synthetic_subjects_practise_the_warm_up_split_only(script: Script, name: str) -> None:
    models, lessons, r = script("start_models"), script("lessons"), random.Random(0)
    subject = models.SUBJECTS[name]
    assert {split_of(subject.example(r, 1.0)) for _ in range(300)} == {"warmup"}
    drills = [lessons.calculate(*subject.drill(r)) for _ in range(200)]
    assert all(result is not None for result in drills)


def test_rare_kinds_come_as_often_as_a_phase_says(script: Script) -> None:
    subject, r = script("start_models").SUBJECTS["multiplication-base"], random.Random(0)
    shares = []
    for weight in (1.0, 0.1):
        drawn = [subject.example(r, weight).kind for _ in range(600)]
        shares.append(drawn.count("3x2") / len(drawn))
    assert 0.17 < shares[0] < 0.33
    assert 0 < shares[1] < 0.1


def test_terse_demonstrations_state_only_the_answer(script: Script) -> None:
    models, lessons = script("start_models"), script("lessons")
    course, subject = models.COURSES["addition"], models.SUBJECTS["addition"]
    teacher = lessons.StudyLessons(course.recipe, models.build_tokenizer(512), subject)
    for worked in itertools.islice(draw("addition", "warmup", 0), 12):
        texts = [teacher.demonstration(worked) for _ in range(200)]
        terse = f"\\boxed{{{worked.answer}}}"
        assert set(texts) == {terse, worked.solution}
        assert abs(texts.count(terse) / 200 - subject.terse[worked.kind]) < 4 * math.sqrt(0.25 / 200)


@pytest.fixture
def problems(script: Script) -> list:
    words = script("words")
    svamp, gsm8k = real_data("SVAMP.json"), real_data("gsm8k_train.jsonl")
    return [*words.read_svamp(svamp), *words.read_gsm8k(gsm8k)]


def test_word_problems_keep_text_and_answer_and_are_solved_step_by_step(problems: list) -> None:
    answers: dict[str, str] = {}
    for row in json.loads(real_data("SVAMP.json").read_text(encoding="utf-8")):
        answers[" ".join(row["Question"].split())] = str(int(row["Answer"]))
    for line in real_data("gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        answers[" ".join(row["question"].split())] = row["answer"].rpartition("#### ")[2].replace(",", "")
    kinds = {problem.kind for problem in problems}
    assert kinds == {"svamp-1", "svamp-2", "gsm8k-1", "gsm8k-2"}
    assert len(problems) > 1400
    for problem in problems:
        worked = problem.worked()
        assert all(value == written for value, written in equations(worked.solution))
        assert equations(worked.solution)[-1][1] == worked.answer
        if problem.kind.startswith("gsm8k"):
            plain = {question.replace(",", "") for question in answers if answers[question] == str(worked.answer)}
            assert worked.question.replace(",", "") in plain


def test_other_numbers_change_nothing_but_numbers(problems: list) -> None:
    r = random.Random(0)
    changed = 0
    for problem in problems[::7]:
        varied = problem.varied(r)
        assert re.sub(r"\d+", "#", varied.question) == "#".join(problem.parts)
        assert len(varied.steps) == len(problem.steps)
        assert all(value == written for value, written in equations(varied.solution))
        changed += varied.question != problem.worked().question
    assert changed > 0.9 * len(problems[::7])


def test_no_question_is_in_two_splits_and_the_base_shares_no_story(script: Script, problems: list) -> None:
    words = script("words")
    splits = words.split(problems)
    assert sum(map(len, splits.values())) == len({problem.parts for problem in problems})
    assert min(map(len, splits.values())) > 100
    texts = [problem.parts for share in splits.values() for problem in share]
    assert len(set(texts)) == len(texts)
    runs: dict[str, set[str]] = {"base": set(), "others": set()}
    for name, share in splits.items():
        for problem in share:
            tokens = re.sub(r"[^a-z#]+", " ", "#".join(problem.parts).lower().replace("#", " # ")).split()
            side = "base" if name == "base" else "others"
            runs[side] |= {" ".join(tokens[i : i + 8]) for i in range(len(tokens) - 7)}
    assert not runs["base"] & runs["others"]
    again = words.split(problems[::-1])
    assert {name: {p.parts for p in share} for name, share in again.items()} == {
        name: {p.parts for p in share} for name, share in splits.items()
    }


def completion(text: str) -> Completion:
    return Completion((1,), text, (0.0,), "stop")


@pytest.mark.parametrize(("name", "share"), [("noisy_10", 0.1), ("noisy_30", 0.3)])
def test_noisy_accuracy_turns_its_share_of_verdicts_round(name: str, share: float) -> None:
    options = RewardOptions(reward_funcs=[f"{STUDY / 'rewards.py'}:{name}"])
    turned: dict[bool, list[bool]] = {True: [], False: []}
    with Scorer(options, "boxed") as scorer:
        for problem in load("addition", "train", 60):
            right = [True] * 10 + [False] * 10
            wrong = str(int(problem.answer) + 1)
            texts = [f"{i}+0={i}; \\boxed{{{problem.answer if good else wrong}}}" for i, good in enumerate(right)]
            prompt = Prompt(problem.question, ())
            scores = scorer.score(problem, prompt, [completion(text) for text in texts])
            again = scorer.score(problem, prompt, [completion(text) for text in texts[::-1]])
            assert [score.reward for score in scores] == [score.reward for score in again[::-1]]
            for score, good in zip(scores, right, strict=True):
                turned[good].append(score.reward != float(good))
    for flips in turned.values():  # 600 each: four standard deviations
        assert abs(sum(flips) / len(flips) - share) < 4 * math.sqrt(share * (1 - share) / len(flips))


@pytest.mark.parametrize("name", ["addition", "multiplication", "words"])
def test_recipes_resolve_and_leave_room_for_every_solution(script: Script, name: str) -> None:
    config = resolve(load_file(STUDY / f"{name}.yaml"))
    assert (config.num_generations, config.prompts_per_step) == (16, 8)
    if name == "words":
        return
    tokenizer = script("start_models").build_tokenizer(512)
    solutions = [problem.columns["solution"] for problem in load(name, "train", 500)]
    assert max(len(tokenizer.encode(solution)) for solution in solutions) < config.max_completion_length


def test_a_start_model_comes_out_whole(script: Script, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    models = script("start_models")
    assert models.main(["addition-base", "--output-dir", str(tmp_path), "--max-steps", "1", "--problems", "4"]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.vocab_size == len(tokenizer)
    text = "<|im_start|>user\nWhat is 12 + 345?<|im_end|>\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert "as saved" in (tmp_path / "build.log").read_text(encoding="utf-8")
