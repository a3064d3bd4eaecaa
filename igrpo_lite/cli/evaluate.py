"""``igrpo-lite eval``: held-out accuracy of a model, an adapter or a finished run."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from igrpo_lite.cli.flags import COMMAND, UNTRAINED, Recipe, examined, settings_flags
from igrpo_lite.config import DataOptions, ModelOptions, PromptOptions
from igrpo_lite.config.fields import FIELDS
from igrpo_lite.errors import ConfigError
from igrpo_lite.evaluation.output import output_findings, write_results
from igrpo_lite.inputs import input_findings

if TYPE_CHECKING:
    from igrpo_lite.evaluation.compare import Comparison

RUN_CONFIG = "config.yaml"
"""A folder that holds this file is a run's."""

_OTHERS = (
    "max_completion_length",
    "max_num_seqs",
    "sampler",
    "kv_cache_gib",
    "seed",
    "progress",
)


def verb() -> Callable[..., int | None]:
    """The verb with the flags that matter to an evaluation."""
    sections = (ModelOptions, DataOptions, PromptOptions)
    wanted = {name for section in sections for name in section.model_fields} | set(_OTHERS)
    wanted -= {"model", "lora_r", "lora_alpha", "lora_target_modules", "lora_layers", "max_problems"}
    return settings_flags(evaluate, [name for name in FIELDS if name in wanted])


def _own(help: str) -> Parameter:
    return Parameter(help=help, group=COMMAND)


def evaluate(
    run_or_model: Annotated[str, Parameter(help="Run folder, model folder, `tiny` or hub id.")],
    /,
    *,
    config: Recipe = None,
    adapter: Annotated[Path | None, _own("Adapter folder; unset: a run's best.")] = None,
    base: Annotated[bool, _own("Measure the model without the adapter too, and the paired change.")] = True,
    samples: Annotated[int, _own("Completions sampled per problem for avg@k, maj@k and pass@k; 0: greedy only.")] = 0,
    sample_temperature: Annotated[float, _own("Temperature of these samples (the paper's).")] = 0.6,
    sample_top_p: Annotated[float, _own("Share of probability that these samples are cut to.")] = 0.95,
    best_of: Annotated[
        int, _own("Sampled drafts of which the best by the gold answer is refined (not in the paper); 0: none.")
    ] = 0,
    few_shot: Annotated[int, _own("Worked examples in the prompt, from training problems that have them.")] = 0,
    output: Annotated[
        Path | None, _own("Folder for the results and every answer; or a .json file for the results alone.")
    ] = None,
    show_flips: Annotated[int, _own("Answers to show that flipped, each way.")] = 0,
    **settings: Any,
) -> None:
    """Measure accuracy on held-out problems: one greedy pass from the plain prompt, and refined with an own draft. A
    run is measured with its own settings, except for the flags given here."""
    run = Path(run_or_model) if (Path(run_or_model) / RUN_CONFIG).is_file() else None
    if run is not None:
        config = config or str(run / RUN_CONFIG)
        adapter = adapter or next((run / name for name in ("best", "adapter") if (run / name).is_dir()), None)
    else:
        settings["model"] = run_or_model
    resolved, findings = examined(config, settings | UNTRAINED, trained=run is not None)
    findings += _missing_run(run_or_model) or input_findings(resolved)
    findings += _adapter_findings(adapter, base, show_flips)
    findings += _sampling_findings(sample_temperature, sample_top_p)
    counts = {"--samples": samples, "--best-of": best_of, "--few-shot": few_shot, "--show-flips": show_flips}
    findings += [f"{flag}: must be 0 or more, not {count}" for flag, count in counts.items() if count < 0]
    findings += output_findings(output) if output is not None else []
    if findings:
        raise ConfigError(findings)
    from igrpo_lite.policy.backends import enter

    enter(resolved)
    from igrpo_lite.evaluation.compare import compare
    from igrpo_lite.evaluation.evaluate import Sampling
    from igrpo_lite.report.evaluation import print_evaluation
    from igrpo_lite.report.plain import PlainScreen, QuietScreen

    screen = (QuietScreen if resolved.progress == "off" else PlainScreen)(sys.stderr)
    sampling = Sampling(samples, sample_temperature, sample_top_p, best_of, resolved.seed)
    comparison = compare(
        resolved,
        adapter,
        sampling,
        few_shot,
        base,
        lambda name, done, total: screen.heartbeat(f"{name}: {done} of {total} completions"),
    )
    for note in (*_run_notes(run, adapter, settings), *comparison.notes):
        print(f"note: {note}", file=sys.stderr)
    about = {"model": resolved.model, "data": resolved.data, "adapter": adapter and str(adapter)}
    print_evaluation(about | comparison.to_json(), _shown(comparison, show_flips))
    if output is not None:
        write_results(output, comparison, about)


def _missing_run(text: str) -> list[str]:
    """A name in the form of a hub id that means a run which is not there: its first part is ``runs``, or holds runs."""
    path = Path(text)
    if len(path.parts) != 2 or path.exists():
        return []
    runs = sorted(config.parent.name for config in path.parent.glob(f"*/{RUN_CONFIG}"))
    if not runs and path.parent != Path("runs"):
        return []
    near = difflib.get_close_matches(path.name, runs, n=1)
    hint = (
        f"did you mean {path.parent / near[0]}?" if near else f"{path.parent} holds {', '.join(runs[:8]) or 'no run'}"
    )
    return [f"{text}: no such folder; {hint}"]


def _run_notes(run: Path | None, adapter: Path | None, settings: Mapping[str, Any]) -> list[str]:
    if run is not None and adapter is None:
        return [f"{run} holds no adapter yet, so only its base model was measured"]
    if run is not None and adapter == run / "best" and not {"data", "eval_data", "eval_split"} & settings.keys():
        return [
            "this adapter was chosen by its accuracy on these very problems, which flatters it a little; name others "
            f"with --eval-data or --eval-split, or the last adapter with --adapter {run / 'adapter'}"
        ]
    return []


def _adapter_findings(adapter: Path | None, base: bool, show_flips: int) -> list[str]:
    if adapter is None:
        found = (
            [] if base else ["--no-base: there is no adapter, so nothing would be measured; name one with --adapter"]
        )
    else:
        there = (adapter / "adapter_config.json").is_file()
        found = [] if there else [f"--adapter: {adapter} holds no adapter (no adapter_config.json)"]
    if show_flips > 0 and (adapter is None or not base):
        found.append("--show-flips: answers flip from the base to an adapter, so both must be measured")
    return found


def _sampling_findings(temperature: float, top_p: float) -> list[str]:
    found = []
    if not temperature > 0:
        found.append(f"--sample-temperature: must be above 0, not {temperature:g}; a greedy pass is made anyhow")
    if not 0 < top_p <= 1:
        found.append(f"--sample-top-p: must be above 0 and at most 1, not {top_p:g}")
    return found


def _shown(comparison: Comparison, count: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Records of the first answers that flipped, so many to right and so many to wrong."""
    flips = comparison.flips()
    chosen = [pair for pair in flips if pair[1].single.right][:count]
    chosen += [pair for pair in flips if pair[0].single.right][:count]
    return [(base.record(), adapted.record()) for base, adapted in chosen]
