"""From what the user gave to one checked configuration; every finding is reported at once.

Flags win over the recipe file, the file over the defaults of the model, these over the general defaults.
:func:`resolve` looks at values only; :func:`igrpo_lite.inputs.input_findings` opens the files that they name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, get_origin

from pydantic import ValidationError

from igrpo_lite.config.defaults import (
    ENDPOINT_SETTINGS,
    LONG_COMPLETION,
    MODEL_DEFAULTS,
    REWARD_SETTINGS,
    SGRPO_PRESETS,
)
from igrpo_lite.config.fields import FIELDS, allowed, choices, hint, is_list, nearest, parts
from igrpo_lite.config.options import ALGORITHMS, TOKENS, RunConfig
from igrpo_lite.config.recipe_file import dump, load_file
from igrpo_lite.config.retired import RETIRED, retired_findings
from igrpo_lite.errors import ConfigError

__all__ = ["RESUMABLE", "differences", "dump", "examine", "load_file", "merge", "resolve", "suggestion"]

RESUMABLE: frozenset[str] = frozenset(
    {
        "fresh",
        "output_dir",
        "max_steps",
        "max_minutes",
        "save_steps",
        "report_to",
        "progress",
        "patience_dead",
        "parity_steps",
        "kv_cache_gib",
        "judge_url",
        "reward_timeout",
        "judge_token_budget",
        "dtype",  # ``auto`` depends on the device; a run that would go on in another type is refused on its own
    }
)
"""Settings that may differ when a run folder is continued: none of them changes what was already computed."""

_ELSEWHERE = {
    "model_name_or_path": "model",
    "dataset_name": "data",
    "dataset": "data",
    "train_batch_size": "prompts_per_step",
    "per_device_train_batch_size": "prompts_per_step",
    "gradient_accumulation_steps": "update_tokens",
    "num_train_epochs": "max_steps",
    "epochs": "max_steps",
    "max_new_tokens": "max_completion_length",
    "max_tokens": "max_completion_length",
    "lr": "learning_rate",
    "lora_rank": "lora_r",
    "rank": "lora_r",
    "resume": "output_dir",
    "resume_from_checkpoint": "output_dir",
    "overwrite_output_dir": "fresh",
}
"""Names of other trainers for what is close to one of ours but spelt too differently for the nearest name."""


def resolve(given: Mapping[str, Any]) -> RunConfig:
    """The configuration for the given settings, by field name; raises :class:`ConfigError` with all findings."""
    config, findings = examine(given)
    if findings:
        raise ConfigError(findings)
    return config


def examine(given: Mapping[str, Any]) -> tuple[RunConfig, list[str]]:
    """The configuration and everything that is wrong with the given settings.

    A setting that is wrong stands at its default in the configuration, so that further checks can still be made.
    """
    given = {str(key).replace("-", "_"): value for key, value in given.items()}
    known, findings = _split_unknown(given)
    values: dict[str, Any] = {name: _plain(name, value) for name, value in known.items()}
    bad, complaints = _field_findings(values)
    findings += complaints
    good = {name: value for name, value in values.items() if name not in bad}
    defaults = MODEL_DEFAULTS.get(good.get("model", FIELDS["model"].default), {})
    config = RunConfig.model_validate({**defaults, **good})
    findings += [] if bad & {"algorithm", "num_generations", "num_drafts"} else _rollout_findings(config)
    drafts = {"num_drafts": config.n_drafts} if config.two_stages else {}
    config = config.model_copy(update=drafts | _selection(config))
    return config, findings + retired_findings(given, config) + _cross_findings(config, bad) + _idle(config)


def merge(file: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's settings with the flags over them.

    A flag for the number of rollouts, or another algorithm, also takes back what the file says about the drafts of
    them. So does a choice of tokens with the settings of another one, and
    the policy as the judge with the endpoint.
    """
    stale: set[str] = set()
    if "num_generations" in flags or ALGORITHMS.get(str(flags.get("algorithm"))) == ("stage1",):
        stale |= {"num_drafts", "num_refinements"}
    if "num_drafts" in flags:
        stale.add("num_refinements")
    if "reward_funcs" in flags:
        named = str(flags["reward_funcs"])
        unused = tuple(prefix for reward, prefix in REWARD_SETTINGS.items() if reward not in named)
        stale |= {name for name in FIELDS if unused and name.startswith(unused)}
    if flags.get("judge_by") == "policy":
        stale |= set(ENDPOINT_SETTINGS)
    if "tokens" in flags:
        stale |= {name for name in FIELDS if name.startswith(tuple(filter(None, TOKENS.values())))}
    kept = {key: value for key, value in file.items() if str(key).replace("-", "_") not in stale | flags.keys()}
    return {**kept, **flags}


def differences(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """The settings in which two configurations differ, as (old, new). Those in :data:`RESUMABLE` do not keep a run
    folder from being continued."""
    pairs = {name: (getattr(old, name), getattr(new, name)) for name in FIELDS}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def suggestion(name: str, names: Collection[str] = FIELDS) -> str | None:
    """The setting among ``names`` that was most likely meant by one that does not exist."""
    elsewhere = _ELSEWHERE.get(name)
    return elsewhere if elsewhere in names else nearest(name, names)


def _split_unknown(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    known = {name: value for name, value in given.items() if name in FIELDS}
    near = {name: suggestion(name) for name in given if name not in FIELDS and name not in RETIRED}
    return known, [f"unknown setting {name}" + (f"; did you mean {near[name]}?" if near[name] else "") for name in near]


def _plain(name: str, value: Any) -> Any:
    """A value as Python has it: flags and YAML also write lists with commas, and nothing as ``none``."""
    bare, _, optional = parts(hint(FIELDS[name]))
    if value in ("none", ["none"]) and bare is not str and (optional or name == "report_to"):
        return None if optional else []
    if is_list(FIELDS[name]) and isinstance(value, (str, list, tuple)):
        items = [value] if isinstance(value, str) else value
        pieces = [piece for item in items for piece in (item.split(",") if isinstance(item, str) else [item])]
        return [piece.strip() if isinstance(piece, str) else piece for piece in pieces if piece != ""]
    if isinstance(value, str) and bare is not str and get_origin(bare) is None:
        return value.strip()
    return value


def _field_findings(values: Mapping[str, Any]) -> tuple[set[str], list[str]]:
    numbers = {name for name in values if parts(hint(FIELDS[name]))[0] in (int, float)}
    bad = {name for name in numbers if isinstance(values[name], bool)}  # pydantic would take true for 1
    try:
        RunConfig.model_validate(dict(values))
    except ValidationError as error:
        bad |= {str(detail["loc"][0]) for detail in error.errors(include_url=False)}
    return bad, [_complaint(name, values[name]) for name in values if name in bad]


def _complaint(name: str, value: Any) -> str:
    field = FIELDS[name]
    near = nearest(value, choices(field)) if isinstance(value, str) else None
    advice = f"; did you mean {near}?" if near else ""
    if parts(hint(field))[0] is str and not choices(field) and isinstance(value, (int, float)):
        advice = "; write it in quotes"
    return f"{name}: must be {allowed(field)}, not {_shown(value)}{advice}"


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _rollout_findings(config: RunConfig) -> list[str]:
    """Whether the rollouts of a problem can be split into drafts and refinements that learn."""
    if not config.two_stages:
        return _one_stage_findings(config)
    counts = f"num_generations {config.num_generations}, num_drafts {config.n_drafts}"
    if config.n_refinements >= 2:
        return []
    return [
        f"num_drafts: must leave at least 2 refinements, but {counts}; a group of one has no spread, so no advantage "
        "to learn"
    ]


def _selection(config: RunConfig) -> dict[str, Any]:
    """The parameters of S-GRPO, where it is chosen: the user's, or the preset's."""
    if config.tokens != "s-grpo":
        return {}
    preset = SGRPO_PRESETS["long" if config.max_completion_length >= LONG_COMPLETION else "short"]
    return {key: value for key, value in preset.items() if getattr(config, key) is None}


def _one_stage_findings(config: RunConfig) -> list[str]:
    findings = []
    if config.num_drafts is not None:
        findings.append(
            f"num_drafts: {config.algorithm} has one stage and takes num_generations only; choose igrpo or "
            "igrpo-joint, or leave it out"
        )
    if config.num_generations < 2:
        findings.append(
            f"num_generations: must be at least 2, not {config.num_generations}; "
            "a group of one has no spread, so no advantage to learn"
        )
    return findings


def _cross_findings(config: RunConfig, bad: set[str]) -> list[str]:
    """Contradictions between settings that are each fine."""
    found = []
    high = config.epsilon_high
    if high is not None and high < config.epsilon and "epsilon" not in bad and config.loss_type != "cispo":
        found.append(f"epsilon_high: {high} is below epsilon {config.epsilon}; it widens the clip range above 1")
    if high is not None and config.loss_type == "cispo" and high < 1.0:
        found.append(f"epsilon_high: cispo takes it as the highest ratio itself, so at least 1, not {high}; usual is 5")
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", config.device):
        found.append(f"device: must be auto, cpu, cuda, cuda:<number> or mps, not {config.device!r}")
    if not re.fullmatch(r"all|last[ -](half|third|quarter|[1-9]\d*)", config.lora_layers):
        found.append(
            "lora_layers: must be all, last half, last third, last quarter or last <number>, not "
            f"{config.lora_layers!r}"
        )
    if config.schedule == "ahead" and "stage1" in config.learning_stages:
        found.append(
            f"schedule: ahead is for igrpo; with {config.algorithm} "
            + ("drafts learn, so they must be on-policy" if config.two_stages else "there are no drafts")
        )
    if config.single_stage_share and not config.two_stages:
        found.append(
            f"single_stage_share: is about a second stage, which {config.algorithm} has not; choose igrpo or "
            "igrpo-joint, or leave it out"
        )
    if config.single_stage_share and config.schedule == "ahead":
        found.append("single_stage_share: does not go with schedule ahead, whose first stage is one update old")
    return found + _selection_findings(config)


def _idle(config: RunConfig) -> list[str]:
    """Settings of a choice of tokens that was not made: they would silently change nothing."""
    return [
        f"{name}: belongs to tokens {tokens}, but tokens is {config.tokens}; set --tokens {tokens} or leave it out"
        for tokens, prefix in TOKENS.items()
        for name, field in FIELDS.items()
        if prefix and tokens != config.tokens and name.startswith(prefix) and getattr(config, name) != field.default
    ]


def _selection_findings(config: RunConfig) -> list[str]:
    found = []
    if config.tokens == "t-spmo" and config.scale_rewards != "group":
        found.append("scale_rewards: has no effect with tokens t-spmo, which takes rewards as they are; leave it out")
    if config.tokens == "t-spmo" and config.loss_type is not None:
        found.append(
            f"loss_type: {config.loss_type} does not go with tokens t-spmo, whose loss is a mean over transitions; "
            "leave loss_type out"
        )
    if config.tokens == "s-grpo" and not (config.sgrpo_alpha or config.sgrpo_p):
        found.append("sgrpo_p: 0 with sgrpo_alpha 0 leaves no token to learn from; raise one of them")
    return found
