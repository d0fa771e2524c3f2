"""``sdp-lightning fit | validate | test``: LightningCLI for this package's two classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI

from sdp_lightning.callbacks import WeightSyncCallback
from sdp_lightning.datamodule import RolloutDataModule
from sdp_lightning.module import SegmentWisePPOModule

TRAINER_DEFAULTS: dict[str, Any] = {
    "logger": {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": "runs", "name": None},
    },
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}


class RolloutCLI(LightningCLI):
    """LightningCLI without abbreviated flags, and with weights always published.

    A config without a ``WeightSyncCallback`` gets one: without it nothing would ever be sampled.
    """

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Those of Lightning but ``predict``: a policy is used by its engine."""
        commands = LightningCLI.subcommands()
        del commands["predict"]
        return commands

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """The base class warns if ``sys.argv`` has arguments too; here they are always passed."""
        self.config = parser.parse_args(args)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds the callback in front, so that it acts before those of the config."""
        trainer = super().instantiate_trainer(**kwargs)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, WeightSyncCallback) for callback in callbacks):
            callbacks.insert(0, WeightSyncCallback())
        return trainer

    def before_fit(self) -> None:
        """Let ``--ckpt_path last`` find what an earlier run has left, as Lightning's hook."""
        settings = self.config_init["fit"]
        if settings.get("ckpt_path") == "last" and (found := _last_of_all_versions(self.trainer)):
            settings["ckpt_path"] = str(found)


def _last_of_all_versions(trainer: Trainer) -> Path | None:
    """The newest ``last*.ckpt`` of all runs, where a logger gives each run a folder of its own.

    Lightning looks in the folder of the new run only. None leaves it to that.
    """
    savers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    if trainer.logger is None or any(saver.dirpath for saver in savers):
        return None
    folder = Path(trainer.logger.save_dir or trainer.default_root_dir, str(trainer.logger.name))
    found = folder.glob("version_*/checkpoints/last*.ckpt")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def run(arguments: Sequence[str]) -> RolloutCLI:
    """Parse ``arguments``, command first, and run it.

    Raises:
        SystemExit: if they cannot be parsed, or asked for help.
    """
    return RolloutCLI(
        SegmentWisePPOModule,
        RolloutDataModule,
        args=list(arguments),
        trainer_defaults=TRAINER_DEFAULTS,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"allow_abbrev": False},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
    )
