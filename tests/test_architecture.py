"""The structure that docs/architecture.md promises: modules import only from floors below their own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "igrpo_lite"
FLOORS = [
    {"types", "errors", "versions"},
    {"config", "defaults", "environment", "prompts"},
    {"fields", "planning", "problems", "rewards"},
    {"tiny"},
    {"checks", "recipe_file", "retired"},
    {"settings"},
    {"policy"},
    {"sampling"},
    {"algorithms"},
    {"evaluation", "export", "report"},
    {"training"},
    {"comparison"},
    {"cli", "trl"},
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem not in ("__init__", "__main__")
)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = (
                [node.module] if node.module != "igrpo_lite" else [f"igrpo_lite.{alias.name}" for alias in node.names]
            )
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("igrpo_lite.")}
    return rooms - {"__version__"}


def test_every_room_has_a_floor():
    assert {room_of(path) for path in MODULES} == LEVEL.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_from_below(path):
    room = room_of(path)
    above = {other for other in imported_rooms(path) if other != room and LEVEL[other] >= LEVEL[room]}
    assert not above


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_is_two_things(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 420
