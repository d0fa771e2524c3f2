"""Files of a run's report: what a kill, a resume or another run leaves of them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from sdp_lightning.observability.report import write_report
from sdp_lightning.observability.report.files import RunWriter, read_run
from support.reports import Page, make_step, write_run


def test_steps_that_a_resume_did_again_count_once(tmp_path: Path) -> None:
    steps = [make_step(v) for v in (1, 2, 3)] + [make_step(v, train__reward=9) for v in (2, 3, 4)]
    run = read_run(write_run(tmp_path, steps))
    assert [row["rollout/version"] for row in run.steps] == [1, 2, 3, 4]
    assert [row["train/reward"] for row in run.steps] == [0.1, 9, 9, 9]


@pytest.mark.parametrize("torn", ["", '{"rollout/version": 3.0, "train/rew', "{"])
def test_a_line_that_a_kill_has_torn_costs_no_other(tmp_path: Path, torn: str) -> None:
    folder = write_run(tmp_path, [make_step(v) for v in (1, 2)])
    with (folder / "report" / "steps.jsonl").open("a") as file:
        file.write(torn)
    writer = RunWriter(folder)
    for version in (3, 4):
        writer.step(make_step(version))
    assert [row["rollout/version"] for row in read_run(folder).steps] == [1, 2, 3, 4]


def test_a_new_run_in_the_same_folder_replaces_the_old_one(tmp_path: Path) -> None:
    steps = [make_step(v) for v in (1, 2, 3, 1)]
    assert len(read_run(write_run(tmp_path, steps)).steps) == 1


@pytest.mark.fault("corrupted data", "observer")
def test_any_end_that_a_kill_may_leave_of_a_table_is_left_out(tmp_path: Path) -> None:
    """A number that is cut is another number."""
    path = tmp_path / "metrics.csv"
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, make_step(1))
        table.writeheader()
        table.writerows([make_step(1), make_step(2)])
    data = path.read_bytes()
    last = data.rindex(b"\n", 0, -1) + 1
    for end in range(last, len(data) - 2):  # before the end of the line
        path.write_bytes(data[:end])
        assert [row["rollout/version"] for row in read_run(tmp_path).steps] == [1]
    path.write_bytes(data + b"a word,1,2,3\n\xff\n")
    assert [row["rollout/version"] for row in read_run(tmp_path).steps] == [1, 2]


@pytest.mark.fault("corrupted data", "observer")
@pytest.mark.parametrize("torn", ["", "{", '{"status": "run', "3"])
def test_settings_and_samples_that_were_written_by_half_are_left_out_and_named(
    tmp_path: Path, torn: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_run(tmp_path / "run", [make_step(1)])
    for name in ("run.json", "state.json"):
        (folder / "report" / name).write_text(torn)
    assert Page(write_report(folder).read_text()).values["steps"] == 1
    said = [record.getMessage() for record in caplog.records]
    assert [text.split("/")[-1] for text in said] == [
        "run.json was written by half, and is left out.",
        "state.json was written by half, and is left out.",
    ]
