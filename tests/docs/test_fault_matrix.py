"""docs/faults.md is the table that the tests' marks make, and no cell of it is passed over."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from support.fault_matrix import (
    KINDS,
    NOT_APPLICABLE,
    NOT_TESTED,
    PHASES,
    Shown,
    by_cell,
    num_tested,
    render,
)
from support.paths import ROOT, SUPPORT

LEAST = 35


@pytest.fixture(scope="module")
def shown() -> list[Shown]:
    found = subprocess.run(
        [sys.executable, str(SUPPORT / "fault_matrix.py"), "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert found.returncode == 0, found.stderr
    return [Shown(**entry) for entry in json.loads(found.stdout)]


def test_the_page_is_what_the_tests_say_now(shown: list[Shown]) -> None:
    page = (ROOT / "docs" / "faults.md").read_text()
    assert page == render(shown), "run `python tests/support/fault_matrix.py > docs/faults.md`"


def test_enough_cells_are_tested(shown: list[Shown]) -> None:
    assert num_tested(by_cell(shown)) >= LEAST


def test_every_cell_is_tested_or_has_its_reason_and_is_in_one_place(shown: list[Shown]) -> None:
    tested = {one.cell for one in shown if not one.is_apart}
    places = [*tested, *NOT_APPLICABLE, *NOT_TESTED]
    assert sorted(places) == sorted((kind, phase) for kind in KINDS for phase in PHASES)
    assert {one.cell for one in shown} == tested, "a cell rests on tests that are not run"
    assert all({**NOT_APPLICABLE, **NOT_TESTED}.values())


def test_a_test_is_counted_once_and_apart_only_if_all_its_cases_are() -> None:
    def make(name: str, is_apart: bool = False, phase: str = "fetch") -> Shown:
        return Shown("hang", phase, "test_a.py", name, is_apart)

    cells = by_cell([make("b", True), make("a", True), make("b"), make("b", True)])
    assert cells == {("hang", "fetch"): [make("a", True), make("b")]}
    assert num_tested(cells) == 1 and num_tested(by_cell([make("a", True)])) == 0
    page = render([make("b"), make("a", True)])
    assert f"1 of {len(KINDS) * len(PHASES)} cells are tested." in page
    assert "| fetch | n/a | ? | ? | 2 | ? | ? |" in page
    assert "- *`test_a.py::a`*\n- `test_a.py::b`" in page
    with pytest.raises(ValueError, match=r"test_a.py::a: no cell \('hang', 'sleep'\)"):
        by_cell([make("a", phase="sleep")])
