"""What a checkpoint knows of its run: an id, its settings, a digest of them, and its version.

It is one line of text in the checkpoint, which is found without unpickling anything.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sdp_lightning.errors import CheckpointError, error_text

KEY = "sdp_run"  # of the checkpoint
_MARK = b"sdp-lightning run "

# Names of settings that say where, how fast and how long a run runs, not what it learns; and all
# that end in _s, which are deadlines.
_NOT_LEARNED = frozenset(
    {
        *("data.engine", "data.engine_options", "data.prompts", "trainer"),
        *("data.val_prompts", "data.val_workflow"),
        *("gradient_checkpointing", "layout", "max_tokens_per_microbatch"),
        *("max_concurrent", "max_failures", "lost_retries", "reward_workers"),
        *("max_rejected_in_a_row", "max_skipped_in_a_row", "max_uniform_in_a_row"),
        *("data.rollout.num_epochs", "prompts_check", "prompts_on_resume"),
    }
)


@dataclass(frozen=True)
class RunRecord:
    """A run, as a checkpoint of it knows it.

    Args:
        settings: plain settings by dotted name.
        id: name of the run, the same in all fits that resume it.
        started: when the fit began that wrote the checkpoint, in seconds since 1970.
        saved: when the checkpoint was written.
        version: policy version of the checkpoint.
        groups: plain settings of the groups of each optimizer, as configured.
    """

    settings: Mapping[str, Any]
    id: str = field(default_factory=lambda: os.urandom(6).hex())
    started: float = field(default_factory=time.time)
    saved: float = 0.0
    version: int = 0
    groups: Sequence[Sequence[Mapping[str, Any]]] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of the settings that say what is learned."""
        learned = {name: value for name, value in self.settings.items() if is_learned(name)}
        return hashlib.sha256(json.dumps(learned, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def order(self) -> tuple[float, int]:
        """Place of the checkpoint among those of its run: by version, in the latest fit first."""
        return self.started, self.version

    def text(self, version: int) -> str:
        """The line for a checkpoint of ``version`` that is written now."""
        now = replace(self, version=version, saved=time.time())
        return _MARK.decode() + json.dumps(asdict(now) | {"digest": self.digest}) + "\n"

    @classmethod
    def parsed(cls, line: str) -> RunRecord:
        """The record of a :meth:`text`."""
        values = json.loads(line.removeprefix(_MARK.decode()))
        values.pop("digest")
        return cls(**values)


def is_learned(name: str) -> bool:
    """Whether a setting says what a run learns."""
    parts = name.split(".")
    heads = {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
    return not (heads | {parts[-1]}) & _NOT_LEARNED and not parts[-1].endswith("_s")


def read_record(path: Path) -> RunRecord | None:
    """The record in the checkpoint at ``path``, a file or a folder of shards; None without one.

    Raises:
        CheckpointError: if it is no checkpoint of torch.
    """
    try:
        with zipfile.ZipFile(path / "meta.pt" if path.is_dir() else path) as archive:
            (name,) = [n for n in archive.namelist() if n.endswith("/data.pkl")]
            data = archive.read(name)
        start = data.rfind(_MARK)
        line = data[start : data.index(b"\n", start)] if start >= 0 else None
        return None if line is None else RunRecord.parsed(line.decode())
    except Exception as error:  # zipfile raises a dozen kinds for damaged archives
        raise CheckpointError(f"{str(path)!r} cannot be read: {error_text(error)}") from error


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings by name whose values differ, old and new; None for one that is not there."""
    names = sorted(old.keys() | new.keys())
    found = {name: (old.get(name), new.get(name)) for name in names}
    return {name: pair for name, pair in found.items() if pair[0] != pair[1]}


def table(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """A row for each changed setting: its name, old and new value."""
    rows = [("setting", "old", "new")]
    rows += [(name, _short(old), _short(new)) for name, (old, new) in changed.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"  {n:{widths[0]}}  {o:{widths[1]}}  {new}" for n, o, new in rows)


def _short(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
