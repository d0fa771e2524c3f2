"""Training on a recording: the same batches in the same order, without engine or rollouts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L

from sdp_lightning.config.compatibility import check_centre
from sdp_lightning.distributed.rank_group import RankGroup, make_rank_group
from sdp_lightning.errors import ConfigError, RecordingError
from sdp_lightning.lightning.ending import guard_callbacks
from sdp_lightning.lightning.module import SegmentWisePPOModule
from sdp_lightning.lightning.train_loader import Shares, make_batch
from sdp_lightning.lightning.weight_sync import WeightSyncCallback
from sdp_lightning.observability.recording import Recording, fingerprint_of
from sdp_lightning.observability.recording.table import RecordedBatch
from sdp_lightning.training.batch import SealedBatch

logger = logging.getLogger(__name__)

_MEET_S = 600.0


class ReplayDataModule(L.LightningDataModule):
    """Trains on the batches of a recording, once and in order: ``Trainer(max_epochs=1)``.

    It replaces ``RolloutDataModule``; ``WeightSyncCallback`` is left out. With the settings of the
    recorded run (and its ``max_steps``, if the learning rate has a schedule), from the same
    weights, it reproduces losses and weights of that run, on the CPU bit by bit. Other settings,
    such as another ``LossConfig``, are compared on the same data; lags and policies remain those of
    the recorded run.

    A recording of several processes may be replayed by one, or by any number that divides the
    groups of a batch.

    Args:
        recording: the folder, or a :class:`Recording`.

    Raises:
        RecordingError: if there is none, it is damaged, or of another tokenizer.
        ConfigError: without pyarrow.
    """

    def __init__(self, recording: str | Path | Recording) -> None:
        super().__init__()
        is_open = isinstance(recording, Recording)
        self.recording = recording if is_open else Recording(recording)
        self._ranks = RankGroup()

    def setup(self, stage: str) -> None:
        if stage != "fit" or self.trainer is None:
            raise ConfigError(f"a recording has batches for Trainer.fit only, not for {stage}.")
        guard_callbacks(self.trainer)
        module, settings = self._module(), self.recording.settings
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, WeightSyncCallback) for callback in callbacks):
            raise ConfigError(
                "a replay has no engine to publish weights to: leave WeightSyncCallback out of the "
                "callbacks."
            )
        fingerprint = fingerprint_of(module.tokenizer.get_vocab())
        if fingerprint != settings.tokenizer:
            raise RecordingError(
                f"{self.recording.folder} was recorded with the tokenizer of {settings.model!r} "
                f"({settings.tokenizer}), but {module.model_id!r} has another ({fingerprint}), "
                "with other token ids. Use a model with the same tokenizer."
            )
        check_centre(module.loss, segment_wise=settings.segment_wise)
        if module.loss.needs_segment_scores and not settings.is_scored:
            logger.warning(
                "the recorded run had no segments scored, and this loss reads their scores: for "
                "tokens of lag 2 or more missing_proximal=%r stands in. metrics: "
                "bridge/approximated_share.",
                settings.missing_proximal,
            )
        if self.trainer.world_size > 1:
            self._ranks = make_rank_group(timeout_s=_MEET_S)
            module.use_ranks(self._ranks)
        self.trainer.limit_val_batches = 0

    def train_dataloader(self) -> ReplayLoader:
        module, trainer = self._module(), self.trainer
        assert trainer is not None
        length = len(self.recording)
        if trainer.max_steps > 0:
            length = min(length, trainer.max_steps // module.update.steps_per_batch)
        return ReplayLoader(
            self.recording,
            length=length,
            pad_token_id=module.tokenizer.pad_token_id or 0,
            trainer=trainer,
            ranks=self._ranks,
        )

    def val_dataloader(self) -> list[Any]:
        """Empty: an evaluation needs an engine."""
        return []

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch.batch if isinstance(batch, SealedBatch) else batch

    def teardown(self, stage: str) -> None:
        self._ranks.close()

    def on_exception(self, exception: BaseException) -> None:
        self._ranks.fail(exception)
        self._ranks.close()

    def _module(self) -> SegmentWisePPOModule:
        module = None if self.trainer is None else self.trainer.lightning_module
        if not isinstance(module, SegmentWisePPOModule):
            raise ConfigError(
                f"ReplayDataModule trains a SegmentWisePPOModule; found {type(module).__name__}."
            )
        return module


class ReplayLoader:
    """The batches of a recording, from its first version on; ends the run after the last one."""

    def __init__(
        self,
        recording: Recording,
        *,
        length: int,
        pad_token_id: int,
        trainer: L.Trainer,
        ranks: RankGroup,
    ) -> None:
        self._recording, self._length, self._pad_token_id = recording, length, pad_token_id
        self._trainer, self._ranks = trainer, ranks

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[SealedBatch]:
        settings = self._recording.settings
        for number, version in enumerate(self._recording.versions[: self._length], 1):
            batch = make_batch(
                self._share(self._recording.read(version)),
                version=version,
                pad_token_id=self._pad_token_id,
                segment_wise=settings.segment_wise,
                missing_proximal=settings.missing_proximal,
                max_lag=settings.max_lag,
            )
            if number == self._length:  # else Lightning starts the recording again
                self._trainer.should_stop = True
            yield SealedBatch(batch)

    def _share(self, batch: RecordedBatch) -> Shares:
        """This process' part of a batch: its own of then, if there are as many processes.

        Raises:
            RecordingError: if the groups cannot be divided evenly.
        """
        size, rank = self._ranks.size, self._ranks.rank
        sizes, count = batch.sizes, len(batch.groups)
        if len(sizes) != size:
            sizes = [count // size] * size
        if sum(sizes) < count:
            raise RecordingError(
                f"the batch of version {batch.version} has {count} groups, which {size} processes "
                "cannot share evenly: use as many as recorded it "
                f"({self._recording.settings.num_ranks}), or one."
            )
        start = sum(sizes[:rank])
        names = sorted(batch.groups[0].trajectories[0].rewards)
        return Shares(batch.groups[start : start + sizes[rank]], sizes, names)
