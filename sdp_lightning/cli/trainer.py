"""``sdp-lightning fit | validate | test | rollout``: LightningCLI for this package's classes."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from sdp_lightning.cli.failures import condensed, refusal
from sdp_lightning.cli.kept_texts import keeping_mode
from sdp_lightning.config.server_keys import hide_keys, without_keys
from sdp_lightning.errors import ConfigError
from sdp_lightning.lightning.datamodule import RolloutDataModule
from sdp_lightning.lightning.module import SegmentWisePPOModule
from sdp_lightning.lightning.trainer_flags import add_weight_sync
from sdp_lightning.observability.recording import Recording
from sdp_lightning.observability.recording.recorder import Recorder
from sdp_lightning.types import count_sampled_tokens

TRAINER_DEFAULTS: dict[str, Any] = {
    "logger": {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": "runs", "name": None},
    },
    "log_every_n_steps": 1,
    "max_epochs": -1,  # Lightning's None is 1000 where nothing else ends the run
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are one line with the nearest setting, without the long usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with status 2; ``ArgumentError`` where jsonargparse tries one type of several."""
        if not self.exit_on_error:
            super().error(message, ex)
        self.refuse(self.one_line(message, ex), ex)

    def refuse(self, reason: str, ex: Exception | None) -> NoReturn:
        """Exit with status 2 and one line."""
        sys.stderr.write(f"sdp-lightning: {reason}\n")
        sys.exit(2)

    def one_line(self, message: str, ex: Exception | None) -> str:
        """A message on one line, with the nearest setting."""
        parser: Any = vars(ex).get("subcommand_parser") if ex is not None else None
        text = hide_keys(" ".join(condensed(str(message)).split()))
        return text + _nearest(text, parser or self)

    def dump(self, namespace: Any, *args: Any, **settings: Any) -> str:
        """The config as text, with the name of a variable in place of a server's key."""
        clean = namespace.clone()
        for name, value in namespace.items():
            if "data" in name.split("."):
                clean[name] = without_keys(value, name.rpartition(".")[2])
        return super().dump(clean, *args, **settings)


def _nearest(text: str, parser: Any) -> str:
    """A hint at the setting nearest to an unknown key; empty if no key is unknown."""
    match = re.search(r"(?:does not accept option '|unrecognized arguments: --)([\w.]+)", text)
    known = [action.dest for action in parser._actions]
    if match is None:
        return ""
    near = difflib.get_close_matches(match[1], known, n=1, cutoff=0.75)
    return f". Did you mean {near[0]}?" if near else f". See {parser.prog.split(' [')[0]} --help."


class RolloutTrainer(Trainer):
    """A Trainer that can also generate without training."""

    def rollout(
        self,
        model: SegmentWisePPOModule,
        datamodule: RolloutDataModule,
        num_batches: int = 1,
        folder: str | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Generates batches from the training prompts and records them, without training.

        Args:
            model: the policy that samples.
            datamodule: prompts, workflow and engine.
            num_batches: number of batches, of data.rollout.batch_size groups each.
            folder: folder of the recording; by default recording/ in the folder of the logger.
            ckpt_path: checkpoint whose weights sample.
            weights_only: load only tensors and plain values from it.

        Raises:
            ConfigError: if num_batches is below 1.
        """
        if num_batches < 1:
            raise ConfigError(f"num_batches must be at least 1, got {num_batches}.")
        recorders = [c for c in self.callbacks if isinstance(c, Recorder)]  # type: ignore
        if not recorders:
            recorders = [Recorder()]
            self.callbacks.append(recorders[0])  # type: ignore[attr-defined]
        if folder is not None:
            recorders[0].folder = Path(folder)
        self.limit_predict_batches = num_batches
        self.predict(
            model,
            datamodule=datamodule,
            return_predictions=False,
            ckpt_path=ckpt_path,
            weights_only=weights_only,
        )


class RolloutCLI(LightningCLI):
    """LightningCLI without abbreviated flags, and with weights always published.

    A config without a ``WeightSyncCallback`` gets one: without it nothing is ever sampled. With
    ``run=False`` the arguments have no command, and the objects are made but not run.
    """

    parser_kind: type[LightningArgumentParser] = OneLineParser

    def __init__(self, arguments: Sequence[str], *, run: bool = True) -> None:
        self._command = arguments[0] if run else "fit"
        super().__init__(
            SegmentWisePPOModule,
            RolloutDataModule,
            trainer_class=RolloutTrainer,
            args=list(arguments),
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            save_config_callback=SaveConfigCallback if run else None,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"allow_abbrev": False, "parser_mode": keeping_mode()},
            parser_class=type(self).parser_kind,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            run=run,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command that was given: each parser takes long to build. ``rollout`` is ours."""
        commands = LightningCLI.subcommands() | {"rollout": {"model", "datamodule"}}
        return {self._command: commands[self._command]}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Those of Lightning; ``class_path`` in ``model.optimizer`` is a setting of its own."""
        super().add_core_arguments_to_parser(parser)
        for action in parser._actions:
            if action.dest == "model.optimizer":
                action.basetype = None  # type: ignore[attr-defined]

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse the arguments; the base class would warn if ``sys.argv`` has some, too."""
        self.config = parser.parse_args(args)

    def _set_seed(self) -> None:
        """Seed random numbers; a seed that NumPy does not take is a ``ConfigError``."""
        seed = self._get(self.config, "seed_everything")
        if type(seed) is int and not 0 <= seed < 2**32:
            raise ConfigError(
                f"seed_everything={seed}: NumPy takes 0 to {2**32 - 1}. Choose one of these, true "
                "for a random one, or false for none."
            )
        super()._set_seed()

    def _parse_ckpt_path(self) -> None:
        """Leave the settings as they are: Lightning's CLI would take those of the checkpoint."""

    def instantiate_classes(self) -> None:
        """Make the objects; what a library refuses is a ``ConfigError`` of one line."""
        try:
            super().instantiate_classes()
        except Exception as error:
            if (refused := refusal(error, self._given_to_trainer())) is None:
                raise
            raise refused from error

    def _given_to_trainer(self) -> dict[str, str | int | float]:
        """The Trainer's plain settings that differ from its defaults."""
        defaults = inspect.signature(Trainer.__init__).parameters
        given: dict[str, Any] = dict(self._get(self.config, "trainer").items())
        return {
            name: value
            for name, value in given.items()
            if isinstance(value, str | int | float)
            and name in defaults
            and value != defaults[name].default
        }

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer, with a ``WeightSyncCallback`` before the callbacks of the config."""
        trainer = super().instantiate_trainer(**kwargs)
        # foreign: launchers differ
        if getattr(trainer.strategy.launcher, "_start_method", None) == "spawn":
            raise ConfigError(
                "this strategy sends model and data to its processes as pickles, which those of a "
                "run cannot be: use trainer.strategy=ddp, which starts the command once a process."
            )
        add_weight_sync(trainer)
        return trainer


def recording_of(trainer: Trainer) -> Recording:
    """What ``rollout`` has recorded; a recording that is not whole says so."""
    (recorder,) = [c for c in trainer.callbacks if isinstance(c, Recorder)]  # type: ignore
    return Recording(recorder.written_to)


def describe(recording: Recording) -> str:
    """One line about a recording."""
    groups = [group for batch in recording for group in batch.groups]
    rewards = [t.reward for group in groups for t in group.attempts]
    num_trajectories = sum(len(group.trajectories) for group in groups)
    return (
        f"{len(recording)} batches: {len(groups)} groups, {num_trajectories} trajectories, "
        f"{count_sampled_tokens(groups):,} sampled tokens, mean reward "
        f"{sum(rewards) / len(rewards):.3f}; recorded in {recording.folder}"
    )
