"""Which fault is tested in which phase: the table of docs/faults.md, made from the tests.

A test shows a cell by ``@pytest.mark.fault(kind, phase)``; with ``only=...``, a regular expression,
those of its cases show it whose id matches.
``PYTHONPATH=tests python tests/support/fault_matrix.py > docs/faults.md`` writes the table anew,
``--json`` prints what it is made of.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import pytest

from support.paths import TESTS

KINDS = ("process killed", "thread died", "exception", "hang", "slow", "corrupted data")
PHASES = {
    "start": "connecting to the servers of a run",
    "fetch": "reading the next row of the prompts",
    "generate": "sampling, by the engine in the process or by servers",
    "completion": "reading and scoring what the policy wrote, which may be anything",
    "reward": "calling the reward",
    "queue": "handing finished groups to the trainer, and its wait for them",
    "score": "the proximal log-probs of tokens that were sampled by an older version",
    "train step": "forward, backward and optimizer",
    "gather": "what ranks agree on: batch, end, errors, stopping",
    "publish": "pausing, sending the weights, committing the version",
    "observer": "callbacks and loggers that show the run, and the files that they keep",
    "checkpoint": "writing one, and exporting it",
    "resume": "reading one, and repeating what was under way",
    "stranger": "who connects to a port of the run, or looks at its folders, and is none of it",
    "teardown": "closing executor, engine, servers and reward workers",
}
QUICKLY = ["--collect-only", "-qq", "-p", "no:cacheprovider", "--assert=plain", "-o", "addopts="]
APART = ("slow", "vllm", "gpu")  # not among the tests that `make test` runs

Cell = tuple[str, str]  # kind, phase

OWN = "the trainer's own process; that its kill costs no row is shown under checkpoint and resume."
MAIN = "the trainer's thread, which ends with its process."
NOT_APPLICABLE: dict[Cell, str] = {
    ("thread died", "start"): "The thread that calls servers is that of generate.",
    ("process killed", "fetch"): f"Rows are read in {OWN}",
    ("process killed", "queue"): f"The queue is in {OWN}",
    ("thread died", "score"): f"Scores are computed in {MAIN}",
    ("thread died", "train step"): f"Steps are made in {MAIN}",
    ("thread died", "checkpoint"): f"Checkpoints are written in {MAIN}",
    ("thread died", "stranger"): "No thread of the run is a stranger's.",
    ("corrupted data", "teardown"): "Teardown reads no data.",
}
NOT_TESTED: dict[Cell, str] = {}

HEAD = """\
# Faults

What happens when something fails, by phase and kind: the number of tests that make it happen, and
see the run recover or end with an error that names what failed, within a deadline and with every
row accounted for. *Slow* is what takes long and ends: it must not be taken for a fault. *n/a* is a
cell that cannot be, a question mark one that no test shows; both have their reasons below. A hang
in the trainer's own thread is ended by `sdp.Watchdog`, which is opt-in. Tests in italics need
minutes, vLLM or a GPU and are not run by `make test`; no cell rests on them alone. This page is
made from the marks of the tests, by `python tests/support/fault_matrix.py > docs/faults.md`.
"""


@dataclass(frozen=True)
class Shown:
    """One test function that shows one cell; ``is_apart`` if `make test` runs no such case."""

    kind: str
    phase: str
    file: str
    name: str
    is_apart: bool

    @property
    def cell(self) -> Cell:
        return self.kind, self.phase


def by_cell(shown: Iterable[Shown]) -> dict[Cell, list[Shown]]:
    """The tests of each cell, once each, in the order of files and names.

    Raises:
        ValueError: if a test names a kind or a phase that is none.
    """
    found: dict[Cell, dict[tuple[str, str], Shown]] = defaultdict(dict)
    for one in shown:
        if one.kind not in KINDS or one.phase not in PHASES:
            raise ValueError(f"{one.file}::{one.name}: no cell {one.cell}")
        tests = found[one.cell]
        before = tests.get((one.file, one.name))
        if before is None or before.is_apart:
            tests[one.file, one.name] = one
    return {cell: [tests[key] for key in sorted(tests)] for cell, tests in found.items()}


def num_tested(cells: Mapping[Cell, Sequence[Shown]]) -> int:
    """Cells that a test of `make test` shows."""
    return sum(any(not one.is_apart for one in tests) for tests in cells.values())


def render(shown: Iterable[Shown]) -> str:
    """The page."""
    cells = by_cell(shown)
    total = len(KINDS) * len(PHASES)
    lines = [HEAD, f"{num_tested(cells)} of {total} cells are tested.", ""]
    lines += ["| phase | " + " | ".join(KINDS) + " |", "|---" * (len(KINDS) + 1) + "|"]
    for phase in PHASES:
        row = [_count(cells, (kind, phase)) for kind in KINDS]
        lines.append("| " + " | ".join([phase, *row]) + " |")
    for title, reasons in (("Cannot be", NOT_APPLICABLE), ("Not tested", NOT_TESTED)):
        lines += ["", f"## {title}"] if reasons else []
        lines += [f"- {phase}, {kind}: {why}" for (kind, phase), why in reasons.items()]
    for phase, meaning in PHASES.items():
        lines += ["", f"## {phase}", f"{meaning[0].upper()}{meaning[1:]}."]
        for kind in KINDS:
            if tests := cells.get((kind, phase)):
                lines += ["", f"**{kind}**"] + [f"- {_name(one)}" for one in tests]
    return "\n".join(lines) + "\n"


def _count(cells: Mapping[Cell, Sequence[Shown]], cell: Cell) -> str:
    if cell in cells:
        return str(len(cells[cell]))
    return "n/a" if cell in NOT_APPLICABLE else "?"


def _name(one: Shown) -> str:
    name = f"`{one.file}::{one.name}`"
    return f"*{name}*" if one.is_apart else name


class Collector:
    """A pytest plugin that keeps the marks of what was collected."""

    def __init__(self) -> None:
        self.shown: list[Shown] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        unmatched: set[tuple[str, str]] = set()
        matched: set[tuple[str, str]] = set()
        for item in session.items:
            assert isinstance(item, pytest.Function)
            is_apart = any(item.get_closest_marker(name) for name in APART)
            case = item.name.removeprefix(item.originalname).strip("[]")
            for mark in item.iter_markers("fault"):
                key = (f"{item.path.name}::{item.originalname}", str(mark))
                unmatched.add(key)
                kind, phase = mark.args
                if re.search(mark.kwargs.get("only", ""), case):
                    matched.add(key)
                    self.shown.append(
                        Shown(kind, phase, item.path.name, item.originalname, is_apart)
                    )
        if unmatched - matched:
            raise ValueError(f"marks that no case matches: {sorted(unmatched - matched)}")


def collect() -> list[Shown]:
    """Ask pytest for the tests that carry the mark."""
    files = sorted(
        str(path) for path in TESTS.rglob("test_*.py") if "mark.fault(" in path.read_text()
    )
    collector = Collector()
    with contextlib.redirect_stdout(sys.stderr):
        code = pytest.main([*QUICKLY, *files], plugins=[collector])
    if code != 0:
        raise SystemExit(int(code))
    return sorted(set(collector.shown), key=lambda one: (*one.cell, one.file, one.name))


def main() -> None:
    """Print the page, or with ``--json`` what it is made of."""
    shown = collect()
    if "--json" in sys.argv[1:]:
        print(json.dumps([asdict(one) for one in shown]))
    else:
        print(render(shown), end="")


if __name__ == "__main__":
    main()
