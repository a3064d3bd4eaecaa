"""Flags made from the settings: every field of the configuration is one, with its sentence, type and default.

A flag hands over the text that the user typed, and only if it was typed; :mod:`igrpo_lite.config.resolve` judges it
together with the recipe, so that all mistakes are reported at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, get_args

from cyclopts import App, Group, Parameter, Token

from igrpo_lite.config import SECTIONS, RunConfig
from igrpo_lite.config.defaults import MODEL_DEFAULTS
from igrpo_lite.config.fields import FIELDS, choices, default_text, hint, is_list, item_type, parts, section_of
from igrpo_lite.config.resolve import examine, load_file, merge, suggestion
from igrpo_lite.config.retired import RETIRED, gone, without_retired
from igrpo_lite.errors import ConfigError
from igrpo_lite.inputs import input_findings

FIRST = ("model", "data", "algorithm", "tokens")
"""The four settings that say what is trained on what; they head every list of flags."""

_MAIN = Group("Main settings", sort_key=0)
COMMAND = Group("This command", sort_key=1)

SHORT: dict[str, dict[str, str]] = {
    "Main settings": {
        "model": "tiny (bundled), a folder or a hub id",
        "data": "Public or synthetic set, or a file",
        "algorithm": "grpo, igrpo or igrpo-joint",
        "tokens": "That learn: all, s-grpo, t-spmo, entropy",
        "reward_funcs": "Or judge, or file.py:function",
        "answer_style": "Final answer asked for: boxed or tags",
        "eval_data": "Held-out problems; unset: found or split off",
        "load_in_4bit": "QLoRA: a third of the memory, slower",
        "lora_r": "Rank of the LoRA adapter",
    },
    "One step": {
        "prompts_per_step": "Problems per optimizer step",
        "num_generations": "Rollouts per problem",
        "temperature": "Of sampling",
        "max_completion_length": "Tokens of an answer",
        "max_num_seqs": "Sequences decoded at a time",
        "loss_type": "grpo, dr_grpo, dapo, gspo, cispo",
        "learning_rate": "Peak of the learning rate",
        "update_tokens": "At once in the update: the memory dial",
        "gradient_checkpointing": "Less memory, slower",
    },
    "Run": {
        "output_dir": "Run folder; unset: runs/<model>-<data>-...",
        "fresh": "Start over; the old folder is kept",
        "seed": "Fixes every sampled token",
        "max_steps": "Optimizer steps",
        "max_minutes": "Stop then; the same command goes on",
        "eval_steps": "Steps between evaluations",
        "report_to": "wandb, tensorboard, trackio",
    },
}
"""The settings that ``--help`` shows, by group, each in a line of 80 columns; ``--help-all`` shows all."""

UNTRAINED: dict[str, Any] = {"reward_funcs": ["accuracy"], "reward_weights": None, "report_to": []}
"""What verbs that do not train put over a recipe: its rewards and trackers need not be there for them."""

Recipe = Annotated[str | None, Parameter(help="YAML file, or the name of a recipe of ours; flags win.", group=COMMAND)]
"""Type of every verb's ``--config``."""


def settings_flags(verb: Callable[..., int | None], names: Iterable[str] = FIELDS) -> Callable[..., int | None]:
    """A verb whose ``**settings`` became one flag per named setting."""
    signature = inspect.signature(verb, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    wanted = list(names)
    ordered = [name for name in FIRST if name in wanted] + [name for name in wanted if name not in FIRST]
    flags = [_flag(name) for name in ordered]

    def command(*args: Any, **kwargs: Any) -> int | None:
        return verb(*args, **kwargs)

    command.__doc__ = verb.__doc__
    command.__signature__ = signature.replace(parameters=[*own, *flags])  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *flags]}
    return command


def shortened(command: Callable[..., int | None]) -> Callable[..., int | None]:
    """The verb with a help that shows the settings of :data:`SHORT` only, in its words."""
    signature = inspect.signature(command)
    found = dict(signature.parameters)
    for name in found.keys() & FIELDS.keys():
        kind, parameter = get_args(found[name].annotation)
        found[name] = found[name].replace(annotation=Annotated[kind, Parameter.combine(parameter, _brief(name))])
    lines = [name for lines in SHORT.values() for name in lines if name in found]
    ordered = [name for name in found if name not in lines] + lines
    command.__signature__ = signature.replace(parameters=[found[name] for name in ordered])  # type: ignore[attr-defined]
    command.__annotations__ = {name: found[name].annotation for name in ordered}
    return command


def examined(recipe: str | None, flags: Mapping[str, Any], trained: bool = False) -> tuple[RunConfig, list[str]]:
    """The configuration of a recipe, by file or name, and flags; with everything that is wrong with either.
    ``trained``: the recipe is of a run that is over, so what it was trained with does not matter."""
    from igrpo_lite.cli.recipes import find

    file: dict[str, Any] = {}
    unread: list[str] = []
    try:
        file = load_file(find(recipe)) if recipe is not None else {}
    except ConfigError as error:
        unread = error.problems
    config, findings = examine(merge(without_retired(file) if trained else file, flags))
    return config, unread + findings


def checked(recipe: str | None, flags: Mapping[str, Any], files: bool = True) -> RunConfig:
    """The configuration of a recipe and flags, and if ``files`` what it names; raises one error with all findings."""
    config, findings = examined(recipe, flags)
    findings += input_findings(config) if files else []
    if findings:
        raise ConfigError(findings)
    return config


def complaints(app: App, words: Sequence[str], unused: Sequence[str], given: Mapping[str, Any]) -> list[str]:
    """What is wrong with a command line that has words the verb does not know: these, and the settings it does know."""
    verb, names = _known(app, words)
    found = []
    for word in unused:
        if word.startswith("--"):
            name = word.partition("=")[0]
            setting = name[2:].replace("-", "_")
            if setting in RETIRED:
                found.append(gone(setting))
                continue
            meant = suggestion(setting, [known[2:].replace("-", "_") for known in names])
            advice = f"did you mean --{meant.replace('_', '-')}?" if meant else f"see {verb} --help"
            found.append(f"unknown flag {name}; {advice}")
        elif not found:  # a word after an unknown flag is most likely its value
            found.append(f"unexpected {word!r}; see {verb} --help")
    config, bad = examined(given.get("config"), {name: given[name] for name in given if name in FIELDS})
    return found + bad + input_findings(config)


def _known(app: App, words: Sequence[str]) -> tuple[str, list[str]]:
    path, apps, _ = app.parse_commands(list(words))
    if apps[-1].default_command is None:
        return " ".join(["igrpo-lite", *path]), []
    arguments = apps[-1].assemble_argument_collection()
    return " ".join(["igrpo-lite", *path]), [name for argument in arguments for name in argument.names]


def _brief(name: str) -> Parameter:
    for place, (title, lines) in enumerate(SHORT.items()):
        if name in lines:
            default = default_text(FIELDS[name].default)
            text = lines[name] if default == "unset" else f"{lines[name]} [{default}]"
            group = _MAIN if place == 0 else Group(title, sort_key=2 * place)
            return Parameter(help=text, group=group, negative=(), show_default=False)
    return Parameter(show=False)


def _flag(name: str) -> inspect.Parameter:
    field = FIELDS[name]
    bare, section, few = parts(hint(field))[0], section_of(name), choices(field)
    group = _MAIN if name in FIRST else Group(section.__doc__ or "", sort_key=2 + SECTIONS.index(section))
    parameter = Parameter(
        name=f"--{name.replace('_', '-')}",
        help=f"{field.description} [choices: {', '.join(few)}]" if few else field.description,
        group=group,
        show_default=_defaults(name),
        converter=None if bare is bool else _typed if is_list(field) else _one,
        completer=(lambda _: few) if few else None,
        metavar="CHOICE" if few else None if bare is bool else item_type(field).upper(),
        n_tokens=None if bare is bool else 1,
        negative_iterable=(),
        consume_multiple=is_list(field),
    )
    kind: Any = bool if bare is bool else list[str] if is_list(field) else str
    annotation = Annotated[kind | None, parameter]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _typed(_: Any, tokens: Sequence[Token]) -> list[str]:
    return [token.value for token in tokens]


def _one(_: Any, tokens: Sequence[Token]) -> str:
    return tokens[0].value


def _defaults(name: str) -> str | bool:
    texts = [default_text(FIELDS[name].default)]
    texts += [f"{model}: {default_text(values[name])}" for model, values in MODEL_DEFAULTS.items() if name in values]
    return "; ".join(texts) if texts != ["unset"] else False
