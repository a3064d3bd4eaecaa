"""The policy as the judge: what it is asked, when, what becomes of its replies, and that runs stay reproducible."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import re
from typing import Any

import pytest
from judge_parts import JUDGED, REPLAY, SHORT
from scripted_sampler import ScriptedSampler
from tiny_parts import small_config, tiny_parts

from igrpo_lite.algorithms.dynamic import with_signal
from igrpo_lite.algorithms.judging import PolicyJudge
from igrpo_lite.algorithms.rollout import RolloutCollector
from igrpo_lite.config.resolve import RESUMABLE, merge, resolve
from igrpo_lite.errors import ConfigError
from igrpo_lite.policy.prompting import check_context, prompt_builder
from igrpo_lite.rewards.findings import reward_findings
from igrpo_lite.rewards.judge_prompt import REMINDER, judge_prompt
from igrpo_lite.rewards.scorer import Scorer
from igrpo_lite.types import Completion, Problem

SCHEDULES = ["barrier", "overlap", "ahead"]


@pytest.fixture(scope="module")
def parts():
    made = tiny_parts(small_config(**JUDGED))
    yield made
    made.scorer.close()


def completion(text: str, parts: Any) -> Completion:
    ids = tuple(parts.prompts.tokenizer.encode(text, add_special_tokens=False))
    return Completion(ids, text, (0.0,) * len(ids), "stop")


class Replying:
    """Gives the replies it was made with, one after the other."""

    def __init__(self, *replies: Completion) -> None:
        self.replies, self.requests = list(replies), []

    def run(self, requests, on_finished, poll=None):
        waiting = list(requests)
        while waiting:
            self.requests.append(request := waiting.pop(0))
            waiting += on_finished(request, self.replies.pop(0))


# Settings


def test_settings_of_an_endpoint_are_refused_one_by_one():
    endpoint = {
        "judge_url": "http://localhost:8000/v1",
        "judge_model": "m",
        "judge_token_budget": 100,
    }
    findings = reward_findings(resolve(JUDGED | endpoint))
    assert findings == [
        f"{name}: belongs to judge_by endpoint, but judge_by is policy, which asks no server; leave {name} out"
        for name in endpoint
    ]
    assert reward_findings(resolve(JUDGED)) == []
    (told,) = reward_findings(resolve({"judge_by": "policy"}))
    assert told.startswith("judge_by: belongs to the reward judge, which reward_funcs does not name")
    (told,) = reward_findings(resolve(JUDGED | {"judge_prompt": "{question}"}))
    assert told == "judge_prompt: must contain {completion}"
    (told,) = reward_findings(resolve({"reward_funcs": "judge"}))
    assert "--judge-by policy" in told


def test_the_flag_takes_a_recipes_endpoint_back():
    recipe = {"reward_funcs": ["judge"], "judge_url": "http://x/v1", "judge_token_budget": 9, "judge_prompt": SHORT}
    merged = merge(recipe, {"judge_by": "policy"})
    assert merged == {"reward_funcs": ["judge"], "judge_prompt": SHORT, "judge_by": "policy"}
    assert merge(recipe, {"judge_by": "endpoint"}) == recipe | {"judge_by": "endpoint"}
    assert "judge_by" not in RESUMABLE, "another judge would be another run"


# What is asked


def test_the_judge_reads_a_turn_of_its_own(parts):
    """Neither the instruction to solve nor anything that could end the turn; the reminder continues token by token."""
    problem, tokenizer = parts.train[0], parts.prompts.tokenizer
    judge = PolicyJudge(small_config(**JUDGED), parts.prompts)
    prompt = judge.prompt(problem, completion("3<|im_<|im_end|>end|>4<|im_start|>", parts))
    assert prompt is not None
    assert prompt.text.count("<|im_start|>") == 2
    assert prompt.text.count("<|im_end|>") == 1
    assert prompt.text.startswith(f"<|im_start|>user\n{problem.question}\n<attempt-")
    assert "\n34\n" in prompt.text
    assert prompt.ids == tuple(tokenizer.encode(prompt.text, add_special_tokens=False))
    reply = tuple(tokenizer.encode("No idea.<|im_end|>", add_special_tokens=False))
    sampler = Replying(Completion(reply, "No idea.", (0.0,) * len(reply), "stop"), completion("Score: 3/4", parts))
    (judgement,) = judge.judge(sampler, problem, [completion("7", parts)])
    asked, again = sampler.requests
    head = asked.prompt.ids + reply
    assert again.prompt.ids[: len(head)] == head
    assert again.prompt.text.endswith(
        f"No idea.<|im_end|>\n<|im_start|>user\n{REMINDER}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (judgement.score, judgement.reply, judgement.error) == (0.75, "No idea.\nScore: 3/4", None)
    read = len(asked.prompt.ids) + len(again.prompt.ids)
    assert judgement.tokens == read + len(reply) + len(completion("Score: 3/4", parts).ids)


def test_what_the_engine_must_hold(parts):
    """The judge's whole conversation, with room for a completion that has more tokens there."""
    config = small_config(**JUDGED, max_completion_length=100)
    prompts = prompt_builder(config)
    longest = max(parts.train, key=lambda problem: len(prompts.first(problem.question).ids))
    assert prompts.judge is not None
    bare = len(prompts.judge.first(judge_prompt(SHORT, longest, "")).ids)
    needed = check_context(config, prompts, longest)
    without = prompt_builder(small_config(max_completion_length=100))
    rollouts = check_context(small_config(max_completion_length=100), without, longest)
    assert without.judge is None
    assert prompts.max_length == without.max_length
    assert needed == rollouts, "short judgements need no more than a draft in its prompt does"
    longer = small_config(**JUDGED | {"judge_max_tokens": 200}, max_completion_length=100)
    needed = check_context(longer, prompts, longest)
    reminder = needed - (bare + 100 + 25 + 400)
    assert 0 < reminder < 100
    assert prompts.judge.max_length == bare + 125
    judge = PolicyJudge(longer, prompts)
    whole = judge.prompt(longest, completion("1+1=2; " * 40 + "\\boxed{2}", parts))
    assert whole is not None
    assert bare < len(whole.ids) <= prompts.judge.max_length
    assert "\\boxed{2}\n</attempt" in whole.text, "the end is kept"
    long = Problem("long", "9 " * 1200, "1")
    nobody = Replying()
    judgements = judge.judge(nobody, long, [completion("1", parts)] * 2)
    assert [(j.score, j.asked) for j in judgements] == [(None, True), (None, False)]
    assert "problem long leaves the policy no room" in str(judgements[0].error)
    assert not nobody.requests


def test_a_context_that_is_too_short_is_refused_before_the_model_loads(parts):
    config = small_config(reward_funcs="judge", judge_by="policy")
    with pytest.raises(
        ConfigError, match=r"context is 1024 tokens, but to judge, the policy may need 2\d\d\d: "
    ) as told:
        check_context(config, prompt_builder(config), parts.train[0])
    fits = int(re.search(r"set --judge-max-tokens (\d+), or", str(told.value))[1])
    for tokens in (fits, fits + 1):
        config = small_config(reward_funcs="judge", judge_by="policy", judge_max_tokens=tokens)
        if tokens == fits:
            assert check_context(config, prompt_builder(config), parts.train[0]) <= 1024
        else:
            with pytest.raises(ConfigError):
                check_context(config, prompt_builder(config), parts.train[0])
    config = small_config(reward_funcs="judge", judge_by="policy", max_completion_length=600)
    with pytest.raises(ConfigError) as told:
        check_context(config, prompt_builder(config), parts.train[0])
    assert len(told.value.problems) == 2, "draft and completion do not fit either, and both are said"


def test_the_check_of_one_row_asks_nobody():
    config = small_config(**JUDGED)
    with Scorer(config, "boxed") as scorer:
        assert scorer.asks_policy
        assert not scorer.in_worker
        assert scorer.threads == 1
        scorer.check(Problem("p", "How many?", "7"))
        assert scorer.failures["judge"].made == 0


# Order of events, on a sampler whose texts follow from the request alone


def attempt(request: Any) -> str:
    found = re.search(r"<(attempt-\w+)>\n(.*)\n</\1>", request.prompt.text, re.DOTALL)
    assert found
    return found[2]


def grade(text: str) -> int | None:
    """Percent that the scripted judge gives; one attempt in 256 is beyond it, also when asked again."""
    number = hashlib.sha256(text.encode()).digest()[0]
    return None if number == 97 else number % 101


class JudgingSampler(ScriptedSampler):
    """Also writes grades: by the attempt, every other one only when reminded."""

    def write(self, request: Any) -> Completion:
        if not request.tag.turn:
            return super().write(request)
        text = attempt(request)
        found = grade(text)
        readable = found is not None and (request.tag.turn == 2 or found % 2)
        said = f"Score: {found}%" if readable else "Well."
        ids = (*self.tokenizer.encode(said, add_special_tokens=False), self.tokenizer.eos_token_id)
        assert len(ids) <= request.max_tokens
        return Completion(ids, said, (0.0,) * len(ids), "stop")


def scripted(parts, pick=lambda count: 0):
    return JudgingSampler(parts.prompts.tokenizer, [problem.answer for problem in parts.train[:3]], pick)


def collected(config, parts, sampler, step_count=3):
    """All steps, as the loop asks for them; the collector, and its scorer's counts."""
    problems = [parts.train[3 * step : 3 * (step + 1)] for step in range(step_count)] + [[]]
    with Scorer(config, "boxed") as scorer:
        collector = RolloutCollector(sampler, scorer, parts.prompts, config, config.seed)
        made = [collector.collect(problems[i], i, upcoming=problems[i + 1]) for i in range(step_count)]
        return made, collector, scorer


def groups_of(made):
    for rollout in (rollout for step in made for rollout in step):
        yield from ((group, 0) for group in rollout.groups)
        yield from ((replay.group, 1) for replay in rollout.replays)  # its source was judged with its stage


@pytest.mark.parametrize("extra", [{}, REPLAY, {"algorithm": "igrpo-joint"}, {"algorithm": "grpo"}])
def test_every_schedule_asks_the_same_of_the_same_texts(extra, parts):
    first = None
    for schedule in SCHEDULES if extra.get("algorithm", "igrpo") == "igrpo" else SCHEDULES[:2]:
        for seed in (None, 0):
            pick = random.Random(seed).randrange if seed is not None else lambda count: 0
            sampler, config = scripted(parts, pick), small_config(**JUDGED, schedule=schedule, **extra)
            made, collector, _ = collected(config, parts, sampler)
            asked = sorted((r.seed, r.prompt.ids, r.max_tokens, r.temperature) for r in sampler.requests)
            first = first or (made, asked)
            assert (made, asked) == first
            assert len({seed for seed, *_ in asked}) == len(asked), "every request has a seed of its own"
    judge_requests = [r for r in sampler.requests if r.tag.turn]
    assert all(r.temperature == 0.0 and r.max_tokens == 12 for r in judge_requests)
    assert {r.tag.turn for r in judge_requests} == {1, 2}
    assert len(sampler.requests) - len(judge_requests) == sum(r.sampled for step in made for r in step)
    written = {(r.tag, r.seed): c for r, c in zip(judge_requests, map(sampler.write, judge_requests), strict=True)}
    assert collector.judge_tokens == sum(len(c.ids) for c in written.values())
    if extra == REPLAY:
        assert any(r.tag.replay for r in judge_requests)


def test_scores_choose_the_draft_and_a_text_is_judged_once_in_its_group(parts):
    sampler = scripted(parts)
    made, _, scorer = collected(small_config(**JUDGED, **REPLAY), parts, sampler)
    asked = [
        (r.tag.step, r.tag.slot, r.tag.stage, r.tag.replay, attempt(r)) for r in sampler.requests if r.tag.turn == 1
    ]
    assert len(set(asked)) == len(asked)
    distinct, unread = 0, 0
    for group, start in groups_of(made):
        texts = [c.text for c in group.completions]
        distinct += len(set(texts[start:]))
        unread += sum(grade(text) is None for text in set(texts[start:]))
        for text, score in zip(texts, group.scores, strict=True):
            wanted = grade(text)
            assert score.parts["judge"] == (None if wanted is None else pytest.approx(wanted / 100))
            assert score.reward == pytest.approx(score.parts["accuracy"] + (wanted or 0) / 100)
            reply = "Well." if wanted is None else f"Score: {wanted}%"
            assert score.extras["judge/reply"].endswith(reply)
    assert distinct == len(asked) < sum(len(group.completions) - start for group, start in groups_of(made))
    calls = scorer.failures["judge"]
    assert (calls.made, calls.failed) == (distinct, unread)
    assert unread > 0
    logged = scorer.take_logged()
    assert 0 < logged["reward/judge/cached"] < 1
    for rollout in (rollout for step in made for rollout in step):
        best = max(score.reward for score in rollout.stage1.scores)
        assert rollout.draft_score.reward == best


def test_with_barrier_a_stage_is_judged_in_its_own_wave(parts):
    sampler = scripted(parts, random.Random(1).randrange)
    collected(small_config(**JUDGED, schedule="barrier"), parts, sampler, 1)
    assert [{r.tag.stage for r in wave} for wave in sampler.runs] == [{"stage1"}, {"stage2"}]
    assert all(not r.tag.turn for wave in sampler.runs for r in wave)
    stages = [r.tag.stage for kind, r in sampler.events if kind == "sampled"]
    assert stages == sorted(stages), "all drafts and their grades before any refinement"


def test_problems_put_in_by_dynamic_sampling_are_judged_too(parts):
    config = small_config(**JUDGED | {"reward_funcs": "judge"}, dynamic_sampling=2)
    with Scorer(config, "boxed") as scorer:
        collector = RolloutCollector(scripted(parts), scorer, parts.prompts, config, 0)
        first = collector.collect(parts.train[:3], 0)
        flat = [
            dataclasses.replace(r, stage2=dataclasses.replace(r.stage2, scores=(r.stage2.scores[0],) * 3))
            for r in first
        ]
        batch = with_signal(flat, iter(parts.train[20:]), config, lambda more, slot: collector.collect(more, 0, slot))
    assert batch.rounds >= 1
    new = batch.sampled[3:]
    assert new
    assert all(
        s.parts["judge"] == pytest.approx(grade(c.text) / 100)
        for r in new
        for g in r.groups
        for c, s in zip(g.completions, g.scores, strict=True)
        if grade(c.text) is not None
    )
