"""The generated pages are what the code says now; ``make docs`` rewrites them."""

from __future__ import annotations

import re
from pathlib import Path

import make_docs as docs
import pytest

from igrpo_lite.config.fields import FIELDS

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_generated_pages_are_current() -> None:
    assert (DOCS / "config.md").read_text(encoding="utf-8") == docs.config_page()


@pytest.mark.parametrize("page", docs.TABLES)
def test_tables_within_pages_are_current(page: str) -> None:
    assert (DOCS / page).read_text(encoding="utf-8") == docs.filled_page(DOCS, page)


def test_every_setting_is_documented_once() -> None:
    page = docs.config_page()
    assert all(len(re.findall(rf"^\| (\*\*)?`{name}`(\*\*)? \|", page, re.MULTILINE)) == 1 for name in FIELDS)
