"""What a setting is, in words: one place for the error messages, the flags' help and the generated documents."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from igrpo_lite.config.defaults import MODEL_DEFAULTS
from igrpo_lite.config.options import SECTIONS, NameIn, RunConfig, Section

FIELDS: dict[str, FieldInfo] = {name: field for section in SECTIONS for name, field in section.model_fields.items()}
"""Every setting by name, in the order of the sections."""

_BOUNDS = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}
_NUMBERS = {int: "a whole number", float: "a number"}


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The valid name that the user most likely meant."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=0.65)), None)


def hint(field: FieldInfo) -> Any:
    """A field's full type, with the constraints that pydantic has moved into its metadata."""
    return Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation


def parts(annotation: Any) -> tuple[Any, list[Any], bool]:
    """A type without ``Annotated`` and ``None``, its constraints, and whether it may be ``None``."""
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        bare, deeper, optional = parts(inner)
        return bare, [*metadata, *deeper], optional
    if get_origin(annotation) in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        bare, metadata, _ = parts(members[0])
        return bare, metadata, len(members) < len(get_args(annotation))
    return annotation, [], False


def is_list(field: FieldInfo) -> bool:
    """Whether a setting takes several values."""
    return get_origin(parts(hint(field))[0]) is list


def choices(field: FieldInfo) -> tuple[str, ...]:
    """The values of a setting, or of its items, that has only a few."""
    bare = parts(hint(field))[0]
    item = parts(get_args(bare)[0])[0] if get_origin(bare) is list else bare
    names = [mark.registry for mark in parts(hint(field))[1] if isinstance(mark, NameIn)]
    return tuple(names[0]) if names else get_args(item) if get_origin(item) is Literal else ()


def item_type(field: FieldInfo) -> str:
    """The type of a setting, or of its items."""
    bare = parts(hint(field))[0]
    item = parts(get_args(bare)[0])[0] if get_origin(bare) is list else bare
    return "str" if choices(field) else str(item.__name__)


def short_type(field: FieldInfo) -> str:
    """A setting's type in a word or two."""
    name = f"list of {item_type(field)}" if is_list(field) else item_type(field)
    return f"{name} or none" if parts(hint(field))[2] else name


def allowed(field: FieldInfo) -> str:
    """What a setting may be, as the end of the sentence "must be ..."."""
    return _allowed(hint(field))


def default_text(value: Any) -> str:
    """A default as a user would type it."""
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(map(default_text, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def section_of(name: str) -> type[Section]:
    """The section that a setting stands in."""
    return next(section for section in SECTIONS if name in section.model_fields)


def model_default(name: str, model: str) -> Any:
    """A setting's default for one model."""
    return MODEL_DEFAULTS.get(model, {}).get(name, RunConfig.model_fields[name].default)


def _allowed(annotation: Any) -> str:
    bare, metadata, optional = parts(annotation)
    names = [mark.registry for mark in metadata if isinstance(mark, NameIn)]
    if names or get_origin(bare) is Literal:
        few = tuple(names[0]) if names else get_args(bare)
        words = ("one of " if len(few) > 1 else "") + ", ".join(map(str, few))
    elif get_origin(bare) is list:
        words = f"a list of at least one item, each {_allowed(get_args(bare)[0])}"
        if not any(getattr(item, "min_length", 0) for item in metadata):
            words = words.replace("a list of at least one item", "a list")
    elif bare in _NUMBERS:
        words = _NUMBERS[bare] + _range(bare, metadata)
    else:
        words = {str: "text", bool: "true or false"}[bare]
    return f"{words} (or none)" if optional else words


def _range(kind: type, metadata: list[Any]) -> str:
    bounds: dict[str, Any] = {}
    for item in metadata:
        for bound in item.metadata if isinstance(item, FieldInfo) else [item]:
            bounds |= {name: getattr(bound, name) for name in _BOUNDS if getattr(bound, name, None) is not None}
    if kind is int:  # among whole numbers, above 0 is at least 1
        bounds |= {"ge": bounds.pop("gt") + 1} if "gt" in bounds else {}
        bounds |= {"le": bounds.pop("lt") - 1} if "lt" in bounds else {}
    if {"ge", "le"} <= bounds.keys():
        return f" from {bounds['ge']:g} to {bounds['le']:.10g}"
    return "".join(f" {word} {bounds[name]:g}" for name, word in _BOUNDS.items() if name in bounds)
