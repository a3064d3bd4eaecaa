"""``igrpo-lite doctor``: what works on this machine, what does not, and the commands that repair it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from igrpo_lite import __version__
from igrpo_lite.cli.flags import COMMAND

if TYPE_CHECKING:
    from igrpo_lite.environment.diagnosis import Choice
    from igrpo_lite.environment.facts import Facts, Problem

_GIB = 2**30


def doctor(
    *,
    json_: Annotated[
        bool, Parameter(name="--json", help="Print JSON, for scripts.", group=COMMAND, negative=())
    ] = False,
    network: Annotated[bool, Parameter(help="Ask whether the Hugging Face hub answers.", group=COMMAND)] = True,
    need: Annotated[
        list[Literal["gpu", "hub", "transformers-4bit", "vllm", "unsloth"]] | None,
        Parameter(help="Exit with 3 if these do not work.", group=COMMAND, consume_multiple=True, negative_iterable=()),
    ] = None,
    timeout: Annotated[float, Parameter(help="Seconds that trying the back ends may take.", group=COMMAND)] = 120.0,
) -> int:
    """Check versions, GPU, memory, disks, hub and back ends (each is tried in a process of its own), and print the
    problems with the commands that repair them. Exit code 0: training works; 3: it does not, or something does not
    that --need asks for or that is installed for the GPU."""
    from igrpo_lite.doctor.collect import collect
    from igrpo_lite.environment.diagnosis import choices, exit_code, problems

    if sys.stderr.isatty():
        print("trying the back ends, each in a process of its own ...", file=sys.stderr)
    facts = collect(network, timeout)
    found, chosen = problems(facts, need or ()), choices(facts)
    code = exit_code(found)
    if json_:
        print(json.dumps(_as_json(facts, found, chosen, code), indent=2))
    else:
        print("\n".join(_text(facts, found, chosen)))
    return code


def _as_json(facts: Facts, found: list[Problem], chosen: dict[str, Choice], code: int) -> dict[str, Any]:
    from igrpo_lite.environment.pins import missing, suited

    suits = suited(facts)
    return {
        "igrpo_lite": __version__,
        "exit_code": code,
        "problems": [asdict(problem) for problem in found],
        "auto": {name: asdict(choice) for name, choice in chosen.items()},
        "versions": {
            "set": suits.letter,
            "file": str(suits.path) if suits.file else "",
            "reason": suits.reason,
            "missing": missing(suits.file, facts.versions()),
        },
        "facts": asdict(facts) | {"kinds": sorted(facts.kinds)},
    }


def _text(facts: Facts, found: list[Problem], chosen: dict[str, Choice]) -> Iterator[str]:
    kinds = f" ({', '.join(sorted(facts.kinds))})" if facts.kinds else ""
    yield f"igrpo-lite {__version__}, Python {facts.python}, {facts.system} {facts.machine}{kinds}"
    yield from ("", "Packages", *_packages(facts))
    yield from ("", "GPU", *_gpus(facts))
    yield from ("", "Machine", *_machine(facts))
    yield from ("", "Back ends", *_back_ends(facts, chosen))
    yield ""
    yield from _problems(found)


def _packages(facts: Facts) -> Iterator[str]:
    from igrpo_lite.environment.packages import SHOWN, own_ranges

    ranges = own_ranges(facts)
    names = [*ranges, *(name for name in SHOWN if name not in ranges)]
    there = [name for name in names if name in facts.packages]
    for name in there:
        yield f"  {name:18} {facts.packages[name]:16} {ranges.get(name, '')}".rstrip()
    absent = [name for name in names if name not in facts.versions()]
    if absent:
        yield f"  not installed: {', '.join(absent)}"


def _gpus(facts: Facts) -> Iterator[str]:
    from igrpo_lite.environment.hardware import dtype_for

    torch, driver, used = facts.torch, facts.driver, facts.gpu
    if driver.version or driver.cuda:
        yield f"  driver {driver.version or '?'}, runs CUDA up to {driver.cuda or '?'}"
    if torch is not None:
        build = f"CUDA {torch.cuda}" if torch.cuda else f"ROCm {torch.hip}" if torch.hip else "no GPU"
        state = (
            "it can use the GPU" if torch.available else "it can use Apple's GPU" if torch.mps else "it uses the CPU"
        )
        yield f"  torch {torch.version} is built for {build}; {state}"
    for gpu in driver.gpus or (torch.devices if torch is not None else ()):
        mark = "*" if gpu == used else " "
        capability = "?" if gpu.capability is None else "{}.{}".format(*gpu.capability)
        room = _free(gpu.free_bytes, gpu.total_bytes)
        yield f"{mark} {gpu.index}  {gpu.name}, compute capability {capability}, {room}"
    if used is None:
        yield "  no NVIDIA GPU" + ("" if driver.version else " (there is no nvidia-smi, or it finds no driver)")
    elif used.capability is not None:
        precision = dtype_for(used.capability)
        yield f"  * is the one that is used: {precision.dtype or 'refused'}, as {precision.reason}"
    yield from _set(facts)


def _set(facts: Facts) -> Iterator[str]:
    """The versions that go together on this GPU (docs/install.md)."""
    from igrpo_lite.environment.pins import INSTALL, missing, suited

    choice = suited(facts)
    if facts.gpu is None or not choice.letter:
        return
    absent = missing(choice.file, facts.versions())
    yield f"  versions that go together: {choice}"
    if absent:
        yield f"    missing: {', '.join(absent[:6])}{f' and {len(absent) - 6} more' if len(absent) > 6 else ''}"
        yield f"    {INSTALL}"
    else:
        yield "    all are installed"


def _machine(facts: Facts) -> Iterator[str]:
    if facts.memory is not None:
        shared = "" if facts.shm_bytes is None else f"; shared memory: {_size(facts.shm_bytes)} free"
        yield f"  memory: {_free(facts.memory.free_bytes, facts.memory.total_bytes)}{shared}"
    for disk in facts.disks:
        yield f"  {disk.what}: {disk.path}, {_free(disk.free_bytes)}{'' if disk.writable else ', not writable'}"
    if facts.hub is not None:
        detail = f" ({facts.hub.detail})" if facts.hub.detail else ""
        token = "a token is set" if facts.hub.token else "no token (gated models need one)"
        yield f"  hub: {facts.hub.endpoint} {facts.hub.state}{detail}, {token}"
    for name, value in facts.variables.items():
        yield f"  {name}={value}"


def _back_ends(facts: Facts, chosen: dict[str, Choice]) -> Iterator[str]:
    from igrpo_lite.report.text import cut

    for name, back_end in facts.back_ends.items():
        yield f"  {name:20} {back_end.state}" + (f": {cut(back_end.error, 300)}" if back_end.error else "")
    for name, choice in chosen.items():
        yield f"  --{name} auto: {choice.choice}, as {choice.reason}"


def _problems(found: list[Problem]) -> Iterator[str]:
    from igrpo_lite.report.text import cut

    if not found:
        yield "No problems found."
        return
    errors = sum(problem.level == "error" for problem in found)
    yield f"Problems, the most important first ({errors} of {len(found)} are errors)"
    for number, problem in enumerate(found, 1):
        yield f"{number:3}. {problem.level}: {cut(problem.what, 600)}"
        yield from (
            f"     {label}: {text}" for label, text in (("do", problem.repair), ("see", problem.source)) if text
        )


def _free(free: int | None, total: int | None = None) -> str:
    if free is None:
        return "free space unknown" if total is None else f"{_size(total)}"
    return f"{_size(free)} free" if total is None else f"{free / _GIB:.1f} of {_size(total)} free"


def _size(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"
