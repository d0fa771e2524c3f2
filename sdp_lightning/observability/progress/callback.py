"""Progress line: the state of a run, and the phase that the trainer is in.

On a terminal and in a notebook the line is rewritten, twice a second while the trainer is busy;
elsewhere each step is a line of plain text.
"""

from __future__ import annotations

import math
import threading
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from sdp_lightning.errors import ConfigError
from sdp_lightning.lightning.datamodule import RolloutDataModule
from sdp_lightning.lightning.observer import Observer, guarded
from sdp_lightning.observability.progress.pace import Pace, seconds_left
from sdp_lightning.observability.progress.screens import LogScreen, Screen, find_screen
from sdp_lightning.observability.report.markup import clock
from sdp_lightning.training.metrics.names import MetricRow

TICK_S = 0.5
PATIENCE_S = 1.0  # longer phases are shown
DOING = {
    "wait": "waiting for rollouts",
    "score": "scoring segments",
    "train": "training",
    "publish": "publishing weights",
    "evaluate": "evaluating",
}


class ProgressLine(Observer, ProgressBar):
    """Progress line with step, version, reward, lag, groups, speeds and the trainer's phase.

    It is rewritten on a terminal and in a notebook, else one line a step. Without a
    ``RolloutDataModule`` no phases are shown.
    """

    lost = "the progress line from here on"

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._screen: Screen = LogScreen()
        self._lock = threading.Lock()
        self._stopped: threading.Event | None = None  # ends the thread that rewrites the line
        self._started = time.monotonic()
        self._pace = Pace()
        self._row: MetricRow = {}

    @property
    def is_enabled(self) -> bool:
        """Whether the line is shown; Lightning reads it before the module prints."""
        return self._enabled

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    @guarded
    def print(self, *args: Any, **kwargs: Any) -> None:
        with self._lock:
            self._screen.end()
            print(*args, **kwargs)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._screen, self._row = find_screen(), {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.monotonic()
        self._pace = Pace()
        self._pace.note(self._started, trainer.global_step)
        self._start_ticking()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._row = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self._pace.note(time.monotonic(), trainer.global_step)
        self._show(self._parts())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_ticking()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()
        self._show(["evaluating"])
        self._start_ticking()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        value = trainer.callback_metrics.get("val/reward")
        self._show(["evaluated"] if value is None else ["evaluated", f"reward {float(value):.3f}"])
        self._end()
        if trainer.state.fn != "fit":
            self._stop_ticking()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stop_ticking()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop_ticking()

    def let_go(self) -> None:
        stopped, self._stopped = self._stopped, None
        if stopped is not None:
            stopped.set()
        self._screen = LogScreen()

    def _parts(self) -> list[str]:
        trainer, now = self.trainer, time.monotonic()
        left_s, elapsed_s = seconds_left(trainer, self._pace, now), now - self._started
        row, steps = self._row, (trainer.global_step, trainer.max_steps)
        return progress_parts(row, *steps, elapsed_s, left_s) + concurrency_parts(trainer)

    def _show(self, parts: list[str]) -> None:
        if self._enabled and self.trainer.is_global_zero:
            with self._lock:
                self._screen.show(parts)

    def _end(self) -> None:
        with self._lock:
            self._screen.end()

    def _start_ticking(self) -> None:
        if self._stopped is None and self._screen.is_live and self.trainer.is_global_zero:
            self._stopped = threading.Event()
            arguments = (self._stopped,)
            threading.Thread(
                target=self._tick, args=arguments, name="sdp-progress", daemon=True
            ).start()

    def _stop_ticking(self) -> None:
        if self._stopped is not None:
            self._stopped.set()
            self._stopped = None
        self._end()

    @guarded
    def _tick(self, stopped: threading.Event) -> None:
        while not stopped.wait(TICK_S):
            doing = activity_text(self.trainer)
            if doing is None or not self._enabled:
                continue
            parts = [doing] if doing.startswith(DOING["evaluate"]) else self._parts()
            if doing != parts[0]:
                parts.insert(5, doing)
            with self._lock:
                if not stopped.is_set():
                    self._screen.show(parts)


def activity_text(trainer: Trainer) -> str | None:
    """The trainer's phase with its duration; None before ``PATIENCE_S`` or without phases."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, RolloutDataModule):
        return None
    phase, seconds = data.phase_timer.now
    if seconds < PATIENCE_S or phase not in DOING:
        return None
    if phase != "wait":
        return f"{DOING[phase]} {seconds:.0f} s"
    try:
        executor = data.executor
    except ConfigError:  # the data module has just been closed
        return None
    stat, size = executor.stat, executor.config.batch_size
    return f"{DOING[phase]} {seconds:.0f} s: {stat.pending} of {size} ready, {stat.running} running"


def concurrency_parts(trainer: Trainer) -> list[str]:
    """The number of groups at once with its reason, where ``max_concurrent`` is ``"auto"``."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, RolloutDataModule):
        return []
    try:
        tuner = data.executor.concurrency.tuner
    except ConfigError:  # the data module has just been closed
        return []
    return [] if tuner is None else [f"{tuner.setting} at once: {tuner.reason}"]


def progress_parts(
    row: MetricRow, step: int, max_steps: int, elapsed_s: float, left_s: float | None = None
) -> list[str]:
    """Parts of the line of one step, the most important first; without those not in ``row``.

    ``left_s`` is the time until the end in seconds, None if it is not known.

    >>> progress_parts({"train/reward": 0.5, "lag/mean": 1.25}, 3, 20, 75)
    ['step  3/20', 'reward 0.500', 'lag 1.2', '1:15']
    >>> progress_parts({"rollout/pending": 3.0, "rollout/running": 12.0}, 1, -1, 5)
    ['step 1', '0:05', '3 ready, 12 running, 0 dropped']
    >>> progress_parts({}, 3, 20, 75, 4000)
    ['step  3/20', '1:15, ETA in 1:06:40']
    """
    of = f"{step:>{len(str(max_steps))}}/{max_steps}" if max_steps > 0 else str(step)
    parts = [f"step {of}"]
    for name, label, form in (
        ("rollout/version", "v", ".0f"),
        ("train/reward", "reward ", ".3f"),
        ("lag/mean", "lag ", ".1f"),
    ):
        if name in row:
            parts.append(f"{label}{row[name]:{form}}")
    parts.append(clock(elapsed_s) + ("" if not left_s else f", ETA in {clock(math.ceil(left_s))}"))
    if "rollout/pending" in row:
        dropped = row.get("rollout/dropped_stale", 0) + row.get("rollout/dropped_overdue", 0)
        ready, running = row["rollout/pending"], row.get("rollout/running", 0)
        at_most = f" of {row['rollout/concurrency']:.0f}" if "rollout/concurrency" in row else ""
        parts.append(f"{ready:.0f} ready, {running:.0f}{at_most} running, {dropped:.0f} dropped")
    if "time/step_s" in row:
        parts.append(f"{row['time/step_s']:.1f} s")
    speeds = (row.get(f"speed/{side}_tokens_per_s") for side in ("generated", "train"))
    shown = [short(speed) for speed in speeds if speed is not None]
    return [*parts, f"tok/s {' sampled, '.join(shown)} trained"] if len(shown) == 2 else parts


def short(number: float) -> str:
    """A number with three digits or fewer.

    >>> short(87.4), short(1234), short(56789), short(2e6)
    ('87', '1.2k', '57k', '2.0M')
    """
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if number >= limit:
            scaled = number / limit
            return f"{scaled:.1f}{unit}" if scaled < 10 else f"{scaled:.0f}{unit}"
    return f"{number:.0f}"
