"""The Lightning module: segment-wise decoupled PPO on any causal LM of transformers.

It knows batches and log-probs, and nothing of rollouts or engines.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sdp_lightning.batch import Batch, Layout, collate, split_minibatches
from sdp_lightning.config import LossConfig, OptimizerConfig, UpdateConfig
from sdp_lightning.errors import ConfigError, SDPError
from sdp_lightning.forward import SequenceLogprobs, check_model, sequence_logprobs
from sdp_lightning.loading import quiet_transformers, resolve_model
from sdp_lightning.metrics import LagMetrics
from sdp_lightning.objective import (
    complete_segment_logprobs,
    group_relative_advantages,
    segment_wise_ppo_loss,
)
from sdp_lightning.scoring import group_by_prompt, split_by_segment
from sdp_lightning.types import FloatArray, Trajectory

# The weights after the step, with the version published for them, are what a resume needs.
warnings.filterwarnings(
    "ignore", message="Using ModelCheckpoint with manual optimization and every_n_train_steps"
)


class SegmentWisePPOModule(L.LightningModule):
    """Trains a causal LM with the segment-wise PPO loss, one consumed batch a ``training_step``.

    The Trainer's ``max_steps`` counts optimizer steps: ``num_minibatches * num_epochs`` a batch.

    Args:
        model: id or path of a transformers causal LM, or where to find a function that returns one:
            ``"package.module:name"`` or ``"path/to/file.py:name"``.
        loss: the objective.
        optimizer: AdamW and its schedule.
        update: minibatches, epochs, memory.
        trainable: regular expression; only parameters whose name it finds are trained. None is all.
        gradient_checkpointing: recompute activations in the backward pass.
        model_kwargs: passed on to ``from_pretrained``; ``dtype`` is float32 unless set.

    Raises:
        ConfigError: if settings contradict each other, or ``trainable`` finds no parameter.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        loss: LossConfig = LossConfig(),
        optimizer: OptimizerConfig = OptimizerConfig(),
        update: UpdateConfig = UpdateConfig(),
        trainable: str | None = None,
        gradient_checkpointing: bool = False,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.loss, self.optimizer, self.update = loss, optimizer, update
        self.trainable, self.gradient_checkpointing = trainable, gradient_checkpointing
        self.policy: PreTrainedModel | None = None
        self._model, self._model_kwargs = model, dict(model_kwargs or {})
        self._metrics = LagMetrics()
        self._skipped_in_a_row = 0
        self._shuffler = torch.Generator().manual_seed(0)

    # The model -----------------------------------------------------------------------------------

    @cached_property
    def model_id(self) -> str:
        """Id or path of the model."""
        return resolve_model(self._model)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return AutoTokenizer.from_pretrained(self.model_id)

    def configure_model(self) -> None:
        if self.policy is not None:
            return
        options = {"dtype": torch.float32, **self._model_kwargs}
        with quiet_transformers():
            policy = AutoModelForCausalLM.from_pretrained(self.model_id, **options)
        select_trainable(policy, self.trainable)
        silence_dropout(policy)
        if self.gradient_checkpointing:
            policy.gradient_checkpointing_enable({"use_reentrant": False})
            policy.disable_input_require_grads()  # frozen layers need no graph
        self.policy = policy.train()

    def named_weights(self, *, changed_only: bool = False) -> Iterator[tuple[str, Tensor]]:
        """What an engine must be given, under the names of the model's ``state_dict``."""
        policy = self._require_policy()
        trained = {name for name, p in policy.named_parameters() if p.requires_grad}
        for name, tensor in policy.state_dict().items():
            if not changed_only or name in trained:
                yield name, tensor

    # Training ------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        precision = str(self.trainer.precision)
        if stage == "fit" and precision in ("16-mixed", "16-true"):
            raise ConfigError(
                f"precision={precision!r} needs a scaled loss, which this module does not do; use "
                "'bf16-mixed' or '32-true'."
            )
        steps, every = self.trainer.max_steps, self.update.steps_per_batch
        if stage == "fit" and steps > 0 and steps % every:
            near = [str(n) for n in (steps // every * every, (steps // every + 1) * every) if n]
            raise ConfigError(
                f"max_steps={steps} is no multiple of {every}, the optimizer steps of one batch "
                f"({self.update.num_minibatches} minibatches x {self.update.num_epochs} epochs): "
                f"use {' or '.join(near)}."
            )

    def configure_optimizers(self) -> Any:
        config = self.optimizer
        parameters = [p for p in self._require_policy().parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        total = config.total_steps or self.trainer.max_steps
        if config.schedule != "constant" and total <= config.warmup_steps:
            raise ConfigError(
                f"schedule={config.schedule!r} needs total_steps (or the Trainer's max_steps) "
                f"above warmup_steps={config.warmup_steps}, got {total}."
            )
        factor = schedule_factor(config, total)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, factor)]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One consumed batch: proximal log-probs, then minibatches, each one optimizer step."""
        batch = replace(batch, advantages=self._advantages(batch))
        single = self.update.steps_per_batch == 1
        proximal = None if single else self._logprobs(batch)
        self._metrics = LagMetrics().to(self.device)  # a kept one would be made bfloat16, too
        steps: list[dict[str, Tensor]] = []
        for _ in range(self.update.num_epochs):
            shuffler = None if single else self._shuffler
            for rows in split_minibatches(
                batch.group_ids, self.update.num_minibatches, generator=shuffler
            ):
                x = None if proximal is None else proximal[rows]
                steps.append(self._optimizer_step(batch.select(rows), x))
        self._log_step(batch, steps)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the mean reward of rollouts of the published version."""
        self._log_evaluation("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """As ``validation_step``, under ``test/``."""
        self._log_evaluation("test", batch)

    # Scoring (LogprobScorer) ---------------------------------------------------------------------

    def score(self, trajectories: Sequence[Trajectory]) -> list[list[FloatArray]]:
        """Log-probs of every segment under the present weights, one ``[n]`` array a segment."""
        groups, rows = group_by_prompt(trajectories)
        newest = max(group.tail_version or 0 for group in groups)
        logprobs = self._logprobs(collate(groups, version=newest).to(self.device)).cpu()
        return split_by_segment(trajectories, logprobs[rows])

    # Helpers -------------------------------------------------------------------------------------

    def _optimizer_step(self, batch: Batch, proximal: Tensor | None) -> dict[str, Tensor]:
        optimizer: Any = self.optimizers()
        num_tokens = batch.num_tokens
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        optimizer.zero_grad()
        layout = self._layout(batch)
        for rows in batch.microbatches(self.update.max_tokens_per_microbatch, layout):
            x = None if proximal is None else proximal[rows]
            loss = self._loss(batch.select(rows), x, num_tokens, layout)
            self.manual_backward(loss)
            total += loss.detach()
        norm = self._gradient_norm()
        schedulers: Any = self.lr_schedulers()
        rate = torch.tensor(schedulers.get_last_lr()[0], dtype=torch.float32)
        self._skipped_in_a_row = 0 if torch.isfinite(norm) else self._skipped_in_a_row + 1
        if self._skipped_in_a_row == 0:
            optimizer.step()
            schedulers.step()
        elif self._skipped_in_a_row >= self.update.max_skipped_in_a_row:
            raise SDPError(
                f"the gradient was not finite (norm {norm}) in {self._skipped_in_a_row} optimizer "
                "steps in a row. Lower the learning rate, or look at the rewards and log-probs."
            )
        skipped = torch.tensor(float(self._skipped_in_a_row > 0))
        return {"loss": total, "grad_norm": norm.float(), "lr": rate, "skipped": skipped}

    def _loss(
        self, batch: Batch, proximal: Tensor | None, num_tokens: int, layout: Layout
    ) -> Tensor:
        forward = self._forward(batch, layout)
        target = forward.logprobs
        x = target.detach() if proximal is None else proximal
        q = complete_segment_logprobs(
            batch.segment_logprobs,
            batch.segment_scored,
            x,
            batch.behavior_logprobs,
            batch.lags,
            batch.missing_proximal,
        )
        assert batch.advantages is not None
        result = segment_wise_ppo_loss(
            target,
            x,
            q,
            batch.behavior_logprobs,
            batch.advantages,
            batch.loss_mask,
            config=self.loss,
            num_tokens=num_tokens,
        )
        self._metrics.update(batch, result, x, q, forward.entropy)
        return result.loss

    def _logprobs(self, batch: Batch) -> Tensor:
        """[B, T] under the present weights, no gradient."""
        layout = self._layout(batch)
        out = torch.zeros_like(batch.behavior_logprobs)  # float32, also under bf16-true
        with torch.no_grad(), self._precision():
            for rows in batch.microbatches(self.update.max_tokens_per_microbatch, layout):
                out[rows] = self._forward(batch.select(rows), layout).logprobs.float()
        return out

    def _forward(self, batch: Batch, layout: Layout) -> SequenceLogprobs:
        return sequence_logprobs(self._require_policy(), batch, layout=layout)

    def _layout(self, batch: Batch) -> Layout:
        if self.update.layout != "auto":
            return self.update.layout
        policy = self._require_policy()
        try:
            check_model(policy, "shared_prefix")
        except ConfigError:
            return "padded"
        hidden: int = policy.config.get_text_config(decoder=True).hidden_size
        return batch.cheapest_layout(self.update.max_tokens_per_microbatch, hidden)

    def _advantages(self, batch: Batch) -> Tensor:
        per_row = group_relative_advantages(
            batch.rewards, batch.group_ids, scale_by_std=self.update.scale_advantages_by_std
        )
        per_token = per_row[:, None].expand(batch.loss_mask.shape)
        if batch.max_lag is not None:
            per_token = torch.where(batch.lags > batch.max_lag, 0.0, per_token)
        return per_token

    def _gradient_norm(self) -> Tensor:
        limit = self.optimizer.gradient_clip_val
        parameters = [p for p in self._require_policy().parameters() if p.requires_grad]
        return nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit)

    def _log_step(self, batch: Batch, steps: list[dict[str, Tensor]]) -> None:
        means = {name: torch.stack([s[name] for s in steps]).mean() for name in steps[0]}
        self.log("train/reward", batch.rewards.mean(), prog_bar=True, batch_size=len(batch))
        self.log_dict(
            {
                **{f"train/{name}": value for name, value in means.items()},
                "train/tokens": batch.loss_mask.sum(dtype=torch.float32),
                "train/truncated": batch.truncated.float().mean(),
                **{name: value.float() for name, value in self._metrics.compute().items()},
            },
            batch_size=len(batch),
        )

    def _log_evaluation(self, stage: str, batch: Any) -> None:
        self.log(f"{stage}/reward", batch.reward, batch_size=batch.num_trajectories, prog_bar=True)
        self.log(f"{stage}/version", float(batch.version), batch_size=batch.num_trajectories)

    def _precision(self) -> AbstractContextManager[Any]:
        return (
            nullcontext()
            if self._trainer is None
            else self.trainer.precision_plugin.forward_context()
        )

    def _require_policy(self) -> PreTrainedModel:
        if self.policy is None:
            raise ConfigError("the model is not loaded yet: call configure_model() first.")
        return self.policy


def select_trainable(policy: nn.Module, pattern: str | None) -> None:
    """Freeze every parameter whose name ``pattern`` does not find."""
    import re

    if pattern is None:
        return
    names = [name for name, _ in policy.named_parameters() if re.search(pattern, name)]
    if not names:
        some = ", ".join([name for name, _ in policy.named_parameters()][:3])
        raise ConfigError(f"trainable={pattern!r} finds no parameter; names look like {some}.")
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(name in names)


def silence_dropout(policy: nn.Module) -> None:
    """Dropout off in train mode: it would make every log-prob a random number."""
    for module in policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(vars(module).get("attention_dropout"), float):
            vars(module)["attention_dropout"] = 0.0


def schedule_factor(config: OptimizerConfig, total: int) -> Callable[[int], float]:
    """The learning rate's factor at optimizer step n."""

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / (config.warmup_steps + 1)
        if config.schedule == "constant":
            return 1.0
        done = min(1.0, (step - config.warmup_steps) / (total - config.warmup_steps))
        return 1.0 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))

    return factor
