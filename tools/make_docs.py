"""Writes from the code what would drift else: ``python tools/make_docs.py docs`` (``make docs``).

These are docs/config.md, and tables within other pages.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from igrpo_lite.cli.flags import SHORT
from igrpo_lite.config import SECTIONS, Section
from igrpo_lite.config.defaults import MODEL_DEFAULTS
from igrpo_lite.config.fields import FIELDS, choices, default_text, short_type
from igrpo_lite.environment import pins

VERBS = (
    (),
    ("train",),
    ("check",),
    ("scan",),
    ("eval",),
    ("export",),
    ("compare",),
    ("show-prompt",),
    ("plan",),
    ("models",),
    ("gpus",),
    ("recipes", "ls"),
    ("recipes", "show"),
    ("recipes", "cp"),
    ("doctor",),
    ("verify",),
    ("data", "ls"),
    ("data", "show"),
)


def sets_table() -> list[str]:
    """The sets A, B and C side by side, as lines of Markdown."""
    files = ("a.txt", "b.txt", "c.txt")
    sets = [pins.pins(file) for file in files]
    lines = ["| | A | B | C |", "|---|---|---|---|"]
    lines.append("| " + " | ".join(["`-r igrpo_lite/environment/sets/`", *(f"`{file}`" for file in files)]) + " |")
    others = [", ".join(f"`{path.name}`" for path in sorted(pins.SETS.glob(f"{file[0]}-*.txt"))) for file in files]
    lines.append("| " + " | ".join(["other builds of the same versions", *(names or "" for names in others)]) + " |")
    for package in dict.fromkeys(package for one in sets for package in one):
        lines.append("| " + " | ".join([package, *(one.get(package, "") for one in sets)]) + " |")
    return lines


TABLES: dict[str, tuple[str, Callable[[], list[str]]]] = {
    "install.md": ("sets of versions", sets_table),
}
"""Pages with a table of ours in them: what its comments call it, and its lines."""

_BRIEF = [name for lines in SHORT.values() for name in lines]
_NOTE = "<!-- Written by `make docs`; change the code instead. -->"


def config_page() -> str:
    """Every setting in a table per section."""
    models = ", ".join(f"`{model}`" for model in MODEL_DEFAULTS)
    lines = [
        "# Settings",
        "",
        _NOTE,
        "",
        "Every setting is a flag (`--max-steps 10`), a line of a recipe (`max_steps: 10`) and an argument of",
        "`igrpo_lite.train(max_steps=10)`. Flags win over the recipe, the recipe over the defaults of the model",
        f"({models}), these over the general defaults.",
        f"`igrpo-lite train --help` shows the {len(_BRIEF)} in bold, `--help-all` all of them.",
    ]
    for section in SECTIONS:
        lines += ["", f"## {section.__doc__}", "", "| setting | type | default | meaning |", "|---|---|---|---|"]
        lines += [_row(name, section) for name in section.model_fields]
    return "\n".join(lines) + "\n"


def filled(text: str, title: str, lines: list[str]) -> str:
    """A page's text with the table called ``title`` made anew."""
    begin, end = f"<!-- {title}: written by `make docs` -->", "<!-- end -->"
    new = "\n".join([begin, *lines, end])
    made, count = re.subn(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: new, text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"the page must have one place for its table, between {begin} and {end}")
    return made


def filled_page(folder: Path, page: str) -> str:
    """A page as it stands, with its table made anew."""
    title, lines = TABLES[page]
    return filled((folder / page).read_text(encoding="utf-8"), title, lines())


def write(folder: Path) -> None:
    """Write the pages and their tables."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.md").write_text(config_page(), encoding="utf-8")
    for page in TABLES:
        (folder / page).write_text(filled_page(folder, page), encoding="utf-8")


def _row(name: str, section: type[Section]) -> str:
    field = section.model_fields[name]
    few = choices(field)
    kind = ", ".join(f"`{choice}`" for choice in few) if few else short_type(field)
    kind = f"list of {kind}" if few and isinstance(field.default, list) else kind
    default = f"`{default_text(field.default)}`" if field.default is not None else "unset"
    special = [f"{model}: `{default_text(own[name])}`" for model, own in MODEL_DEFAULTS.items() if name in own]
    shown = f"**`{name}`**" if name in _BRIEF else f"`{name}`"
    cells = (shown, kind, "; ".join([default, *special]), (FIELDS[name].description or "").replace("|", "\\|"))
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
