"""The data side of ``Trainer.fit``: an engine, an executor, and loaders that pull from it.

The train loader has a length, so Lightning never fetches ahead: a batch is taken when the step
before it has been published.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from sdp_lightning.batch import SealedBatch
from sdp_lightning.config import RolloutConfig
from sdp_lightning.engines.base import InferenceEngine
from sdp_lightning.engines.connect import connect_engine
from sdp_lightning.engines.embedded import EmbeddedEngine
from sdp_lightning.errors import ConfigError
from sdp_lightning.loaders import EvaluationLoader, RolloutLoader
from sdp_lightning.loading import load_rows
from sdp_lightning.module import SegmentWisePPOModule
from sdp_lightning.rollout.executor import WorkflowExecutor
from sdp_lightning.rollout.factory import create_workflow_executor
from sdp_lightning.workflows.base import RolloutWorkflow

logger = logging.getLogger(__name__)

# Lightning 2.6 asks torch 2.13 a question that torch would rather have asked otherwise.
warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")

ENDLESS = 10**9


class RolloutDataModule(L.LightningDataModule):
    """Generates rollouts while the trainer trains, and hands them out as batches.

    Needs a :class:`SegmentWisePPOModule` (for model and tokenizer) and a ``WeightSyncCallback``.

    Args:
        prompts: rows (mappings), or where to find them: ``"package.module:name"`` or
            ``"path/to/file.py:name"`` of a sequence, or of a function that returns one.
        workflow: what one rollout does.
        engine: what :func:`connect_engine` takes: ``"embedded"``, ``"vllm://host:port"``,
            ``"vllm://launch"``, or an engine of one's own, which is closed at the end of the run.
        engine_options: passed on to :func:`connect_engine`.
        rollout: counts are of the whole world.
        val_prompts: rows of ``validate`` and ``test``; None leaves them out.
        val_workflow: how they are rolled out; None is ``workflow``.

    Raises:
        ConfigError: if there are no prompts, or settings contradict each other.
    """

    def __init__(
        self,
        prompts: str | Sequence[Mapping[str, Any]],
        workflow: RolloutWorkflow,
        *,
        engine: str | InferenceEngine = "embedded",
        engine_options: dict[str, Any] | None = None,
        rollout: RolloutConfig = RolloutConfig(),
        val_prompts: str | Sequence[Mapping[str, Any]] | None = None,
        val_workflow: RolloutWorkflow | None = None,
    ) -> None:
        super().__init__()
        if workflow.sampling.temperature == 0:
            raise ConfigError(
                "the training workflow samples at temperature 0: greedy tokens have no log-probs "
                "to learn from. Use a positive temperature; val_workflow may be greedy."
            )
        self.rollout, self.workflow = rollout, workflow
        self.val_workflow = workflow if val_workflow is None else val_workflow
        self._prompts, self._val_prompts = prompts, val_prompts
        self._engine_source, self._engine_options = engine, dict(engine_options or {})
        self._engine: InferenceEngine | None = None
        self._executor: WorkflowExecutor | None = None
        self._loader: RolloutLoader | None = None
        self._trainer_threads: int | None = None
        self._last_state: dict[str, Any] = {}  # of the last fit, for a checkpoint made after it

    @property
    def executor(self) -> WorkflowExecutor:
        """The executor of this process, from ``setup`` to ``teardown``."""
        if self._executor is None:
            raise ConfigError("the executor exists from setup() to teardown() only.")
        return self._executor

    @property
    def last_wait_s(self) -> float:
        """How long the last batch was waited for."""
        return 0.0 if self._loader is None else self._loader.last_wait_s

    def setup(self, stage: str) -> None:
        if self._executor is not None:
            return
        module = self._module()
        if self.trainer is not None and self.trainer.world_size > 1:
            raise ConfigError(
                f"the Trainer has {self.trainer.world_size} processes; this version trains in one. "
                "Use devices=1."
            )
        if module.update.num_minibatches > self.rollout.batch_size:
            raise ConfigError(
                f"batch_size={self.rollout.batch_size} groups cannot fill "
                f"num_minibatches={module.update.num_minibatches}: groups stay whole."
            )
        drops = self.rollout.enable_segment_wise_ppo and self.rollout.missing_proximal == "drop"
        if drops and not module.loss.needs_segment_proximal:
            raise ConfigError(
                "missing_proximal='drop' drops every group older than 1 version, because the "
                f"estimator (trust_region={module.loss.trust_region!r}) never has segments scored. "
                "Use another missing_proximal, or trust_region='segment'."
            )
        options = dict(self._engine_options)
        if isinstance(self._engine_source, str):
            options = {"model": module.model_id, **options}
        engine = connect_engine(self._engine_source, **options)
        self._executor = create_workflow_executor(
            config=self.rollout,
            engine=engine,
            workflow=self.workflow,
            prompts=load_rows(self._prompts),
            tokenizer=module.tokenizer,
        )
        self._engine = engine
        if self._val_prompts is None and stage == "fit" and self.trainer is not None:
            self.trainer.limit_val_batches = 0
        engine.start()
        self._share_cores(engine)

    def train_dataloader(self) -> RolloutLoader:
        module, trainer = self._module(), self.trainer
        assert trainer is not None
        self._loader = RolloutLoader(
            self.executor,
            pad_token_id=module.tokenizer.pad_token_id or 0,
            length=_num_batches(trainer, self.rollout, module.update.steps_per_batch),
            trainer=trainer,
        )
        return self._loader

    def val_dataloader(self) -> EvaluationLoader:
        if self._val_prompts is None:
            raise ConfigError("there is nothing to evaluate: pass val_prompts.")
        assert self.trainer is not None
        rows = load_rows(self._val_prompts)
        return EvaluationLoader(self.executor, rows, self.val_workflow, trainer=self.trainer)

    def test_dataloader(self) -> EvaluationLoader:
        return self.val_dataloader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch.batch if isinstance(batch, SealedBatch) else batch

    def state_dict(self) -> dict[str, Any]:
        return self._last_state if self._executor is None else self._executor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict and self.trainer is not None and self.trainer.state.fn == "fit":
            self.executor.load_state_dict(state_dict)  # evaluation trains on no prompt

    def teardown(self, stage: str) -> None:
        self.close()

    def on_exception(self, exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException) and exception.code is None:
            exception.code = 128 + signal.SIGTERM  # Lightning's own would exit with 0, as success
        self.close()

    def close(self) -> None:
        """End rollouts and engine. Safe to call twice."""
        executor, self._executor = self._executor, None
        engine, self._engine = self._engine, None
        loader, self._loader = self._loader, None
        try:
            if executor is not None:
                executor.close()
                self._last_state = self._last_state if loader is None else executor.state_dict()
        finally:
            if engine is not None:
                engine.close()
            if self._trainer_threads is not None:
                torch.set_num_threads(self._trainer_threads)
                self._trainer_threads = None

    def _share_cores(self, engine: InferenceEngine) -> None:
        """Leave the engine its cores: on shared ones two OpenMP pools spin against each other."""
        if not isinstance(engine, EmbeddedEngine) or "OMP_NUM_THREADS" in os.environ:
            return
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        share = max(1, cores - engine.num_cpu_threads)
        if engine.num_cpu_threads and share < torch.get_num_threads():
            self._trainer_threads = torch.get_num_threads()
            torch.set_num_threads(share)

    def _module(self) -> SegmentWisePPOModule:
        module = None if self.trainer is None else self.trainer.lightning_module
        if not isinstance(module, SegmentWisePPOModule):
            raise ConfigError(
                "RolloutDataModule takes model and tokenizer from the Trainer's module, which must "
                f"be a SegmentWisePPOModule; found {type(module).__name__}."
            )
        return module


def _has_timer(trainer: L.Trainer) -> bool:
    return any(isinstance(callback, Timer) for callback in trainer.callbacks)  # type: ignore


def _num_batches(trainer: L.Trainer, rollout: RolloutConfig, steps_per_batch: int) -> int:
    if trainer.max_steps > 0:
        return trainer.max_steps // steps_per_batch
    if rollout.num_epochs is None and not _has_timer(trainer):
        raise ConfigError(
            "nothing ends this run: set the Trainer's max_steps or max_time, or num_epochs of the "
            "RolloutConfig."
        )
    return ENDLESS
