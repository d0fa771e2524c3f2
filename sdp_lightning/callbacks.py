"""The callback that moves policy versions: publish, commit, purge, and score what must be scored.

It runs in ``on_train_batch_end``, before ModelCheckpoint saves and before the next batch is taken.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from sdp_lightning.batch import Batch
from sdp_lightning.datamodule import RolloutDataModule
from sdp_lightning.errors import ConfigError, VersionError
from sdp_lightning.module import SegmentWisePPOModule
from sdp_lightning.rollout.executor import WorkflowExecutor

logger = logging.getLogger(__name__)

DROP_WARNING_SHARE = 0.05
DROP_WARNING_GROUPS = 50


class WeightSyncCallback(Callback):
    """Publishes one policy version for every consumed batch.

    At every start, fresh or resumed, all weights are published before anything is generated. After
    each training batch the trained ones follow as the next version; then stale groups are purged.
    Before each batch, segments that need their proximal log-probs now are scored.

    Logged, in seconds: ``time/wait_s`` for the batch, ``time/score_s``, ``time/train_s``,
    ``time/publish_s``, ``time/paused_s`` (no token sampled), ``time/step_s`` from batch to batch;
    in groups: ``rollout/{version,running,pending,rejected,failed}``, ``rollout/dropped_stale``
    (they waited), ``rollout/dropped_overdue`` (they ran); ``rollout/trained_length`` and
    ``rollout/dropped_length``, mean sampled tokens of a group; ``speed/generated_tokens_per_s`` and
    ``speed/train_tokens_per_s``.
    """

    def __init__(self) -> None:
        self.version = 0
        self._times: dict[str, float] = {}
        self._marks: dict[str, float] = {}
        self._generated = 0
        self._warned = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        _parts(trainer, pl_module)

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._publish_first(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._publish_first(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._publish_first(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._publish_first(trainer, pl_module)
        executor = _parts(trainer, pl_module)[2]
        executor.resume()
        self._marks["step"] = time.monotonic()
        self._generated = executor.engine.num_generated

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        module, data, executor = _parts(trainer, pl_module)
        start = time.monotonic()
        if module.loss.needs_segment_proximal:
            executor.recompute(module)
        now = time.monotonic()
        self._times = {"time/wait_s": data.last_wait_s, "time/score_s": now - start}
        self._marks["train"] = now

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        module, _, executor = _parts(trainer, pl_module)
        if batch.version != self.version:
            raise VersionError(
                f"the batch was taken at version {batch.version}, but the trainer is at "
                f"{self.version}: was a publish skipped?"
            )
        start = time.monotonic()
        weights = module.named_weights(changed_only=True)
        report = executor.publish(weights, self.version + 1)
        self.version += 1
        now = time.monotonic()
        self._times |= {
            "time/train_s": start - self._marks["train"],
            "time/publish_s": now - start,
            "time/paused_s": report.paused_s,
            "time/step_s": now - self._marks["step"],
        }
        self._marks["step"] = now
        self._log(module, executor, batch)

    def state_dict(self) -> dict[str, Any]:
        return {"version": self.version}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.version = int(state_dict["version"])

    def _publish_first(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module, _, executor = _parts(trainer, pl_module)
        if not executor.is_published:
            executor.publish(module.named_weights(), self.version, reset=True)

    def _log(self, module: SegmentWisePPOModule, executor: WorkflowExecutor, batch: Batch) -> None:
        stat, telemetry = executor.stat, executor.telemetry
        step_s = max(self._times["time/step_s"], 1e-9)
        generated = executor.engine.num_generated
        module.log_dict(
            {
                **self._times,
                "rollout/version": float(self.version),
                "rollout/running": float(stat.running),
                "rollout/pending": float(stat.pending),
                "rollout/rejected": float(stat.rejected),
                "rollout/failed": float(stat.failed),
                "rollout/dropped_stale": float(stat.dropped - telemetry.num_overdue),
                "rollout/dropped_overdue": float(telemetry.num_overdue),
                "rollout/trained_length": telemetry.trained_tokens
                / max(1, telemetry.trained_groups),
                "rollout/dropped_length": telemetry.dropped_tokens
                / max(1, telemetry.dropped_groups),
                "speed/generated_tokens_per_s": (generated - self._generated) / step_s,
                "speed/train_tokens_per_s": batch.num_tokens / step_s,
            },
            batch_size=len(batch),
        )
        self._generated = generated
        self._warn_of_drops(telemetry.dropped_groups, telemetry.trained_groups)

    def _warn_of_drops(self, dropped: int, trained: int) -> None:
        total = dropped + trained
        if self._warned or total < DROP_WARNING_GROUPS or dropped <= DROP_WARNING_SHARE * total:
            return
        self._warned = True
        logger.warning(
            "%d of %d finished or overdue groups went stale and were dropped: training is biased "
            "against long rollouts. Raise max_head_lag, lower max_concurrent, or use "
            "on_overdue='wait'.",
            dropped,
            total,
        )


def _parts(
    trainer: L.Trainer, pl_module: L.LightningModule
) -> tuple[SegmentWisePPOModule, RolloutDataModule, WorkflowExecutor]:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, RolloutDataModule) or not isinstance(pl_module, SegmentWisePPOModule):
        raise ConfigError(
            "WeightSyncCallback needs fit(SegmentWisePPOModule, datamodule=RolloutDataModule); "
            f"found {type(pl_module).__name__} and {type(data).__name__}."
        )
    return pl_module, data, data.executor
