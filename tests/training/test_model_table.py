"""docs/reference/models.md says what each type of model does, and no cell of it is a fault."""

from __future__ import annotations

import random

import pytest
from transformers import __version__

from support.model_table import COLUMNS, FAULT, KINDS, OK, row_of, small_model, table
from support.paths import ROOT

PAGE = (ROOT / "docs/reference/models.md").read_text()
ROWS = [line for line in PAGE.splitlines() if line.startswith("| `") and f" {OK} |" in line]
SAMPLE = random.Random(__version__).sample(KINDS, 14)


@pytest.mark.parametrize("kind", ["bert", "arcee"])
def test_the_page_has_the_row_of(kind: str) -> None:
    assert row_of(kind, small_model(kind)) in PAGE.splitlines()


@pytest.mark.slow  # with the rest of the page
def test_at_least_95_types_score_and_70_run_in_the_embedded_engine() -> None:
    assert f"transformers {__version__}" in PAGE
    assert FAULT not in PAGE
    cells = [dict(zip(COLUMNS, row.split(" | ")[1:], strict=True)) for row in ROWS]
    assert sum(row["padded"] == OK for row in cells) >= 95
    assert sum(row["engine"] == row["swap"] == OK for row in cells) >= 70


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of transformers, whose older models call what is deprecated
def test_the_page_has_the_rows_of_a_sample() -> None:
    rows = list(table(SAMPLE))
    assert len(rows) >= len(SAMPLE) // 2
    assert [row for row in rows if row not in PAGE.splitlines()] == []
