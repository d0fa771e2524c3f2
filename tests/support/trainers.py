"""Helpers of the tests that fit: trainers, rows, workflows with a script, and a recorder."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from transformers import AutoModelForCausalLM

import sdp_lightning as sdp
from sdp_lightning.distributed.event_loop import settle
from sdp_lightning.engines.protocol import InferenceEngine
from sdp_lightning.training.batch import Batch
from sdp_lightning.types import Row
from sdp_lightning.workflows.workflow import RolloutSession

WAIT_S = 60.0  # a deadline, never a pause


def make_rows(count: int = 16) -> list[dict[str, Any]]:
    return [{"id": f"row{i}", "prompt": f"{i}+{i}="} for i in range(count)]


def weigh_letters(completion: str, row: Mapping[str, Any]) -> float:
    """A reward that differs among samples."""
    return sum(map(ord, completion)) % 97 / 97


def make_workflow(
    reward: Any = weigh_letters, *, group_size: int = 2, max_new_tokens: int = 6, **params: Any
) -> sdp.RLVRWorkflow:
    sampling = sdp.SamplingParams(max_new_tokens=max_new_tokens, **params)
    return sdp.RLVRWorkflow(reward, group_size=group_size, sampling=sampling)


def make_data(
    workflow: sdp.RolloutWorkflow | None = None,
    *,
    rows: Sequence[Row] | None = None,
    engine: str | InferenceEngine = "embedded",
    engine_options: dict[str, Any] | None = None,
    val_prompts: Sequence[Row] | None = None,
    val_workflow: sdp.RolloutWorkflow | None = None,
    **rollout: Any,
) -> sdp.RolloutDataModule:
    settings: dict[str, Any] = {"batch_size": 2, "timeout_s": WAIT_S} | rollout
    on_cpu: dict[str, Any] = {"device": "cpu", "max_slots": 16}
    return sdp.RolloutDataModule(
        make_rows() if rows is None else rows,
        make_workflow() if workflow is None else workflow,
        engine=engine,
        engine_options=on_cpu if engine == "embedded" and not engine_options else engine_options,
        rollout=sdp.RolloutConfig(**settings),
        val_prompts=val_prompts,
        val_workflow=val_workflow,
    )


def make_module(folder: Any, *, lr: float = 1e-3, **settings: Any) -> sdp.SegmentWisePPOModule:
    chosen: dict[str, Any] = {"optimizer": sdp.OptimizerConfig(lr=lr)} | settings
    return sdp.SegmentWisePPOModule(folder, **chosen)


def make_trainer(*callbacks: Callback, **settings: Any) -> L.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(callbacks=list(callbacks), **(quiet | settings))


def weights_of(module: sdp.SegmentWisePPOModule) -> dict[str, Tensor]:
    """As an engine gets them: adapters merged."""
    return {name: value.clone() for name, value in module.named_weights()}


@dataclass(eq=False)
class Step:
    """One training step as it was seen from outside."""

    batch: Batch
    row_ids: list[str]
    groups: list[sdp.TrajectoryGroup]


@dataclass(eq=False)
class Recorder(Callback):
    """Keeps every batch with its groups, and the weights of every version. Goes last."""

    steps: list[Step] = field(default_factory=list[Step])
    weights: dict[int, dict[str, Tensor]] = field(default_factory=dict[int, dict[str, Tensor]])
    engine_versions: list[int | None] = field(default_factory=list[int | None])
    metrics: list[dict[str, float]] = field(default_factory=list[dict[str, float]])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._keep(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        live = [g for g in executor_of(trainer).registry.snapshot() if g.in_training]
        groups = [g.finished for g in live if g.finished is not None]
        self.steps.append(Step(batch, [g.row.row_id for g in live], groups))

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        self._keep(trainer, pl_module)
        self.metrics.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    def _keep(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, sdp.SegmentWisePPOModule)
        executor = executor_of(trainer)
        self.engine_versions.append(executor.engine.version)
        self.weights[executor.version] = weights_of(pl_module)

    @property
    def lags(self) -> list[list[int]]:
        """Of every loss token, step by step."""
        return [step.batch.lags[step.batch.loss_mask].tolist() for step in self.steps]


def executor_of(trainer: L.Trainer) -> sdp.WorkflowExecutor:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    return data.executor


class AwaitIdleRollouts(Callback):
    """Before each step, wait until every group that may be submitted has finished."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        executor = executor_of(trainer)
        with executor.registry.changed:
            done = executor.registry.changed.wait_for(lambda: executor.stat.running == 0, WAIT_S)
        assert done, executor.stat


class VersionClock(Callback):
    """Lets a workflow wait for a policy version. Goes after WeightSyncCallback."""

    def __init__(self) -> None:
        self.version = -1
        self._lock = threading.Lock()
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._advance(executor_of(trainer).version)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        self._advance(executor_of(trainer).version)

    async def reached(self, version: int) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with self._lock:
            if self.version >= version:
                return
            self._waiting.append((version, future))
        await future

    def _advance(self, version: int) -> None:
        with self._lock:
            self.version = version
            due = [entry for entry in self._waiting if entry[0] <= version]
            self._waiting = [entry for entry in self._waiting if entry[0] > version]
        for _, future in due:
            settle(future, None)


class StagedWorkflow(sdp.RolloutWorkflow):
    """Rows with ``"stages": n`` sample n times, each time under a later version than before."""

    def __init__(self, clock: VersionClock, *, group_size: int = 2, tokens: int = 3) -> None:
        self._clock, self._group_size = clock, group_size
        self._sampling = sdp.SamplingParams(max_new_tokens=tokens)

    @property
    def sampling(self) -> sdp.SamplingParams:
        return self._sampling

    async def run(self, row: Row, session: RolloutSession) -> Sequence[sdp.Trajectory]:
        samples = [self._sample(row, session) for _ in range(self._group_size)]
        return await asyncio.gather(*samples)

    async def _sample(self, row: Row, session: RolloutSession) -> sdp.Trajectory:
        episode = session.open()
        episode.add_context(session.tokenizer.encode(row["prompt"], add_special_tokens=False))
        for stage in range(int(row.get("stages", 1))):
            if stage:
                await self._clock.reached(self._last_version(episode) + 1)
            await episode.generate(self._sampling)
        return episode.finish(int(episode.sampled_token_ids.sum()) % 97 / 97)

    @staticmethod
    def _last_version(episode: sdp.Episode) -> int:
        return max(p.version for p in episode.parts if isinstance(p, sdp.Segment))


class Judge:
    """Log-probs by transformers' own forward under saved weights: the reference."""

    def __init__(self, folder: str) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def weights(self) -> dict[str, Tensor]:
        """Those of the folder, or the last that were judged."""
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def segment_logprobs(
        self, weights: Mapping[str, Tensor], trajectory: sdp.Trajectory
    ) -> list[Tensor]:
        """[n] for every segment of ``trajectory``, under ``weights``."""
        self.model.load_state_dict(weights)
        tokens = torch.tensor(trajectory.token_ids)
        with torch.no_grad():
            table = self.model(input_ids=tokens[None]).logits[0]
        found: list[Tensor] = []
        start = 0
        for part in trajectory.parts:
            end = start + part.token_ids.size
            if isinstance(part, sdp.Segment):
                rows = (table[start - 1 : end - 1] / part.temperature).log_softmax(-1)
                found.append(rows.gather(1, tokens[start:end, None])[:, 0])
            start = end
        return found
