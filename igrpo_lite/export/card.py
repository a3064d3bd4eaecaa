"""What an export says about itself: ``igrpo.json`` for programs, ``README.md`` (the model card) for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment

from igrpo_lite.export.merging import Base
from igrpo_lite.export.serving import Served
from igrpo_lite.export.source import Options, Source
from igrpo_lite.export.verification import MAX_TOKENS, TOLERANCES, Verification
from igrpo_lite.policy.prompting import stage2_template
from igrpo_lite.versions import installed_versions

_TRAINING = (
    *("algorithm", "tokens", "data", "temperature", "seed", "max_prompt_length", "max_completion_length"),
    *("answer_style", "draft_placement"),
)
"""Settings of the run that ``igrpo.json`` names; none of them is a local path but ``data``, if that is a file."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What card, record and screen are made of.

    Attributes:
        trained_on: how the run held its weights; ``auto`` where it did not record it.
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
    verification: Verification | str
    folder: Path
    commands: Mapping[str, str]
    notes: Sequence[str]

    @property
    def passed(self) -> bool | None:
        """Whether the export was found to be what was trained; ``None``: it was not verified."""
        return None if isinstance(self.verification, str) else self.verification.passed

    @property
    def portable_commands(self) -> dict[str, str]:
        """The commands with the export as the current folder."""
        return {name: command.replace(str(self.folder), ".") for name, command in self.commands.items()}

    @property
    def onto(self) -> str:
        """The weights that the adapter was merged onto."""
        return self.base.name + (" in 4 bits, dequantised" if self.options.onto == "dequantized" else "")


def record(facts: Facts) -> dict[str, Any]:
    """``igrpo.json``: everything that is needed to use the export as the run used its model."""
    source, config, lora, base = facts.source, facts.source.config, facts.source.lora, facts.base
    prompts, verification = facts.served.prompts, facts.verification
    return {
        "format": 1,
        "kind": facts.options.to,
        "quantization": facts.options.quantization if facts.options.to == "gguf" else None,
        "base": {
            "model": config.model,
            "revision": config.revision,
            "commit": base.commit if base.name == config.model else None,
            "trained_in": facts.trained_on,
            "merged": None if facts.options.to == "adapter" else {"onto": facts.onto, "dtype": base.target_name},
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
            "chat_template": "plain, of igrpo-lite" if prompts.plain_template else "the base's own",
            "stage2_template": stage2_template(config),
            "stop": facts.served.stops(),
        },
        "training": {name: getattr(config, name) for name in _TRAINING} | {"steps": source.summary.get("steps")},
        "evaluation": {"before": source.summary.get("before"), "this": source.evaluation},
        "verification": {"skipped": verification} if isinstance(verification, str) else verification.to_json(),
        "commands": facts.portable_commands,
        "notes": list(facts.notes),
        "versions": {"training": source.summary.get("versions"), "export": installed_versions()},
    }


def card(facts: Facts) -> str:
    """``README.md``, from the template ``card.md.jinja``."""
    source = facts.source
    results = [("before training", source.summary.get("before")), ("this adapter", source.evaluation)]
    template = Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8")
    environment = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return environment.from_string(template).render(
        facts=facts,
        source=source,
        config=source.config,
        served=facts.served,
        base_lines=base_lines(facts),
        verification_lines=verification_lines(facts.verification),
        accuracy=[(name, found["step"], found["single"]) for name, found in results if found and found.get("single")],
    )


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
    if facts.options.to != "adapter":
        lines.append(f"merged onto {facts.onto} in float32, rounded once to {facts.base.target_name}")
    return lines
