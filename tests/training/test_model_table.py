"""docs/reference/models.md says of every type of model how it scores, and none scores wrong."""

from __future__ import annotations

import pytest
from transformers import __version__

from support.model_table import OK, row_of, small_model, table
from support.paths import ROOT

PAGE = (ROOT / "docs/reference/models.md").read_text()


@pytest.mark.parametrize("kind", ["bert", "bloom", "hyperclovax", "mistral", "phimoe"])
def test_the_page_has_the_row_of(kind: str) -> None:
    assert row_of(kind, small_model(kind)) in PAGE.splitlines()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of transformers, whose older models call what is deprecated
def test_the_page_has_every_type_and_at_least_95_score() -> None:
    rows = list(table())
    assert f"transformers {__version__}" in PAGE
    lines = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert rows == [line for line in lines if line.count("|") == 5]
    assert sum(row.count(f"| {OK} ") > 0 for row in rows) >= 95
