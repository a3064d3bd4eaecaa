"""The policy as the judge (``judge_by: policy``): its own engine is asked about a group, as a plan.

A grade is a completion like any other, but greedy, never learned from and not counted as a rollout. The judge is the
policy of that step, adapter and all: a judge that moves with what it grades. As at an endpoint, a reply without a score
is followed by one reminder, and then the judge abstains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from igrpo_lite.algorithms.plans import All, Driver, Plan, Sample
from igrpo_lite.config import RunConfig
from igrpo_lite.prompts import PromptBuilder
from igrpo_lite.rewards.endpoint import Reply
from igrpo_lite.rewards.judge import Judgement, each, read_judgement
from igrpo_lite.rewards.judge_prompt import judge_prompt, judge_template
from igrpo_lite.sampling.base import Request, Sampler, request_seed
from igrpo_lite.types import Completion, Problem, Prompt

ASKED, REMINDED = 1, 2
"""Turns of a question. 0 is left to the completions themselves."""

MakeRequest = Callable[[Prompt, int, int], Request]
"""The request for a grade: from what the policy reads, the completion's index in its group, and the turn."""


class PolicyJudge:
    """Asks the policy about groups of completions.

    Args:
        config: with ``judge_by: policy``.
        prompts: those of the run; their ``judge`` renders the questions.
    """

    def __init__(self, config: RunConfig, prompts: PromptBuilder) -> None:
        assert prompts.judge is not None, "made for a configuration in which the policy is no judge"
        self.prompts = prompts.judge
        self.max_tokens = config.judge_max_tokens
        self._template = judge_template(config)

    def grade(self, problem: Problem, completions: Sequence[Completion], request: MakeRequest) -> Plan[list[Judgement]]:
        """One judgement per completion; the same text is asked about once."""
        first = {c.text: index for index, c in reversed(list(enumerate(completions)))}
        places = sorted(first.values())
        found = yield All([self._ask(problem, completions[index], index, request) for index in places])
        texts = [completion.text for completion in completions]
        return each(texts, {texts[index]: judgement for index, judgement in zip(places, found, strict=True)})

    def _ask(self, problem: Problem, completion: Completion, index: int, request: MakeRequest) -> Plan[Judgement]:
        """A question about one completion, and a reminder if the reply has no score."""
        prompt = self.prompt(problem, completion)
        if prompt is None:
            told = f"problem {problem.id} leaves the policy no room in its context to judge; lower "
            return Judgement(None, error=told + "--judge-max-tokens or leave such problems out")
        replies: list[Reply] = []
        for turn in (ASKED, REMINDED):
            (reply,) = yield Sample([request(prompt, index, turn)])
            replies.append(Reply(reply.text, reply.truncated, len(prompt.ids) + len(reply.ids)))
            judgement = read_judgement(replies)
            if judgement.score is not None:
                break
            prompt = self.prompts.second("", prompt, reply.ids)
        return judgement

    def request(self, prompt: Prompt, seed: int, tag: object) -> Request:
        """The engine's request for a grade."""
        return Request(prompt, seed, self.max_tokens, temperature=0.0, tag=tag)

    def prompt(self, problem: Problem, completion: Completion) -> Prompt | None:
        """What the policy reads; ``None`` where not even the problem fits.

        Of a completion that is too long, tokenised anew among its marks, the end is kept: the answer stands there.
        """
        text, ids = completion.text, completion.ids
        while True:
            text = self.prompts.without_controls(text)
            prompt = self.prompts.first(judge_prompt(self._template, problem, text))
            excess = len(prompt.ids) - (self.prompts.max_length or len(prompt.ids))
            if excess <= 0:
                return prompt
            if not ids:
                return None
            ids = ids[excess:]
            text = self.prompts.tokenizer.decode(list(ids), skip_special_tokens=True)

    def judge(
        self, sampler: Sampler, problem: Problem, completions: Sequence[Completion], *seed: object
    ) -> list[Judgement]:
        """Judge one group in a run of the engine of its own; ``seed`` is the path of its requests' seeds."""

        def request(prompt: Prompt, index: int, turn: int) -> Request:
            return self.request(prompt, request_seed(*seed, "judge", index, turn), (index, turn))

        (judgements,) = Driver(sampler).run([self.grade(problem, completions, request)])
        return judgements
