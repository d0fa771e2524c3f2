"""The callback that moves policy versions: publish, commit, purge, and score old segments.

It runs in ``on_train_batch_end``, before ModelCheckpoint saves and before the next batch is taken.
"""

from __future__ import annotations

import logging
import time
import warnings
from typing import Any, get_args

import lightning as L
from lightning.pytorch.callbacks import Callback

from sdp_lightning.errors import ConfigError, VersionError
from sdp_lightning.lightning.checkpoint_io import use_atomic_checkpoints
from sdp_lightning.lightning.checkpoint_names import keep_names_flat
from sdp_lightning.lightning.datamodule import RolloutDataModule
from sdp_lightning.lightning.drop_warning import DropWarning
from sdp_lightning.lightning.failing_callbacks import (
    FailingCallbacks,
    guard_hooks,
    num_set_aside,
)
from sdp_lightning.lightning.graceful_stop import GracefulStop
from sdp_lightning.lightning.module import SegmentWisePPOModule
from sdp_lightning.lightning.phase_timer import PHASES
from sdp_lightning.lightning.published_weights import num_embeddings, weights_for
from sdp_lightning.lightning.resumed import RunOfFit, say_if_unsaved, say_nothing_trained
from sdp_lightning.lightning.rollout_hooks import tell_rollouts
from sdp_lightning.lightning.score_window import ScoreWindow
from sdp_lightning.lightning.startup import tell_vocabulary
from sdp_lightning.lightning.weight_check import WeightCheck
from sdp_lightning.rollout.executor import WorkflowExecutor
from sdp_lightning.rollout.groups.telemetry import RolloutCounts
from sdp_lightning.training.batch import Batch

logger = logging.getLogger(__name__)


class WeightSyncCallback(Callback):
    """Publishes one policy version for every consumed batch.

    At every start, fresh or resumed, all weights are published before anything is generated. After
    each training batch the trained ones follow as the next version; then stale groups are purged.
    Before each batch, segments that need their proximal log-probs now are scored.

    Times, counts of groups and the speed of both sides are logged right after the publish. Times
    are rank 0's, counts are over all ranks when they took the batch. docs/metrics.md lists all.

    Args:
        weight_check_every: compare log-probs of a text under the engine's weights and the trainer's
            (:class:`~sdp_lightning.lightning.weight_check.WeightCheck`) after the first two
            publishes and every so many, and keep a copy of the trained weights on the CPU for it.
            None: once, after the first publish of a run. 0: never.
        weight_check_tolerance: largest mean difference of these log-probs in nats.
        save_on_stop: let Ctrl-C and SIGTERM end a fit after the present step and, if the Trainer
            checkpoints, with a checkpoint
            (:class:`~sdp_lightning.lightning.graceful_stop.GracefulStop`).
        stop_grace_s: longest such step in seconds; after it the step is abandoned.
        failing_callbacks: what an error in a callback of yours does once training has begun:
            ``"set_aside"`` names it in a warning and goes on without that callback, on one rank;
            ``"raise"``, and always on several ranks, ends the run, as in any Lightning fit.
        echo_every: former name of ``weight_check_every``.
        echo_tolerance: former name of ``weight_check_tolerance``.

    Raises:
        ConfigError: if a setting is out of range.
    """

    def __init__(
        self,
        *,
        weight_check_every: int | None = None,
        weight_check_tolerance: float = 0.1,
        save_on_stop: bool = True,
        stop_grace_s: float = 600.0,
        failing_callbacks: FailingCallbacks = "set_aside",
        echo_every: int | None = None,
        echo_tolerance: float | None = None,
    ) -> None:
        if echo_every is not None:
            _warn_of_rename("echo_every", "weight_check_every")
            weight_check_every = echo_every
        if echo_tolerance is not None:
            _warn_of_rename("echo_tolerance", "weight_check_tolerance")
            weight_check_tolerance = echo_tolerance
        if weight_check_every is not None and weight_check_every < 0:
            raise ConfigError(
                f"weight_check_every must be 1 or more, 0 for never, or None for once at the start;"
                f" got {weight_check_every}."
            )
        if failing_callbacks not in (choices := get_args(FailingCallbacks)):
            raise ConfigError(f"failing_callbacks={failing_callbacks!r} is none of {choices}.")
        self.version = 0
        self._run: RunOfFit | None = None
        self._failing: FailingCallbacks = failing_callbacks
        self._check_every = weight_check_every or 0
        keep = self._check_every > 0
        check = WeightCheck(tolerance=weight_check_tolerance, keep_weights=keep)
        self._weight_check = None if weight_check_every == 0 else check
        self._checked: dict[str, float] = {}
        self._times: dict[str, float] = {}
        self._learned, self._busy_s = 0, 0.0
        self._window = ScoreWindow()
        self._num_trained = 0  # batches of the fit
        self._drops = DropWarning()
        self._stop = GracefulStop(grace_s=stop_grace_s) if save_on_stop else None
        self._start = self._validated = (
            0  # versions at the start of the fit and of the last validation
        )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        _parts(trainer, pl_module)
        use_atomic_checkpoints(trainer)
        keep_names_flat(trainer)
        if stage == "fit":
            _parts(trainer, pl_module)[1].stop.saves.guard(trainer)
            self._run, self._num_trained = RunOfFit(trainer), 0
        guard_hooks(trainer, self._failing)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._run is not None:
            self._run.see_configured(trainer)

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._publish_first(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._publish_first(trainer, pl_module)
        _parts(trainer, pl_module)[1].phase_timer.enter("evaluate")

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._publish_first(trainer, pl_module)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._publish_first(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._run is not None:
            self._run.put_in_force(trainer)
        self._publish_first(trainer, pl_module)
        module, data, executor = _parts(trainer, pl_module)
        module.optimizer_set()  # refused before anything is generated
        say_if_unsaved(trainer, module.update.steps_per_batch)
        executor.resume()
        self._start = self.version
        data.stop.saves.end_step()
        data.stop.saves.take_requeue()
        if self._stop is not None:
            self._stop.begin(trainer, self.version)
        data.phase_timer.take_spent()
        self._learned, self._busy_s = 0, executor.gate.busy_s

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        module, data, executor = _parts(trainer, pl_module)
        data.stop.saves.begin_step()
        tell_rollouts(trainer, pl_module, executor.registry.in_hand())
        data.phase_timer.enter("train")
        self._window.open(module, executor, data.phase_timer)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        module, data, executor = _parts(trainer, pl_module)
        self._window.shut(module, executor, data.phase_timer)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        module, data, executor = _parts(trainer, pl_module)
        if batch.version != self.version:
            raise VersionError(
                f"the batch was taken at version {batch.version}, but the trainer is at "
                f"{self.version}: was a publish skipped?"
            )
        self._window.shut(module, executor, data.phase_timer)
        data.phase_timer.enter("publish")
        weights = weights_for(executor.engine, module, changed_only=True)
        report = executor.publish(weights, self.version + 1)
        self.version += 1
        self._num_trained += 1
        data.stop.saves.end_step()
        data.phase_timer.enter("rest")
        spent, busy_s = data.phase_timer.take_spent(), executor.gate.busy_s
        # A request that is in flight over a pause counts as busy.
        paused_s = report.paused_s if executor.engine.updates_in_flight else 0.0
        self._times = {
            **{f"time/{phase}_s": spent.get(phase, 0.0) for phase in PHASES},
            "time/step_s": sum(spent.values()),
            "time/paused_s": report.paused_s,
            "time/sampling_s": max(0.0, busy_s - self._busy_s - paused_s),
            "publish/bytes": float(report.num_bytes),
            "publish/bytes_per_s": report.bytes_per_s,
            "publish/stage_s": report.stage_s,
            "publish/drain_s": report.drain_s,
            "publish/load_s": report.load_s,
            "publish/resume_s": report.resume_s,
        }
        self._busy_s = busy_s
        self._times |= executor.concurrency.on_step(self._times)
        if self._check_every and (self.version == 1 or self.version % self._check_every == 0):
            self._check_weights(module, executor)
        self._times |= self._checked
        self._checked = {}
        assert data.loader is not None  # this batch came from it
        self._log(module, data.loader.counts, len(batch))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validated = self.version
        _parts(trainer, pl_module)[1].phase_timer.enter("rest")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _, data, executor = _parts(trainer, pl_module)
        executor.publisher.finish()
        if trainer.enable_validation and self._start < self.version != self._validated:
            trainer.validating = True  # as Lightning's loop does, which skips the last version
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True
        data.stop.saves.finish(data.ranks)
        if self._stop is not None:
            self._stop.end()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        if self._stop is not None:
            self._stop.save(self.version)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, RolloutDataModule):
            data.stop.saves.abandon()

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Name the run in the checkpoint, and for ``sdp-lightning export`` the model."""
        if self._run is not None:
            self._run.write(checkpoint, self.version)
        if isinstance(pl_module, SegmentWisePPOModule):
            checkpoint["sdp_model_source"] = saved = pl_module.source.saved()
            checkpoint["sdp_model_id"] = saved["name"]

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on with the run of the checkpoint, and say which settings have changed since."""
        if trainer.state.fn == "fit" and self._run is not None:
            self._run.go_on_with(trainer, checkpoint)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._num_trained:  # Lightning may have skipped the hooks of training
            _, data, _ = _parts(trainer, pl_module)
            data.stop.saves.end_step()
            data.stop.saves.finish(data.ranks)
            say_nothing_trained(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"version": self.version}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.version = int(state_dict["version"])

    def _publish_first(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module, data, executor = _parts(trainer, pl_module)
        executor.publisher.finish()
        if not executor.is_published:
            if trainer.state.fn == "fit":
                data.resume(self.version)
            tell_vocabulary(executor.engine, num_embeddings(module.require_policy()))
            weights = weights_for(executor.engine, module)
            executor.publish(weights, self.version, reset=True)
            self._check_weights(module, executor)

    def _check_weights(self, module: SegmentWisePPOModule, executor: WorkflowExecutor) -> None:
        if self._weight_check is None:
            return
        executor.publisher.finish()
        policy, start_s = module.require_policy(), time.perf_counter()
        with module.whole_vocabulary():  # as the engine's log-probs of a prompt
            difference = self._weight_check.check(
                policy,
                num_embeddings=num_embeddings(policy),
                score=lambda trajectory: module.score([trajectory])[0][0],
                ask=executor.engine.prompt_logprobs,
                own=module.own_logprobs,
            )
        if difference is not None:
            took_s = time.perf_counter() - start_s
            self._checked = {"publish/echo": difference, "publish/echo_s": took_s}
            logger.info(
                "weight check at version %d: engine and trainer are %.2g nats apart; took %.3f s.",
                *(self.version, difference, took_s),
            )

    def _log(self, module: SegmentWisePPOModule, counts: RolloutCounts, size: int) -> None:
        learned, self._learned = counts.trained_tokens - self._learned, counts.trained_tokens
        step_s = max(1e-9, self._times["time/step_s"])
        module.log_dict(
            {
                **self._times,
                "rollout/version": float(self.version),
                **counts.metrics(),
                "run/callbacks_set_aside": float(num_set_aside(module.trainer)),
                "speed/generated_tokens_per_s": counts.generated / step_s,
                "speed/train_tokens_per_s": learned / step_s,
            },
            batch_size=size,
        )
        waited = self._times["time/wait_s"] / step_s
        module.log("wait", waited, prog_bar=True, logger=False, batch_size=size)
        if module.global_rank == 0:
            telemetry = _parts(module.trainer, module)[2].registry.telemetry
            self._drops.see(counts.dropped_groups, counts.trained_groups, telemetry.num_aside)


def _warn_of_rename(former: str, present: str) -> None:
    warnings.warn(f"{former} of WeightSyncCallback is now {present}.", FutureWarning, stacklevel=3)


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
