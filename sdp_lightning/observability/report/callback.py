"""Keeps what a report shows while a run goes on, and writes the page when it ends."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from sdp_lightning.errors import ConfigError
from sdp_lightning.lightning.datamodule import RolloutDataModule
from sdp_lightning.lightning.module import SegmentWisePPOModule
from sdp_lightning.lightning.weight_sync import WeightSyncCallback
from sdp_lightning.observability.report.files import RunWriter
from sdp_lightning.observability.report.page import write_report
from sdp_lightning.observability.report.samples import Sample, SampleKeeper
from sdp_lightning.observability.view import STYLE as VIEW_STYLE, view
from sdp_lightning.rollout.groups.telemetry import RolloutTelemetry

logger = logging.getLogger(__name__)

MOST_TOKENS = 600  # of a trajectory that is shown
MOST_SHARE = 0.01  # of a run's time, for what is sampled of it


class RunReport(Callback):
    """Writes ``report.html`` in the run's folder: one page, which needs nothing else.

    Place it after ``WeightSyncCallback``, whose metrics it reads. The folder is the first logger's,
    else the Trainer's ``default_root_dir``. The metrics of every step are written as it ends, a
    sample of trajectories from time to time, so a killed run can still be reported:
    ``sdp-lightning report FOLDER`` makes the page of what there is. Rank 0 writes.

    Args:
        save_every_s: at most so often what is sampled is written; less often where that would take
            more than 1 % of the time.

    Attributes:
        path: of the page, once there is one.
    """

    def __init__(self, save_every_s: float = 10.0) -> None:
        if not save_every_s >= 0:
            raise ConfigError(f"save_every_s must be 0 or more, got {save_every_s}.")
        self.path: Path | None = None
        self._save_every_s = save_every_s
        self._writer: RunWriter | None = None
        self._keeper = SampleKeeper()
        self._telemetry = RolloutTelemetry()
        self._begun = self._own_s = self._next_save = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = run_folder(trainer)
        module, data = _parts(trainer, pl_module)
        _check_order(trainer)
        self._keeper, self._writer = SampleKeeper(), None
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
            executor = _parts(trainer, pl_module)[1].executor
            trained = [g for g in executor.registry.snapshot() if g.in_training]
            groups = [g.finished for g in trained if g.finished is not None]
            self._keeper.see(groups, batch.version)
            self._own_s += time.monotonic() - start

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._writer is not None:
            start = time.monotonic()
            found = trainer.callback_metrics
            row = {n: float(v) for n, v in found.items() if "/" in n and not n.startswith("val/")}
            self._writer.step(row)
            if start >= self._next_save:
                self._save(pl_module, "running")
                took = time.monotonic() - start
                self._next_save = start + max(self._save_every_s, took / MOST_SHARE)
            self._own_s += time.monotonic() - start

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._writer is not None and not trainer.sanity_checking:
            found = trainer.callback_metrics
            self._writer.evaluation({n: float(v) for n, v in found.items() if n[:4] == "val/"})

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(pl_module, "finished")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        name = type(exception).__name__
        is_told = isinstance(exception, KeyboardInterrupt) or name == "SIGTERMException"
        self._end(pl_module, "stopped by a signal" if is_told else f"failed: {exception}")

    def _end(self, pl_module: LightningModule, status: str) -> None:
        writer, self._writer = self._writer, None
        if writer is None:
            return
        self._writer = writer
        self._save(pl_module, status)
        self._writer = None
        self.path = write_report(writer.page.parent)
        logger.info("the run's report is %s", self.path)

    def _save(self, pl_module: LightningModule, status: str) -> None:
        assert self._writer is not None and isinstance(pl_module, SegmentWisePPOModule)

        def draw(sample: Sample) -> str:
            seen = view(
                sample.trajectory,
                tokenizer=pl_module.tokenizer,
                version=sample.version,
                loss=pl_module.loss,
                max_tokens=MOST_TOKENS,
            )
            return seen.fragment()

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
    """Where a run's files are: its logger's folder, one for each run. A collective."""
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
            "RunReport must come after WeightSyncCallback among the Trainer's callbacks: it writes "
            f"what that one logs. Found {[kind.__name__ for kind in kinds]}."
        )


def _records(telemetry: RolloutTelemetry) -> list[dict[str, Any]]:
    return [
        {
            "row_id": record.row_id,
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
    sampling = asdict(data.workflow.sampling)
    return {
        "model": module.model_id,
        "engine": type(data.executor.engine).__name__,
        "started": datetime.now().isoformat(sep=" ", timespec="seconds"),
        "max_steps": trainer.max_steps,
        "world_size": trainer.world_size,
        "device": str(trainer.strategy.root_device),
        "precision": str(trainer.precision),
        **{name: asdict(part) for name, part in parts.items()},
        "sampling": sampling,
    }


def _parts(
    trainer: Trainer, pl_module: LightningModule
) -> tuple[SegmentWisePPOModule, RolloutDataModule]:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, RolloutDataModule) or not isinstance(pl_module, SegmentWisePPOModule):
        raise ConfigError(
            "RunReport needs fit(SegmentWisePPOModule, datamodule=RolloutDataModule); found "
            f"{type(pl_module).__name__} and {type(data).__name__}."
        )
    return pl_module, data
