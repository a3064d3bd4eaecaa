"""A user's own reward: found by ``path/file.py:function`` or ``package.module:function``, called by its signature.

Two forms are understood. TRL's: ``f(completions, answer, **kwargs)`` gets lists, one entry per completion, and returns
a list of as many numbers or ``None`` (as ``GRPOTrainer._calculate_rewards`` has it; completions are plain strings). The
simple one, known by its first parameter being called ``completion``: ``f(completion, answer)`` gets one entry of each
and returns one number or ``None``. Both may be ``async``. A function gets those of the offered arguments that its
signature names, or all with ``**kwargs``; ``log_metric(name, value)`` and ``log_extra(column, values)`` are TRL's too,
the latter with one value per completion (in the simple form: this completion's value).

Runs inside the worker process too, so nothing but the standard library is imported here.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from igrpo_lite.errors import RewardError

_FRAME = re.compile(r'[ ]+File "(.+?)", line (\d+)')
_LIBRARY = re.compile(r"site-packages|[\\/]lib[\\/]python3|igrpo_lite[\\/]worker[\\/]")

_SINGULAR = {"completions": "completion", "prompts": "prompt"}


@dataclass(frozen=True, slots=True)
class UserFunction:
    """An imported reward function and how it wants to be called."""

    spec: str
    call: Callable[..., Any]
    scalar: bool
    concurrent: bool
    takes: frozenset[str] | None
    """Names of its parameters; ``None`` when it takes any (``**kwargs``)."""
    required: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Returned:
    """What one call gave.

    Attributes:
        values: one per completion; ``None`` where the function has no opinion.
        metrics: what it logged with ``log_metric``, in order.
        extras: one row of JSON values per completion, of what it logged with ``log_extra``.
    """

    values: list[float | None]
    metrics: list[tuple[str, float]]
    extras: list[dict[str, Any]]


def split_spec(spec: str) -> tuple[str, str]:
    """``path/file.py:function`` as its two halves; the last colon counts (a Windows path has one of its own)."""
    place, _, name = spec.rpartition(":")
    return place.strip(), name.strip()


def is_file_spec(place: str) -> bool:
    return place.endswith(".py") or "/" in place or os.sep in place


def find_function_error(spec: str) -> str | None:
    """What is wrong with ``spec`` as far as it can be seen without importing it; ``None`` when nothing is."""
    place, name = split_spec(spec)
    if not place or not name.isidentifier():
        return f"{spec!r} names no function; write it as path/file.py:function"
    if is_file_spec(place):
        path = Path(place).expanduser()
        if not path.is_file():
            return f"no file {place} (looked in {Path.cwd()}); give its path from here, or the full path"
        return _definition_error(path, place, name)
    head = place.partition(".")[0]
    if not all(part.isidentifier() for part in place.split(".")):
        return f"{spec}: {place!r} is not a module name; a file is given by its path with .py"
    if head not in sys.modules and PathFinder.find_spec(head, [*sys.path, os.getcwd()]) is None:
        return f"{spec}: no module {head}; install it, or give a file as path/file.py:function"
    return None  # more would mean to import the package; the worker does that before a model loads


def _definition_error(path: Path, place: str, name: str) -> str | None:
    try:
        nodes = list(ast.walk(ast.parse(path.read_bytes(), filename=str(path))))
    except SyntaxError as error:
        return f"{place}, line {error.lineno}: {error.msg}; the file is not valid Python"
    except (OSError, ValueError) as error:
        return f"{place} cannot be read: {error}"
    functions = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    others = {node.name for node in nodes if isinstance(node, ast.ClassDef)}
    others |= {(node.asname or node.name).partition(".")[0] for node in nodes if isinstance(node, ast.alias)}
    others |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    if {name, "*", "__getattr__"} & (functions | others):
        return None
    close = difflib.get_close_matches(name, functions | others, n=1)
    hint = f"did you mean {close[0]}?" if close else f"it defines {', '.join(sorted(functions)[:8]) or 'no function'}"
    return f"no function {name} in {place}; {hint}"


def load_function(spec: str) -> UserFunction:
    """Import the user's function. Raises :class:`RewardError` with the traceback's end when that fails."""
    place, name = split_spec(spec)
    try:
        module = _load_file(Path(place).expanduser()) if is_file_spec(place) else importlib.import_module(place)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise RewardError(
            f"reward {spec} cannot be imported: {in_short(traceback.format_exc())}; fix the file"
        ) from error
    call = getattr(module, name, None)
    if not callable(call):
        found = "nothing of that name" if call is None else f"a {type(call).__name__}"
        raise RewardError(f"reward {spec}: {place} holds {found}, not a function {name}")
    return _examine(spec, call)


def _load_file(path: Path) -> ModuleType:
    path = path.resolve()
    module_name = f"igrpo_lite_reward_{path.stem}_{abs(hash(str(path)))}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # so that the file can import its neighbours
    found = importlib.util.spec_from_file_location(module_name, path)
    if found is None or found.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[module_name] = module  # before running it: dataclasses and pickle look their module up
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _examine(spec: str, call: Callable[..., Any]) -> UserFunction:
    try:
        parameters = list(inspect.signature(call).parameters.values())
    except (TypeError, ValueError) as error:
        raise RewardError(f"reward {spec}: its signature cannot be read ({error}); wrap it in a def") from error
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in parameters):
        raise RewardError(f"reward {spec}: it has positional-only parameters, but is called by name; remove the /")
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    takes = None if takes_all else frozenset(p.name for p in named)
    required = tuple(p.name for p in named if p.default is p.empty)
    scalar = bool(named) and named[0].name == "completion"
    is_async = inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(type(call).__call__)
    return UserFunction(spec, call, scalar, is_async or not scalar, takes, required)


def run_function(
    function: UserFunction, columns: Mapping[str, Sequence[Any]], count: int, wait: Callable[[Any], Any]
) -> Returned:
    """Call the function on ``count`` completions and check what it returns.

    Args:
        columns: lists of ``count`` entries: ``prompts``, ``completions``, ``completion_ids``, the row's columns.
        wait: runs an awaitable and returns its result.

    Raises:
        RewardError: parameters that the data does not have, a wrong count, or values that are not finite numbers.
    """
    if not function.scalar:
        log = _Log(count)
        result = function.call(**_arguments(function, dict(columns), log))
        values = checked_values(function.spec, wait(result) if inspect.isawaitable(result) else result, count)
        return Returned(values, log.metrics, log.rows())
    renamed = {_SINGULAR.get(name, name): column for name, column in columns.items()}
    logs = [_Log(None) for _ in range(count)]
    results = [
        function.call(**_arguments(function, {name: column[i] for name, column in renamed.items()}, log))
        for i, log in enumerate(logs)
    ]
    if any(inspect.isawaitable(result) for result in results):
        results = wait(_gathered(results))
    values = [checked_value(function.spec, value) for value in results]
    return Returned(
        values, [entry for log in logs for entry in log.metrics], [row for log in logs for row in log.rows()]
    )


async def _gathered(awaitables: Sequence[Any]) -> list[Any]:
    import asyncio

    return list(await asyncio.gather(*awaitables))


class _Log:
    """TRL's ``log_metric`` and ``log_extra`` for one call; wrong arguments raise in the user's function.

    Args:
        count: of completions, for each of which a column gets one value; ``None``: for one, whose value comes bare.
    """

    def __init__(self, count: int | None) -> None:
        self.count = count
        self.metrics: list[tuple[str, float]] = []
        self._columns: dict[str, list[Any]] = {}

    def metric(self, name: str, value: Any) -> None:
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"log_metric({name!r}, {number}): expected a finite number")
        self.metrics.append((str(name), number))

    def extra(self, column: str, values: Any) -> None:
        if self.count is not None and isinstance(values, (str, bytes, Mapping)):
            raise TypeError(f"log_extra({column!r}, ...): expected a list of {self.count} values, one per completion")
        # As in TRL, further calls continue a column.
        self._columns.setdefault(str(column), []).extend([values] if self.count is None else values)

    def rows(self) -> list[dict[str, Any]]:
        """One row per completion."""
        count = 1 if self.count is None else self.count
        for column, values in self._columns.items():
            if len(values) != count:
                raise ValueError(f"log_extra({column!r}, ...) got {len(values)} values for {count} completions")
        return [{column: _plain(values[i]) for column, values in self._columns.items()} for i in range(count)]


def _plain(value: Any) -> Any:
    """A value as JSON gives it back, or else as text."""
    value = value.tolist() if hasattr(value, "tolist") else value  # numpy, torch
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = json.dumps(str(value), ensure_ascii=False)
    return json.loads(text.encode(errors="replace"))  # half of a surrogate pair could not be written to a file


def _arguments(function: UserFunction, offered: dict[str, Any], log: _Log) -> dict[str, Any]:
    offered = {**offered, "log_extra": log.extra, "log_metric": log.metric}
    if missing := [name for name in function.required if name not in offered]:
        names = sorted(set(offered) - {"log_extra", "log_metric"})
        close = difflib.get_close_matches(missing[0], names, n=1)
        hint = f"did you mean {close[0]}? There" if close else "there"
        raise RewardError(
            f"reward {function.spec} asks for {', '.join(missing)}, which the data does not have; {hint} is "
            f"{', '.join(names)}. Rename the parameter, or give it a default"
        )
    return offered if function.takes is None else {name: offered[name] for name in function.takes & offered.keys()}


def checked_values(spec: str, result: Any, count: int) -> list[float | None]:
    """A returned list as floats and ``None``. Raises :class:`RewardError` for a wrong type, count or value."""
    if hasattr(result, "tolist") and not isinstance(result, (list, tuple)):
        result = result.tolist()  # numpy, torch
    if not isinstance(result, (list, tuple)):
        raise RewardError(
            f"reward {spec} returned {_shown(result)}, expected a list of {count} numbers, one per completion "
            "(to score one completion at a time, call the first parameter `completion`)"
        )
    if len(result) != count:
        raise RewardError(
            f"reward {spec} returned {len(result)} values for {count} completions; return one number (or None) for each"
        )
    return [checked_value(spec, value) for value in result]


def checked_value(spec: str, value: Any) -> float | None:
    """One returned value as a float, or ``None`` (no opinion). Raises :class:`RewardError` for anything else."""
    if value is None:
        return None
    number: float | None = None
    if not isinstance(value, (str, bytes, bytearray)):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            number = None
    if number is None or not math.isfinite(number):
        raise RewardError(
            f"reward {spec} returned {_shown(value)}, expected a finite number; return None where it has no opinion"
        )
    return number


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:
        text = "a value"
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def in_short(failure: str) -> str:
    """A failure in one line: the exception of a traceback and the user's line that raised it, or the line that hung."""
    _, traced, block = failure.rpartition("Traceback (most recent call last):")
    lines = block.splitlines()
    if not traced:
        where = [line.strip() for line in lines[1:] if _FRAME.match(line)]
        return " ".join([*lines[:1], *where[:1]])
    said = " ".join(line for line in lines if line and not line.startswith(" "))
    frames = [place for place in _FRAME.findall(block) if not place[0].startswith("<")]
    own = [place for place in frames if not _LIBRARY.search(place[0])] or frames
    where = [f"({own[-1][0]}, line {own[-1][1]})"] if own else []
    return " ".join([said if len(said) <= 300 else f"{said[:297]}...", *where])


def last_lines(text: str, count: int = 6) -> str:
    """The last lines of a traceback."""
    return "\n".join(text.rstrip().splitlines()[-count:])
