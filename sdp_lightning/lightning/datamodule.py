"""The data side of ``Trainer.fit``: an engine, an executor, and loaders that pull from it.

The train loader has a length, so Lightning never fetches ahead: a batch is taken when the step
before it has been published.
"""

from __future__ import annotations

import signal
from contextlib import ExitStack
from typing import Any, cast

import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from sdp_lightning.config import RolloutConfig
from sdp_lightning.config.compatibility import check_together
from sdp_lightning.config.plain_settings import plain
from sdp_lightning.distributed.rank_group import RankGroup
from sdp_lightning.engines.protocol import InferenceEngine
from sdp_lightning.errors import ConfigError
from sdp_lightning.lightning.ending import guard_callbacks
from sdp_lightning.lightning.evaluation_loader import EvaluationLoader
from sdp_lightning.lightning.last_checkpoint import RunDataModule
from sdp_lightning.lightning.leftover import Leftover
from sdp_lightning.lightning.module import SegmentWisePPOModule
from sdp_lightning.lightning.observer import say_set_aside
from sdp_lightning.lightning.phase_timer import PhaseTimer
from sdp_lightning.lightning.prediction_loader import GenerationLoader
from sdp_lightning.lightning.prompt_epochs import PromptEpochs, with_passes
from sdp_lightning.lightning.rollout_hooks import add_tables
from sdp_lightning.lightning.run_rows import PROMPTS, VAL_PROMPTS, RunRows
from sdp_lightning.lightning.startup import (
    find_eos_tokens,
    leave_cores,
    longest_sequence,
    make_trainer_ranks,
    open_engine,
    start_engine,
)
from sdp_lightning.lightning.stop_request import StopRequest
from sdp_lightning.lightning.train_loader import RolloutLoader
from sdp_lightning.prompts.sources import Prompts
from sdp_lightning.rollout.checkpoint.resharding import count_discarded, reshard
from sdp_lightning.rollout.executor import WorkflowExecutor
from sdp_lightning.rollout.factory import create_workflow_executor
from sdp_lightning.training.batch import SealedBatch
from sdp_lightning.workflows.workflow import RolloutWorkflow


class RolloutDataModule(RunDataModule):
    """Generates rollouts while the trainer trains, and hands them out as batches.

    Needs a :class:`SegmentWisePPOModule` (for model and tokenizer) and a ``WeightSyncCallback``.
    A second ``fit`` with the same three objects goes on with the next prompts, or begins again with
    all of them if they had ended.

    Args:
        prompts: rows (mappings): a sequence, or an iterable (a generator, ``datasets`` streaming, a
            ``DataLoader``), or a function that returns one; or the import path of any of these:
            ``"package.module:name"`` or ``"path/to/file.py:name"``.
        workflow: workflow of every rollout.
        engine: argument of :func:`connect_engine`: ``"embedded"``, ``"vllm://host:port"``,
            ``"vllm://launch"``, or an engine object, which is closed at the end of the run and
            serves no other.
        engine_options: further arguments of :func:`connect_engine`.
        rollout: settings; counts are over all ranks.
        val_prompts: rows of ``validate`` and ``test``; None leaves validation out.
        val_workflow: workflow of ``val_prompts``; None is ``workflow``.

    Raises:
        ConfigError: if there are no prompts, or settings contradict each other.
    """

    def __init__(
        self,
        prompts: Prompts,
        workflow: RolloutWorkflow,
        *,
        engine: str | InferenceEngine = "embedded",
        engine_options: dict[str, Any] | None = None,
        rollout: RolloutConfig = RolloutConfig(),
        val_prompts: Prompts | None = None,
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
        self._rows = RunRows(prompts, val_prompts)
        self._engine_source, self._engine_options = engine, dict(engine_options or {})
        settings = {"workflow": workflow, "engine": engine, "engine_options": engine_options}
        settings |= {"rollout": rollout, "val_workflow": val_workflow}
        self.save_hyperparameters(plain(settings | self._rows.names))
        self._engine: InferenceEngine | None = None
        self._executor: WorkflowExecutor | None = None
        self.loader: RolloutLoader | None = None  # of the fit under way
        self._trainer_threads: int | None = None
        self._leftover = Leftover()
        self._engine_spent = False
        self._ranks = RankGroup()
        self._epochs = PromptEpochs((), rollout.batch_size)
        self.stop = StopRequest()
        self.phase_timer = PhaseTimer()  # of the trainer's thread

    @property
    def executor(self) -> WorkflowExecutor:
        """The executor of this process, from ``setup`` to ``teardown``."""
        if self._executor is None:
            raise ConfigError("the executor exists from setup() to teardown() only.")
        return self._executor

    @property
    def ranks(self) -> RankGroup:
        """The processes that train together, from ``setup`` to ``teardown``."""
        return self._ranks

    @property
    def is_between_steps(self) -> bool:
        """Whether weights, version and rollouts are consistent: no batch is being trained on."""
        if self._executor is None:
            return False
        return self.stop.agreed or not any(
            g.in_training for g in self._executor.registry.snapshot()
        )

    def setup(self, stage: str) -> None:
        if self._executor is not None:
            return
        if self._engine_spent:
            raise ConfigError(
                "the engine object that this data module was given was closed at the end of the "
                "last run: make a new RolloutDataModule with a new engine, or give the engine by "
                "name (engine='embedded', engine='vllm://...'), which starts one for every run."
            )
        self.stop = StopRequest()
        if self.trainer is not None:
            add_tables(self.trainer, self.rollout.log_completions if stage == "fit" else 0)
            guard_callbacks(self.trainer)
        module = self._module()
        config = self.rollout.share(1 if self.trainer is None else self.trainer.world_size)
        if self.trainer is not None and stage == "fit":
            config = with_passes(config, self.trainer, goes_on=self._leftover.is_resumable)
        check_together(config, module.update, module.loss)
        engine = open_engine(
            self._engine_source, self._engine_options, module=module, trainer=self.trainer
        )
        self._ranks = make_trainer_ranks(self.trainer, self.stop, batch_timeout_s=config.timeout_s)
        module.use_ranks(self._ranks)
        self._rows.load(stage, self.trainer, self.rollout, self._num_rows_predicted())
        used = {PROMPTS: self.workflow} if stage in ("fit", "predict") else {}
        used |= {VAL_PROMPTS: self.val_workflow} if stage != "predict" else {}
        self._rows.check(used, module, self.rollout, self._ranks)
        self._engine = engine
        start_engine(engine, self._ranks)
        self._rows.keep(longest_sequence(engine))
        self._executor = create_workflow_executor(
            config=config,
            engine=engine,
            workflow=self.workflow,
            prompts=self._rows.used[PROMPTS],
            tokenizer=module.tokenizer,
            ranks=self._ranks,
            eos_token_ids=find_eos_tokens(module, self.workflow),
            max_length=longest_sequence(engine),
        )
        self._epochs = PromptEpochs(self._rows.used[PROMPTS], self.rollout.batch_size)
        if self.trainer is not None:
            self.planned_batches = self._epochs.plan(self.trainer, self.rollout)
        if not self._rows.has_val and stage == "fit" and self.trainer is not None:
            self.trainer.limit_val_batches = 0
        self._trainer_threads = leave_cores(engine)

    def _num_predicted(self) -> int | None:
        """Batches that ``predict`` makes at most; None is all."""
        limit: Any = None if self.trainer is None else self.trainer.limit_predict_batches
        return limit if isinstance(limit, int) else None

    def _num_rows_predicted(self) -> int | None:
        """Rows that ``predict`` rolls out at most, on all ranks; None is all."""
        batches = self._num_predicted()
        return None if batches is None else batches * self.rollout.batch_size * self._ranks.size

    def train_dataloader(self) -> RolloutLoader:
        module, trainer = self._module(), cast(Any, self.trainer)
        trainer.reload_dataloaders_every_n_epochs = 1  # an epoch has a length of its own
        if self.loader is None:
            self.loader = RolloutLoader(
                self.executor,
                pad_token_id=module.tokenizer.pad_token_id or 0,
                epochs=self._epochs,
                trainer=trainer,
                ranks=self._ranks,
                stop=self.stop,
                phase_timer=self.phase_timer,
            )
        self.loader.begin_epoch(module.update)
        return self.loader

    def val_dataloader(self) -> EvaluationLoader:
        if not self._rows.has_val:
            raise ConfigError("there is nothing to evaluate: pass val_prompts.")
        assert self.trainer is not None
        return EvaluationLoader(
            self.executor,
            self._rows.used[VAL_PROMPTS],
            self.val_workflow,
            trainer=self.trainer,
            ranks=self._ranks,
            stop=self.stop,
        )

    def test_dataloader(self) -> EvaluationLoader:
        return self.val_dataloader()

    def predict_dataloader(self) -> GenerationLoader:
        """Rollouts of the training prompts: only generated, nothing is learned from them."""
        assert self.trainer is not None
        return GenerationLoader(
            self.executor,
            self._rows.used[PROMPTS],
            self.workflow,
            tokenizer=self._module().tokenizer,
            num_batches=self._num_predicted(),
            trainer=self.trainer,
            ranks=self._ranks,
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch.batch if isinstance(batch, SealedBatch) else batch

    def state_dict(self) -> dict[str, Any]:
        """State of the rollouts: of all ranks on rank 0, which writes it; on the others nothing.

        A collective: all ranks save.
        """
        if self._executor is None:
            return self._leftover.checkpoint
        parts = self._ranks.gather("saving rollouts", self._executor.state_dict())
        return {} if parts is None else {"ranks": parts, "epoch_left": self._epochs.left}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict or self.trainer is None or self.trainer.state.fn != "fit":
            return  # evaluation trains on no prompt
        self._leftover.discard()
        if self.rollout.prompts_on_resume == "restart":
            if self._ranks.rank == 0:
                count_discarded(state_dict["ranks"], self.executor.telemetry)
            return
        self._epochs.left = state_dict.get("epoch_left")
        parts = reshard(state_dict["ranks"], self._ranks.size)
        self.executor.load_state_dict(parts[self._ranks.rank])

    def resume(self, version: int) -> None:
        """Load the rollouts that the last fit left at ``version``; before the first publish."""
        self._leftover.resume(self.executor, self._module(), version)

    def teardown(self, stage: str) -> None:
        self.close()

    def on_exception(self, exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException) and exception.code is None:
            exception.code = 128 + signal.SIGTERM  # Lightning's own would exit with 0, as success
        try:
            self._ranks.fail(exception)
        except Exception as error:
            say_set_aside("telling the other ranks", error, "the cause, in their messages")
        try:
            self.close()
        except Exception as error:
            say_set_aside("closing the run", error, "nothing; the run's own error follows")

    def close(self) -> None:
        """End rollouts and engine, each also if another cannot be. Safe to call twice."""
        is_consistent = self.is_between_steps
        executor, self._executor = self._executor, None
        engine, self._engine = self._engine, None
        loader, self.loader = self.loader, None
        threads, self._trainer_threads = self._trainer_threads, None
        with ExitStack() as closing:  # the last one first
            if threads is not None:
                closing.callback(torch.set_num_threads, threads)
            if engine is not None:
                self._engine_spent = not isinstance(self._engine_source, str)
                closing.callback(engine.close)
            for workflow in (self.val_workflow, self.workflow):
                closing.callback(workflow.close)
            if executor is not None:
                closing.callback(self._end_rollouts, executor, loader, is_consistent)
            closing.callback(self._ranks.close)

    def _end_rollouts(
        self, executor: WorkflowExecutor, loader: RolloutLoader | None, is_consistent: bool
    ) -> None:
        executor.close()
        if loader is not None:
            self._leftover.keep(
                executor,
                self._module(),
                num_ranks=self._ranks.size,
                is_resumable=is_consistent and executor.is_published and not loader.ended,
                epoch_left=self._epochs.left,
            )

    def _module(self) -> SegmentWisePPOModule:
        module = None if self.trainer is None else self.trainer.lightning_module
        if not isinstance(module, SegmentWisePPOModule):
            raise ConfigError(
                "RolloutDataModule takes model and tokenizer from the Trainer's module, which must "
                f"be a SegmentWisePPOModule; found {type(module).__name__}."
            )
        return module
