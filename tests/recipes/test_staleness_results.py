"""Results of the staleness ablation: kept, never computed twice, and compared in pairs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from support.paths import ROOT

FOLDER = ROOT / "recipes/benchmarks"
sys.path.insert(0, str(FOLDER))

from staleness import report  # noqa: E402
from staleness.plan import Results, fill, representative, stage_1, stage_2  # noqa: E402
from staleness.summary import Place, Table, estimate  # noqa: E402
from staleness.training import Cell  # noqa: E402


def test_an_interrupted_job_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl.gz"
    cells = list(stage_1(range(1), lags=(4, 0)))
    computed: list[Cell] = []

    def compute(cell: Cell) -> dict[str, Any]:
        computed.append(cell)
        return dict(vars(cell))

    fill(Results(path), cells[:7], compute)
    path.with_suffix(".part").write_bytes(b"killed while it wrote")
    fill(Results(path), cells, compute)
    assert len(computed) == len(set(computed)) == len({representative(cell) for cell in cells})
    assert Results(path).done == set(computed)
    assert {cell.lag for cell in computed} == {4, 0}


def test_the_results_in_the_repository_are_what_its_tables_show(tmp_path: Path) -> None:
    results = Results(FOLDER / "staleness" / "results.jsonl.gz")
    assert len(results.runs) > 2000 and len(results.gradients) > 100
    report.write(results.runs, tmp_path / "tables.md", results.gradients)
    kept = (FOLDER / "staleness" / "tables.md").read_text()
    assert (tmp_path / "tables.md").read_text() == kept


def test_runs_and_gradients_share_a_file_and_are_told_apart(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.jsonl.gz")
    assert results.runs == results.gradients == []
    results.append({"final": 0.5}, {"cosine_of_mean": 0.9})
    results.append({"final": 0.6})
    assert results.runs == [{"final": 0.5}, {"final": 0.6}]
    assert results.gradients == [{"cosine_of_mean": 0.9}]


def test_stage_2_has_all_lags_and_the_most_telling_first() -> None:
    cells = list(stage_2(["segment", "origin"], range(2)))
    assert {(c.lag, c.minibatches) for c in cells} == {
        (k, m) for k in (0, 1, 2, 4, 8) for m in (1, 2, 4)
    }
    assert cells[0].minibatches == 2 and min(c.lag for c in cells[: len(cells) // 3]) >= 2


def test_differences_are_paired_by_seed() -> None:
    place, noise = Place("whole", 4), (0.1, -0.2, 0.3)
    lines = [
        {**vars(Cell(method, "whole", 4, seed=seed)), "final": 0.5 + noise[seed] + gain}
        for seed in range(3)
        for method, gain in (("segment", 0.0), ("origin", -0.05))
    ]
    table = Table(lines)
    difference = table.difference(place, "origin", "segment")
    level = table.level(place, "origin")
    assert difference is not None and level is not None
    assert difference.mean == pytest.approx(-0.05) and difference.excludes_zero
    assert level.half > 0.3  # unpaired, nothing could be told
    pooled = table.pooled([place], "origin", "segment")
    assert pooled == difference
    assert table.pooled([place, Place("mixed", 4)], "origin", "segment") is None  # no pairs there
    assert estimate([1.0, 2.0, 3.0]).half == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert not estimate([0.3]).excludes_zero
