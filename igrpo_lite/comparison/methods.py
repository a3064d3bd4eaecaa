"""What is compared: methods by name, each with its configuration, and whether comparing them is fair."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from igrpo_lite.config import RunConfig
from igrpo_lite.config.fields import FIELDS, choices, nearest
from igrpo_lite.config.resolve import examine, load_file, merge
from igrpo_lite.errors import ConfigError
from igrpo_lite.inputs import input_findings

ALGORITHMS = choices(FIELDS["algorithm"])

_OURS: dict[str, Any] = {
    "patience_dead": 0,  # equal rollouts: a run without signal goes on all the same
    "max_minutes": None,
    "fresh": False,
    "progress": "off",
}
RESERVED = frozenset({"algorithm", "seed", "output_dir", *_OURS})
"""Settings that methods cannot share: they, or the comparison, say them. A recipe under all may hold them."""

_LONGEST_NAME = 150
_HELD_OUT = ("eval_data", "eval_split", "eval_size")
_HELD_OUT_OF_DATA = ("data", "data_config", "data_split", "question_column", "answer_column")

Find = Callable[[str], Path]
"""Finds a recipe's file; raises :class:`ConfigError` if there is none."""


@dataclass(frozen=True, slots=True)
class Method:
    """One side of a comparison; ``config`` is complete but for seed and folder."""

    name: str
    spec: str
    config: RunConfig

    def folder(self, seed: int) -> str:
        """Name of the folder of one run."""
        return f"{_slug(self.name)}-{self.config.max_steps}-steps-seed-{seed}"

    def run_config(self, seed: int, output_dir: Path) -> RunConfig:
        """The configuration of one run."""
        return self.config.model_copy(update={"seed": seed, "output_dir": str(output_dir / self.folder(seed))})

    @property
    def rollouts(self) -> int:
        """Completions that a run samples, without those that replays or dynamic sampling may add."""
        return self.config.prompts_per_step * self.config.num_generations * self.config.max_steps


def existing(recipe: str) -> Path:
    """A recipe given by path."""
    path = Path(recipe).expanduser()
    if not path.is_file():
        raise ConfigError(f"no such recipe file: {recipe}")
    return path


def read_methods(
    specs: Sequence[str],
    common: Mapping[str, Any],
    recipe: str | None = None,
    allow_unequal: bool = False,
    find: Find = existing,
) -> tuple[list[Method], list[str]]:
    """The methods of a comparison, and everything wrong with them and with what their settings name.

    Args:
        specs: ``ALGORITHM[/TOKENS]`` or a recipe's file, then any ``+KEY=VALUE``, with an own ``NAME=`` before it if
            wanted: ``igrpo/s-grpo``, ``few=igrpo+num_drafts=4``, ``mine.yaml+max_steps=30``.
        common: settings of all methods; a method's own win.
        recipe: a recipe under all of them; it loses against every other setting.
        allow_unequal: methods may differ in their number of rollouts.
    """
    findings: list[str] = [reserved(name) for name in common if name in RESERVED]
    base = _loaded(recipe, find, findings) if recipe is not None else {}
    common = {name: value for name, value in common.items() if name not in RESERVED}
    methods: list[Method] = []
    found: dict[str, list[str]] = {}
    for spec in specs:
        name, head, own = _split(spec)
        file = _head(head, own, find, findings)
        if file is None:
            continue
        complaints = [reserved(key) for key in own if key in RESERVED - {"algorithm"}]
        given = _layered(base, file, common, own)
        given = {key: value for key, value in given.items() if key not in RESERVED - {"algorithm"}}
        config, more = examine(given | _OURS)
        for complaint in complaints + more + input_findings(config):
            found.setdefault(complaint, []).append(name)
        methods.append(Method(name, spec, config))
    for complaint, names in found.items():
        everywhere = len(names) == len(specs) > 1
        findings.append(complaint if everywhere else f"{', '.join(names)}: {complaint}")
    findings += [] if specs else ["name at least one method: grpo, igrpo, igrpo-joint, or a recipe's file"]
    findings += _name_findings(methods)
    if not findings:  # of settings that are wrong it would speak of the defaults in their place
        findings += _held_out_findings(methods) + ([] if allow_unequal else _rollout_findings(methods))
    return methods, findings


def read_seeds(seeds: int | str | Sequence[int]) -> tuple[list[int], list[str]]:
    """The seeds, and what is wrong with them: ``5`` is 0 to 4, ``0,3,7`` these three, ``7,`` seed 7 alone."""
    try:
        if isinstance(seeds, str):
            found = (
                [int(part) for part in seeds.split(",") if part.strip()] if "," in seeds else list(range(int(seeds)))
            )
        else:
            found = list(range(seeds)) if isinstance(seeds, int) else [int(seed) for seed in seeds]
    except ValueError:
        found = []
    if not found or len(set(found)) < len(found) or not all(0 <= seed < 2**31 for seed in found):
        return [], [f"seeds: must be how many, like 5, or different numbers from 0, like 0,3,7; not {seeds}"]
    return found, []


def _split(spec: str) -> tuple[str, str, dict[str, str]]:
    """A method's name, its algorithm or recipe, and its own settings."""
    labelled = re.fullmatch(r"([^=+/\\]+)=(.+)", spec, re.DOTALL)
    text = labelled[2] if labelled else spec
    head, *pairs = re.split(r"\+(?=[A-Za-z][\w-]*=)", text)
    own = {key.strip().replace("-", "_"): value for key, _, value in (pair.partition("=") for pair in pairs)}
    if labelled:
        return labelled[1].strip(), head, own
    if head.partition("/")[0] not in ALGORITHMS:
        text = "+".join([Path(head).name.removesuffix(".yaml"), *pairs])
    return text, head, own


def _head(head: str, own: dict[str, Any], find: Find, findings: list[str]) -> dict[str, Any] | None:
    """The settings of a recipe; an algorithm and its tokens become settings of the method's own."""
    algorithm, _, tokens = head.partition("/")
    if algorithm in ALGORITHMS:
        said = {"algorithm": algorithm} | ({"tokens": tokens} if tokens else {})
        findings += [f"{head}+{name}={own[name]}: {name} is given twice" for name in said.keys() & own.keys()]
        own |= said
        return {}
    try:
        path = find(head)
    except ConfigError:
        near = nearest(algorithm, ALGORITHMS)
        advice = f"; did you mean {near}?" if near else ""
        findings.append(f"{head}: neither an algorithm ({', '.join(ALGORITHMS)}) nor a recipe's file{advice}")
        return None
    return _loaded(str(path), existing, findings)


def _loaded(recipe: str, find: Find, findings: list[str]) -> dict[str, Any]:
    try:
        return load_file(find(recipe))
    except ConfigError as error:
        findings += error.problems
        return {}


def _layered(
    base: Mapping[str, Any], file: Mapping[str, Any], common: Mapping[str, Any], own: Mapping[str, Any]
) -> dict[str, Any]:
    """All settings of a method: its own over the common ones over its recipe over the recipe under all."""
    # A common setting of one choice of tokens stays: where it does not belong, it is refused and not dropped.
    without_tokens = {name: value for name, value in own.items() if name != "tokens"}
    return merge(merge(base, file), {**merge(common, without_tokens), **own})


def reserved(name: str) -> str:
    """Why a comparison takes no such setting."""
    ways = {
        "seed": "say --seeds",
        "algorithm": "the methods say it",
        "output_dir": "its runs have folders of their own",
    }
    return f"{name}: is no setting of a comparison; {ways.get(name, 'it sets that itself')}"


def _name_findings(methods: Sequence[Method]) -> list[str]:
    """Two methods whose runs would share their folders."""
    seen: dict[str, str] = {}
    findings = []
    for method in methods:
        slug = _slug(method.name)
        if slug in seen:
            findings.append(f"{method.spec}: has the name of {seen[slug]}; give it another one, as NAME={method.spec}")
        if len(slug) > _LONGEST_NAME:
            findings.append(f"{method.spec}: is too long for a folder's name; give it a short one, NAME={method.spec}")
        seen[slug] = method.spec
    return findings


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9_.-]+", "-", name.lower())


def _held_out_findings(methods: Sequence[Method]) -> list[str]:
    """Accuracies on different problems cannot be compared."""
    findings = []
    for method in methods[1:]:
        first, other = methods[0].config, method.config
        names = _HELD_OUT if first.eval_data and other.eval_data else _HELD_OUT + _HELD_OUT_OF_DATA
        changed = [name for name in names if getattr(first, name) != getattr(other, name)]
        if changed:
            findings.append(
                f"{method.name}: is measured on other held-out problems than {methods[0].name} ({', '.join(changed)}); "
                "name the same for all, as with --eval-data"
            )
    return findings


def _rollout_findings(methods: Sequence[Method]) -> list[str]:
    plans: dict[str, list[str]] = {}
    for method in methods:
        plans.setdefault(_plan(method), []).append(method.name)
    if len(plans) < 2:
        return []
    each = "; ".join(f"{plan}: {', '.join(names)}" for plan, names in plans.items())
    return [
        f"rollouts of a run are not equal ({each}); set prompts_per_step, num_generations or max_steps, or compare "
        "all the same with --allow-unequal"
    ]


def _plan(method: Method) -> str:
    more = [name for name in ("tspmo_replay", "dynamic_sampling") if getattr(method.config, name)]
    text = f"{method.rollouts:,}"
    return text + "".join(f" and what {name} {getattr(method.config, name)} adds" for name in more)
