"""Recordings of what a run trained on, as Parquet files. No engine, no Lightning, no torch."""

from sdp_lightning.observability.recording.files import (
    Recording,
    RecordingSettings,
    RecordingWriter,
    fingerprint_of,
    next_run,
)
from sdp_lightning.observability.recording.table import RecordedBatch, import_pyarrow, schema

__all__ = [
    "RecordedBatch",
    "Recording",
    "RecordingSettings",
    "RecordingWriter",
    "fingerprint_of",
    "import_pyarrow",
    "next_run",
    "schema",
]
