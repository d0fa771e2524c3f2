"""Settings of a Trainer that the module cannot work with."""

from __future__ import annotations

from multiprocessing.context import get_spawning_popen
from typing import Any

import lightning as L

from sdp_lightning.config import LoRAConfig, UpdateConfig
from sdp_lightning.errors import ConfigError
from sdp_lightning.lightning.last_checkpoint import RunDataModule


def check_trainer(trainer: L.Trainer, update: UpdateConfig, stage: str) -> None:
    """Refuse a strategy, a precision or a number of steps that cannot work.

    FSDP1 has flat parameters, which can be neither named, frozen in part nor published.

    Raises:
        ConfigError: naming the setting and the one to use.
    """
    if any(kind.__name__ == "FSDPStrategy" for kind in type(trainer.strategy).__mro__):
        raise ConfigError(
            "FSDPStrategy (FSDP1) is not supported: it hides the model's parameters. Use FSDP2, "
            "ModelParallelStrategy(data_parallel_size=<devices>, tensor_parallel_size=1)."
        )
    precision = str(trainer.precision)
    if stage == "fit" and precision in ("16-mixed", "16-true"):
        raise ConfigError(
            f"precision={precision!r} needs a scaled loss, which this module does not do; use "
            "'bf16-mixed' or '32-true'."
        )
    if stage == "fit" and precision == "bf16-true":
        raise ConfigError(
            "precision='bf16-true' keeps weights and adapters in bfloat16, which rounds the steps "
            "of an optimizer away; use 'bf16-mixed', which computes in bfloat16 and steps in "
            "float32. A base model under an adapter may be in bfloat16: "
            "model_kwargs={'dtype': 'bfloat16'}."
        )
    if stage == "fit" and not is_resumed(trainer):
        check_steps(trainer, update)


def refuse_spawn() -> None:
    """Refuse to be pickled for a process that is being spawned, before there is one.

    Raises:
        ConfigError: naming the strategies to use.
    """
    if get_spawning_popen() is not None:
        raise ConfigError(
            "strategy='ddp_spawn' starts its ranks from pickled copies of the run, which its "
            "rollouts and models do not survive. Use strategy='ddp', which starts the script once "
            "a rank, or 'ddp_fork' or 'ddp_notebook', which fork this process."
        )


def check_steps(trainer: L.Trainer, update: UpdateConfig) -> None:
    """Refuse a ``max_steps`` that whole batches do not reach from the present step on.

    The steps before may be of another number of minibatches.

    Raises:
        ConfigError: naming the nearest that they reach.
    """
    done, most, every = trainer.global_step, trainer.max_steps, update.steps_per_batch
    left = most - done
    if most > 0 and left > 0 and left % every:
        near = [str(done + n * every) for n in (left // every, left // every + 1) if done + n]
        leaves = f" leaves {left} steps after step {done}, which" if done else ""
        raise ConfigError(
            f"max_steps={most}{leaves} is no multiple of {every}, the optimizer steps of one batch "
            f"({update.num_minibatches} minibatches x {update.num_epochs} epochs): "
            f"use {' or '.join(near)}."
        )


def is_resumed(trainer: L.Trainer) -> bool:
    """Whether the fit that begins goes on with a checkpoint, which is not loaded yet."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    chosen = data.chosen_checkpoint if isinstance(data, RunDataModule) else None
    return (chosen or trainer.ckpt_path) is not None


def refuse_both(trainable: str | None, lora: LoRAConfig | None) -> None:
    """Raise a ConfigError if both a pattern and an adapter say what is trained."""
    if lora is not None and trainable is not None:
        raise ConfigError(
            f"trainable={trainable!r} and lora= both say what is trained. Remove one of the two; "
            "lora.target_modules says where adapters lie."
        )
