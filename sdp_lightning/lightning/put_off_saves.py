"""Checkpoints between two steps only, whoever asks for one.

Between two steps weights, version and rollouts belong together. Within one they do not: a resume
from there would train a minibatch twice, and one version would name two sets of weights.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterable
from types import FrameType
from typing import Any, NamedTuple

import lightning as L
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from sdp_lightning.distributed.rank_group import RankGroup
from sdp_lightning.errors import CheckpointError

logger = logging.getLogger(__name__)


class Ask(NamedTuple):
    """A checkpoint that was asked for in the middle of a step; without a path a requeue of SLURM.

    ``weights_only`` and ``storage_options`` are those of ``Trainer.save_checkpoint``.
    """

    path: str | None
    weights_only: bool | None = None
    storage_options: Any = None


class PutOffSaves:
    """``save_checkpoint`` of a fit's Trainer: within a step it is put off to the end of the step.

    The same for SLURM's signal for a requeue, after which Lightning saves and requeues the job. The
    loader performs what was asked before it takes the next batch, on all ranks at the same one.

    Attributes:
        asked: what waits for the end of the step.
    """

    def __init__(self) -> None:
        self.asked: list[Ask] = []
        self._trainer: L.Trainer | None = None
        self._is_within = self._is_abandoned = False
        self._signum: int | None = None
        self._requeue: Any = None  # Lightning's handler

    def guard(self, trainer: L.Trainer) -> None:
        """Stand before ``trainer.save_checkpoint``. The state is not whole before :meth:`open`."""
        self._trainer, self._is_within, self._is_abandoned = trainer, True, False
        trainer.save_checkpoint = self._save  # type: ignore[method-assign]

    def take_requeue(self) -> None:
        """Put off the signal of SLURM for a requeue from now on, if Lightning handles it."""
        assert self._trainer is not None
        trainer: Any = self._trainer
        cluster = trainer._accelerator_connector.cluster_environment
        if not isinstance(cluster, SLURMEnvironment) or not cluster.auto_requeue:
            return
        signum = cluster.requeue_signal
        if signum is None or threading.current_thread() is not threading.main_thread():
            return
        handler = signal.getsignal(signum)
        if type(handler).__module__.startswith("lightning."):  # else it is the user's own
            self._signum, self._requeue = int(signum), handler
            signal.signal(signum, self._on_requeue)

    def finish(self, ranks: RankGroup) -> None:
        """Perform what was asked for after the last batch was taken. A collective.

        The Trainer is then as it was.
        """
        asked = ranks.all_gather("saving what the last step put off", tuple(self.asked))
        self.perform(ask for each in asked for ask in each)
        if self._signum is not None and signal.getsignal(self._signum) == self._on_requeue:
            signal.signal(self._signum, self._requeue)  # Lightning's, which may save at once now
        if self._trainer is not None:
            vars(self._trainer).pop("save_checkpoint", None)

    def begin_step(self) -> None:
        """From here to :meth:`end_step` nothing is saved."""
        self._is_within = True

    def end_step(self) -> None:
        """Weights, version and rollouts belong together again."""
        self._is_within = False

    def abandon(self) -> None:
        """An error has ended the fit: what waits for the end of its step is not saved."""
        self._is_abandoned = True
        for ask in self.asked:
            logger.error("%s: the fit has ended by an error.", _name(ask, "was not saved"))
        self.asked.clear()

    def perform(self, asked: Iterable[Ask]) -> None:
        """Save what any rank asked for, between two steps. A collective."""
        done = _asked_once(asked)
        self.asked = [ask for ask in self.asked if ask not in done]
        assert self._trainer is not None or not done
        for ask in done:
            if ask.path is not None:
                self._save(ask.path, ask.weights_only, ask.storage_options)
            elif self._requeue is not None:
                self._requeue(self._signum, None)

    def _save(
        self, filepath: Any, weights_only: bool | None = None, storage_options: Any | None = None
    ) -> None:
        """Do what ``Trainer.save_checkpoint`` does, within a step at its end.

        Raises:
            CheckpointError: if an error has ended the fit in the middle of a step.
        """
        trainer = self._trainer
        assert trainer is not None
        if not self._is_within:
            type(trainer).save_checkpoint(trainer, filepath, weights_only, storage_options)
        elif self._is_abandoned:
            raise CheckpointError(
                f"{str(filepath)!r} was not saved: the fit ended in the middle of a step, and a "
                "resume from there would train part of its batch twice."
            )
        else:
            ask = Ask(str(filepath), weights_only, storage_options)
            logger.warning("%s.", _name(ask, "is saved when this step has ended"))
            self.asked.append(ask)

    def _on_requeue(self, signum: int, frame: FrameType | None) -> None:
        ask = Ask(None)
        if self._is_abandoned:
            logger.error("%s: the fit has ended by an error.", _name(ask, "was not saved"))
        elif ask not in self.asked:
            logger.warning("%s.", _name(ask, "is saved and requeued when this step has ended"))
            self.asked.append(ask)


def _asked_once(asked: Iterable[Ask]) -> list[Ask]:
    """Each of ``asked`` once, checkpoints before a requeue, which may end the process."""
    once: list[Ask] = []
    for ask in asked:
        if ask not in once:
            once.append(ask)
    return sorted(once, key=lambda ask: ask.path is None)


def _name(ask: Ask, what: str) -> str:
    return f"the SLURM job {what}" if ask.path is None else f"{ask.path!r} {what}"
