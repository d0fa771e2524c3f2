"""Reader of a recording: batches in the order of policy versions.

A start of a run begins at a version. Batches that earlier starts recorded from that version on were
undone by it, and are not read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sdp_lightning.errors import RecordingError
from sdp_lightning.observability.recording.files import (
    DamagedFileError,
    EndMark,
    RecordingFile,
    files_in,
)
from sdp_lightning.observability.recording.table import (
    LATER,
    RecordedBatch,
    batch_of,
    import_pyarrow,
    schema,
    to_rows,
)

logger = logging.getLogger(__name__)


class Recording:
    """The batches that a run trained on, read from the folder that a ``Recorder`` wrote.

    Iterating gives one :class:`RecordedBatch` a policy version; only one file a process is in
    memory at a time.

    Attributes:
        settings: facts about the run.
        versions: policy versions that are there, in order, with none missing between.
        is_whole: whether every batch that the run trained on is there. False, with a warning, if
            the run still goes on, was killed or set its ``Recorder`` aside, or if files of the end
            are missing or written by half; None if it is unknown, since an older release wrote it.

    Raises:
        RecordingError: if there is no recording, or versions are missing between others.
        ConfigError: without pyarrow.
    """

    def __init__(self, folder: str | Path) -> None:
        import_pyarrow()
        self.folder = Path(folder)
        files, self._damaged = files_in(self.folder)
        if not files:
            if self._damaged:
                raise self._damaged[0]
            what = "has no recording in it" if self.folder.is_dir() else "is not there"
            raise RecordingError(
                f"the folder {str(self.folder)!r} {what}. Add Recorder({str(self.folder)!r}) to "
                "the callbacks of a run, or use `sdp-lightning rollout`."
            )
        for file in files:
            file.check_same_run(files[-1])
        self.settings = files[-1].settings
        self._paths = _paths_by_version(files)
        self.versions = self._find_versions()
        self.is_whole = self._find_whole(files)
        if self.is_whole is False:
            logger.warning("%s", self._what_is_missing())
        self._loaded: dict[int, tuple[Path, list[dict[str, Any]]]] = {}  # the last file by rank

    def __len__(self) -> int:
        return len(self.versions)

    def __iter__(self) -> Iterator[RecordedBatch]:
        for version in self.versions:
            yield self.read(version)

    def read(self, version: int) -> RecordedBatch:
        """The batch that was trained on at ``version``, of all processes one after another.

        Raises:
            RecordingError: if it is not there, or cannot be read.
        """
        if version not in self.versions:
            raise RecordingError(
                f"{self.folder} has versions {self.versions[0]} to {self.versions[-1]}, "
                f"not {version}."
            )
        read = [self._read(rank, version) for rank in range(self.settings.num_ranks)]
        parts = [part for part in read if part is not None]
        if not parts:
            raise RecordingError(
                f"{self._paths[0][version]} says that it has version {version}, and has no row of "
                "it."
            )
        return RecordedBatch(
            version=version,
            step=parts[0].step,
            groups=tuple(group for part in parts for group in part.groups),
            places=tuple(place for part in parts for place in part.places),
            sizes=tuple(0 if part is None else len(part.groups) for part in read),
        )

    def _read(self, rank: int, version: int) -> RecordedBatch | None:
        """The part of a rank; None if it had no group left when others trained their last ones."""
        path = self._paths[rank][version]
        if rank not in self._loaded or self._loaded[rank][0] != path:
            self._loaded[rank] = path, _rows_in(path)
        rows = [row for row in self._loaded[rank][1] if row["version"] == version]
        return batch_of(rows, str(path)) if rows else None

    def _find_versions(self) -> list[int]:
        """Versions of which every process has its part.

        Raises:
            RecordingError: if the files of a process, or versions between, are missing.
        """
        ranks = range(self.settings.num_ranks)
        absent = [rank for rank in ranks if rank not in self._paths]
        if absent:
            raise RecordingError(
                f"{self.folder} was recorded by {len(ranks)} processes, and the files of rank "
                f"{', '.join(map(str, absent))} are missing: copy them to the others."
                f"{self._damage()}"
            )
        common = set.intersection(*(set(self._paths[rank]) for rank in ranks))
        every = set.union(*(set(self._paths[rank]) for rank in ranks))
        if not common:
            raise RecordingError(f"{self.folder} has no version of which every rank has its part.")
        last = max(common)
        expected = set(range(min(every), last + 1))
        if missing := sorted(expected - common):
            raise RecordingError(
                f"{self.folder} lacks versions {', '.join(map(str, missing[:8]))}"
                f"{' and more' if len(missing) > 8 else ''} between {min(every)} and {last}: were "
                f"files removed?{self._damage()}"
            )
        self._left_out = max(every) - last
        return sorted(common)

    def _find_whole(self, files: Sequence[RecordingFile]) -> bool | None:
        if self._left_out:
            return False
        newest = {file.rank: file for file in files}
        for rank in range(self.settings.num_ranks):
            mark = EndMark.read(self.folder, rank)
            if not newest[rank].marks_end:
                return False if self._damaged else None
            if mark is None or mark.run < newest[rank].run or mark.end > self.versions[-1] + 1:
                return False
        return True

    def _what_is_missing(self) -> str:
        first, last = self.versions[0], self.versions[-1]
        left_out = f"; versions {last + 1} to {last + self._left_out} are left out, which not every"
        return (
            f"{self.folder} is not whole: it has {len(self)} steps, versions {first} to {last}"
            f"{left_out + ' rank has written' if self._left_out else ''}. The run was killed, set "
            f"its Recorder aside, or still goes on.{self._damage()}"
        )

    def _damage(self) -> str:
        return "".join(f" {error}" for error in self._damaged)


def _rows_in(path: Path) -> list[dict[str, Any]]:
    pa, pq = import_pyarrow()
    try:
        table = pq.ParquetFile(path, page_checksum_verification=True).read()
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: text that is no UTF-8
        raise DamagedFileError(path, error) from error
    known = schema().names
    if table.schema.names not in (known, [name for name in known if name not in LATER]):
        raise RecordingError(f"{path} has other columns than a recording has.")
    return to_rows(table)


def _paths_by_version(files: Sequence[RecordingFile]) -> dict[int, dict[int, Path]]:
    """``{rank: {version: path}}`` of files in the order of starts, without undone versions."""
    paths: dict[int, dict[int, Path]] = {}
    runs: dict[int, int] = {}
    for file in files:
        of_rank = paths.setdefault(file.rank, {})
        if runs.get(file.rank) != file.run:
            runs[file.rank] = file.run
            for version in [v for v in of_rank if v >= file.first_version]:
                del of_rank[version]
        of_rank.update(dict.fromkeys(file.versions, file.path))
    return paths
