"""The policy as the judge (``judge_by: policy``): what its own engine is asked about a group, and what it said.

A grade is a completion like any other, but greedy, never learned from and not counted as a rollout. The judge is the
policy of that step, adapter and all: a judge that moves with what it grades. As at an endpoint, a reply without a score
is followed by one reminder, and then the judge abstains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from igrpo_lite.config import RunConfig
from igrpo_lite.prompts import PromptBuilder
from igrpo_lite.rewards.endpoint import Reply
from igrpo_lite.rewards.judge import Judgement, each, read_judgement
from igrpo_lite.rewards.judge_prompt import judge_prompt, judge_template
from igrpo_lite.sampling.base import Request, Sampler, request_seed
from igrpo_lite.types import Completion, Problem, Prompt

ASKED, REMINDED = 1, 2
"""Turns of a question. 0 is left to the completions themselves."""


@dataclass(frozen=True, slots=True)
class Question:
    """What the policy is asked next: about the group's completion ``index``, for the first or the second time."""

    prompt: Prompt
    index: int
    turn: int

    def request(self, seed: int, max_tokens: int, tag: object) -> Request:
        """The engine's request for the grade."""
        return Request(self.prompt, seed, max_tokens, temperature=0.0, tag=tag)


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

    def about(self, problem: Problem, completions: Sequence[Completion]) -> Judging:
        """Begin to judge a group."""
        return Judging(self, problem, completions)

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
        judging = self.about(problem, completions)

        def requests(questions: Sequence[Question]) -> list[Request]:
            return [q.request(request_seed(*seed, "judge", q.index, q.turn), self.max_tokens, q) for q in questions]

        def on_finished(request: Request, reply: Completion) -> list[Request]:
            assert isinstance(request.tag, Question)
            return requests(judging.replied(request.tag.index, reply))

        sampler.run(requests(judging.questions), on_finished)
        return judging.judgements()


class Judging:
    """One group that is being judged; the same text is asked about once.

    Attributes:
        questions: to begin with; none where none fits.
    """

    def __init__(self, judge: PolicyJudge, problem: Problem, completions: Sequence[Completion]) -> None:
        self.completions = tuple(completions)
        self._prompts = judge.prompts
        self._found: dict[str, Judgement] = {}
        self._open: dict[int, Question] = {}
        self._replies: dict[int, list[Reply]] = {}
        texts = [completion.text for completion in completions]
        for index, completion in enumerate(completions):
            if texts.index(completion.text) < index:
                continue
            prompt = judge.prompt(problem, completion)
            if prompt is None:
                told = f"problem {problem.id} leaves the policy no room in its context to judge; lower "
                told += "--judge-max-tokens or leave such problems out"
                self._found[completion.text] = Judgement(None, error=told)
            else:
                self._open[index] = Question(prompt, index, ASKED)
        self.questions = list(self._open.values())

    @property
    def done(self) -> bool:
        """Whether every question is answered."""
        return not self._open

    def replied(self, index: int, reply: Completion) -> list[Question]:
        """Take in a reply; gives the question that follows, if one does."""
        question, replies = self._open.pop(index), self._replies.setdefault(index, [])
        replies.append(Reply(reply.text, reply.truncated, len(question.prompt.ids) + len(reply.ids)))
        found = read_judgement(replies)
        if found.score is None and question.turn == ASKED:
            reminder = self._prompts.second("", question.prompt, reply.ids)
            self._open[index] = Question(reminder, index, REMINDED)
            return [self._open[index]]
        self._found[self.completions[index].text] = found
        return []

    def judgements(self) -> list[Judgement]:
        """One per completion, in order, once all is answered."""
        return each([completion.text for completion in self.completions], self._found)
