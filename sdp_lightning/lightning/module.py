"""The Lightning module: segment-wise decoupled PPO on any causal LM of transformers.

It knows batches and log-probs, and nothing of rollouts or engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.compile import to_uncompiled
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from sdp_lightning.config import LoRAConfig, LossConfig, OptimizerConfig, UpdateConfig
from sdp_lightning.config.model_source import ModelSource
from sdp_lightning.config.pretrained import count_tokens, load_tokenizer
from sdp_lightning.distributed.rank_group import RankGroup
from sdp_lightning.distributed.reductions import RankSums
from sdp_lightning.errors import ConfigError
from sdp_lightning.lightning.known_warnings import ignore_known_warnings
from sdp_lightning.lightning.prompt_epochs import planned_steps
from sdp_lightning.lightning.saved_module import SavedModule
from sdp_lightning.lightning.stepping import SteppingModule
from sdp_lightning.lightning.trainer_checks import check_trainer
from sdp_lightning.lightning.trainer_flags import prepare_trainer
from sdp_lightning.training.batch import Batch, collate
from sdp_lightning.training.metrics import HealthLog, LagMetrics
from sdp_lightning.training.metrics.train_step import step_values
from sdp_lightning.training.metrics.uniform_rewards import UniformWatch
from sdp_lightning.training.policy.forward import LogprobForward
from sdp_lightning.training.policy.layers import compile_layers, refuse_wrapped
from sdp_lightning.training.policy.loading import disable_noise, load, prepare, select_trainable
from sdp_lightning.training.policy.logprob_runner import LogprobRunner
from sdp_lightning.training.policy.lora import merged_alpha, without_adapter
from sdp_lightning.training.policy.optimizer import make_optimizer
from sdp_lightning.training.policy.scoring import group_by_prompt, split_by_segment
from sdp_lightning.training.policy.sharding import gradient_sync, is_sharded, shard
from sdp_lightning.training.policy.weight_export import named_weights
from sdp_lightning.training.update import PolicyUpdate, TrainingLoop
from sdp_lightning.types import Context, FloatArray, Segment, Trajectory, TrajectoryGroup
from sdp_lightning.weights.protocol import WeightStream


class SegmentWisePPOModule(SteppingModule, SavedModule):
    """Trains a causal LM with the segment-wise PPO loss, one consumed batch a ``training_step``.

    The Trainer's ``max_steps`` counts optimizer steps: ``num_minibatches * num_epochs`` a batch.

    Args:
        model: id or path of a transformers causal LM, or the import path of a function that returns
            one: ``"package.module:name"`` or ``"path/to/file.py:name"``; or a ``ModelSource``, with
            a revision, trust in its code, another tokenizer or chat template, which hold for all
            parts of a run. Of a vision-language model the text part is trained. A model object of
            transformers is copied, and stays as it is: ``policy`` is trained.
        loss: the objective.
        optimizer: AdamW or another optimizer, and its schedule.
        update: minibatches, epochs, memory.
        trainable: regular expression; only parameters whose name it finds are trained. None is all.
        lora: train a LoRA adapter in place of the model's own weights; None trains these.
        gradient_checkpointing: recompute activations in the backward pass.
        model_kwargs: passed on to ``from_pretrained``. ``dtype`` is float32 unless set, and trained
            weights must be: ``dtype="bfloat16"`` is for the base model of an adapter. ``revision``
            and ``trust_remote_code`` are those of the ``ModelSource``.

    Raises:
        ConfigError: if settings contradict each other, or ``trainable`` finds no parameter.
    """

    def __init__(
        self,
        model: str | Path | ModelSource | PreTrainedModel,
        *,
        loss: LossConfig = LossConfig(),
        optimizer: OptimizerConfig = OptimizerConfig(),
        update: UpdateConfig = UpdateConfig(),
        trainable: str | None = None,
        lora: LoRAConfig | None = None,
        gradient_checkpointing: bool = False,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._source, self._model_kwargs = ModelSource.of(model, model_kwargs or {})
        self.take_settings(
            loss=loss,
            optimizer=optimizer,
            update=update,
            lora=lora,
            trainable=trainable,
            gradient_checkpointing=gradient_checkpointing,
            model=self._source,
            model_kwargs=self._model_kwargs,
        )
        self.trainable, self.gradient_checkpointing = trainable, gradient_checkpointing
        self.policy: PreTrainedModel | None = None
        self._ranks = RankGroup()
        self._num_tokens: int | None = None  # that have a text
        self._runner: LogprobRunner
        self._reference_runner: LogprobRunner
        self._reference: list[PreTrainedModel] = []  # in a list it is not a submodule
        self._metrics, self._warner = LagMetrics(), HealthLog()
        self._policy_update = PolicyUpdate(self.loss, self.optimizer, self.update)
        self._uniform = UniformWatch(self.update.max_uniform_in_a_row)

    # The model -----------------------------------------------------------------------------------

    @cached_property
    def source(self) -> ModelSource:
        """What model and tokenizer are read from, for all parts of the run."""
        return self._source.resolved()

    @property
    def model_id(self) -> str:
        """Id or path of the model."""
        return str(self.source.name)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded when it is first read."""
        return load_tokenizer(self.source)

    def configure_callbacks(self) -> list[Callback]:
        """The schedules. The first hook of a run, in which the Trainer's flags are looked at."""
        own = super().configure_callbacks()
        optimizer = prepare_trainer(self.trainer, self.update, self.optimizer)
        if optimizer != self.optimizer:
            self.optimizer = optimizer
            self._policy_update = PolicyUpdate(self.loss, optimizer, self.update)
        return own

    def configure_model(self) -> None:
        if self.policy is None:
            policy, self._runner = self._load(frozen=False)
            if self.loss.needs_reference and self.lora is None:
                reference, self._reference_runner = self._load(frozen=True)
                self._reference = [reference]
            self.policy = policy
        if (compiled := self._compiler_ctx) is not None:  # by Lightning, of torch.compile(module)
            to_uncompiled(self)  # a step is bookkeeping around the layers
            for model in (self.policy, *self._reference):
                compile_layers(model, compiled["dynamo_ctx"])

    def _load(self, *, frozen: bool) -> tuple[PreTrainedModel, LogprobRunner]:
        """The model, sharded if the strategy shards. ``frozen``: a reference policy."""
        sharded = isinstance(mesh := self.device_mesh, DeviceMesh)
        loaded = load(self.source, self._model_kwargs, sharded=sharded, lora=self.lora)
        policy, self._adapter = loaded.policy, loaded.adapter
        if frozen:
            policy.requires_grad_(False)
        elif self.lora is None:
            select_trainable(policy, self.trainable)
        prepare(policy, recompute=self.gradient_checkpointing and not frozen)
        forward = LogprobForward(policy, self._num_tokens)
        if isinstance(mesh, DeviceMesh):
            device, precision = self.trainer.strategy.root_device, self.trainer.precision
            shard(forward, mesh, loaded.source, device, precision=str(precision))
            if self.lora is not None:
                self.strict_loading = False  # Lightning would look for base weights
        runner = LogprobRunner(
            forward,  # not a submodule of this module: its weights are the policy's
            self.update,
            over_ranks=lambda *values: self._sums.table(*values),
            precision=self._precision,
        )
        return policy, runner

    def named_weights(
        self, *, changed_only: bool = False, lora_alpha: float | None = None
    ) -> WeightStream:
        """Weights for an engine; see :mod:`~sdp_lightning.training.policy.weight_export`.

        Args:
            changed_only: only layers with trained weights.
            lora_alpha: lora_alpha of an engine that samples with adapters: they are sent unmerged,
                under PEFT's names. None: they are merged, under the names of the base model.

        Raises:
            ConfigError: if the engine expects an adapter of another alpha, or there is none.
        """
        alpha = merged_alpha(self.lora, lora_alpha)
        return named_weights(self.require_policy(), changed_only=changed_only, merged_alpha=alpha)

    # Training ------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> SegmentWisePPOModule:
        """Set the mode of this module; the policy stays as :func:`disable_noise` has it."""
        super().train(mode)
        if self.policy is not None:
            disable_noise(self.policy)
        return self

    def setup(self, stage: str) -> None:
        check_trainer(self.trainer, self.update, stage)
        self._num_tokens = count_tokens(self.tokenizer)
        if self.policy is not None:  # loaded before
            self._runner.use_vocabulary(self._num_tokens)
            if self._reference:
                self._reference_runner.use_vocabulary(self._num_tokens)
        ignore_known_warnings(self.trainer)
        self.read_optimizers()

    def configure_optimizers(self) -> Any:
        parameters = self.require_policy().parameters()
        steps = planned_steps(self.trainer, self.update.steps_per_batch)
        optimizer, schedule = make_optimizer(parameters, self.optimizer, max_steps=steps)
        return [optimizer], [schedule]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One consumed batch: each of its minibatches is an optimizer step."""
        metrics = LagMetrics(sync_on_compute=False)  # a kept one would be made bfloat16, too
        self._metrics = metrics.to(self.device)
        update, reference = self._policy_update, self._reference_logprobs
        with self.optimizer_set().training():
            batch = update.prepare(batch, self._runner, reference, sums=self._sums)
            steps = update.train(batch, self._training_loop())
        self._log_step(batch, steps)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the mean reward and pass@k of rollouts of the published version."""
        batch.log(self.log, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the same as ``validation_step``, under ``test/``."""
        batch.log(self.log, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """The rollouts of the published version, unchanged."""
        return batch

    # Scoring (LogprobScorer) ---------------------------------------------------------------------

    def score(self, trajectories: Sequence[Trajectory]) -> list[list[FloatArray]]:
        """Log-probs of every segment under the present weights, one ``[n]`` array a segment."""
        if not trajectories:  # the other ranks' forwards need this one's shard
            blank = Segment(0, [0], [0.0])
            return self.score([Trajectory((Context([0]), blank))])[:0]
        groups, rows = group_by_prompt(trajectories)
        newest = max(group.tail_version or 0 for group in groups)
        logprobs = self._runner.logprobs(collate(groups, version=newest).to(self.device)).cpu()
        return split_by_segment(trajectories, logprobs[rows])

    def own_logprobs(self, trajectory: Trajectory) -> FloatArray:
        """Log-probs of its one segment by the model's own logits in eval mode: a second opinion."""
        batch = collate([TrajectoryGroup((trajectory,))], version=0).to(self.device)
        return split_by_segment([trajectory], self._runner.own_logprobs(batch).cpu())[0][0]

    def whole_vocabulary(self) -> AbstractContextManager[None]:
        """Context in which token ids without a text, which are never sampled, are scored, too."""
        return self._runner.whole_vocabulary()

    @property
    def is_collective(self) -> bool:
        """Whether all ranks must call ``score`` together, because each holds a shard."""
        return self._num_ranks > 1 and is_sharded(self.require_policy())

    # Ranks ---------------------------------------------------------------------------------------

    def use_ranks(self, ranks: RankGroup) -> None:
        """Exchange numbers over ``ranks``; the data module, which makes them, says so in setup."""
        self._ranks = ranks

    @property
    def _num_ranks(self) -> int:
        return 1 if self._trainer is None else self.trainer.world_size

    @property
    def _sums(self) -> RankSums:
        return RankSums(self.device, self.global_rank, self._num_ranks, self._ranks)

    # Helpers -------------------------------------------------------------------------------------

    def _training_loop(self) -> TrainingLoop:
        return TrainingLoop(
            policy=self.require_policy(),
            forward=self._runner,
            optimizer=self.optimizer_set(),
            schedule=self._schedules,
            sums=self._sums,
            observe=self._metrics.update,
            backward=self.manual_backward,
            sync=lambda last: gradient_sync(self.trainer.model, on=last),
            extra=self.extra_loss if self.has_extra_loss else None,
        )

    def _reference_logprobs(self, batch: Batch) -> Tensor:
        """[B, T] log-probs under the initial weights: a frozen copy, or the adapter's base."""
        if self.lora is not None:
            with without_adapter(self.require_policy()):
                return self._runner.logprobs(batch)
        for reference in self._reference:
            reference.to(self.device)  # type: ignore
        return self._reference_runner.logprobs(batch)

    def _log_step(self, batch: Batch, steps: list[dict[str, Tensor]]) -> None:
        apart = self.update.advantages == "gdpo"
        values = step_values(batch, steps, self._num_ranks, apart=apart)
        of_rank = torch.stack([value.double().to(self.device) for value, _ in values.values()])
        weights = of_rank.new_tensor([weight for _, weight in values.values()])
        mine = torch.stack((of_rank * weights, weights))
        rank, size = self.global_rank, self._num_ranks
        pooled = self._metrics.pool(self._sums.add_up, mine.flatten(), rank=rank, num_ranks=size)
        total, weight = pooled.view_as(mine)
        metrics = dict(zip(values, (total / weight).float(), strict=True))
        metrics |= self._metrics.compute()
        metrics["train/optimizer_step"] = total.new_tensor(float(self.trainer.global_step))
        uniform, reward = metrics["train/uniform"].item(), metrics["train/reward"].item()
        self._uniform.note(uniform, reward=reward, rank=rank)
        self.log_dict(metrics, batch_size=len(batch))
        bar = {"reward": metrics["train/reward"], "lag": metrics["lag/mean"]}
        self.log_dict(bar, prog_bar=True, logger=False, batch_size=len(batch))
        if rank == 0:
            numbers = dict(zip(metrics, torch.stack([*metrics.values()]).tolist(), strict=True))
            self._warner.warn(numbers, leaves_bridge_out=self.loss.bends_bridge)

    def _precision(self) -> AbstractContextManager[Any]:
        plain = self._trainer is None
        return nullcontext() if plain else self.trainer.precision_plugin.forward_context()

    def require_policy(self) -> PreTrainedModel:
        """The model. ``ConfigError`` before :meth:`configure_model`."""
        if self.policy is None:
            raise ConfigError("the model is not loaded yet: call configure_model() first.")
        refuse_wrapped(self.policy)
        return self.policy
