"""Which checkpoint ``ckpt_path="last"`` is: the newest of this run, by version.

Lightning takes the ``last*.ckpt`` that was written last, whichever run wrote it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from sdp_lightning.config.plain_settings import flat, plain
from sdp_lightning.errors import CheckpointError
from sdp_lightning.lightning.run_record import RunRecord, changes, is_learned, read_record, table

logger = logging.getLogger(__name__)


class RunDataModule(L.LightningDataModule):
    """A data module whose fits go on with the last checkpoint of their own run only."""

    chosen_checkpoint: Any = None  # of the Trainer's method under way
    planned_batches: int | None = None  # of the run; None: no epoch ends it
    _attached: L.Trainer | None = None

    @property
    def trainer(self) -> L.Trainer | None:
        """The Trainer, from the call of one of its methods on."""
        return self._attached

    @trainer.setter
    def trainer(self, trainer: L.Trainer | None) -> None:  # type: ignore
        self._attached = trainer
        if trainer is not None:  # before Lightning looks for a checkpoint
            connector: Any = trainer._checkpoint_connector  # type: ignore[reportPrivateUsage]
            connector._parse_ckpt_path = _OfRun(trainer)


def run_settings(trainer: L.Trainer) -> dict[str, Any]:
    """The settings of the run under way, plain, by dotted name as in a config file."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    own = {
        "max_steps": trainer.max_steps,
        "precision": str(trainer.precision),
        "world_size": trainer.world_size,
    }
    module = dict(trainer.lightning_module.hparams)
    return flat(plain({"model": module, "data": dict(data.hparams), "trainer": own}))


class _OfRun:
    """Resolves the ``ckpt_path`` of a Trainer's method in Lightning's place."""

    def __init__(self, trainer: L.Trainer) -> None:
        self._trainer = trainer

    def __call__(self, state_fn: Any, ckpt_path: Any, **known: bool) -> Any:
        chosen = self._choose(state_fn, ckpt_path, **known)
        data: Any = self._trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, RunDataModule):
            data.chosen_checkpoint = chosen
        return chosen

    def _choose(self, state_fn: Any, ckpt_path: Any, **known: bool) -> Any:
        connector: Any = self._trainer._checkpoint_connector  # type: ignore[reportPrivateUsage]
        is_fit = state_fn == "fit"
        is_requeued = is_fit and ckpt_path is None and SLURMEnvironment.detect()
        is_requeued = is_requeued and connector._hpc_resume_path is not None
        savers: list[Any] = self._trainer.callbacks  # type: ignore[attr-defined]
        failed = [c.ckpt_path for c in savers if isinstance(c, OnExceptionCheckpoint)]
        is_retried = is_fit and ckpt_path is None and not is_requeued and bool(failed)
        if is_retried and not any(Path(path).exists() for path in failed):
            return None  # Lightning would take it for "last", and warn that there is none
        data: Any = self._trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, RunDataModule) and (ckpt_path == "last" or is_requeued or is_retried):
            records = dict(_records(_folders(self._trainer)))
            if records:
                return self._newest(records, is_fit=is_fit)
        return type(connector)._parse_ckpt_path(connector, state_fn, ckpt_path, **known)

    def _newest(self, records: dict[Path, RunRecord], *, is_fit: bool) -> str | None:
        """The newest checkpoint of this run; None if there is none."""
        present = RunRecord(run_settings(self._trainer))
        own = {path: r for path, r in records.items() if r.digest == present.digest}
        if not own and is_fit:
            self._say_foreign(records, present)
            return None
        own = own or records  # others are only evaluated
        run = max(own.values(), key=lambda record: record.saved).id
        path = max(own, key=lambda path: (own[path].id == run, *own[path].order))
        logger.info("%s is the newest checkpoint of this run: version %d.", path, own[path].version)
        return str(path)

    def _say_foreign(self, records: dict[Path, RunRecord], present: RunRecord) -> None:
        path = max(records, key=lambda path: records[path].saved)
        changed = changes(records[path].settings, present.settings)
        learned = {name: pair for name, pair in changed.items() if is_learned(name)}
        logger.warning(
            "no checkpoint here is of this run, which begins anew. The newest one, %s, has other "
            "settings:\n%s\nTo go on from it with the new ones, pass ckpt_path=%r.",
            *(path, table(learned), str(path)),
        )


def _folders(trainer: L.Trainer) -> set[Path]:
    """The folders in which checkpoints of the run may lie; a store's address is none."""
    places = {str(trainer.default_root_dir)}
    for saver in trainer.checkpoint_callbacks:
        if isinstance(saver, OnExceptionCheckpoint):
            places.add(str(Path(saver.ckpt_path).parent))
        elif isinstance(saver, ModelCheckpoint):
            found: Any = saver
            folder = str(found._ModelCheckpoint__resolve_ckpt_dir(trainer))
            places.add(folder)
            if saver.dirpath is None and trainer.loggers and "://" not in folder:
                # A logger gives each of its runs a folder.
                runs = Path(folder).parent.parent
                places |= {str(other) for other in runs.glob("*/checkpoints")}
    return {Path(place) for place in places if "://" not in place}


def _records(folders: set[Path]) -> Iterator[tuple[Path, RunRecord]]:
    """The checkpoints in ``folders`` that know their run. One that is damaged is named."""
    for path in sorted(file for folder in folders for file in _checkpoints(folder)):
        try:
            record = read_record(path)
        except CheckpointError as error:
            logger.warning("%s. It is left out in the search for the last checkpoint.", error)
            continue
        if record is not None:
            yield path, record


def _checkpoints(folder: Path) -> Sequence[Path]:
    return [p for p in folder.glob("*.ckpt") if p.is_file() or (p / "meta.pt").is_file()]
