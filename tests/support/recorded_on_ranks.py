"""Training on groups made beforehand, on several ranks or alone as if by several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import peft  # noqa: F401  (loaded here, once)
import torch
import transformers.models.llama.modeling_llama  # noqa: F401  (loaded here, once)
from lightning.pytorch.callbacks import Callback

import sdp_lightning as sdp
import sdp_lightning.training.policy.loading
import sdp_lightning.training.update
from sdp_lightning.training.batch import Batch, collate, split_minibatches
from sdp_lightning.training.policy.layers import decoder_layers
from sdp_lightning.types import Trajectory
from support.rank_place import CountingModule, Metrics, Place, make_strategy, weights_of
from support.steps import Batches, make_trajectories
from support.trainers import make_trainer

VERSION, NUM_GROUPS = 4, 4


def recorded(
    place: Place,
    *,
    model: str | None = None,
    strategy: str = "ddp",
    steps: int = 5,
    ranks: int = 2,
    layout: str = "padded",
    minibatches: int = 1,
    max_tokens: int = 40,
    dtype: str = "float32",
    precision: str = "32-true",
    truncated: Sequence[int] = (),
    apart: bool = False,
    loss: Mapping[str, Any] | None = None,
    lora: Mapping[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train on groups made beforehand: rank r of n on every n-th. Alone, as if by ``ranks``.

    The samples of the groups ``truncated`` are, and left out of the loss. With ``apart`` there are
    two rewards, each normalized apart. ``model`` is the folder of one that is not the tiny model.
    """
    place = replace(place, folder=model or place.folder)
    batches: list[Batch] = []
    for step in range(steps):
        groups = make_trajectories(place.folder, [3] * NUM_GROUPS, seed=step)
        for number in truncated:
            groups[number] = [replace(t, finish_reason="length") for t in groups[number]]
        if apart:
            groups = [[with_two_rewards(t) for t in group] for group in groups]
        mine = [sdp.TrajectoryGroup(tuple(g)) for g in groups[place.rank :: place.size]]
        batches.append(replace(collate(mine, version=VERSION), missing_proximal="behavior"))
    loads: list[str] = []
    load = sdp_lightning.training.policy.loading.load_policy
    sdp_lightning.training.policy.loading.load_policy = lambda *args: (
        loads.append("") or load(*args)
    )
    if place.size == 1:
        sdp_lightning.training.update.split_minibatches = split_as(ranks)
    update = sdp.UpdateConfig(
        num_minibatches=minibatches,
        layout=layout,
        max_tokens_per_microbatch=max_tokens,
        mask_truncated=bool(truncated),
        advantages="gdpo" if apart else "group",
    )
    torch.manual_seed(place.rank)  # of adapters; all ranks get rank 0's
    module = CountingModule(
        place.folder,
        loss=sdp.LossConfig(**loss or {}),
        lora=None if lora is None else sdp.LoRAConfig(**lora),
        optimizer=sdp.OptimizerConfig(lr=1e-3),
        update=update,
        model_kwargs={"dtype": getattr(torch, dtype)},
        **settings,
    )
    metrics, seen = Metrics(), Types(make_trajectories(place.folder, [3], seed=place.rank)[0])
    trainer = make_trainer(
        metrics,
        seen,
        precision=precision,
        max_steps=steps * minibatches,
        devices=place.size,
        strategy=make_strategy(strategy, place.size),
    )
    trainer.fit(module, Batches(*batches))
    counts = [len(b.microbatches(max_tokens, layout)) for b in batches]  # type: ignore
    merged = {name: tensor.clone() for name, tensor in module.named_weights()}
    sdp_lightning.training.policy.loading.load_policy = load
    return {
        "weights": weights_of(module) | (merged if lora else {}),
        "metrics": metrics.steps,
        "microbatches": counts,
        "num_loads": len(loads),
        "types": seen.types,
        "scores": seen.scores,
    }


def with_two_rewards(trajectory: Trajectory) -> Trajectory:
    named = {"given": trajectory.reward, "even": float(trajectory.num_sampled % 2 == 0)}
    return trajectory.with_rewards(named, {"given": 1.0, "even": 0.3})


def split_as(ranks: int) -> Any:
    """``split_minibatches`` whose minibatches are those of ``ranks`` processes together."""

    def split(group_ids: torch.Tensor, count: int, *, generator: Any = None) -> list[list[int]]:
        minibatches: list[list[int]] = [[] for _ in range(count)]
        before = None if generator is None else generator.get_state()
        for rank in range(ranks):
            if generator is not None:
                generator.set_state(before)
            mine = (group_ids % ranks == rank).nonzero()[:, 0]
            for number, rows in enumerate(
                split_minibatches(group_ids[mine], count, generator=generator)
            ):
                minibatches[number] += mine[rows].tolist()
        return [sorted(rows) for rows in minibatches]

    return split


class Types(Callback):
    """What is computed in and what is kept, and the scores of ``trajectories`` before any step."""

    def __init__(self, trajectories: Sequence[Trajectory]) -> None:
        self.types: dict[str, str] = {}
        self.scores: list[list[Any]] = []
        self._trajectories = trajectories

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, sdp.SegmentWisePPOModule)
        layers = decoder_layers(pl_module.require_policy())
        inner = [m for layer in layers.values() for m in layer.modules()]
        first: Any = next(m for m in inner if "weight" in m._parameters and m.weight.dim() == 2)

        def note(name: str, value: torch.Tensor) -> None:
            self.types[name] = str(value.dtype)

        handle = first.register_forward_pre_hook(
            lambda linear, inputs: note("used", linear.weight) or note("hidden", inputs[0])
        )
        scores = pl_module.score(self._trajectories)
        self.scores = [[segment.tolist() for segment in scored] for scored in scores]
        handle.remove()
        note("kept", first.weight)
