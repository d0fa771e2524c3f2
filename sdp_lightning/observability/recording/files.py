"""Files of a recording: their names, their metadata, and the run that they are of.

A folder holds ``rank0000-run000-part00000.parquet`` and so on, numbered by process, by start of the
run, and by file; and for each process an end mark, ``_rank0000.end.json``, once its part is whole.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from sdp_lightning.config import MissingProximal
from sdp_lightning.config.atomic_files import atomic_file
from sdp_lightning.errors import RecordingError
from sdp_lightning.observability.recording.table import import_pyarrow

FORMAT = 1
KEY = b"sdp_lightning"  # of our entry in the metadata of a Parquet file
_NAME = re.compile(r"rank(\d+)-run(\d+)-part(\d+)\.parquet")


@dataclass(frozen=True)
class RecordingSettings:
    """Facts about the recorded run that a replay needs.

    Args:
        model: id or folder of the model.
        tokenizer: :func:`fingerprint_of` its tokenizer.
        segment_wise: whether the batches carried segment scores.
        missing_proximal: substitute for the score of an unscored token of lag 2 or more.
        max_lag: tokens older than this had weight 0; None is no bound.
        is_scored: whether the estimator had segments scored.
        num_ranks: number of processes that trained together.
    """

    model: str
    tokenizer: str
    segment_wise: bool
    missing_proximal: MissingProximal
    max_lag: int | None
    is_scored: bool
    num_ranks: int = 1


def fingerprint_of(vocabulary: Mapping[str, int]) -> str:
    """Size of a vocabulary and a hash of its tokens and ids, to tell vocabularies apart.

    >>> fingerprint_of({"a": 0, "b": 1})
    '2 tokens, 4b4543fe5561'
    """
    pairs = json.dumps(sorted(vocabulary.items()), ensure_ascii=True)
    return f"{len(vocabulary)} tokens, {hashlib.sha256(pairs.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class RecordingFile:
    """Metadata of one file.

    Args:
        path: path of the file.
        rank: rank of the process that wrote it.
        run: number of the start that wrote it.
        first_version: policy version at which that start began.
        versions: policy versions whose batches it holds.
        settings: facts about the run.
        marks_end: whether the start that wrote it writes an end mark; older releases wrote none.
    """

    path: Path
    rank: int
    run: int
    first_version: int
    versions: tuple[int, ...]
    settings: RecordingSettings
    marks_end: bool

    @classmethod
    def open(cls, path: Path, rank: int, run: int) -> RecordingFile:
        """Read the metadata; rows are not read.

        Raises:
            DamagedFileError: if the file is damaged, for instance written by half.
            RecordingError: if it is of another package or format.
        """
        pa, pq = import_pyarrow()
        try:
            metadata = pq.read_schema(path).metadata or {}
            facts = json.loads(metadata[KEY]) if KEY in metadata else None
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DamagedFileError(path, error) from error
        if facts is None:
            raise RecordingError(f"{path} is Parquet, but no recording of this package.")
        if facts["format"] != FORMAT:
            raise RecordingError(
                f"{path} has format {facts['format']}, and this version of sdp_lightning reads "
                f"{FORMAT}: use the version that wrote it, or record again."
            )
        settings = RecordingSettings(**facts["settings"])
        versions, marks_end = tuple(facts["versions"]), facts.get("marks_end", False)
        return cls(path, rank, run, facts["first_version"], versions, settings, marks_end)

    def check_same_run(self, other: RecordingFile) -> None:
        """Both files are of runs with the same settings.

        Raises:
            RecordingError: naming the settings that differ.
        """
        mine, theirs = asdict(self.settings), asdict(other.settings)
        names = [field.name for field in fields(RecordingSettings)]
        differences = [f"{n} {mine[n]!r} and {theirs[n]!r}" for n in names if mine[n] != theirs[n]]
        if differences:
            raise RecordingError(
                f"{self.path.name} and {other.path.name} are of runs that differ in: "
                f"{', '.join(differences)}."
            )


def file_name(rank: int, run: int, part: int) -> str:
    """Name of the file number ``part`` of one process and one start."""
    return f"rank{rank:04}-run{run:03}-part{part:05}.parquet"


def files_in(folder: Path) -> tuple[list[RecordingFile], list[DamagedFileError]]:
    """Files of a recording in the order of starts and parts, and errors about damaged ones.

    Raises:
        RecordingError: if a file is of another package or format.
    """
    files: list[RecordingFile] = []
    errors: list[DamagedFileError] = []
    for path, (run, _, rank) in _names_in(folder):
        try:
            files.append(RecordingFile.open(path, rank, run))
        except DamagedFileError as error:
            errors.append(error)
    return files, errors


def next_run(folder: Path) -> int:
    """Number of the next start that is recorded in ``folder``."""
    return max((run for _, (run, _, _) in _names_in(folder)), default=-1) + 1


@dataclass(frozen=True)
class EndMark:
    """A process' part of a recording has every batch that it trained on.

    Args:
        run: number of the start that wrote the mark when it ended.
        end: policy version after that of the last batch.
    """

    run: int
    end: int

    def write(self, folder: Path, rank: int) -> None:
        """Replace the mark of ``rank``."""
        with atomic_file(folder / f"_rank{rank:04}.end.json", durable=True) as file:
            file.write(json.dumps(asdict(self)).encode())

    @classmethod
    def read(cls, folder: Path, rank: int) -> EndMark | None:
        """The mark of ``rank``; None if there is none, or it cannot be read."""
        try:
            facts = json.loads((folder / f"_rank{rank:04}.end.json").read_bytes())
            return cls(int(facts["run"]), int(facts["end"]))
        except (OSError, ValueError, TypeError, KeyError):
            return None


def remove_end_marks(folder: Path) -> None:
    """Another start goes on with the recording, which is not whole until that ends, too."""
    for path in folder.glob("_rank*.end.json"):
        path.unlink()


class DamagedFileError(RecordingError):
    """A file is damaged: says which, why, and the remedy."""

    def __init__(self, path: Path, error: Exception) -> None:
        cause = (str(error) or repr(error)).splitlines()[0]
        super().__init__(
            f"{path} is damaged ({cause}). Copy it again, or remove it together with those of "
            "later versions to use what comes before."
        )


def _names_in(folder: Path) -> list[tuple[Path, tuple[int, int, int]]]:
    """(path, (run, part, rank)) of each file, in this order."""
    numbered: list[tuple[Path, tuple[int, int, int]]] = []
    for path in folder.glob("*.parquet") if folder.is_dir() else ():
        if match := _NAME.fullmatch(path.name):
            rank, run, part = map(int, match.groups())
            numbered.append((path, (run, part, rank)))
    return sorted(numbered, key=lambda entry: entry[1])
