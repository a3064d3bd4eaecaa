"""``igrpo-lite recipes``: the configurations that come with the package, listed, shown and copied."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from igrpo_lite.config.fields import nearest
from igrpo_lite.errors import ConfigError

CARD = re.compile(r"(?P<model>[^/]+)/(?P<method>[^/_]+)_(?P<card>[^/_]+)")
"""Names of recipes that are made for one GPU; model and card as ``igrpo-lite models`` and ``gpus`` call them."""

_Name = Annotated[str, Parameter(help="Name from igrpo-lite recipes ls; its last part is enough.")]


def app() -> App:
    """The verbs of recipes."""
    group = App(
        name="recipes",
        help="List the recipes that come with igrpo-lite, show one, or copy one to start from.",
        help_epilogue="",
    )
    group.command(ls, name="ls")
    group.command(show, name="show")
    group.command(cp, name="cp")
    return group


def folder() -> Path:
    """Where the recipes lie: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def names() -> list[str]:
    """The recipes by name, with the folder that they lie in: general ones first, then those for one GPU."""
    found = [path.relative_to(folder()).with_suffix("").as_posix() for path in folder().rglob("*.yaml")]
    return sorted(found, key=lambda name: ("/" in name, name))


def path_of(name: str) -> Path:
    """The file of a recipe that is there."""
    return folder() / f"{name}.yaml"


def find(recipe: str) -> Path:
    """The file of a recipe given by path, or by name, with or without its folder."""
    path = Path(recipe)
    return path if path.is_file() else path_of(_named(recipe))


def summary(name: str) -> str:
    """A recipe's opening sentence."""
    lines = path_of(name).read_text(encoding="utf-8").splitlines()[1:]
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
    return " ".join(line.lstrip("# ") for line in comment).partition(". ")[0].rstrip(".")


def ls() -> None:
    """List the recipes with one sentence each."""
    width = max(map(len, names()), default=0)
    for name in names():
        print(f"{name:{width}}  {summary(name)}")


def show(name: _Name, /) -> None:
    """Print a recipe."""
    print(path_of(_named(name)).read_text(encoding="utf-8"), end="")


def cp(
    name: _Name,
    dest: Annotated[Path | None, Parameter(help="File or folder to copy to; unset: here.")] = None,
    /,
) -> None:
    """Copy a recipe, and the files that it names, to start from. Nothing is overwritten."""
    name = _named(name)
    target = dest or Path()
    target = target / path_of(name).name if dest is None or target.is_dir() else target
    text = path_of(name).read_text(encoding="utf-8").replace(f"recipes/{name}.yaml", target.as_posix())
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


def _named(recipe: str) -> str:
    """The name that is meant: whole, or without its folder where only one is called so.

    Raises:
        ConfigError: there is none, or there are several.
    """
    known = names()
    wanted = recipe.replace("\\", "/").removesuffix(".yaml").removeprefix("recipes/")
    if wanted in known:
        return wanted
    alike = [name for name in known if name.rpartition("/")[2] == wanted]
    if len(alike) == 1:
        return alike[0]
    inside = alike or [name for name in known if name.startswith(f"{wanted.rstrip('/')}/")]
    if inside:
        raise ConfigError(f"{recipe} may be {', '.join(inside)}; name one of them")
    ends = {name.rpartition("/")[2]: name for name in known}
    near = nearest(wanted, known) or ends.get(nearest(wanted.rpartition("/")[2], ends) or "")
    raise ConfigError(
        f"no such recipe: {recipe}" + (f"; did you mean {near}?" if near else "; see igrpo-lite recipes ls")
    )


def _write(path: Path, content: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
    print(path)
