"""``igrpo-lite check``: would this run be able to learn? Before any training."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from igrpo_lite.cli.flags import COMMAND, Recipe, examined, settings_flags
from igrpo_lite.errors import ConfigError
from igrpo_lite.inputs import input_findings

if TYPE_CHECKING:
    from igrpo_lite.evaluation.preflight import Preflight

FAILED = 3
"""Exit code when something would keep the run from learning."""


def verb() -> Callable[..., int | None]:
    """The verb with a flag for every setting."""
    return settings_flags(check)


def _own(help: str) -> Parameter:
    return Parameter(help=help, group=COMMAND)


def check(
    *,
    config: Recipe = None,
    load_model: Annotated[bool, _own("Also sample from the model; without, its tokenizer alone is loaded.")] = True,
    problems: Annotated[int, _own("Training problems that the model is tried on.")] = 16,
    samples: Annotated[int, _own("Completions sampled of each.")] = 4,
    as_json: Annotated[bool, Parameter(name="--json", help="Print the result as JSON.", negative=(), group=COMMAND)] = (
        False
    ),
    **settings: Any,
) -> int:
    """Look at everything a run depends on: data, gold answers, rewards, prompts and lengths, and some samples of the
    model. Ends with 3 if something would keep it from learning."""
    resolved, findings = examined(config, settings)
    findings += input_findings(resolved)
    counts = {"--problems": problems, "--samples": samples}
    findings += [f"{flag}: must be 1 or more, not {count}" for flag, count in counts.items() if count < 1]
    if findings:
        raise ConfigError(findings)
    from igrpo_lite.evaluation.preflight import preflight
    from igrpo_lite.policy.backends import enter

    enter(resolved)
    from igrpo_lite.report.plain import PlainScreen, QuietScreen

    screen = (QuietScreen if resolved.progress == "off" or as_json else PlainScreen)(sys.stderr)
    found = preflight(
        resolved, problems, samples, load_model, lambda done, total: screen.heartbeat(f"{done} of {total} completions")
    )
    print(json.dumps(found.to_json(), indent=2)) if as_json else _show(found)
    return FAILED if found.failed else 0


def _show(found: Preflight) -> None:
    for part in found.parts:
        print(f"== {part.title} ==")
        for line in part.lines:
            _say(line)
        for finding in part.findings:
            _say(f"{finding.level}: {finding.text}")
        print()
    print("this run could not learn: see the errors above" if found.failed else "no problems found")


def _say(line: str) -> None:
    """Print what may hold a model's or a data set's text: no control codes, and only what the stream can write."""
    line = "".join(character if character.isprintable() or character == "\t" else "?" for character in line)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(line.encode(encoding, "replace").decode(encoding))
