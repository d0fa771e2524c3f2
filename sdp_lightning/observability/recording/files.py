"""The files of a recording: written whole or not at all, read back in the order of versions.

A folder holds ``rank0000-run000-part00000.parquet`` and so on: of every process, of every start of
the run, in turn. A start begins at a version, and what earlier starts recorded from there on has
been undone by it: it is not read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sdp_lightning.config import MissingProximal
from sdp_lightning.config.atomic_files import atomic_file
from sdp_lightning.errors import RecordingError
from sdp_lightning.observability.recording.table import (
    RecordedBatch,
    batch_of,
    import_pyarrow,
    rows_of,
    schema,
    to_rows,
)

logger = logging.getLogger(__name__)

FORMAT = 1
_KEY = b"sdp_lightning"
_NAME = re.compile(r"rank(\d+)-run(\d+)-part(\d+)\.parquet")


@dataclass(frozen=True)
class RecordingSettings:
    """What a recording must know of the run that made it.

    Args:
        model: id or folder of the model.
        tokenizer: :func:`fingerprint_of` its tokenizer.
        segment_wise: whether the batches carried segment scores.
        missing_proximal: what stood in for the score of an unscored token of lag 2 or more.
        max_lag: tokens older than this had weight 0; None is no bound.
        is_scored: whether the estimator had segments scored.
        num_ranks: processes that trained together.
    """

    model: str
    tokenizer: str
    segment_wise: bool
    missing_proximal: MissingProximal
    max_lag: int | None
    is_scored: bool
    num_ranks: int = 1


def fingerprint_of(vocabulary: Mapping[str, int]) -> str:
    """A text that differs for another vocabulary: its size and a hash of its tokens and ids.

    >>> fingerprint_of({"a": 0, "b": 1})
    '2 tokens, 4b4543fe5561'
    """
    pairs = json.dumps(sorted(vocabulary.items()), ensure_ascii=True)
    return f"{len(vocabulary)} tokens, {hashlib.sha256(pairs.encode()).hexdigest()[:12]}"


class RecordingWriter:
    """Writes one process' part of one start of a run.

    A file appears under its name when it is complete. What a kill can lose is what was added since
    the last one.

    Args:
        folder: made if it is not there.
        settings: kept in every file.
        rank: of this process.
        run: number of the start, higher than those before.
        first_version: at which it starts.
        rows_per_file: trajectories from which on a file is written.
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
        }
        self._batches: list[RecordedBatch] = []
        self._part = 0

    def add(self, batch: RecordedBatch) -> None:
        """Keep a batch, and write a file if there are enough."""
        self._batches.append(batch)
        if sum(b.num_trajectories for b in self._batches) >= self._rows_per_file:
            self.flush()

    def flush(self) -> None:
        """Write what was added and not written yet.

        Raises:
            RecordingError: naming the file and why it could not be written.
        """
        if not self._batches:
            return
        pa, pq = import_pyarrow()
        rows = [row for batch in self._batches for row in rows_of(batch, self._rank)]
        facts = self._facts | {"versions": [batch.version for batch in self._batches]}
        table = pa.Table.from_pylist(rows, schema=schema())
        table = table.replace_schema_metadata({_KEY: json.dumps(facts)})
        name = f"rank{self._rank:04}-run{self._run:03}-part{self._part:05}.parquet"
        target = self.folder / name
        try:
            with atomic_file(target, durable=True) as file:
                pq.write_table(table, file, compression="zstd", write_page_checksum=True)
        except OSError as error:
            raise RecordingError(
                f"{target} could not be written: {error}. Make room, choose another folder, or "
                "leave out the Recorder."
            ) from error
        self._batches, self._part = [], self._part + 1


@dataclass(frozen=True)
class _File:
    path: Path
    rank: int
    run: int
    first_version: int
    versions: tuple[int, ...]
    settings: RecordingSettings


class Recording:
    """What a run trained on, step by step, read from the folder that a ``Recorder`` wrote.

    Iterating gives one :class:`RecordedBatch` a policy version; only one file a process is in
    memory at a time.

    Attributes:
        settings: of the run.
        versions: that are there, in order, with none missing between.

    Raises:
        RecordingError: if there is no recording, a file is damaged, or versions are missing.
        ConfigError: without pyarrow.
    """

    def __init__(self, folder: str | Path) -> None:
        import_pyarrow()
        self.folder = Path(folder)
        files = [_open(path, found) for path, found in _files_in(self.folder)]
        if not files:
            what = "has no recording in it" if self.folder.is_dir() else "is not there"
            raise RecordingError(
                f"the folder {str(self.folder)!r} {what}. Add Recorder({str(self.folder)!r}) to "
                "the callbacks of a run, or use `sdp-lightning rollout`."
            )
        self.settings = files[-1].settings
        for file in files:
            if file.settings != self.settings:
                raise RecordingError(_difference(file, files[-1]))
        self._places = _places(files)
        self.versions = self._find_versions()
        self._loaded: dict[int, tuple[Path, list[dict[str, Any]]]] = {}

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
        if version not in self._places.get(0, {}) or version not in self.versions:
            raise RecordingError(
                f"{self.folder} has versions {self.versions[0]} to {self.versions[-1]}, "
                f"not {version}."
            )
        parts = [self._read(rank, version) for rank in range(self.settings.num_ranks)]
        return RecordedBatch(
            version=version,
            step=parts[0].step,
            groups=tuple(group for part in parts for group in part.groups),
            places=tuple(place for part in parts for place in part.places),
        )

    def _read(self, rank: int, version: int) -> RecordedBatch:
        path = self._places[rank][version]
        if rank not in self._loaded or self._loaded[rank][0] != path:
            self._loaded[rank] = path, _rows_in(path)
        rows = [row for row in self._loaded[rank][1] if row["version"] == version]
        if not rows:
            raise RecordingError(
                f"{path} says that it has version {version}, and has no row of it."
            )
        return batch_of(rows, str(path))

    def _find_versions(self) -> list[int]:
        """Those of which every process has its part."""
        ranks = range(self.settings.num_ranks)
        absent = [rank for rank in ranks if rank not in self._places]
        if absent:
            raise RecordingError(
                f"{self.folder} was recorded by {len(ranks)} processes, and the files of rank "
                f"{', '.join(map(str, absent))} are missing: copy them to the others."
            )
        common = set.intersection(*(set(self._places[rank]) for rank in ranks))
        every = set.union(*(set(self._places[rank]) for rank in ranks))
        if not common:
            raise RecordingError(f"{self.folder} has no version of which every rank has its part.")
        last = max(common)
        expected = set(range(min(every), last + 1))
        if missing := sorted(expected - common):
            raise RecordingError(
                f"{self.folder} lacks versions {', '.join(map(str, missing[:8]))}"
                f"{' and more' if len(missing) > 8 else ''} between {min(every)} and {last}: were "
                "files removed?"
            )
        if last < max(every):
            logger.warning(
                "%s: versions %d to %d are left out, which not every rank has written.",
                *(self.folder, last + 1, max(every)),
            )
        return sorted(common)


def next_run(folder: Path) -> int:
    """The number of the next start that is recorded in ``folder``."""
    return max((found[1] for _, found in _files_in(folder)), default=-1) + 1


def _files_in(folder: Path) -> list[tuple[Path, tuple[int, int, int]]]:
    """Files with their (rank, run, part), by run and part."""
    found: list[tuple[Path, tuple[int, int, int]]] = []
    for path in folder.glob("*.parquet") if folder.is_dir() else ():
        if match := _NAME.fullmatch(path.name):
            rank, run, part = map(int, match.groups())
            found.append((path, (rank, run, part)))
    return sorted(found, key=lambda entry: (entry[1][1], entry[1][2], entry[1][0]))


def _open(path: Path, place: tuple[int, int, int]) -> _File:
    """What a file says of itself; its rows are not read."""
    pa, pq = import_pyarrow()
    try:
        metadata = pq.read_schema(path).metadata or {}
        facts = json.loads(metadata[_KEY]) if _KEY in metadata else None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise RecordingError(_damaged(path, error)) from error
    if facts is None:
        raise RecordingError(f"{path} is Parquet, but no recording of this package.")
    if facts["format"] != FORMAT:
        raise RecordingError(
            f"{path} has format {facts['format']}, and this version of sdp_lightning reads "
            f"{FORMAT}: use the version that wrote it, or record again."
        )
    settings = RecordingSettings(**facts["settings"])
    versions = tuple(facts["versions"])
    return _File(path, place[0], place[1], facts["first_version"], versions, settings)


def _rows_in(path: Path) -> list[dict[str, Any]]:
    pa, pq = import_pyarrow()
    try:
        table = pq.ParquetFile(path, page_checksum_verification=True).read()
    except (pa.ArrowException, OSError, ValueError) as error:  # also of a text that is no UTF-8
        raise RecordingError(_damaged(path, error)) from error
    if table.schema.names != schema().names:
        raise RecordingError(f"{path} has other columns than a recording has.")
    return to_rows(table)


def _damaged(path: Path, error: Exception) -> str:
    return (
        f"{path} is damaged ({str(error).splitlines()[0]}). Copy it again, or remove it together "
        "with those of later versions to use what comes before."
    )


def _places(files: Sequence[_File]) -> dict[int, dict[int, Path]]:
    """By rank and version, the file; what a later start has undone is left out."""
    places: dict[int, dict[int, Path]] = {}
    starts: dict[int, int] = {}
    for file in files:  # in the order of starts
        mine = places.setdefault(file.rank, {})
        if starts.get(file.rank) != file.run:
            starts[file.rank] = file.run
            for version in [v for v in mine if v >= file.first_version]:
                del mine[version]
        mine.update(dict.fromkeys(file.versions, file.path))
    return places


def _difference(one: _File, other: _File) -> str:
    names = [field.name for field in fields(RecordingSettings)]
    pairs = [(name, asdict(one.settings)[name], asdict(other.settings)[name]) for name in names]
    told = ", ".join(f"{name} {a!r} and {b!r}" for name, a, b in pairs if a != b)
    return f"{one.path.name} and {other.path.name} are of runs that differ in: {told}."
