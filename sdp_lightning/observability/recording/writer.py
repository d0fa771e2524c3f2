"""Writer of a recording: files appear complete, or not at all."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from sdp_lightning.config.atomic_files import atomic_file
from sdp_lightning.errors import RecordingError
from sdp_lightning.observability.recording.files import (
    FORMAT,
    KEY,
    EndMark,
    RecordingSettings,
    file_name,
)
from sdp_lightning.observability.recording.table import (
    RecordedBatch,
    import_pyarrow,
    rows_of,
    schema,
)


class RecordingWriter:
    """Writes one process' part of one start of a run.

    A kill loses the batches that were added since the last file, and leaves no end mark.

    Args:
        folder: made if it is not there.
        settings: kept in every file.
        rank: rank of this process.
        run: number of the start, higher than those before.
        first_version: policy version at which the start begins.
        rows_per_file: number of trajectories from which on a file is written.
    """

    def __init__(
        self,
        folder: Path,
        settings: RecordingSettings,
        *,
        rank: int,
        run: int,
        first_version: int,
        rows_per_file: int,
    ) -> None:
        self.folder, self._rank, self._run = folder, rank, run
        self._rows_per_file = rows_per_file
        self._facts = {
            "format": FORMAT,
            "first_version": first_version,
            "settings": asdict(settings),
            "marks_end": True,
        }
        self._end, self._is_over = first_version, False
        self._batches: list[RecordedBatch] = []
        self._part = 0

    def add(self, batch: RecordedBatch) -> None:
        """Keep a batch, and write a file if there are enough rows.

        Raises:
            RecordingError: naming the file and why it could not be written.
        """
        self._batches.append(batch)
        if sum(b.num_trajectories for b in self._batches) >= self._rows_per_file:
            self.flush()

    def abandon(self) -> None:
        """Drop the batches that are not in a file yet: the recording remains without end mark."""
        self._batches, self._is_over = [], True

    def close(self) -> None:
        """Write what is not in a file yet, and the end mark. Safe to call twice.

        Raises:
            RecordingError: naming the file and why it could not be written.
        """
        if self._is_over:
            return
        self.flush()
        self._is_over = True
        if self._part or self._run:  # else nothing is recorded
            mark = EndMark(self._run, self._end)
            with _explained(self.folder):
                mark.write(self.folder, self._rank)

    def flush(self) -> None:
        """Write the batches that are not in a file yet.

        Raises:
            RecordingError: naming the file and why it could not be written.
        """
        if not self._batches:
            return
        pa, pq = import_pyarrow()
        rows = [row for batch in self._batches for row in rows_of(batch, self._rank)]
        facts = self._facts | {"versions": [batch.version for batch in self._batches]}
        table = pa.Table.from_pylist(rows, schema=schema())
        table = table.replace_schema_metadata({KEY: json.dumps(facts)})
        target = self.folder / file_name(self._rank, self._run, self._part)
        with _explained(target), atomic_file(target, durable=True) as file:
            pq.write_table(table, file, compression="zstd", write_page_checksum=True)
        self._end = self._batches[-1].version + 1
        self._batches, self._part = [], self._part + 1


@contextmanager
def _explained(target: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise RecordingError(
            f"{target} could not be written: {error}. Make room, choose another folder, or "
            "leave out the Recorder."
        ) from error
