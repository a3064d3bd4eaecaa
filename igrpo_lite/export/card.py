"""What an export says about itself: ``igrpo.json`` for programs, ``README.md`` (a model card) for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from igrpo_lite.export.merging import Base
from igrpo_lite.export.prompting import Served
from igrpo_lite.export.source import Options, Source
from igrpo_lite.export.verification import MAX_TOKENS, TOLERANCES, Verification
from igrpo_lite.policy.prompting import stage2_template
from igrpo_lite.versions import installed_versions


@dataclass(frozen=True, slots=True)
class Facts:
    """All that was found out while exporting.

    Attributes:
        trained_on: how the run held its weights; ``auto`` where it did not record it.
        rounding: of :func:`igrpo_lite.export.merging.merge`; ``None`` for an adapter.
        verification: the result, or why there is none.
        folder: where the export ends up.
        commands: lines that serve it, by name.
        notes: sentences for the user.
    """

    source: Source
    options: Options
    base: Base
    served: Served
    trained_on: str
    rounding: float | None
    verification: Verification | str
    folder: Path
    commands: Mapping[str, str]
    notes: Sequence[str]

    @property
    def passed(self) -> bool | None:
        """Whether the export was found to be what was trained; ``None``: it was not looked at."""
        return None if isinstance(self.verification, str) else self.verification.passed

    @property
    def portable_commands(self) -> dict[str, str]:
        """The commands for whoever stands in the folder, wherever it was copied to."""
        return {name: command.replace(str(self.folder), ".") for name, command in self.commands.items()}

    @property
    def onto(self) -> str:
        """The weights that the adapter was merged onto."""
        return self.base.name + (" in 4 bits, dequantised" if self.options.onto == "dequantized" else "")


def record(facts: Facts) -> dict[str, Any]:
    """``igrpo.json``: everything that is needed to use the export as the run used its model."""
    source, config, lora, base = facts.source, facts.source.config, facts.source.lora, facts.base
    prompts = facts.served.prompts
    own, verification = config.model, facts.verification
    merged = {"onto": facts.onto, "dtype": _name(base.target), "rounding": facts.rounding}
    return {
        "format": 1,
        "kind": facts.options.to,
        "quantization": facts.options.quantization if facts.options.to == "gguf" else None,
        "base": {
            "model": own,
            "revision": config.revision,
            "commit": base.commit if base.name == own else None,
            "trained_in": facts.trained_on,
            "merged": None if facts.rounding is None else merged,
        },
        "adapter": {
            "rank": lora["r"],
            "alpha": lora["lora_alpha"],
            "target_modules": lora["target_modules"],
            "which": source.which,
        },
        "prompts": {
            "system_prompt": prompts.system_prompt,
            "system_prompt_in": "a message of its own" if facts.served.system_turn else "the first user message",
            "answer_style": config.answer_style,
            "chat_template": "plain, of igrpo-lite" if prompts.plain_template else "the base's own",
            "draft_placement": config.draft_placement,
            "stage2_template": stage2_template(config),
            "stop": facts.served.stops(),
        },
        "training": {name: getattr(config, name) for name in ("algorithm", "tokens", "data", "temperature", "seed")}
        | {"steps": source.summary.get("steps")}
        | {name: getattr(config, name) for name in ("max_prompt_length", "max_completion_length")},
        "evaluation": {"before": source.summary.get("before"), "this": source.evaluation},
        "verification": {"skipped": verification} if isinstance(verification, str) else verification.to_json(),
        "commands": facts.portable_commands,
        "notes": list(facts.notes),
        "versions": {"training": source.summary.get("versions"), "export": installed_versions()},
    }


def card(facts: Facts) -> str:
    """``README.md``."""
    source, config = facts.source, facts.source.config
    what = {"adapter": "LoRA adapter", "merged-16bit": "merged model", "gguf": "GGUF file"}[facts.options.to]
    library = "peft" if facts.options.to == "adapter" else "transformers"
    warning = ["> **This export failed its verification (below). Do not rely on it.**", ""]
    lines = [
        "---",
        f"base_model: {_quoted(facts.base.name)}",
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        f"tags: [igrpo-lite, {config.algorithm}, lora]",
        "---",
        "",
        f"# {source.name}: {what}",
        "",
        *(warning if facts.passed is False else []),
        f"A LoRA adapter of {config.model}, trained with `{config.algorithm}` by igrpo-lite on `{config.data}`. "
        "Settings and versions are in `igrpo.json`. The licences of the base model and of the data apply.",
        "",
        *(f"* {line}" for line in base_lines(facts)),
        "",
        "## Held-out accuracy",
        "",
        *_accuracy(source),
        "",
        "## Verification",
        "",
        *verification_lines(facts.verification),
        "",
        "## Prompt",
        "",
        *_prompt_lines(facts.served),
    ]
    for name, command in facts.portable_commands.items():
        lines += ["", f"## {name}", "", "```bash", command, "```"]
    return "\n".join([*lines, "", *(f"* {note}" for note in facts.notes)]).rstrip() + "\n"


def verification_lines(found: Verification | str) -> list[str]:
    """The verification in a few sentences, for screen and card."""
    if isinstance(found, str):
        return [f"Not verified: {found}."]
    where = found.reference
    first = [place for place in found.divergence if place is not None]
    count, allowed = len(found.divergence), TOLERANCES[found.precision]
    lines = [
        f"{count} held-out questions, answered greedily by base and adapter ({where['weights']} weights, computed in "
        f"{where['dtype']} on {where['device']}; at most {MAX_TOKENS} tokens each).",
        f"{found.agreeing} of {found.tokens} tokens are the export's own greedy choice too; {found.identical} of "
        f"{count} answers throughout" + (f", the others up to token {min(first)} at least." if first else "."),
        f"Log-probability of these tokens: {found.mean:.2g} nats off on average, {found.max:.2g} at most (allowed for "
        f"{found.precision}: {allowed.mean:g} and {allowed.max:g}). The adapter itself moves it by {found.effect:.2g}.",
    ]
    if found.kept is None or found.kept_error is None:
        lines.append("The adapter changes nothing on them, so whether it is there cannot be told.")
    else:
        lines.append(
            f"Of what the adapter changes, {100 * found.kept:.0f} % (+/- {200 * found.kept_error:.0f}) is there."
        )
    return [*lines, *(f"FAILED: {reason}." for reason in found.reasons)]


def base_lines(facts: Facts) -> list[str]:
    """What was put together, for screen and card."""
    config, lora = facts.source.config, facts.source.lora
    revision = f", revision {config.revision}" if config.revision else ""
    which = f"the run's {facts.source.which}" if facts.source.which in ("best", "last") else facts.source.which
    lines = [
        f"base: {config.model}{revision}, trained with its weights in {facts.trained_on}",
        f"adapter: rank {lora['r']}, alpha {lora['lora_alpha']}; {which}",
    ]
    if facts.rounding is not None:
        lines.append(
            f"merged onto {facts.onto} in float32, rounded once to {_name(facts.base.target)}; the rounding moves the "
            f"weights {facts.rounding:.2g} times as far as the adapter"
        )
    return lines


def _accuracy(source: Source) -> list[str]:
    rows = [("before training", source.summary.get("before")), ("this adapter", source.evaluation)]
    lines = []
    for name, result in rows:
        single = (result or {}).get("single")
        if result and single:
            numbers = f"{100 * single['accuracy']:.1f} % ({100 * single['low']:.1f}-{100 * single['high']:.1f})"
            lines.append(f"| {name} | {result['step']} | {numbers} | {single['n']} |")
    if not lines:
        return ["Not measured in the run."]
    table = ["| | step | greedy, single pass (95 % interval) | n |", "|---|---|---|---|", *lines]
    if source.which == "best" and source.summary.get("evaluations", 0) > 1:
        table += ["", "It was chosen among the run's evaluations by these same problems, which flatters it a little."]
    return table


def _prompt_lines(served: Served) -> list[str]:
    system = served.prompts.system_prompt
    lines = []
    if served.prompts.plain_template:
        lines = ["The base has no chat template; the one in this folder makes the run's prompts."]
    if not system:
        return [*lines, "No system prompt: the question is the only message."]
    where = "as the system message" if served.system_turn else "before the question, in the same message"
    return [*lines, f"The model was trained with this text {where}:", "", "```text", system, "```"]


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "/").replace('"', "'") + '"'


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
