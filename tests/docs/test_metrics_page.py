"""docs/metrics.md is the table that the names make."""

from __future__ import annotations

from support.metrics_page import render
from support.paths import ROOT


def test_the_page_is_what_the_names_say_now() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert page == render(), "run `python tests/support/metrics_page.py > docs/metrics.md`"
