"""``igrpo-lite eval``: held-out accuracy of a model, an adapter or a finished run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from igrpo_lite.cli.flags import COMMAND, UNTRAINED, Recipe, checked, settings_flags
from igrpo_lite.config import DataOptions, ModelOptions, PromptOptions
from igrpo_lite.errors import UserError
from igrpo_lite.fields import FIELDS

if TYPE_CHECKING:
    from igrpo_lite.evaluation.compare import Comparison
    from igrpo_lite.evaluation.evaluate import Evaluation
    from igrpo_lite.evaluation.intervals import PairedChange

RUN_CONFIG = "config.yaml"
"""A folder that holds this file is a run's."""

_ROLLOUT = (
    "temperature",
    "draft_temperature",
    "max_completion_length",
    "max_num_seqs",
    "sampler",
    "kv_cache_gib",
    "share_weights",
    "seed",
    "progress",
)


def verb() -> Callable[..., int | None]:
    """The verb with the flags that matter to an evaluation."""
    sections = (ModelOptions, DataOptions, PromptOptions)
    wanted = {name for section in sections for name in section.model_fields} | set(_ROLLOUT)
    wanted -= {"model", "lora_r", "lora_alpha", "lora_target_modules", "lora_layers", "max_problems"}
    return settings_flags(evaluate, [name for name in FIELDS if name in wanted])


def evaluate(
    run_or_model: Annotated[str, Parameter(help="Run folder, model folder, `tiny` or hub id.")],
    /,
    *,
    config: Recipe = None,
    adapter: Annotated[Path | None, Parameter(help="Adapter folder; unset: a run's best.", group=COMMAND)] = None,
    output: Annotated[Path | None, Parameter(help="JSON file for the results.", group=COMMAND)] = None,
    **settings: Any,
) -> None:
    """Measure accuracy on held-out problems: one pass from the plain prompt, and refined with an own draft. A run is
    measured with its own settings, except for the flags given here."""
    run_folder = Path(run_or_model) if (Path(run_or_model) / RUN_CONFIG).is_file() else None
    if run_folder:
        config = config or str(run_folder / RUN_CONFIG)
    else:
        settings["model"] = run_or_model
    resolved = checked(config, settings | UNTRAINED)
    if output is not None and not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}")  # better now than after the work
    from igrpo_lite.evaluation.compare import compare

    if adapter is None and run_folder is not None:
        adapter = next((run_folder / name for name in ("best", "adapter") if (run_folder / name).is_dir()), None)
    comparison = compare(resolved, adapter)
    for note in comparison.notes:
        print(f"note: {note}", file=sys.stderr)
    print(_table(comparison, adapter))
    if output is not None:
        settings = {"model": resolved.model, "data": resolved.data, "adapter": adapter and str(adapter)}
        _write(output, settings | comparison.to_json())


def _table(comparison: Comparison, adapter: Path | None) -> str:
    lines = [f"{'':22}{'single pass':>24}{'refined (own draft)':>24}", _row("model", comparison.base)]
    if comparison.adapted is not None:
        lines.append(_row("with adapter", comparison.adapted))
        changes = [comparison.change(refined) for refined in (False, True)]
        lines.append(f"{'change (paired)':22}" + "".join(f"{_change(change):>24}" for change in changes))
        lines.append(f"adapter: {adapter}")
    lines.append(f"n = {len(comparison.base.answered)} held-out problems, greedy; 95 % intervals")
    return "\n".join(lines)


def _row(name: str, evaluation: Evaluation) -> str:
    result = evaluation.result()
    found = (result[measure] for measure in ("single", "refined"))
    cells = (f"{_percent(r['accuracy'])} ({_percent(r['low'])}-{_percent(r['high'])})" for r in found)
    return f"{name:22}" + "".join(f"{cell:>24}" for cell in cells)


def _change(change: PairedChange | None) -> str:
    if change is None:
        return "-"
    return f"{100 * change.difference:+.1f} ({100 * change.low:+.1f} to {100 * change.high:+.1f})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _write(path: Path, results: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror or error}") from error
