"""One typed configuration: every field has a default, a unit where it needs one, and a sentence.

Keys are flat, in files (YAML) as in flags; the sections below only group them. Names are TRL's and transformers' where
these have one. Nothing here imports torch, so that a wrong setting is reported at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt
from pydantic_core import core_schema

from igrpo_lite.types import Stage

ALGORITHMS: dict[str, tuple[Stage, ...]] = {
    "grpo": ("stage1",),
    "igrpo": ("stage2",),
    "igrpo-joint": ("stage1", "stage2"),
}
"""The methods of ``algorithms/methods``, a line each: the stages whose tokens learn. With ``stage1`` alone there is no
second stage."""

TOKENS: dict[str, str] = {"all": "", "s-grpo": "sgrpo_", "t-spmo": "tspmo_", "entropy": "top_entropy_"}
"""The choices of tokens of ``algorithms/tokens``: what the settings of each begin with."""


@dataclass(frozen=True)
class NameIn:
    """Marks a text that must be one of a registry's names, as these are when it is checked."""

    registry: Mapping[str, object]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_after_validator_function(self._known, handler(source))

    def _known(self, name: str) -> str:
        if name not in self.registry:
            raise ValueError(f"must be one of {', '.join(self.registry)}")
        return name


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are immutable once checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelOptions(Section):
    """Model and adapter"""

    model: str = Field("tiny", description="`tiny` (bundled), a local folder, or a Hugging Face hub id.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    backend: Literal["auto", "transformers", "unsloth"] = Field(
        "auto",
        description="What loads the model; `auto`: Unsloth on a CUDA GPU where it is installed.",
    )
    load_in_4bit: bool = Field(
        False, description="Frozen weights in 4 bits (NF4 by bitsandbytes; QLoRA): a third of the memory, slower."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Type of the frozen weights, or of what 4-bit ones are computed in; `auto`: bfloat16 on GPUs that "
        "compute in it, float16 on older ones, float32 elsewhere.",
    )
    device: str = Field("auto", description="`auto`, `cpu`, `cuda`, `cuda:1` or `mps`.")
    lora_r: PositiveInt = Field(16, description="Rank of the LoRA adapter.")
    lora_alpha: PositiveInt | None = Field(None, description="LoRA alpha; unset: equal to `lora_r` (scale 1).")
    lora_target_modules: list[str] = Field(
        ["all-linear"], min_length=1, description="Module names that get an adapter, or `all-linear`."
    )
    lora_layers: str = Field(
        "all",
        description="Layers that get an adapter: `all`, `last half`, `last third`, `last quarter` or `last <number>`; "
        "the backward pass stops below them.",
    )


class DataOptions(Section):
    """Problems"""

    data: str = Field(
        "two-step",
        description="Public set by its short name (`igrpo-lite data ls`) or hub id, JSONL, JSON, CSV or parquet file, "
        "synthetic set (`two-step`, `multiplication`, `addition`); `gsm8k=file` for a local copy of a public set; "
        "several with weights as `gsm8k:3,svamp:1`.",
    )
    data_config: str | None = Field(None, description="Configuration name of a hub data set.")
    data_split: str = Field("train", description="Split of a hub data set to train on.")
    question_column: str | None = Field(None, description="Column with the question; unset: found by name.")
    answer_column: str | None = Field(None, description="Column with the gold answer; unset: found by name.")
    max_problems: PositiveInt | None = Field(
        None, description="Use at most this many training problems, drawn by the seed."
    )
    max_bad_rows: Annotated[int, Field(ge=0)] = Field(
        0, description="Rows that may be unreadable before the run refuses to start; they are named and counted."
    )
    decontaminate: list[str] = Field(
        [],
        description="Sets, given like `data`, that training must share no question and no long run of words with; the "
        "held-out set always is one.",
    )
    eval_data: str | None = Field(
        None,
        description="Held-out problems, given like `data`; "
        "unset: the set's own validation split, or rows held out of `data`.",
    )
    eval_split: str | None = Field(None, description="Split of `eval_data`, where it is a hub data set.")
    eval_size: PositiveInt = Field(200, description="Held-out problems used at each evaluation.")


class PromptOptions(Section):
    """Prompts"""

    answer_style: Literal["boxed", "tags"] = Field(
        "boxed",
        description="Form asked for and checked: final answer in `\\boxed{}`, or `<think>` and `<answer>` tags.",
    )
    system_prompt: str | None = Field(None, description="Text or file; unset: ours for `answer_style`; empty: none.")
    draft_placement: Literal["plain", "multi-turn"] = Field(
        "plain", description="Draft inside the user turn (the paper's), or as the assistant's own turn, token by token."
    )
    stage2_template: str | None = Field(
        None,
        description="User turn of stage 2, text or file, with {question} and {draft}; unset: ours for the placement.",
    )
    max_prompt_length: PositiveInt = Field(
        1024, description="Tokens of a question's prompt; longer ones are left out and counted, never cut."
    )
    max_draft_length: PositiveInt | None = Field(
        None, description="Tokens of a draft shown in stage 2; of a longer one the end is kept and counted. Unset: all."
    )


class RolloutOptions(Section):
    """Rollouts"""

    algorithm: Annotated[str, NameIn(ALGORITHMS)] = Field(
        "igrpo", description="One stage; the paper's two stages; or two stages where the drafts learn too (ours)."
    )
    prompts_per_step: PositiveInt = Field(8, description="Problems per optimizer step.")
    num_generations: PositiveInt = Field(8, description="Rollouts per problem, both stages together.")
    num_drafts: PositiveInt | None = Field(
        None, description="Drafts N of these; the others are refinements G. Unset: half."
    )
    temperature: PositiveFloat = Field(1.0, description="Sampling temperature of both stages (the paper: 0.7).")
    max_completion_length: PositiveInt = Field(
        768, description="Tokens sampled at most per completion, in either stage."
    )
    draft_selection: Literal["best", "random"] = Field(
        "best", description="Draft that stage 2 sees: highest reward (the paper's; of equals the first), or any."
    )
    truncated_drafts: Literal["last_resort", "allow"] = Field(
        "last_resort",
        description="Drafts cut at the length limit: chosen only when all are cut, or treated like others.",
    )
    schedule: Literal["barrier", "overlap", "ahead"] = Field(
        "overlap",
        description="All drafts first; or each problem's refinements as soon as its drafts are scored (same samples); "
        "or the next step's drafts beside this step's refinements, from the policy before the update.",
    )
    single_stage_share: Fraction = Field(
        0.0,
        description="Share of the problems of a two-stage step that get one stage, with all rollouts, as with GRPO "
        "(ours).",
    )
    dynamic_sampling: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Rounds in which problems whose rewards are all equal are replaced by others (DAPO); 0: never.",
    )
    sampler: Literal["auto", "transformers", "vllm"] = Field(
        "auto", description="Engine that samples; `auto`: vLLM on a CUDA GPU where it is installed, else transformers."
    )
    max_num_seqs: PositiveInt = Field(128, description="Sequences decoded at the same time.")
    kv_cache_gib: PositiveFloat | None = Field(
        None,
        description="Memory for vLLM's KV cache, GiB; unset: what `max_num_seqs` sequences need, if it fits.",
    )
    parity_steps: Annotated[int, Field(ge=0)] = Field(
        50,
        description="Steps between checks that the sampler samples from the policy, beside those at start and resume; "
        "0: no check at all.",
    )


class RewardOptions(Section):
    """Rewards"""

    reward_funcs: list[str] = Field(
        ["accuracy", "format"],
        min_length=1,
        description="`accuracy`, `format`, `soft_overlong`, `cosine`, `repetition`, `judge`, `random`, or your own as "
        "`path/file.py:function`.",
    )
    reward_weights: list[float] | None = Field(
        None, description="One weight per reward; unset: 1, except 0.1 for `format` (the paper: 1 and 1)."
    )
    reward_timeout: PositiveFloat = Field(
        60.0, description="Seconds one call of your own reward, or of the judge, may take."
    )
    judge_by: Literal["endpoint", "policy"] = Field(
        "endpoint",
        description="`judge`: who grades: a model at `judge_url`, or the policy itself, as it is at that step, in the "
        "engine that samples.",
    )
    judge_url: str | None = Field(
        None, description="`judge`: OpenAI-compatible endpoint, like `http://localhost:8000/v1` (vLLM, Ollama)."
    )
    judge_model: str | None = Field(None, description="`judge`: model name at the endpoint; unset: its only one.")
    judge_prompt: str | None = Field(
        None,
        description="`judge`: text or file with {question} and {completion}, and {answer} where it may see the gold "
        "answer; unset: ours.",
    )
    judge_max_tokens: PositiveInt = Field(1024, description="`judge`: tokens the judge may write per completion.")
    judge_token_budget: PositiveInt | None = Field(
        None,
        description="`judge`: tokens, read and written, after which the run stops with everything saved; unset: any.",
    )


class UpdateOptions(Section):
    """Update"""

    tokens: Annotated[str, NameIn(TOKENS)] = Field(
        "all",
        description="Completion tokens that learn: all, a random part (S-GRPO), those where rollouts part (T-SPMO), "
        "or the most uncertain.",
    )
    sgrpo_alpha: Annotated[int, Field(ge=0)] | None = Field(
        None, description="S-GRPO: leading tokens of a completion that always learn; unset: by `max_completion_length`."
    )
    sgrpo_p: Fraction | None = Field(
        None, description="S-GRPO: probability that a later token learns; unset: by `max_completion_length`."
    )
    sgrpo_k: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="S-GRPO: learning tokens per completion at most, 0: any number; unset: by `max_completion_length`.",
    )
    tspmo_replay: Annotated[int, Field(ge=0)] = Field(
        0,
        description="T-SPMO: fresh continuations from inside one success and one failure each, beside the rollouts; "
        "0: none.",
    )
    loss_type: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo"] | None = Field(
        None,
        description="Objective and its normalisation; unset: `grpo`, mean over each sequence, then over sequences.",
    )
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group",
        description="Standard deviation that advantages are divided by: of the group, of all groups that learn in "
        "the step, or none.",
    )
    epsilon: Fraction = Field(
        0.2, description="Clip range of the probability ratio below 1, and above unless `epsilon_high`."
    )
    epsilon_high: Annotated[float, Field(ge=0.0)] | None = Field(
        None, description="Clip range above 1 (DAPO: 0.28); for `cispo` the highest ratio itself (unset: 5)."
    )
    importance_sampling_mode: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        Field(
            "token_truncate",
            description="Correction for a sampler that computes slightly other probabilities than the policy: weights "
            "are capped or, beyond the cap, zero.",
        )
    )
    beta: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="Weight of the KL penalty to the model without adapter, on the tokens that learn."
    )
    num_iterations: PositiveInt = Field(1, description="Optimizer steps on the same rollouts.")
    mask_truncated_completions: bool = Field(
        False,
        description="Leave completions cut at the length limit out of the loss; they still count in their group (with "
        "`t-spmo`: not even there).",
    )
    learning_rate: PositiveFloat = Field(
        1e-5, description="Peak learning rate of the adapter (the paper's 1e-6 is for all weights)."
    )
    lr_scheduler_type: Literal["cosine_with_min_lr", "constant", "linear"] = Field(
        "cosine_with_min_lr", description="Course of the learning rate after the warm-up."
    )
    warmup_ratio: Fraction = Field(0.1, description="Share of the steps in which the learning rate rises from 0.")
    max_grad_norm: PositiveFloat = Field(0.2, description="Gradients are clipped to this norm.")
    update_tokens: PositiveInt = Field(
        16384, description="Tokens through the model at once in the update: the memory dial."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, slower."
    )


class RunOptions(Section):
    """The run"""

    output_dir: str | None = Field(None, description="Run folder; unset: `runs/<model>-<data>-<algorithm>`.")
    fresh: bool = Field(False, description="Start over; the old run folder is kept under another name.")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        0, description="Fixes data order, adapter and every sampled token."
    )
    max_steps: PositiveInt = Field(200, description="Optimizer steps.")
    max_minutes: PositiveFloat | None = Field(
        None, description="Stop cleanly after this time; the same command goes on."
    )
    save_steps: PositiveInt = Field(20, description="Steps between checkpoints; every 10 minutes there is one anyhow.")
    eval_steps: PositiveInt = Field(50, description="Steps between held-out evaluations.")
    patience_dead: Annotated[int, Field(ge=0)] = Field(
        20, description="Stop, with the reason, after this many steps in a row without any learning signal; 0: never."
    )
    report_to: list[Literal["wandb", "tensorboard", "trackio"]] = Field(
        [], description="Trackers to log to, beside the run folder; none needs an account or asks anything."
    )
    progress: Literal["auto", "live", "plain", "off"] = Field(
        "auto", description="Screen: live in a terminal, plain lines elsewhere and in notebooks."
    )


class RunConfig(RunOptions, UpdateOptions, RewardOptions, RolloutOptions, PromptOptions, DataOptions, ModelOptions):
    """Everything one training run depends on. Build it with :func:`igrpo_lite.config.resolve.resolve`, which applies
    the defaults of the model and checks fields against each other."""

    @property
    def learning_stages(self) -> tuple[Stage, ...]:
        """The stages whose tokens learn."""
        return ALGORITHMS[self.algorithm]

    @property
    def two_stages(self) -> bool:
        """Whether a second stage follows the first."""
        return "stage2" in self.learning_stages

    @property
    def n_drafts(self) -> int:
        """Completions per problem in stage 1: N for iGRPO, all of them for GRPO."""
        if not self.two_stages:
            return self.num_generations
        return self.num_drafts or max(1, self.num_generations // 2)

    @property
    def n_refinements(self) -> int:
        """Completions per problem in stage 2: G for iGRPO, none for GRPO."""
        return self.num_generations - self.n_drafts

    def is_single_stage(self, step: int, slot: int) -> bool:
        """Whether the problem in this place of a step gets one stage: always for GRPO, else ``single_stage_share`` of
        the places, evenly spread over the whole run, so that steps of few problems have their share too."""
        place, share = step * self.prompts_per_step + slot, self.single_stage_share
        return not self.two_stages or math.floor((place + 1) * share) > math.floor(place * share)

    def is_replayed(self, stage: Stage, single: bool = False) -> bool:
        """Whether T-SPMO's replays follow a stage: one whose tokens learn."""
        learns = single or stage in self.learning_stages
        return learns and self.tspmo_replay > 0


SECTIONS: tuple[type[Section], ...] = (
    ModelOptions,
    DataOptions,
    PromptOptions,
    RolloutOptions,
    RewardOptions,
    UpdateOptions,
    RunOptions,
)
