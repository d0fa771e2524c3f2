"""docs/metrics.md is the table that the names make."""

from __future__ import annotations

from pathlib import Path

from metrics_page import render


def test_the_page_is_what_the_names_say_now() -> None:
    page = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    assert page == render(), "run `python tests/metrics_page.py > docs/metrics.md`"
