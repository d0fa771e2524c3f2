"""``sdp-lightning fit | validate | test``: LightningCLI for this package's two classes."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

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


class OneLineParser(LightningArgumentParser):
    """Says what is wrong in one line, with the nearest setting that there is; the usage is long."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with status 2."""
        parser: Any = vars(ex).get("subcommand_parser") if ex is not None else None
        text = " ".join(line.strip() for line in str(message).splitlines())
        sys.stderr.write(f"sdp-lightning: {text}{_nearest(text, parser or self)}\n")
        sys.exit(2)


def _nearest(text: str, parser: Any) -> str:
    """The setting that a key which is not known looks like, if there is one."""
    found = re.search(r"(?:does not accept option '|unrecognized arguments: --)([\w.]+)", text)
    known = [action.dest for action in parser._actions]
    if found is None:
        return ""
    near = difflib.get_close_matches(found[1], known, n=1, cutoff=0.75)
    return f". Did you mean {near[0]}?" if near else f". See {parser.prog.split(' [')[0]} --help."


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


def run(arguments: Sequence[str], kind: type[RolloutCLI] = RolloutCLI) -> RolloutCLI:
    """Parse ``arguments``, command first, and run it.

    Raises:
        SystemExit: if they cannot be parsed, or asked for help.
    """
    return kind(
        SegmentWisePPOModule,
        RolloutDataModule,
        args=list(arguments),
        trainer_defaults=TRAINER_DEFAULTS,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"allow_abbrev": False},
        parser_class=OneLineParser,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
    )
