"""The parts of a fit that callbacks of this room read."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from sdp_lightning.errors import ConfigError
from sdp_lightning.lightning.datamodule import RolloutDataModule
from sdp_lightning.lightning.module import SegmentWisePPOModule


def run_parts(
    trainer: Trainer, pl_module: LightningModule, reader: Callback
) -> tuple[SegmentWisePPOModule, RolloutDataModule]:
    """The module and the data module of a fit that ``reader`` watches.

    Raises:
        ConfigError: if they are not this package's.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, RolloutDataModule) or not isinstance(pl_module, SegmentWisePPOModule):
        raise ConfigError(
            f"{type(reader).__name__} needs fit(SegmentWisePPOModule, datamodule="
            f"RolloutDataModule); found {type(pl_module).__name__} and {type(data).__name__}."
        )
    return pl_module, data
