"""``igrpo-lite scan``: keep the training problems that are neither too easy nor too hard for a model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from igrpo_lite.cli.flags import COMMAND, UNTRAINED, Recipe, examined, settings_flags
from igrpo_lite.config import DataOptions, ModelOptions, PromptOptions
from igrpo_lite.config.fields import FIELDS
from igrpo_lite.errors import ConfigError
from igrpo_lite.evaluation.output import scan_findings
from igrpo_lite.inputs import input_findings

_OTHERS = (
    *("temperature", "max_completion_length", "max_num_seqs", "sampler", "kv_cache_gib"),
    *("seed", "progress"),
)


def verb() -> Callable[..., int | None]:
    """The verb with the flags that matter to sampling."""
    sections = (ModelOptions, DataOptions, PromptOptions)
    wanted = {name for section in sections for name in section.model_fields} | set(_OTHERS)
    wanted -= {name for name in wanted if name.startswith("lora_")}
    return settings_flags(scan, [name for name in FIELDS if name in wanted])


def _own(help: str) -> Parameter:
    return Parameter(help=help, group=COMMAND)


def scan(
    *,
    output: Annotated[Path, _own("JSONL file for the problems that are kept; train on it with --data.")],
    config: Recipe = None,
    samples: Annotated[int, _own("Completions sampled of each problem.")] = 8,
    keep_from: Annotated[float, _own("Lowest pass rate that is kept.")] = 0.2,
    keep_to: Annotated[float, _own("Highest pass rate that is kept.")] = 0.8,
    **settings: Any,
) -> None:
    """Sample every training problem and keep those that the model solves sometimes: the others teach nothing. An
    interrupted scan goes on with the same command."""
    resolved, findings = examined(config, settings | UNTRAINED)
    findings += input_findings(resolved)
    if samples < 1:
        findings.append(f"--samples: must be 1 or more, not {samples}")
    if not 0 <= keep_from <= keep_to <= 1:
        findings.append(f"--keep-from, --keep-to: must be 0 <= from <= to <= 1, not {keep_from:g} and {keep_to:g}")
    findings += scan_findings(output, resolved)
    if findings:
        raise ConfigError(findings)
    from igrpo_lite.policy.backends import enter

    enter(resolved)
    from igrpo_lite.evaluation.scan import scan as run
    from igrpo_lite.report.plain import PlainScreen, QuietScreen

    screen = (QuietScreen if resolved.progress == "off" else PlainScreen)(sys.stderr)
    found = run(
        resolved,
        output,
        samples,
        (keep_from, keep_to),
        lambda done, total: screen.heartbeat(f"{done:,} of {total:,} problems"),
    )
    print(
        f"{found.problems:,} problems x {samples} samples: kept {found.kept:,} with a pass rate from {keep_from:g} to "
        f"{keep_to:g}; {found.too_hard:,} are harder, {found.too_easy:,} easier, {found.too_long:,} too long"
    )
    use = f"train with --data {found.output}" if found.kept else "empty; widen --keep-from and --keep-to"
    print(f"{found.output}: {use}; all pass rates are in {found.rates}")
