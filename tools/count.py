"""Numbers of the library's shape: ``python tools/count.py [folder of a checkout] [--cases]``.

Imports count wherever they stand, for circles of modules those inside functions do not. ``--cases`` collects the tests,
which takes a minute.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

NAME = "igrpo_lite"
PAGE = {"Trainer": {"_step"}, "RolloutCollector": None, "Groups": None}
"""Classes with the algorithm, and which methods of theirs; ``None``: all but what stands beside it."""
BESIDE = {"__init__", "drafted", "load_drafted", "close", "_places", "_n_drafts", "_on_sampled", "_keep", "_expect"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def read(root: Path) -> dict[str, ast.Module]:
    """The package's modules by name."""
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
        for path in (root / NAME).rglob("*.py")
    }


def imports(nodes: Iterable[ast.AST], modules: Mapping[str, object]) -> dict[str, str]:
    """Own modules that ``nodes`` import, by the names under which they, or what is theirs, is known."""
    found = {}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == NAME:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found[alias.asname or alias.name] = full if full in modules else str(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.asname or alias.name: alias.name for alias in node.names if alias.name in modules}
    return found


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """What is not in the body of a function."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, Function | ast.Lambda):
            yield child
            yield from at_import(child)


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def methods(class_: ast.ClassDef) -> list[Function]:
    return [node for node in class_.body if isinstance(node, Function)]


def classes(modules: Mapping[str, ast.Module]) -> Iterator[tuple[str, ast.ClassDef, int]]:
    """Every class with its module, and how many own modules it uses."""
    for name, tree in modules.items():
        known = imports(ast.walk(tree), modules)
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                used = {known[n.id] for n in ast.walk(node) if isinstance(n, ast.Name) and n.id in known}
                yield name, node, len(used)


def floors(arrows: set[tuple[str, str]]) -> int | str:
    """The longest chain of packages, which no layout can do with fewer floors than."""
    graph: dict[str, set[str]] = {}
    for above, below in arrows:
        graph.setdefault(above, set()).add(below)
    height: dict[str, int] = {}
    try:
        for room in TopologicalSorter(graph).static_order():
            height[room] = 1 + max((height[below] for below in graph.get(room, ())), default=0)
    except CycleError as error:
        return f"circle: {' -> '.join(error.args[1])}"
    return max(height.values())


def circles(graph: Mapping[str, set[str]]) -> list[str]:
    """Pairs of modules that import each other."""
    return [f"{a} <-> {b}" for a in sorted(graph) for b in sorted(graph[a]) if a < b and a in graph.get(b, ())]


def settings(root: Path) -> str:
    code = f"from {NAME}.config import RunConfig; print(len(RunConfig.model_fields))"
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True).stdout.strip()


def cases(root: Path) -> str:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    return done.stdout.strip().splitlines()[-1]


def main(root: Path, with_cases: bool) -> None:
    modules = read(root)
    graph = {name: set(imports(ast.walk(tree), modules).values()) for name, tree in modules.items()}
    first = {name: set(imports(at_import(tree), modules).values()) for name, tree in modules.items()}
    inner = [name for name in modules if room_of(name) not in ("", "__main__")]
    pairs = {(room_of(name), room_of(other)) for name in inner for other in graph[name]}
    arrows = {(a, b) for a, b in pairs if b and a != b}
    sources = [path.read_text() for path in (root / NAME).rglob("*.py")]
    tests = [path.read_text() for path in (root / "tests").glob("test_*.py")]
    found = list(classes(modules))
    print(f"library: {sum(len(s.splitlines()) for s in sources):,} lines in {len(sources)} files")
    print(f"settings: {settings(root)}")
    print(f"packages: {len({room_of(n) for n in inner})}, import arrows: {len(arrows)}, floors: {floors(arrows)}")
    print(f"circles of modules: {'; '.join(circles(first)) or 'none'}")
    print("largest classes by methods:")
    for name, node, _ in sorted(found, key=lambda entry: -len(methods(entry[1])))[:5]:
        print(f"  {len(methods(node)):3} {name}.{node.name}")
    print("largest classes by own modules that they use:")
    for name, node, used in sorted(found, key=lambda entry: -entry[2])[:5]:
        print(f"  {used:3} {name}.{node.name}")
    page = [
        method
        for _, node, _ in found
        if node.name in PAGE
        for method in methods(node)
        if method.name in (PAGE[node.name] or {m.name for m in methods(node)} - BESIDE)
    ]
    lines = sum((method.end_lineno or 0) - method.lineno + 1 for method in page)
    print(f"the page: {lines} lines in {len(page)} functions")
    print(f"tests: {sum(s.count('def test_') for s in tests)} functions in {len(tests)} files")
    if with_cases:
        print(f"cases: {cases(root)}")


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    main(Path(words[0] if words else Path(__file__).parents[1]).resolve(), "--cases" in sys.argv)
