"""Recordings on disk: what is read is what was written, or an error says why not."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import sdp_lightning as sdp
from sdp_lightning.observability.recording import (
    RecordingWriter,
    fingerprint_of,
    next_run,
    schema,
    table as tables,
)
from sdp_lightning.observability.recording.files import remove_end_marks
from support.fork_server import ForkServer
from support.recordings import SETTINGS, assert_same_group, make_batch, write


def test_what_is_read_is_what_was_written_bit_by_bit(tmp_path: Path) -> None:
    write(tmp_path, [0, 1, 2])
    recording = sdp.Recording(tmp_path)
    assert recording.settings == SETTINGS and recording.versions == [0, 1, 2]
    for version, found in enumerate(recording):
        expected = make_batch(version)
        assert (found.version, found.step, found.places) == (
            *(version, 2 * version, expected.places),
        )
        for one, other in zip(found.groups, expected.groups, strict=True):
            assert_same_group(one, other)


def test_files_are_bounded_and_appear_whole(tmp_path: Path) -> None:
    write(tmp_path, range(5))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names.pop(0) == "_rank0000.end.json"
    assert names == [f"rank0000-run000-part0000{part}.parquet" for part in range(3)]
    rows = [pq.read_metadata(tmp_path / name).num_rows for name in names]
    assert rows == [12, 12, 6], "two batches of 6 trajectories a file"


def test_one_row_is_one_trajectory_and_every_column_is_documented(tmp_path: Path) -> None:
    write(tmp_path, [3])
    table = pq.read_table(tmp_path)
    documented = str(tables.__doc__)
    assert table.schema.names == schema().names
    for name in schema().names:
        assert f"``{name}``" in documented
    for field in schema().field("parts").type.value_type:
        assert f"``.{field.name}``" in documented
    row = table.to_pylist()[1]
    assert (row["version"], row["member"], row["reward"], row["finish_reason"]) == (
        *(3, 1, 3.1, "length"),
    )
    assert (row["head_version"], row["tail_version"], row["num_sampled"]) == (1, 3, 4)
    assert [part["kind"] for part in row["parts"]] == ["context", "segment"] * 2
    assert row["parts"][1]["proximal_version"] == 2 and row["parts"][3]["proximal"] is None


@pytest.mark.fault("process killed", "observer")
def test_what_a_killed_run_leaves_is_readable(fork_server: ForkServer, tmp_path: Path) -> None:
    """Killed while it writes: whole files stay, the one under way does not count."""
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "import pyarrow.parquet as pq\n"
        "from support.recordings import write\n"
        "folder, real, files = Path(sys.argv[1]), pq.write_table, []\n"
        "def dies(table, file, **settings):\n"
        "    files.append(file)\n"
        "    if len(files) == 3:\n"
        "        file.write(b'PAR1 half a file'); file.flush(); os.kill(os.getpid(), 9)\n"
        "    real(table, file, **settings)\n"
        "pq.write_table = dies\n"
        "write(folder, range(6))\n"
    )
    assert fork_server.start(script, str(tmp_path), stderr=2).wait(200.0) == -9
    assert [path.name[0] for path in sorted(tmp_path.iterdir())].count(".") == 1
    recording = sdp.Recording(tmp_path)
    assert recording.versions == [0, 1, 2, 3] and recording.is_whole is False


def test_a_recording_is_whole_until_another_start_goes_on_and_does_not_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def is_whole() -> bool | None:
        return sdp.Recording(tmp_path).is_whole

    write(tmp_path, [0, 1, 2])
    assert is_whole() is True and not caplog.records
    remove_end_marks(tmp_path)  # another start begins
    assert is_whole() is False
    (said,) = caplog.records
    assert "is not whole: it has 3 steps, versions 0 to 2. The run was killed" in said.getMessage()
    write(tmp_path, [3, 4], run=1, is_killed=True)
    assert is_whole() is False
    write(tmp_path, [3, 4, 5], run=2)
    assert is_whole() is True
    (tmp_path / "rank0000-run002-part00001.parquet").unlink()
    assert is_whole() is False, "the mark knows of version 5"


@pytest.mark.fault("corrupted data", "observer")
@pytest.mark.parametrize("torn", [b"", b"PAR1", b"PAR1 half a file PAR1"])
@pytest.mark.parametrize("mark", [b"", b'{"run": 0, "e', b"[]", b'{"run": null, "end": 3}', None])
def test_what_was_written_by_half_at_the_end_costs_only_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, torn: bytes, mark: bytes | None
) -> None:
    write(tmp_path, range(3))
    (tmp_path / "rank0000-run000-part00001.parquet").write_bytes(torn)
    if mark is not None:
        (tmp_path / "_rank0000.end.json").write_bytes(mark)
    recording = sdp.Recording(tmp_path)
    assert recording.versions == [0, 1] and recording.is_whole is False
    assert [batch.version for batch in recording] == [0, 1]
    (said,) = caplog.records
    assert "it has 2 steps" in said.getMessage() and "part00001.parquet is d" in said.getMessage()
    write(tmp_path, [2, 3], run=1)
    assert sdp.Recording(tmp_path).is_whole is True, "the next start does it again"


@pytest.mark.fault("exception", "observer")
def test_a_disk_that_is_full_at_the_end_leaves_a_recording_that_is_not_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = RecordingWriter(tmp_path, SETTINGS, rank=0, run=0, first_version=0, rows_per_file=1)
    writer.add(make_batch(0))
    monkeypatch.setattr(os, "fsync", raise_full)
    with pytest.raises(sdp.RecordingError, match=r"No space left.*Make room"):
        writer.close()
    writer.abandon()
    monkeypatch.undo()
    writer.close()
    assert sdp.Recording(tmp_path).is_whole is False


def raise_full(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_later_start_replaces_what_it_does_again(tmp_path: Path) -> None:
    write(tmp_path, [0, 1, 2, 3])
    assert next_run(tmp_path) == 1
    write(tmp_path, [2, 3, 4], run=1)
    recording = sdp.Recording(tmp_path)
    assert recording.versions == [0, 1, 2, 3, 4]
    write(tmp_path, [1], run=2)
    assert sdp.Recording(tmp_path).versions == [0, 1]


def test_parts_of_several_ranks_make_one_batch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, [0, 1, 2], rank=0, num_ranks=2)
    with pytest.raises(sdp.RecordingError, match=r"by 2 processes, and the files of rank 1 are"):
        sdp.Recording(tmp_path)
    write(tmp_path, [0, 1], rank=1, num_ranks=2)
    recording = sdp.Recording(tmp_path)
    assert recording.versions == [0, 1], "rank 1 was killed before it wrote version 2"
    assert "versions 2 to 2 are left out" in caplog.text
    expected = make_batch(1).groups * 2
    for one, other in zip(recording.read(1).groups, expected, strict=True):
        assert_same_group(one, other)


def only_file(folder: Path) -> Path:
    (path,) = folder.glob("*.parquet")
    return path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    import pyarrow as pa

    pq.write_table(pa.table({"a": [1]}), path)


def change_facts(path: Path, **changes: Any) -> None:
    table = pq.read_table(path)
    facts = json.loads(table.schema.metadata[b"sdp_lightning"]) | changes
    pq.write_table(table.replace_schema_metadata({"sdp_lightning": json.dumps(facts)}), path)


def newer(path: Path) -> None:
    change_facts(path, format=2)


def mislabeled(path: Path) -> None:
    change_facts(path, versions=[0, 1])


def other_columns(path: Path) -> None:
    pq.write_table(pq.read_table(path).drop_columns(["reward"]), path)


def nonsense(path: Path) -> None:
    import pyarrow as pa

    table = pq.read_table(path)
    rewards = pa.array([float("nan")] * len(table))
    pq.write_table(table.set_column(table.schema.names.index("reward"), "reward", rewards), path)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut, "is damaged"),
        (empty, "is damaged"),
        (foreign, "no recording of this package"),
        (newer, "has format 2"),
        (mislabeled, "has no row of it"),
        (other_columns, "other columns"),
        (nonsense, "values that make no trajectory: the reward"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_reason(
    harm: Any, message: str, tmp_path: Path
) -> None:
    write(tmp_path, [0])
    harm(only_file(tmp_path))
    with pytest.raises(sdp.RecordingError, match=message) as error:
        list(sdp.Recording(tmp_path))
    assert only_file(tmp_path).name in str(error.value)


def test_a_byte_that_changes_on_the_disk_never_changes_what_is_read(tmp_path: Path) -> None:
    write(tmp_path, [0])
    path, (expected,) = only_file(tmp_path), make_batch(0).groups[:1]
    data = path.read_bytes()
    refused = 0
    for at in range(4, len(data), 331):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        try:
            (batch,) = sdp.Recording(tmp_path)
        except sdp.RecordingError:
            refused += 1
        else:
            assert_same_group(batch.groups[0], expected)
    assert refused > 10


def test_a_recording_that_is_not_there_or_has_a_gap_says_so(tmp_path: Path) -> None:
    with pytest.raises(sdp.RecordingError, match=r"is not there\. Add Recorder"):
        sdp.Recording(tmp_path / "nowhere")
    with pytest.raises(sdp.RecordingError, match="has no recording in it"):
        sdp.Recording(tmp_path)
    write(tmp_path, range(6))
    with pytest.raises(sdp.RecordingError, match="has versions 0 to 5, not 6"):
        sdp.Recording(tmp_path).read(6)
    (tmp_path / "rank0000-run000-part00001.parquet").unlink()
    with pytest.raises(sdp.RecordingError, match="lacks versions 2, 3 between 0 and 5"):
        sdp.Recording(tmp_path)


def test_runs_that_differ_in_one_folder_are_told_apart(tmp_path: Path) -> None:
    write(tmp_path, [0])
    write(tmp_path, [1], run=1, model="large")
    with pytest.raises(sdp.RecordingError, match="differ in: model 'tiny' and 'large'"):
        sdp.Recording(tmp_path)


def test_a_folder_that_cannot_be_written_is_an_error_with_its_cause(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    writer = RecordingWriter(
        tmp_path / "file", SETTINGS, rank=0, run=0, first_version=0, rows_per_file=1
    )
    with pytest.raises(sdp.RecordingError, match=r"could not be written: .*Make room"):
        writer.add(make_batch(0))


def test_without_pyarrow_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for make in (sdp.Recorder, lambda: sdp.Recording("x"), lambda: sdp.ReplayDataModule("x")):
        with pytest.raises(sdp.ConfigError, match=r"pip install 'sdp-lightning\[recording\]'"):
            made = make()
            assert not made


def test_the_package_needs_no_pyarrow_until_something_is_recorded() -> None:
    script = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "import sdp_lightning.observability.recording\n"
        "assert not {'lightning', 'torch'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], timeout=200, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_another_vocabulary_has_another_fingerprint() -> None:
    assert fingerprint_of({"a": 0, "b": 1}) == fingerprint_of({"b": 1, "a": 0})
    assert fingerprint_of({"a": 0, "b": 1}) != fingerprint_of({"a": 1, "b": 0})


def test_no_rows_a_file_are_refused() -> None:
    with pytest.raises(sdp.ConfigError, match="rows_per_file must be at least 1, got 0"):
        sdp.Recorder(rows_per_file=0)
