"""The data side of ``Trainer.fit``: an engine, an executor, and loaders that pull from it.

The train loader has a length, so Lightning never fetches ahead: a batch is taken when the step
before it has been published.
"""

from __future__ import annotations

import logging
import os
import signal
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from sdp_lightning.config import RolloutConfig
from sdp_lightning.config.compatibility import check_together
from sdp_lightning.distributed.rank_group import RankGroup, make_rank_group
from sdp_lightning.engines.connect import connect_engine
from sdp_lightning.engines.protocol import InferenceEngine, SharedServerEngine
from sdp_lightning.engines.remote.engine import RemoteInfEngine
from sdp_lightning.engines.servers.placement import require_one_host
from sdp_lightning.errors import ConfigError
from sdp_lightning.lightning.cpu_threads import leave_cores
from sdp_lightning.lightning.evaluation_loader import EvaluationLoader
from sdp_lightning.lightning.module import SegmentWisePPOModule
from sdp_lightning.lightning.phase_timer import PhaseTimer
from sdp_lightning.lightning.prediction_loader import GenerationLoader
from sdp_lightning.lightning.stop_request import StopRequest
from sdp_lightning.lightning.train_loader import RolloutLoader
from sdp_lightning.prompts.sources import load_rows
from sdp_lightning.rollout.checkpoint.resharding import reshard
from sdp_lightning.rollout.executor import WorkflowExecutor
from sdp_lightning.rollout.factory import create_workflow_executor
from sdp_lightning.training.batch import SealedBatch
from sdp_lightning.workflows.workflow import RolloutWorkflow

logger = logging.getLogger(__name__)

# Lightning 2.6 asks torch 2.13 a question that torch would rather have asked otherwise.
warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")

ENDLESS = 10**9
_MARGIN_S = 30.0  # beyond the wait for a batch, whose error names what was awaited
_START_S = 1200.0  # of servers that are started, or of a model that every rank loads


@dataclass(frozen=True)
class _Leftover:
    """The rollouts that a fit left, and the version and the module they belong to."""

    state: dict[str, Any]
    version: int
    module: weakref.ReferenceType[SegmentWisePPOModule]


class RolloutDataModule(L.LightningDataModule):
    """Generates rollouts while the trainer trains, and hands them out as batches.

    Needs a :class:`SegmentWisePPOModule` (for model and tokenizer) and a ``WeightSyncCallback``.
    A second ``fit`` with the same three objects goes on where the prompts were; if they had ended,
    with all of them again.

    Args:
        prompts: rows (mappings), or where to find them: ``"package.module:name"`` or
            ``"path/to/file.py:name"`` of a sequence, or of a function that returns one.
        workflow: what one rollout does.
        engine: what :func:`connect_engine` takes: ``"embedded"``, ``"vllm://host:port"``,
            ``"vllm://launch"``, or an engine of one's own, which is closed at the end of the run
            and serves no other.
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
        self.loader: RolloutLoader | None = None  # of the fit under way
        self._trainer_threads: int | None = None
        self._last_state: dict[str, Any] = {}  # of the last fit, for a checkpoint made after it
        self._leftover: _Leftover | None = None
        self._engine_spent = False
        self._ranks = RankGroup()
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
        """Whether weights, version and rollouts belong together: no batch is being trained on."""
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
        module = self._module()
        config = self.rollout.share(1 if self.trainer is None else self.trainer.world_size)
        check_together(config, module.update, module.loss)
        known = {"model": module.model_id} if isinstance(self._engine_source, str) else {}
        options: dict[str, Any] = {**known, **self._engine_options}
        if module.lora is not None and options.get("transport") == "lora":
            options.setdefault("lora_alpha", module.lora.alpha)
        engine = connect_engine(self._engine_source, **options)
        self._check_servers(engine)
        self._ranks = ranks = self._make_ranks()
        self._executor = create_workflow_executor(
            config=config,
            engine=engine,
            workflow=self.workflow,
            prompts=load_rows(self._prompts),
            tokenizer=module.tokenizer,
            ranks=ranks,
        )
        self._engine = engine
        if self._val_prompts is None and stage == "fit" and self.trainer is not None:
            self.trainer.limit_val_batches = 0
        self._start(engine, ranks)
        self._trainer_threads = leave_cores(engine)

    def train_dataloader(self) -> RolloutLoader:
        module, trainer = self._module(), self.trainer
        assert trainer is not None
        self.loader = RolloutLoader(
            self.executor,
            pad_token_id=module.tokenizer.pad_token_id or 0,
            length=_num_batches(trainer, self.rollout, module.update.steps_per_batch),
            trainer=trainer,
            ranks=self._ranks,
            stop=self.stop,
            phase_timer=self.phase_timer,
        )
        return self.loader

    def val_dataloader(self) -> EvaluationLoader:
        if self._val_prompts is None:
            raise ConfigError("there is nothing to evaluate: pass val_prompts.")
        assert self.trainer is not None
        rows = load_rows(self._val_prompts)
        return EvaluationLoader(
            self.executor,
            rows,
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
        limit: Any = self.trainer.limit_predict_batches
        return GenerationLoader(
            self.executor,
            load_rows(self._prompts),
            self.workflow,
            num_batches=limit if isinstance(limit, int) else None,
            trainer=self.trainer,
            ranks=self._ranks,
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch.batch if isinstance(batch, SealedBatch) else batch

    def state_dict(self) -> dict[str, Any]:
        """What rollouts need to go on: of all ranks on rank 0, which writes it; else nothing.

        A collective, as all ranks save.
        """
        if self._executor is None:
            return self._last_state
        parts = self._ranks.gather("saving rollouts", self._executor.state_dict())
        return {} if parts is None else {"ranks": parts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict or self.trainer is None or self.trainer.state.fn != "fit":
            return  # evaluation trains on no prompt
        parts = reshard(state_dict["ranks"], self._ranks.size)
        self._leftover = None
        self.executor.load_state_dict(parts[self._ranks.rank])

    def resume(self, version: int) -> None:
        """Before the first publish of a fit: take up what the last one left at ``version``."""
        left, self._leftover = self._leftover, None
        if left is not None and left.version == version and left.module() is self._module():
            self.executor.load_state_dict(left.state)

    def teardown(self, stage: str) -> None:
        self.close()

    def on_exception(self, exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException) and exception.code is None:
            exception.code = 128 + signal.SIGTERM  # Lightning's own would exit with 0, as success
        self._ranks.fail(exception)
        self.close()

    def close(self) -> None:
        """End rollouts and engine. Safe to call twice."""
        is_consistent = self.is_between_steps
        executor, self._executor = self._executor, None
        engine, self._engine = self._engine, None
        loader, self.loader = self.loader, None
        self._ranks.close()
        try:
            if executor is not None:
                executor.close()
                if loader is not None:
                    self._keep(executor, ended=loader.ended, is_consistent=is_consistent)
        finally:
            for workflow in (self.workflow, self.val_workflow):
                workflow.close()
            if engine is not None:
                self._engine_spent = not isinstance(self._engine_source, str)
                engine.close()
            if self._trainer_threads is not None:
                torch.set_num_threads(self._trainer_threads)
                self._trainer_threads = None

    def _keep(self, executor: WorkflowExecutor, *, ended: bool, is_consistent: bool) -> None:
        """What a checkpoint made after the fit, or another fit, may need."""
        state = executor.state_dict()
        if self._ranks.size == 1:
            self._last_state = {"ranks": [state]}
        if is_consistent and executor.is_published and not ended:
            module = weakref.ref(self._module())
            self._leftover = _Leftover(state, executor.version, module)

    def _make_ranks(self) -> RankGroup:
        trainer = self.trainer
        if trainer is None or trainer.world_size == 1:
            return RankGroup()

        def is_interrupted() -> bool:
            self.stop.look()  # a sign of life
            return trainer.received_sigterm

        limit = self.rollout.timeout_s + _MARGIN_S
        return make_rank_group(timeout_s=limit, interrupted=is_interrupted)

    def _start(self, engine: InferenceEngine, ranks: RankGroup) -> None:
        """Rank 0 first: it may start the servers that the others sample on."""
        if not isinstance(engine, SharedServerEngine):
            ranks.run_on_all_ranks("starting the engine", engine.start, timeout_s=_START_S)
            return
        leads = ranks.rank == 0
        _, urls = ranks.run_on_all_ranks(
            "starting the engine",
            engine.start if leads else _nothing,
            lambda _: list(engine.server_urls),
            timeout_s=_START_S,
        )
        join = _nothing if leads else lambda: engine.join(urls[0])
        ranks.run_on_all_ranks("joining the servers of rank 0", join)

    def _check_servers(self, engine: InferenceEngine) -> None:
        """Servers that this run starts must be in reach, and not on a GPU of the trainer's."""
        if not isinstance(engine, RemoteInfEngine) or self.trainer is None:
            return
        config, trainer = engine.server_config, self.trainer
        if config is None:
            return
        require_one_host(trainer.num_nodes, os.environ)
        if trainer.strategy.root_device.type == "cuda":
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            config.check_trainer_devices(trainer.device_ids, visible=visible)

    def _module(self) -> SegmentWisePPOModule:
        module = None if self.trainer is None else self.trainer.lightning_module
        if not isinstance(module, SegmentWisePPOModule):
            raise ConfigError(
                "RolloutDataModule takes model and tokenizer from the Trainer's module, which must "
                f"be a SegmentWisePPOModule; found {type(module).__name__}."
            )
        return module


def _nothing() -> None:
    pass


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
