"""The structure that docs/architecture.md promises: imports go down the floors, and never in a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "igrpo_lite"
FLOORS = [
    {"types", "errors", "versions", "config", "environment", "prompts", "worker"},
    {"answers", "problems", "rewards", "planning", "inputs", "tiny"},
    {"policy", "sampling"},
    {"algorithms", "workbench"},
    {"training", "evaluation", "export", "report", "doctor", "comparison"},
    {"cli", "trl"},
]
"""Rooms, modules or packages, from the foundation up. A room imports from its own floor and from those below."""
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): ast.parse(
        path.read_text(encoding="utf-8")
    )
    for path in PACKAGE.rglob("*.py")
}


def room_of(module: str) -> str:
    return module.split(".")[1]


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """Names of the package's modules that ``nodes`` import, also those written as strings: for ``import_module``, for
    ``python -m``. A string that goes on with a variable counts as far as it goes."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not looked at here"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {name if name in MODULES else str(node.module) for name in full}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and re.fullmatch(r"igrpo_lite\.[\w.]+", str(node.value)):
            names.add(node.value.removesuffix("."))
    return {name for name in names if name.split(".")[0] == PACKAGE.name}


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when the module is imported, and what it imports for its types: not the bodies of functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from at_import(child)


def test_no_import_circles():
    """Two modules that need each other, be it for a type, are one thing in two files."""
    TopologicalSorter({name: imported(at_import(tree)) for name, tree in MODULES.items()}).prepare()  # names the circle


def test_imports_only_from_below():
    """Calls count too: six floors, and on each of them an order."""
    inner = {name: tree for name, tree in MODULES.items() if name not in ("igrpo_lite", "igrpo_lite.__main__")}
    assert {room_of(name) for name in inner} == LEVEL.keys()
    arrows: dict[str, set[str]] = {room: set() for room in LEVEL}
    for name, tree in inner.items():
        others = imported(ast.walk(tree)) - {"igrpo_lite"}
        assert not [other for other in others if LEVEL[room_of(other)] > LEVEL[room_of(name)]], name
        arrows[room_of(name)] |= {room_of(other) for other in others} - {room_of(name)}
    TopologicalSorter(arrows).prepare()  # names the circle
