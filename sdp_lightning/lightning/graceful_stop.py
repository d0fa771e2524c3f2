"""How a signal ends a fit: between two steps, with a checkpoint.

Between two steps weights, version and rollouts belong together; loaders poll for the signal there.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from sdp_lightning.errors import CheckpointError, ConfigError
from sdp_lightning.lightning.datamodule import RolloutDataModule
from sdp_lightning.lightning.launched_ranks import outlive_other_ranks
from sdp_lightning.lightning.stop_request import raise_as_lightning

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class GracefulStop:
    """Turns the first Ctrl-C or SIGTERM of a fit into a stop between two steps, with a checkpoint.

    The checkpoint is ``last-stopped-step=N.ckpt`` beside those of the Trainer's ModelCheckpoint, so
    ``ckpt_path="last"`` finds it. Without a ModelCheckpoint (``enable_checkpointing=False``), or if
    nothing was trained, none is written; nor if one saves on exceptions itself. An error between
    two steps is saved from, too, on one rank. A second signal ends the step at once, and is not
    saved from: within a step there is no state that a resume could use.

    On several ranks they agree where to stop, and SIGTERM is passed on as Lightning does.

    Args:
        grace_s: longest present step in seconds; after it the step ends as by a second signal.

    Raises:
        ConfigError: if ``grace_s`` is not positive.
    """

    def __init__(self, *, grace_s: float) -> None:
        if grace_s <= 0:
            raise ConfigError(f"stop_grace_s must be positive, got {grace_s}.")
        self._grace_s = grace_s
        self._trainer: L.Trainer | None = None
        self._version = 0
        self._previous: dict[int, Any] = {}
        self._timer: threading.Timer | None = None
        self._is_last = False  # whether a signal now ends at once
        self._is_abandoned = False

    def begin(self, trainer: L.Trainer, version: int) -> None:
        """Handle signals from now on. Training begins at ``version``."""
        self._trainer, self._version = trainer, version
        self._is_last = self._is_abandoned = False
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def end(self) -> None:
        """Training has ended by itself. A signal that came too late to stop it ends the run."""
        if self._trainer is None:
            return
        signum = self._data.stop.signum
        if signum is not None and self._trainer.world_size == 1:
            raise_as_lightning(signum)
        self._restore()

    def save(self, version: int) -> None:
        """Training has ended by an exception: save if the state at ``version`` is consistent."""
        if self._trainer is None:
            return
        trainer, data = self._trainer, self._data
        if data.stop.agreed:
            outlive_other_ranks(trainer)
        if self._may_save(version):
            path = self._path()
            try:
                with self._second_signal_ends():
                    trainer.save_checkpoint(path)
                logger.warning("version %d is saved: go on with ckpt_path=%r.", version, str(path))
            except (KeyboardInterrupt, SIGTERMException):
                logger.warning("a second signal: %s was not saved.", path)
            except (CheckpointError, OSError, RuntimeError) as error:  # the first error goes on
                logger.error("version %d could not be saved in %s: %r", version, path, error)
            except BaseException:
                self._restore()
                data.close()
                raise
        elif data.stop.signum is not None and version > self._version:
            logger.warning("version %d was not saved.", version)
        self._restore()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        request, trainer = self._data.stop, self._trainer
        assert trainer is not None
        if self._is_last or request.signum is not None:
            self._is_abandoned = True
            raise_as_lightning(signum)
        request.signum = signum
        name = "Ctrl-C" if signum == signal.SIGINT else "SIGTERM"
        logger.warning("%s: the run ends after this step; once more ends it at once.", name)
        again = os.kill, (os.getpid(), signum)
        self._timer = threading.Timer(self._grace_s, *again)
        self._timer.daemon = True
        self._timer.start()
        if signum == signal.SIGTERM and trainer.world_size == 1:
            previous = self._previous[signum]  # Lightning's, which tells its loops
            if callable(previous):
                previous(signum, frame)
        elif signum == signal.SIGTERM and trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signum)  # to the ranks that this process started

    def _may_save(self, version: int) -> bool:
        trainer, data = self._trainer, self._data
        assert trainer is not None
        savers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        if not savers or any(c.save_on_exception for c in savers):
            return False
        is_trial: Any = trainer.fast_dev_run  # type: ignore[attr-defined]
        if is_trial or self._is_abandoned or version == self._version:
            return False
        if trainer.world_size > 1:  # to save is a collective
            return data.stop.agreed
        return data.is_between_steps and data.executor.version == version

    def _path(self) -> Path:
        trainer = self._trainer
        assert trainer is not None
        savers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        folder = savers[0].dirpath or trainer.default_root_dir
        return Path(folder) / f"last-stopped-step={trainer.global_step}.ckpt"

    @contextmanager
    def _second_signal_ends(self) -> Generator[None]:
        """Let a second signal end the save. Lightning ignores Ctrl-C while it ends."""
        self._is_last = True
        self._cancel_timer()
        before = {number: signal.getsignal(number) for number in self._previous}
        try:
            for number in before:
                signal.signal(number, self._handle)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _restore(self) -> None:
        self._cancel_timer()
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)
        self._previous, self._trainer = {}, None

    @property
    def _data(self) -> RolloutDataModule:
        assert self._trainer is not None
        data: RolloutDataModule = self._trainer.datamodule  # type: ignore[attr-defined]
        return data
