"""Callback that keeps the data of a report during a run, and writes the page when it ends."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from sdp_lightning.errors import ConfigError
from sdp_lightning.lightning.datamodule import RolloutDataModule
from sdp_lightning.lightning.module import SegmentWisePPOModule
from sdp_lightning.lightning.observer import Observer, describe
from sdp_lightning.lightning.weight_sync import WeightSyncCallback
from sdp_lightning.observability.evaluations import Evaluations
from sdp_lightning.observability.report.files import RunWriter
from sdp_lightning.observability.report.page import RUNNING, write_report
from sdp_lightning.observability.report.samples import Sample, SampleKeeper
from sdp_lightning.observability.run_parts import run_parts
from sdp_lightning.observability.view import STYLE as VIEW_STYLE, view
from sdp_lightning.observability.view.text import visible
from sdp_lightning.rollout.groups.telemetry import RolloutTelemetry
from sdp_lightning.training.metrics.names import MetricRow

logger = logging.getLogger(__name__)

MOST_TOKENS = 600  # of a trajectory on the page
MOST_SHARE = 0.01  # of a run's time, for saving samples


class RunReport(Observer):
    """Writes ``report.html`` in the run's folder: one self-contained page.

    Place it after ``WeightSyncCallback``, whose metrics it reads. The folder is the first logger's,
    else the Trainer's ``default_root_dir``. Metrics are written after every step, and a sample of
    trajectories from time to time, so a killed run can still be reported with
    ``sdp-lightning report FOLDER``. Only rank 0 writes.

    Args:
        save_every_s: shortest interval between two writes of the samples, in seconds; longer where
            writing would take more than 1 % of the time.

    Attributes:
        path: path of the page, once it is written.

    Raises:
        ConfigError: if ``save_every_s`` is negative, or when a fit starts, if the callback comes
            before ``WeightSyncCallback`` or the fit has another module or data module.
    """

    lost = "the run's report from here on"

    def __init__(self, save_every_s: float = 10.0) -> None:
        if not save_every_s >= 0:
            raise ConfigError(f"save_every_s must be 0 or more, got {save_every_s}.")
        self.path: Path | None = None
        self._save_every_s = save_every_s
        self._writer: RunWriter | None = None
        self._keeper = SampleKeeper()
        self._evaluations = Evaluations()
        self._telemetry = RolloutTelemetry()
        self._begun = self._own_s = self._next_save = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = run_folder(trainer)
        module, data = run_parts(trainer, pl_module, self)
        _check_order(trainer)
        self._keeper, self._writer = SampleKeeper(), None
        self._evaluations.begin()
        self._begun, self._own_s, self._next_save = time.monotonic(), 0.0, 0.0
        if trainer.is_global_zero:
            self._writer = RunWriter(folder)
            self._writer.settings(_settings(trainer, module, data))
            self._telemetry = data.executor.telemetry

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._writer is not None:
            start = time.monotonic()
            executor = run_parts(trainer, pl_module, self)[1].executor
            trained = executor.registry.in_hand()
            groups = [g.finished for g in trained if g.finished is not None]
            rows = {g.order: g.row.data for g in trained}
            self._keeper.see(groups, batch.version, rows)
            self._own_s += time.monotonic() - start

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._writer is not None:
            start = time.monotonic()
            metrics = {n: float(v) for n, v in trainer.callback_metrics.items() if "/" in n}
            self._write_evaluation(self._evaluations.step(trainer, pl_module))
            self._writer.step({n: v for n, v in metrics.items() if not n.startswith("val/")})
            if start >= self._next_save:
                self._save(pl_module, RUNNING)
                took = time.monotonic() - start
                self._next_save = start + max(self._save_every_s, took / MOST_SHARE)
            self._own_s += time.monotonic() - start

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write_evaluation(self._evaluations.see(trainer, pl_module))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(pl_module, "finished")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        name = type(exception).__name__
        is_signal = isinstance(exception, KeyboardInterrupt) or name == "SIGTERMException"
        self._end(
            pl_module, "stopped by a signal" if is_signal else f"failed: {describe(exception)}"
        )

    def let_go(self) -> None:
        self._writer = None
        self._evaluations.let_go()

    def _write_evaluation(self, row: MetricRow | None) -> None:
        if self._writer is not None and row is not None:
            self._writer.evaluation(row)

    def _end(self, pl_module: LightningModule, status: str) -> None:
        if self._writer is None:
            return
        self._save(pl_module, status)
        writer, self._writer = self._writer, None
        self.path = write_report(writer.page.parent)
        logger.info("the run's report is %s", self.path)

    def _save(self, pl_module: LightningModule, status: str) -> None:
        assert self._writer is not None and isinstance(pl_module, SegmentWisePPOModule)

        def draw(sample: Sample) -> str:
            return view(
                sample.trajectory,
                tokenizer=pl_module.tokenizer,
                version=sample.version,
                loss=pl_module.loss,
                max_tokens=MOST_TOKENS,
            ).fragment()

        self._writer.state(
            {
                "status": status,
                "saved": datetime.now().isoformat(timespec="seconds"),
                "own_share": self._own_s / max(time.monotonic() - self._begun, 1e-9),
                "rejections": dict(self._telemetry.rejections),
                "slowest": _records(self._telemetry),
                "samples": self._keeper.state(draw),
                "style": VIEW_STYLE,
            }
        )


def run_folder(trainer: Trainer) -> Path:
    """Folder of a run's files: the logger's, one for each run. A collective."""
    log_dir = Path(trainer.log_dir or trainer.default_root_dir)
    logger = trainer.logger
    if logger is None or isinstance(logger, CSVLogger | TensorBoardLogger):
        return log_dir
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return log_dir / str(logger.name) / version


def _check_order(trainer: Trainer) -> None:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    kinds = [type(c) for c in callbacks if isinstance(c, RunReport | WeightSyncCallback)]
    if kinds[:1] != [WeightSyncCallback]:
        raise ConfigError(
            "RunReport must come after WeightSyncCallback among the Trainer's callbacks, whose "
            f"metrics it writes. Found {[kind.__name__ for kind in kinds]}."
        )


def _records(telemetry: RolloutTelemetry) -> list[dict[str, Any]]:
    return [
        {
            "row_id": visible(record.row_id),
            "seconds": record.seconds,
            "num_sampled": record.num_sampled,
            "fate": record.fate,
            "versions": record.versions,
            "reward_s": record.times.reward_s / max(1, record.times.num),
        }
        for record in list(telemetry.slowest)
    ]


def _settings(
    trainer: Trainer, module: SegmentWisePPOModule, data: RolloutDataModule
) -> dict[str, Any]:
    parts = {
        "rollout": data.rollout,
        "loss": module.loss,
        "update": module.update,
        "optimizer": module.optimizer,
    }
    return {
        "model": module.model_id,
        "engine": type(data.executor.engine).__name__,
        "started": datetime.now().isoformat(sep=" ", timespec="seconds"),
        "max_steps": trainer.max_steps,
        "world_size": trainer.world_size,
        "device": str(trainer.strategy.root_device),
        "precision": str(trainer.precision),
        **{name: asdict(part) for name, part in parts.items()},
        "sampling": asdict(data.workflow.sampling),
    }
