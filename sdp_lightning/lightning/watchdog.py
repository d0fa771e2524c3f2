"""Ends a run that hangs: a thread notices it, which no lock of the trainer can stop."""

from __future__ import annotations

import faulthandler
import logging
import signal
import sys
import threading
import time
from types import CodeType, FrameType, MethodType
from typing import Any

import lightning as L

from sdp_lightning.errors import ConfigError, HangError
from sdp_lightning.lightning.datamodule import RolloutDataModule
from sdp_lightning.lightning.observer import Observer

logger = logging.getLogger(__name__)

_ENTRIES = tuple(f.__code__ for f in (L.Trainer.fit, L.Trainer.validate, L.Trainer.test))


class Watchdog(Observer):
    """Ends a run of which the trainer's thread hangs, for instance in a collective or a deadlock.

    Signs of life are the hooks of steps, microbatches and validation batches, and every look of a
    wait for rollouts or ranks, which have deadlines of their own. After ``timeout_s`` without one
    the stacks of all threads are written to stderr, and a ``HangError`` is raised in that thread,
    so that the run can end in order. If it does not within ``patience_s``, the stacks are written
    again and the process exits with status 1, also if the interpreter's lock is held for good.

    A process that is suspended (SIGSTOP, a debugger) for longer is ended when it goes on.

    Args:
        timeout_s: seconds without a sign of life. The longest forward and backward pass, publish,
            or user callback must be shorter.
        checkpoint_timeout_s: the same while a checkpoint is written.
        patience_s: seconds from the error to the end of the process.

    Raises:
        ConfigError: if a time is not positive.
    """

    lost = "the end of this run if it hangs"

    def __init__(
        self,
        timeout_s: float,
        *,
        checkpoint_timeout_s: float = 3600.0,
        patience_s: float = 60.0,
    ) -> None:
        if min(timeout_s, checkpoint_timeout_s, patience_s) <= 0:
            raise ConfigError(
                f"timeout_s={timeout_s}, checkpoint_timeout_s={checkpoint_timeout_s} and "
                f"patience_s={patience_s} must all be positive."
            )
        self.timeout_s, self.patience_s = timeout_s, patience_s
        self.checkpoint_timeout_s = max(timeout_s, checkpoint_timeout_s)
        self._watch: _Watch | None = None

    def _beat(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if self._watch is None:
            self._watch = _Watch(self, trainer)
        self._watch.seen = time.monotonic()

    on_sanity_check_start = _beat
    on_train_start = _beat
    on_train_end = _beat
    on_train_batch_start = _beat
    on_train_batch_end = _beat
    on_after_backward = _beat
    on_before_optimizer_step = _beat
    on_before_zero_grad = _beat
    on_validation_start = _beat
    on_validation_batch_start = _beat
    on_validation_batch_end = _beat
    on_validation_end = _beat
    on_test_start = _beat
    on_test_batch_start = _beat
    on_test_batch_end = _beat
    on_test_end = _beat

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        if self._watch is not None:  # it sees by itself when the Trainer has returned
            self._watch.seen = time.monotonic()
            self._watch = None

    def let_go(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None


def _is_free(handler: object) -> bool:
    """Whether nobody else handles the signal. A watch whose run failed still holds it."""
    if isinstance(handler, MethodType):
        return isinstance(handler.__self__, _Watch)
    return handler is signal.SIG_DFL


class _Watch:
    """The thread of one run, made in the thread that it watches."""

    def __init__(self, settings: Watchdog, trainer: L.Trainer) -> None:
        self.seen, self._saving_at, self._saved_at = time.monotonic(), 0.0, 0.0
        self._settings, self._trainer = settings, trainer
        self._watched = threading.get_ident()
        self._poll_s = min(1.0, settings.timeout_s / 4)
        self._has_entry = self._is_in(*_ENTRIES)
        self._closed = threading.Event()
        if (
            sys.platform != "win32"
            and threading.current_thread() is threading.main_thread()
            and _is_free(signal.getsignal(signal.SIGUSR2))
        ):
            signal.signal(signal.SIGUSR2, self._raise)
        self._arm(settings.timeout_s)  # before the thread runs: the next call may hang
        self._thread = threading.Thread(target=self._run, name="sdp-watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        if signal.getsignal(signal.SIGUSR2) == self._raise:
            signal.signal(signal.SIGUSR2, signal.SIG_DFL)

    def _run(self) -> None:
        try:
            while not self._is_over():
                left = self._limit_s() - self._idle_s()
                if left < 0:
                    self._end()
                    return
                self._arm(left)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _arm(self, left_s: float) -> None:
        """Let the process end if this thread never gets the interpreter's lock again."""
        limit = left_s + self._settings.patience_s + 2 * self._poll_s
        faulthandler.dump_traceback_later(limit, exit=True, file=2)

    def _end(self) -> None:
        logger.critical("no sign of life for %.1f s; stacks of all threads:", self._idle_s())
        faulthandler.dump_traceback(file=2, all_threads=True)
        faulthandler.dump_traceback_later(self._settings.patience_s, exit=True, file=2)
        if signal.getsignal(signal.SIGUSR2) == self._raise:
            signal.pthread_kill(self._watched, signal.SIGUSR2)
        while not self._is_over():
            pass

    def _raise(self, signum: int, frame: FrameType | None) -> None:
        raise HangError(
            f"the trainer's thread showed no sign of life for {self._limit_s():g} s, and the "
            "Watchdog ends the run; where it hung is in this traceback, and in the stacks on "
            "stderr. If it was only slow, raise the Watchdog's timeout_s."
        )

    def _is_over(self) -> bool:
        """Whether the Trainer has returned; waits a moment for it."""
        closed = self._closed.wait(self._poll_s)
        return closed or (self._has_entry and not self._is_in(*_ENTRIES))

    def _limit_s(self) -> float:
        """Seconds that the watched thread has; a checkpoint that was written is a sign of life."""
        if self._is_in(L.Trainer.save_checkpoint.__code__):
            self._saving_at = time.monotonic()
            return self._settings.checkpoint_timeout_s
        self._saved_at = self._saving_at
        return self._settings.timeout_s

    def _idle_s(self) -> float:
        data: Any = self._trainer.datamodule  # type: ignore[attr-defined]
        looked_at = data.stop.looked_at if isinstance(data, RolloutDataModule) else 0.0
        return time.monotonic() - max(self.seen, looked_at, self._saved_at)

    def _is_in(self, *codes: CodeType) -> bool:
        """Whether the watched thread is within one of these functions."""
        frame = sys._current_frames().get(self._watched)  # pyright: ignore[reportPrivateUsage]
        while frame is not None:
            if frame.f_code in codes:
                return True
            frame = frame.f_back
        return False
