"""Configurations as YAML files: read with the line of every mistake, written with a sentence on every setting."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import yaml

from igrpo_lite.config.options import SECTIONS, RunConfig
from igrpo_lite.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; here that is an error."""


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key, _ in node.value:
        name = loader.construct_object(key)
        if name in seen:
            raise yaml.constructor.ConstructorError(None, None, f"{name} is given twice", key.start_mark)
        seen.add(name)
    return loader.construct_mapping(node)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def load_file(path: str | Path) -> dict[str, Any]:
    """The settings of a recipe, by field name and unchecked; raises :class:`ConfigError` if it is no flat mapping."""
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError(f"no such recipe file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the recipe {path}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: {getattr(error, 'problem', None) or error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must be lines of `name: value`, not {type(content).__name__}")
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def dump(config: RunConfig) -> str:
    """A configuration as a recipe: by section, each setting under its sentence. Loading it gives the same back."""
    lines = []
    for section in SECTIONS:
        lines += [f"# ---- {section.__doc__}", ""]
        for name, field in section.model_fields.items():
            lines += textwrap.wrap(field.description or "", 110, initial_indent="# ", subsequent_indent="# ")
            lines.append(_line(name, getattr(config, name)))
        lines.append("")
    return "\n".join(lines)


def _line(name: str, value: Any) -> str:
    if isinstance(value, list):
        return f"{name}: " + yaml.safe_dump(value, width=10**6, allow_unicode=True, default_flow_style=True).rstrip()
    return yaml.safe_dump({name: value}, width=10**6, allow_unicode=True).rstrip()
