"""Callback that records the groups that a run trains on, or generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from sdp_lightning.errors import ConfigError, RecordingError
from sdp_lightning.lightning.observer import Observer
from sdp_lightning.lightning.prediction_loader import Rollouts
from sdp_lightning.observability.recording import (
    RecordedBatch,
    Recording,
    RecordingSettings,
    RecordingWriter,
    fingerprint_of,
    import_pyarrow,
    next_run,
)
from sdp_lightning.observability.recording.files import remove_end_marks
from sdp_lightning.observability.run_parts import run_parts


class Recorder(Observer):
    """Records every group that is trained on, as Parquet, one row a trajectory.

    The columns are those of :mod:`sdp_lightning.observability.recording.table`.
    :class:`ReplayDataModule` trains on a recording without an engine; :class:`Recording` and any
    reader of Parquet read it. With ``Trainer.predict`` the generated groups are recorded: batch i
    as if it had been trained on i versions after the one that sampled it, as a replay does.

    A file is written when there are enough rows, before every checkpoint, and at the end of the
    run, also by an exception; it appears when it is complete. A kill loses the batches since the
    last file, and leaves a recording that is not whole (``Recording.is_whole``). A run that resumes
    from a checkpoint may use the same folder: batches that were recorded after the checkpoint are
    replaced.

    Args:
        folder: None is ``recording`` in the folder of the logger, or in ``default_root_dir``.
        rows_per_file: number of trajectories from which on a file is written.

    Raises:
        ConfigError: without pyarrow, or if ``rows_per_file`` is below 1.
    """

    lost = "the batches since its last file, and all later ones"

    def __init__(self, folder: str | Path | None = None, *, rows_per_file: int = 1024) -> None:
        import_pyarrow()
        if rows_per_file < 1:
            raise ConfigError(f"rows_per_file must be at least 1, got {rows_per_file}.")
        self.folder = None if folder is None else Path(folder)
        self.rows_per_file = rows_per_file
        self._writer: RecordingWriter | None = None
        self._taken: RecordedBatch | None = None  # the batch in training

    @property
    def written_to(self) -> Path:
        """Folder of the present recording, or of the last one.

        Raises:
            ConfigError: if nothing was recorded yet.
        """
        if self._writer is None:
            raise ConfigError("nothing was recorded yet.")
        return self._writer.folder

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _, data = run_parts(trainer, pl_module, self)
        self._open(trainer, pl_module, data.executor.version)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        _, data = run_parts(trainer, pl_module, self)
        trained = data.executor.registry.in_hand()
        self._taken = RecordedBatch(
            version=batch.version,
            step=trainer.global_step,
            groups=tuple(group.finished for group in trained if group.finished is not None),
            places=tuple((group.row.epoch, group.row.index) for group in trained),
        )

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        taken, self._taken = self._taken, None
        if self._writer is not None and taken is not None:
            self._writer.add(taken)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _, data = run_parts(trainer, pl_module, self)
        self._open(trainer, pl_module, data.executor.version)

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Rollouts,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._writer is not None:
            version = batch.version + batch_idx
            self._writer.add(RecordedBatch(version, batch_idx, batch.groups, batch.places))

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write all batches: a run that resumes from the checkpoint continues after them."""
        if self._writer is not None:
            self._writer.flush()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._close()

    def let_go(self) -> None:
        self._taken = None
        if self._writer is not None:
            self._writer.abandon()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _open(self, trainer: L.Trainer, pl_module: L.LightningModule, version: int) -> None:
        module, data = run_parts(trainer, pl_module, self)
        chosen = self.folder or Path(trainer.log_dir or trainer.default_root_dir) / "recording"
        folder = data.ranks.broadcast("choosing the folder of the recording", chosen)
        config = data.rollout
        settings = RecordingSettings(
            model=module.model_id,
            tokenizer=fingerprint_of(module.tokenizer.get_vocab()),
            segment_wise=config.enable_segment_wise_ppo,
            missing_proximal=config.missing_proximal,
            max_lag=config.max_token_lag,
            is_scored=module.loss.needs_segment_scores,
            num_ranks=data.ranks.size,
        )
        # Rank 0 looks for all ranks before any of them writes.
        run, _ = data.ranks.run_on_all_ranks(
            "opening the recording",
            lambda: _next_run(folder, settings, version) if data.ranks.rank == 0 else 0,
        )
        self._taken = None
        self._writer = RecordingWriter(
            folder,
            settings,
            rank=data.ranks.rank,
            run=data.ranks.broadcast("numbering the recording", run),
            first_version=version,
            rows_per_file=self.rows_per_file,
        )


def _next_run(folder: Path, settings: RecordingSettings, version: int) -> int:
    """Number of this start.

    Raises:
        RecordingError: if the recording in the folder cannot continue at ``version``.
    """
    run = next_run(folder)
    if run == 0:
        return run
    before = Recording(folder)
    if before.settings != settings:
        raise RecordingError(
            f"{folder} has the recording of a run with other settings ({before.settings}, now "
            f"{settings}). Give Recorder another folder."
        )
    first, last = before.versions[0], before.versions[-1]
    if not first < version <= last + 1:
        raise RecordingError(
            f"{folder} has the recording of versions {first} to {last}, and this run begins at "
            f"version {version}: it does not go on from there. Give Recorder another folder."
        )
    remove_end_marks(folder)
    return run
