"""What is wrong with the reward settings, as far as it can be seen before anything runs."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from igrpo_lite.config import RewardOptions, RunConfig
from igrpo_lite.config.defaults import ENDPOINT_SETTINGS, REWARD_SETTINGS
from igrpo_lite.prompts import read_text_or_file
from igrpo_lite.rewards.builtin import BUILTIN
from igrpo_lite.rewards.judge_prompt import judge_prompt_findings
from igrpo_lite.worker.functions import find_function_error


def reward_findings(options: RunConfig) -> list[str]:
    """All findings on the reward settings; users' files are parsed, not imported."""
    findings: list[str] = []
    for spec in options.reward_funcs:
        name, _, rest = spec.partition(":")
        if name in BUILTIN and rest and not rest.isidentifier():
            findings.append(f"reward_funcs: {spec}: weights have a setting of their own, reward_weights, in this order")
        elif ":" in spec:
            error = find_function_error(spec)
            findings += [f"reward_funcs: {error}"] if error else []
        elif spec not in BUILTIN:
            findings.append(_unknown(spec))
    if len(set(options.reward_funcs)) < len(options.reward_funcs):
        findings.append("reward_funcs: a reward is named twice; name it once and give it more weight in reward_weights")
    weights = options.reward_weights
    if weights is not None and len(weights) != len(options.reward_funcs):
        findings.append(
            f"reward_weights: {len(weights)} weights for {len(options.reward_funcs)} rewards "
            f"({', '.join(options.reward_funcs)}); give one for each, in that order"
        )
    if weights is not None and not any(weights):
        findings.append("reward_weights: all are 0, so every completion earns the same; give at least one a weight")
    findings += _judge_findings(options) if "judge" in options.reward_funcs else []
    return findings + [
        f"{name}: belongs to the reward {reward}, which reward_funcs does not name; add it there or leave {name} out"
        for reward, prefix in REWARD_SETTINGS.items()
        for name in RewardOptions.model_fields
        if reward not in options.reward_funcs and name.startswith(prefix) and _is_set(options, name)
    ]


def trl_findings(reward_funcs: Any) -> list[str]:
    """Our rewards by name where TRL takes functions and models: it would look for a model of that name."""
    given = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    return [
        f"reward_funcs: {name} is a reward of igrpo-lite's own runs, not TRL's; give a function or a reward model"
        for name in given
        if isinstance(name, str) and name in BUILTIN and not Path(name).is_dir()
    ]


def _unknown(name: str) -> str:
    if name.endswith(".py"):
        return f"reward_funcs: {name} names no function; write it as {name}:function"
    close = difflib.get_close_matches(name, BUILTIN, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? There" if close else "there"
    return f"reward_funcs: no reward {name!r}; {hint} are {', '.join(BUILTIN)}, and your own as path/file.py:function"


def _is_set(options: RewardOptions, name: str) -> bool:
    return bool(getattr(options, name) != RewardOptions.model_fields[name].default)


def _judge_findings(options: RewardOptions) -> list[str]:
    findings = _judge_prompt_findings(options.judge_prompt)
    if options.judge_by == "policy":
        return findings + [
            f"{name}: belongs to judge_by endpoint, but judge_by is policy, which asks no server; leave {name} out"
            for name in ENDPOINT_SETTINGS
            if _is_set(options, name)
        ]
    if options.judge_url is None:
        url = (
            "judge_url: the reward judge needs an endpoint, like http://localhost:8000/v1; set --judge-url, or "
            "--judge-by policy to let the policy grade itself"
        )
        return [url, *findings]
    return _url_findings(options.judge_url) + findings


def _url_findings(url: str) -> list[str]:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        return [f"judge_url: {url!r} is not a valid address: {error}"]
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return [f"judge_url: must be like http://localhost:8000/v1, not {url!r}"]
    if parts.username or parts.password:
        return ["judge_url: must not hold a key; put it into the environment variable OPENAI_API_KEY"]
    if parts.query or parts.fragment or parts.path.rstrip("/").endswith("/chat/completions"):
        return [f"judge_url: give it up to the version, like {parts.scheme}://{parts.netloc}/v1, not {url!r}"]
    return []


def _judge_prompt_findings(prompt: str | None) -> list[str]:
    if prompt is None:
        return []
    if re.fullmatch(r"\S+\.(txt|md|prompt)", prompt) and not Path(prompt).is_file():
        return [f"judge_prompt: no such file: {prompt}"]
    try:
        return judge_prompt_findings(read_text_or_file(prompt))
    except (OSError, UnicodeDecodeError) as error:
        return [f"judge_prompt: {prompt} cannot be read as UTF-8 text: {error}"]
