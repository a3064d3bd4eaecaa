"""What the model reads: system prompt, stage-2 template, chat template; text in, token ids out.

One system prompt serves drafts, refinements and evaluation alike (arXiv 2602.09000, appendix C: its clause about a
draft is conditional). Stage 2 only changes the user's turn (``plain``) or adds two turns (``multi-turn``).
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from igrpo_lite.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Placement = Literal["plain", "multi-turn"]
AnswerStyle = Literal["boxed", "tags"]

Shot = tuple[str, str]
"""A worked example for the prompt: question and answer."""

_DRAFT_CLAUSE = (
    "If the prompt contains a draft, take it as guidance and not as truth: correct its mistakes, fill its gaps, "
    "do not repeat it word for word, and give a strictly better solution."
)

SYSTEM_PROMPTS: dict[AnswerStyle, str] = {
    "boxed": f"Solve the problem step by step, then put the final answer in \\boxed{{}}. {_DRAFT_CLAUSE}",
    "tags": (
        "You are a helpful assistant that gives well reasoned and detailed answers. First think about the problem "
        "as an internal monologue, then answer, in this form: <think> ... </think> <answer> ... </answer>. "
        f"{_DRAFT_CLAUSE}"
    ),
}
"""Our wording of the paper's instruction (appendix C), for final answers in a box or in the paper's tags."""

STAGE2_TEMPLATES: dict[Placement, str] = {
    "plain": "{question}\n\nDraft:\n{draft}\n\nWrite a better solution.",
    "multi-turn": "Your solution above is a draft. Write a better solution.",
}
"""User turn of stage 2. ``plain``: question and draft in one turn (paper, equation 3). ``multi-turn``: the turn that
follows the draft, which stands as the assistant's own turn."""

PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Solution:\n{% endif %}"
)
"""Used, and said so, for base models whose tokenizer brings no chat template."""

_MARK = "\u241edraft\u241e"


class _Anything(dict[str, str]):
    def __missing__(self, key: str) -> str:
        return ""


def template_findings(template: str, placement: Placement) -> list[str]:
    """What is wrong with a stage-2 template: empty when nothing is.

    ``plain`` needs ``{question}`` and then ``{draft}``; ``multi-turn`` needs text and no placeholder, because question
    and draft already stand before it.
    """
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        template.format_map(_Anything())  # a placeholder may name no conversion or format that text has not
    except (ValueError, IndexError, AttributeError) as error:
        return [f"stage2_template: {error}; write a literal brace as {{{{ or }}}}"]
    if placement == "multi-turn":
        if fields or not template.strip():
            return ["stage2_template: with draft_placement multi-turn it is plain text, without {question} or {draft}"]
        return []
    unknown = sorted(set(fields) - {"question", "draft"})
    findings = [
        f"stage2_template: unknown placeholder {{{name}}}; it may use {{question}} and {{draft}}" for name in unknown
    ]
    for name in ("question", "draft"):
        if fields.count(name) != 1:
            findings.append(f"stage2_template: must contain {{{name}}} exactly once, found {fields.count(name)}")
    if not findings and fields != ["question", "draft"]:
        findings.append("stage2_template: {question} must come before {draft} (the draft follows the original prompt)")
    return findings


def read_text_or_file(value: str) -> str:
    """A setting that is either the text itself or the path of a file holding it."""
    if "\n" not in value and len(value) < 1024 and Path(value).is_file():
        return Path(value).read_text(encoding="utf-8")
    return value


class PromptBuilder:
    """Renders both stages' prompts with one tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer; its chat template is used, else :data:`PLAIN_CHAT_TEMPLATE`.
        system_prompt: instruction used in every prompt; empty for none.
        stage2_template: checked by :func:`template_findings` beforehand.
        placement: how the draft enters stage 2.
        max_draft_length: tokens of a draft shown at most; of a longer one the end is kept (it holds the answer).
        shots: worked examples that every prompt begins with, as earlier turns of the conversation.
        heading: line before an answer where the tokenizer brings no chat template.

    Attributes:
        max_length: tokens of a prompt that holds what the model wrote (a stage-2 prompt) at most; unset: any number.
        judge: of the prompts in which the model itself grades completions; unset: it does not.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        system_prompt: str,
        stage2_template: str,
        placement: Placement = "plain",
        max_draft_length: int | None = None,
        shots: Sequence[Shot] = (),
        heading: str = "Solution:",
    ) -> None:
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self.stage2_template = stage2_template
        self.placement = placement
        self.max_draft_length = max_draft_length
        self.shots = tuple(shots)
        self.max_length: int | None = None
        self.judge: PromptBuilder | None = None
        self.heading = heading
        self.plain_template = not tokenizer.chat_template
        self._merge_system = not self.plain_template and bool(system_prompt) and not self._accepts_system()

    def first(self, question: str) -> Prompt:
        """The prompt of drafts, of plain GRPO and of evaluation."""
        return self._ask(question)

    def second(self, question: str, first: Prompt, draft_ids: Sequence[int]) -> Prompt:
        """The prompt of refinements, q' = Concat(q, d) of the paper's equation 3.

        In the user's turn the draft is plain text: control tokens, also spelt out, are left out, so that it cannot
        close the turn it stands in.
        """
        kept = self.shown(draft_ids)
        if self.placement == "multi-turn":
            return self._second_turn(first, kept)
        while True:
            draft = self.without_controls(self.tokenizer.decode(kept, skip_special_tokens=True))
            content = self.stage2_template.format(question=question, draft=draft.strip())
            prompt = self._ask(content)
            excess = len(prompt.ids) - (self.max_length or len(prompt.ids))
            if excess <= 0 or not kept:
                return prompt
            kept = kept[excess:]  # tokenised anew, a draft can be longer than it was; its end matters most

    def without_controls(self, text: str) -> str:
        """A text without the tokenizer's control tokens, which it may spell out, nor any that this brings together."""
        while found := [control for control in self.tokenizer.all_special_tokens if control and control in text]:
            for control in found:
                text = text.replace(control, "")
        return text

    def shown(self, draft_ids: Sequence[int]) -> tuple[int, ...]:
        """The part of a draft that stage 2 shows: its last ``max_draft_length`` tokens."""
        limit = self.max_draft_length
        return tuple(draft_ids if limit is None or len(draft_ids) <= limit else draft_ids[-limit:])

    def _second_turn(self, first: Prompt, draft_ids: tuple[int, ...]) -> Prompt:
        # The ids of prompt and draft are kept as they were decoded, never re-tokenised: an engine can re-use their keys
        # and values. Only the text after the draft is new.
        tail = self._after_answer(self.stage2_template.format())
        if draft_ids and draft_ids[-1:] == tail[:1]:
            tail = tail[1:]
        ids = first.ids + draft_ids + tail
        return Prompt(self.tokenizer.decode(ids), ids)

    def end_of_turn(self) -> tuple[int, ...]:
        """The control token that closes the assistant's turn in the chat template, if one does; else nothing.

        It need not be the tokenizer's end-of-sequence token, and a model trained on the template ends with it.
        """
        tail = self._after_answer("?")
        return tail[:1] if tail and tail[0] in self.tokenizer.all_special_ids else ()

    def _after_answer(self, next_turn: str) -> tuple[int, ...]:
        """Ids that follow the assistant's text when the user speaks again: end of turn, user's turn, a new start."""
        messages = [
            {"role": "user", "content": _MARK + "?"},
            {"role": "assistant", "content": _MARK},
            {"role": "user", "content": next_turn},
        ]
        suffix = self._render(messages).rpartition(_MARK)[2]
        return tuple(self.tokenizer.encode(suffix, add_special_tokens=False))

    def _ask(self, content: str) -> Prompt:
        messages = []
        for question, answer in self.shots:
            # The plain template knows no roles: it writes this line at its end, before the completion.
            answer = f"{self.heading}\n{answer}" if self.plain_template else answer
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return self._encode(self._render([*messages, {"role": "user", "content": content}]))

    def _accepts_system(self) -> bool:
        try:  # a template may refuse the role (Gemma) or drop it silently
            messages = [{"role": "system", "content": _MARK}, {"role": "user", "content": "?"}]
            return _MARK in self.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception:
            return False

    def _render(self, messages: list[dict[str, str]]) -> str:
        if self.system_prompt and self._merge_system:
            head = {"role": "user", "content": f"{self.system_prompt}\n\n{messages[0]['content']}"}
            messages = [head, *messages[1:]]
        elif self.system_prompt:
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        template = PLAIN_CHAT_TEMPLATE.replace("Solution:", self.heading) if self.plain_template else None
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, chat_template=template
        )

    def _encode(self, text: str) -> Prompt:
        # A chat template writes its own special tokens; only our plain one relies on the tokenizer's.
        # verbose: transformers warns of what is too long for the model; here that is filtered and counted.
        ids = self.tokenizer.encode(text, add_special_tokens=self.plain_template, verbose=False)
        return Prompt(text, tuple(ids))
