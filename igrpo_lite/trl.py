"""iGRPO (arXiv 2602.09000) as a trainer of TRL: :class:`IGRPOTrainer` beside TRL's ``GRPOTrainer``. See docs/trl.md.

Optional (``pip install 'igrpo-lite[trl]'``) and thin: where TRL samples once, it samples twice. Rewards, advantages,
loss, several processes and vLLM stay TRL's. Nothing else in the package imports this module.
"""

from __future__ import annotations

import copy
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from math import gcd
from typing import Any, ClassVar, Literal

from packaging.version import Version

from igrpo_lite.algorithms.drafts import DraftChoice, choose_draft
from igrpo_lite.answers.answers import find_answer
from igrpo_lite.config import PromptOptions, RolloutOptions
from igrpo_lite.errors import ConfigError, UserError
from igrpo_lite.prompts import STAGE2_TEMPLATES, read_text_or_file, template_findings
from igrpo_lite.rewards.findings import trl_findings
from igrpo_lite.types import Completion, Score

SUPPORTED = ((1, 14), (1, 17))
"""First TRL version that is supported, and the first that is not any more."""


class TRLImportError(UserError, ImportError):
    """TRL is not installed, or not in a version that :class:`IGRPOTrainer` was written for."""


def _installed() -> tuple[int, ...]:
    # From the package's metadata: to import a TRL that does not suit the other packages may fail in any way.
    wanted = f"igrpo_lite.trl needs trl>={SUPPORTED[0][0]}.{SUPPORTED[0][1]},<{SUPPORTED[1][0]}.{SUPPORTED[1][1]}"
    try:
        found = version("trl")
    except PackageNotFoundError as error:
        raise TRLImportError(f"{wanted}, and trl is not installed; pip install 'igrpo-lite[trl]'") from error
    numbers = Version(found).release[:2]
    if not SUPPORTED[0] <= numbers < SUPPORTED[1]:
        raise TRLImportError(
            f"{wanted}, but trl {found} is installed; pip install 'igrpo-lite[trl]' gets one that fits"
        )
    return numbers


_TRL = _installed()

import torch  # noqa: E402 - what follows takes seconds, and is in vain without a TRL that fits
from accelerate.utils import gather_object  # noqa: E402
from datasets import Dataset  # noqa: E402
from torch import Tensor  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402
from trl.trainer.utils import nanstd  # noqa: E402

from igrpo_lite.policy.loading import stop_ids  # noqa: E402

Row = dict[str, Any]
Prompt = str | list[dict[str, Any]]
"""A prompt of TRL's standard or of its conversational data format."""

_ROLLOUT, _PROMPT = RolloutOptions.model_fields, PromptOptions.model_fields
_CHOICES = ("draft_selection", "truncated_drafts")
_UNSUPPORTED = ("tools", "rollout_func", "environment_factory")


@dataclass
class IGRPOConfig(GRPOConfig):
    """TRL's ``GRPOConfig`` with the settings of stage 1. ``num_generations`` is stage 2's group size G.

    Attributes:
        num_drafts: drafts N per prompt; unset: as many as ``num_generations``, the paper's even split.
        draft_selection, truncated_drafts: which draft stage 2 sees, as in
            :class:`igrpo_lite.config.RolloutOptions`.
        stage2_template: text of stage 2's user turn, or a file with it; holds ``{question}`` and then ``{draft}``.
        max_draft_length: tokens of a draft shown at most; of a longer one the end is kept. Unset: all.

    Raises:
        ConfigError: with all findings about these settings, or when a process would not hold whole groups.
    """

    num_drafts: int | None = field(
        default=None, metadata={"help": "Drafts per prompt in stage 1; unset: as many as num_generations."}
    )
    draft_selection: Literal["best", "random"] = field(
        default="best", metadata={"help": _ROLLOUT["draft_selection"].description}
    )
    truncated_drafts: Literal["last_resort", "allow"] = field(
        default="last_resort", metadata={"help": _ROLLOUT["truncated_drafts"].description}
    )
    stage2_template: str | None = field(
        default=None, metadata={"help": "User turn of stage 2, text or file, with {question} and {draft}."}
    )
    max_draft_length: int | None = field(default=None, metadata={"help": _PROMPT["max_draft_length"].description})

    def __post_init__(self) -> None:
        # Before TRL's own checks where that is possible: these name the setting to change.
        findings = self._stage1_findings()
        if self.generation_batch_size is None:
            steps = self.steps_per_generation or self.gradient_accumulation_steps
            findings += _group_findings(self.per_device_train_batch_size, steps, self.num_generations)
        if findings:
            raise ConfigError(findings)
        super().__post_init__()
        steps = self.steps_per_generation
        if findings := _group_findings(self.per_device_train_batch_size, steps, self.num_generations):
            raise ConfigError(findings)
        self.num_drafts = self.num_drafts or self.num_generations

    def template(self) -> str:
        """The user turn of stage 2: the text given or in the file given, else ours."""
        return read_text_or_file(self.stage2_template or STAGE2_TEMPLATES["plain"])

    def rollout_options(self) -> RolloutOptions:
        """The settings that :func:`igrpo_lite.algorithms.drafts.choose_draft` reads."""
        return RolloutOptions(**{name: getattr(self, name) for name in _CHOICES})

    def _stage1_findings(self) -> list[str]:
        findings = [
            f"{name}: {value!r} is no number above 0"
            for name in ("num_drafts", "max_draft_length")
            if (value := getattr(self, name)) is not None and (not isinstance(value, int) or value < 1)
        ]
        for name in _CHOICES:
            allowed = _ROLLOUT[name].annotation.__args__  # type: ignore[union-attr]
            if getattr(self, name) not in allowed:
                findings.append(f"{name}: {getattr(self, name)!r} is none of {', '.join(allowed)}")
        return findings + template_findings(self.template(), "plain")


def _group_findings(batch: int, steps: int, group: int) -> list[str]:
    rows = batch * steps
    if group < 1 or rows % group == 0:
        return []
    return [
        f"a process generates per_device_train_batch_size {batch} x {steps} steps per generation = {rows} completions "
        f"at once, which is no multiple of num_generations {group}, so that a group would lie on two processes; set "
        f"per_device_train_batch_size to a multiple of {group // gcd(steps, group)}, or gradient_accumulation_steps "
        f"(or steps_per_generation) to a multiple of {group // gcd(batch, group)}"
    ]


def _eval_findings(args: IGRPOConfig) -> list[str]:
    group = args.num_generations_eval or args.num_generations
    if args.per_device_eval_batch_size % group == 0:
        return []
    return [
        f"per_device_eval_batch_size {args.per_device_eval_batch_size} is no multiple of num_generations_eval (unset: "
        f"num_generations) {group}, so that a group would lie in two batches; set per_device_eval_batch_size to a "
        f"multiple of {group}"
    ]


def _data_findings(name: str, data: Any, template: str) -> list[str]:
    columns = getattr(data, "column_names", None)
    if isinstance(data, Mapping):
        return [finding for key, part in data.items() for finding in _data_findings(f"{name}[{key!r}]", part, template)]
    if not columns:  # a stream may not know them
        return []
    if images := sorted({"image", "images"} & set(columns)):
        return [f"{name}: column {images[0]!r}: prompts with images are not supported; use text prompts"]
    if "prompt" not in columns:
        return [
            f"{name}: no column 'prompt' (there are: {', '.join(columns)}); rename yours, as GRPOTrainer wants it too"
        ]
    try:
        if isinstance(data, Dataset) and len(data):
            with_draft(data[0]["prompt"], "", template)
    except ConfigError as error:
        return [f"{name}: row 0: {problem}" for problem in error.problems]
    return []


def with_draft(prompt: Prompt, draft: str, template: str) -> Prompt:
    """The prompt of refinements, Concat(q, d) of the paper's equation 3, in the format of ``prompt``.

    In a conversation the last user message is replaced by the template with its text and the draft in it; a string is
    the question as a whole. ``prompt`` is left as it is.

    Raises:
        ConfigError: no user message, or one with something else than text.
    """
    if isinstance(prompt, str):
        return template.format(question=prompt, draft=draft)
    places = [place for place, message in enumerate(prompt) if message["role"] == "user"]
    if not places:
        raise ConfigError("prompt: a conversation without a user message, so the draft has no place; add one")
    message = prompt[places[-1]]
    content = message["content"]
    if isinstance(content, str):
        filled: Any = template.format(question=content, draft=draft)
    elif all(part.get("type") == "text" for part in content):
        question = "".join(part["text"] for part in content)
        filled = [{"type": "text", "text": template.format(question=question, draft=draft)}]
    else:
        raise ConfigError("prompt: a user message with images; only text prompts are supported")
    return [*prompt[: places[-1]], {**message, "content": filled}, *prompt[places[-1] + 1 :]]


class IGRPOTrainer(GRPOTrainer):
    """TRL's ``GRPOTrainer`` that samples, scores and chooses drafts first and lets only their refinements learn.

    Takes what ``GRPOTrainer`` takes, with :class:`IGRPOConfig` for ``args``. Reward functions are called once per stage
    and see the data set's own prompts in both. Metrics of stage 1 are logged as ``drafts/...``, all others are of the
    refinements, but for ``num_tokens``, which counts both.

    Raises:
        ConfigError: with all findings: an unsupported mode of TRL (tools, environments, ``rollout_func``, images), data
            without usable prompts, evaluation batches without whole groups, a reward that TRL has not, 1.15 on a CPU.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "igrpo"]
    _name = "iGRPO"
    _paper: ClassVar[dict[str, str]] = {
        "title": "iGRPO: Self-Feedback-Driven LLM Reasoning",
        "id": "2602.09000",
        "citation": "@article{hatamizadeh2026igrpo,\n  title = {{iGRPO: Self-Feedback-Driven LLM Reasoning}},\n"
        "  author = {Ali Hatamizadeh and others},\n  year = 2026,\n  eprint = {arXiv:2602.09000},\n}",
    }

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: IGRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **others: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = IGRPOConfig(f"{name.rstrip('/').split('/')[-1]}-iGRPO")
        if not isinstance(args, IGRPOConfig):
            raise ConfigError(
                f"args: is a {type(args).__name__}; use igrpo_lite.trl.IGRPOConfig, which has all its fields"
            )
        findings = trl_findings(reward_funcs) + [
            f"{name}: not supported, for drafts and refinements are single answers to text; leave it out"
            for name in _UNSUPPORTED
            if others.get(name)
        ]
        self._template = args.template()
        for name, data in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            findings += _data_findings(name, data, self._template)
        if eval_dataset is not None:
            findings += _eval_findings(args)
        if _TRL == (1, 15) and args.device.type in ("cpu", "mps"):
            findings.append(
                "trl 1.15 computes its loss with Triton only, so not on this device; install trl 1.14 or 1.16"
            )
        if findings:
            raise ConfigError(findings)
        self._options = args.rollout_options()
        self._stage2_prompts: list[Prompt] | None = None
        super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, processing_class, **others)
        self.num_drafts: int = args.num_drafts or args.num_generations

    def _generate_and_score_completions(self, inputs: list[Row]) -> dict[str, Any]:
        mode = "train" if self.model.training else "eval"
        group = self.num_generations if mode == "train" else self.num_generations_eval
        rows = _one_per_group(inputs, group)
        drafts = self._draft(rows, mode)
        prompts = [
            with_draft(row["prompt"], draft.text, self._template) for row, draft in zip(rows, drafts, strict=True)
        ]
        self._stage2_prompts = [prompt for prompt in prompts for _ in range(group)]
        if self.log_completions:
            self._log_completion_extra("shown_draft", [draft.text for draft in drafts for _ in range(group)])
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            self._stage2_prompts = None

    def _generate(self, prompts: list[Prompt]) -> Any:
        # Only here do drafts enter: all else that TRL does with a prompt (rewards, tables) is with the data set's own.
        return super()._generate(prompts if self._stage2_prompts is None else self._stage2_prompts)

    def _draft(self, rows: list[Row], mode: str) -> list[_Draft]:
        """Stage 1: samples, scores, logs and chooses; one draft for each of this process's groups."""
        for row in rows:
            self._refuse_rendered(row["prompt"])
        inputs = [copy.deepcopy(row) for row in rows for _ in range(self.num_drafts)]
        prompts = [row["prompt"] for row in inputs]
        with self._stage1(mode) as metrics:
            _, ids, _, completions, *_ = self._generate(prompts)
            parts = self._calculate_rewards(inputs, prompts, completions, ids)  # of all processes, in order of rank
        totals = (parts * self.reward_weights.to(parts.device)).nansum(dim=1)
        totals[parts.isnan().all(dim=1)] = torch.nan
        first = self.accelerator.process_index * len(inputs)
        local = slice(first, first + len(inputs))
        drafts = self._choose(rows, ids, parts[local].tolist(), totals[local].tolist(), mode)
        self._log_drafts(mode, metrics, parts, totals)
        self._log_choices(mode, drafts)
        return drafts

    def _choose(
        self, rows: list[Row], ids: list[list[int]], parts: list[list[float]], totals: list[float], mode: str
    ) -> list[_Draft]:
        ends = {*stop_ids(self.model, self._tokenizer), self._tokenizer.pad_token_id}
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        drafts = [  # log-probabilities play no part in the choice
            Completion(tuple(draft), text, (), "stop" if draft[-1] in ends else "length")
            for draft, text in zip(ids, texts, strict=True)
        ]
        scores = [_score(self.reward_func_names, *scored) for scored in zip(parts, totals, texts, strict=True)]
        chosen = []
        for place, row in enumerate(rows):
            group = slice(place * self.num_drafts, (place + 1) * self.num_drafts)
            # Addressed and not consumed, so that a resumed run chooses alike.
            address = (self.args.seed, mode, self.state.global_step, self.accelerator.process_index, place)
            rng = random.Random(f"{address}{row['prompt']}")
            choice = choose_draft(drafts[group], scores[group], self._options, rng)
            text = self._shown(drafts[group][choice.index].ids)
            chosen.append(_Draft(choice, text, totals[group][choice.index]))
        return chosen

    def _shown(self, ids: tuple[int, ...]) -> str:
        """A draft as text that cannot close the turn it is put in: without control tokens, also spelt out ones."""
        limit = self.args.max_draft_length or len(ids)
        text = self._tokenizer.decode(ids[-limit:], skip_special_tokens=True)
        for control in self._tokenizer.all_special_tokens:
            text = text.replace(control, "")
        return text.strip()

    def _refuse_rendered(self, prompt: Prompt) -> None:
        """A string with a chat template's control tokens has no place for a draft: it would follow the user's turn."""
        template = self._tokenizer.chat_template
        if not isinstance(prompt, str) or not isinstance(template, str):
            return
        known = set(self._tokenizer.all_special_tokens) - {self._tokenizer.bos_token}
        if found := sorted(token for token in known if token in prompt and token in template):
            raise ConfigError(
                f"prompt: a chat template was applied already ({found[0]} stands in it), so the draft cannot be put "
                "into the user's turn; give the messages, TRL applies the template"
            )

    @contextmanager
    def _stage1(self, mode: str) -> Iterator[dict[str, list[float]]]:
        """Meanwhile TRL's metrics go into the dictionary, and a group has N members."""
        size = "num_generations" if mode == "train" else "num_generations_eval"
        group, log = getattr(self, size), self._metrics[mode]
        aside: dict[str, list[float]] = defaultdict(list)
        self._metrics[mode] = aside
        setattr(self, size, self.num_drafts)  # a vLLM server samples that many for each distinct prompt
        try:
            yield aside
        finally:
            self._metrics[mode] = log
            setattr(self, size, group)

    def _log_drafts(self, mode: str, metrics: Mapping[str, list[float]], parts: Tensor, totals: Tensor) -> None:
        """Stage 1 of all processes under TRL's names, after ``drafts/``."""
        log = self._metrics[mode]
        for name, values in metrics.items():
            if name != "num_tokens":  # a running total, which stage 2 writes again
                log[f"drafts/{name}"].extend(values)
        for index, name in enumerate(self.reward_func_names):
            log[f"drafts/rewards/{name}/mean"].append(parts[:, index].nanmean().item())
            log[f"drafts/rewards/{name}/std"].append(nanstd(parts[:, index]).item())
        log["drafts/reward"].append(totals.nanmean().item())
        log["drafts/reward_std"].append(nanstd(totals).item())
        spread = nanstd(totals.view(-1, self.num_drafts), dim=1)
        log["drafts/frac_reward_zero_std"].append(spread.isclose(spread.new_zeros(())).float().mean().item())
        # What rewards logged themselves; in the same order everywhere, for each gathering is one of all processes.
        for name in sorted(set(gather_object(list(self._pending_metrics)))):
            values = self._pending_metrics.get(name, [])
            counted = torch.tensor([sum(values), len(values)], dtype=torch.float32, device=totals.device)
            total, count = self.accelerator.gather(counted).view(-1, 2).sum(dim=0).tolist()
            log[f"drafts/{name}"].append(total / count)
        self._pending_metrics.clear()
        self._pending_extra_logs.clear()  # the table of completions is of the refinements

    def _log_choices(self, mode: str, drafts: list[_Draft]) -> None:
        rows = [[draft.reward, draft.choice.tied] for draft in drafts]
        table = torch.tensor(rows, dtype=torch.float32, device=self.accelerator.device)
        means = self.accelerator.gather(table).nanmean(dim=0).tolist()
        for name, mean in zip(("chosen_reward", "tied"), means, strict=True):
            self._metrics[mode][f"drafts/{name}"].append(mean)


@dataclass(frozen=True, slots=True)
class _Draft:
    """The draft of one group: as stage 2 would show it, with its reward (NaN where no function scored it)."""

    choice: DraftChoice
    text: str
    reward: float


def _one_per_group(inputs: list[Row], group: int) -> list[Row]:
    rows = inputs[::group]
    # TRL's samplers repeat each row; another sampler, or a split batch, could be at odds with the check of settings.
    if any(row["prompt"] != rows[place // group]["prompt"] for place, row in enumerate(inputs)) or len(inputs) % group:
        raise ConfigError(
            f"a process got {len(inputs)} rows that are not whole groups of {group} equal prompts; set "
            "per_device_train_batch_size and per_device_eval_batch_size to multiples of the group's size "
            "(num_generations, num_generations_eval), and leave accelerator_config as it is"
        )
    return rows


def _score(names: Sequence[str], parts: Sequence[float], total: float, text: str) -> Score:
    values = [None if part != part else part for part in parts]
    found = find_answer(text)
    answer = None if found is None else found.text
    return Score(None if total != total else total, dict(zip(names, values, strict=True)), "unjudged", answer)
