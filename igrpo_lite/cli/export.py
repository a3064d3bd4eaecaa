"""``igrpo-lite export``: a run's adapter as a PEFT folder, a merged model or a GGUF file, verified."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from igrpo_lite.cli.flags import COMMAND
from igrpo_lite.errors import RunFolderError, UserError
from igrpo_lite.export.gguf import find_tools
from igrpo_lite.export.source import Dtype, Kind, Onto, Options, bits, default_output, read_source

if TYPE_CHECKING:
    from igrpo_lite.export.card import Facts

FAILED = 3


def _own(help: str) -> Parameter:
    return Parameter(help=help, group=COMMAND)


def export(
    run: Annotated[Path, _own("Run folder.")],
    /,
    *,
    to: Annotated[Kind, _own("PEFT adapter, model with the adapter merged in, or GGUF file (needs llama.cpp).")],
    output: Annotated[Path | None, _own("Folder to make; unset: `export/` in the run folder.")] = None,
    adapter: Annotated[str | None, _own("`best`, `last` or an adapter's folder; unset: the best.")] = None,
    quantization: Annotated[str, _own("GGUF: type of the weights, as llama.cpp names it.")] = "q8_0",
    dtype: Annotated[Dtype, _own("Type of merged weights; `auto`: the base's, in 16 bits.")] = "auto",
    onto: Annotated[
        Onto, _own("4-bit runs: merge onto the original weights, or onto the dequantised ones of the training.")
    ] = "original",
    base: Annotated[str | None, _own("16-bit model to merge onto; unset: the run's own.")] = None,
    verify: Annotated[bool, _own("Compare the export with base and adapter on held-out questions.")] = True,
    problems: Annotated[int, _own("Held-out questions for that.")] = 8,
    device: Annotated[str | None, _own("Where models are run; unset: as in the run.")] = None,
) -> int:
    """Export a run's adapter and prove that it is what was trained: its tokens and log-probabilities on held-out
    questions against those of base and adapter. Prints the lines that serve it. Exit code 3: it is not; the export is
    kept, and its card says so."""
    target = output or default_output(run, to, quantization)
    options = Options(to, target, quantization, onto, base, dtype, device, problems if verify else 0)
    findings = options.findings()
    if verify and problems == 0:
        findings.append("--problems: must be 1 or more; --no-verify leaves the comparison out")
    source = None
    try:
        source = read_source(run, adapter)
        if to == "gguf" and bits(quantization):
            find_tools(quantization)
    except UserError as error:
        findings += error.problems
    if findings or source is None:
        raise RunFolderError(findings)
    from igrpo_lite.export.exporting import export as write

    return _shown(write(source, options, lambda text: print(f"{text} ...", file=sys.stderr)))


def _shown(facts: Facts) -> int:
    from igrpo_lite.export.card import base_lines, verification_lines

    print(f"{facts.source.adapter} is now {facts.folder}")
    for line in [*base_lines(facts), *verification_lines(facts.verification)]:
        print(f"  {line}")
    for note in facts.notes:
        print(f"note: {note}", file=sys.stderr)
    for name, command in facts.commands.items():
        print(f"\n{name}\n  {command}")
    return FAILED if facts.passed is False else 0
