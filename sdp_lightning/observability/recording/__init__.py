"""Recordings of the batches that a run trained on, as Parquet files.

Reading and writing need no engine, no Lightning and no torch.
"""

from sdp_lightning.observability.recording.files import (
    RecordingSettings,
    fingerprint_of,
    next_run,
)
from sdp_lightning.observability.recording.reader import Recording
from sdp_lightning.observability.recording.table import RecordedBatch, import_pyarrow, schema
from sdp_lightning.observability.recording.writer import RecordingWriter

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
