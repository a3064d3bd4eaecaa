"""``igrpo-lite recipes``: the configurations that come with the package, listed and copied."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from igrpo_lite.errors import ConfigError
from igrpo_lite.fields import nearest


def app() -> App:
    """The two verbs of recipes."""
    group = App(
        name="recipes", help="List the recipes that come with igrpo-lite, or copy one to start from.", help_epilogue=""
    )
    group.command(ls, name="ls")
    group.command(cp, name="cp")
    return group


def folder() -> Path:
    """Where the recipes lie: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def names() -> list[str]:
    """The recipes by name."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def find(recipe: str) -> Path:
    """The file of a recipe given by path or by name."""
    path = Path(recipe)
    if path.is_file():
        return path
    name = path.name.removesuffix(".yaml")  # not ``stem``, which would cut at a version's dot
    if name in names() and path.parent.name in ("", "recipes"):
        return folder() / f"{name}.yaml"
    raise ConfigError(_missing(recipe))


def summary(name: str) -> str:
    """A recipe's opening sentence."""
    lines = (folder() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[1:]
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
    return " ".join(line.lstrip("# ") for line in comment).partition(". ")[0].rstrip(".")


def ls() -> None:
    """List the recipes with one sentence each."""
    width = max(map(len, names()), default=0)
    for name in names():
        print(f"{name:{width}}  {summary(name)}")


def cp(
    name: Annotated[str, Parameter(help="Recipe to copy.")],
    dest: Annotated[Path | None, Parameter(help="File or folder to copy to; unset: here.")] = None,
    /,
) -> None:
    """Copy a recipe, and the files that it names, to start from. Nothing is overwritten."""
    if name not in names():
        raise ConfigError(_missing(name))
    target = dest or Path()
    target = target / f"{name}.yaml" if dest is None or target.is_dir() else target
    text = (folder() / f"{name}.yaml").read_text(encoding="utf-8").replace(f"recipes/{name}.yaml", target.as_posix())
    copies: dict[Path, str] = {}
    for mention in sorted(set(re.findall(r"\brecipes/[\w/-]+\.(?:py|jsonl)\b", text))):
        companion = target.parent / Path(mention).name
        copies[companion] = (folder().parent / mention).read_text(encoding="utf-8")
        text = text.replace(mention, companion.as_posix())
    copies[target] = text
    taken = [path for path in copies if path.exists()]
    if taken:
        raise ConfigError([f"{path} exists already and is left as it is; name another DEST" for path in taken])
    for path, content in copies.items():
        _write(path, content)


def _missing(recipe: str) -> str:
    near = nearest(Path(recipe).name.removesuffix(".yaml"), names())
    return f"no such recipe: {recipe}" + (f"; did you mean {near}?" if near else "; see igrpo-lite recipes ls")


def _write(path: Path, content: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
    print(path)
