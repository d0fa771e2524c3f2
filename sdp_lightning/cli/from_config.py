"""A config file as Python objects: the trainer, module and data module that ``fit`` would make."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import Trainer

from sdp_lightning.cli.kept_texts import KeptText, keep_texts
from sdp_lightning.cli.trainer import OneLineParser, RolloutCLI
from sdp_lightning.errors import ConfigError
from sdp_lightning.lightning.datamodule import RolloutDataModule
from sdp_lightning.lightning.module import SegmentWisePPOModule

_FIT_ONLY = ("ckpt_path", "weights_only")  # keys of a config that a run has saved


class _RaisingParser(OneLineParser):
    """A parser whose errors are exceptions: the caller is a program."""

    def refuse(self, reason: str, ex: Exception | None) -> NoReturn:
        raise ConfigError(reason) from ex


class _ConfigCLI(RolloutCLI):
    """The command line without a command: it makes the objects and runs nothing."""

    parser_kind = _RaisingParser

    def add_arguments_to_parser(self, parser: Any) -> None:
        for name in _FIT_ONLY:
            parser.add_argument(f"--{name}", type=str | bool | None)


def from_config(
    config: str | Path | Sequence[str | Path],
    overrides: Mapping[str, object] | Sequence[str] | None = None,
) -> tuple[Trainer, SegmentWisePPOModule, RolloutDataModule]:
    """The trainer, module and data module of a config file, as ``sdp-lightning fit`` makes them.

    ``trainer.fit(model, data)`` is then the same run. Python's, NumPy's and torch's random numbers
    are seeded as the config says. Relative paths in it start from the working directory.

    Args:
        config: a file, or several of which later ones take precedence.
        overrides: settings by dotted name, such as ``{"trainer.max_steps": 2}``: texts, numbers,
            booleans, None, or lists and dicts of these; or flags of ``sdp-lightning fit``. A text
            is a text, as one in quotes in a file: ``"3"`` is a number only where the setting's type
            is. What follows the ``=`` of a flag is read as YAML.

    Raises:
        ConfigError: if a setting is unknown or refused, or the config names a checkpoint, which
            belongs to ``trainer.fit(..., ckpt_path=...)``.
    """
    files = [config] if isinstance(config, str | Path) else config
    flags = [f"--config={file}" for file in files]
    if overrides is not None and not isinstance(overrides, Mapping):
        flags += overrides
        overrides = None
    for name, value in (overrides or {}).items():
        text = keep_texts(value)
        if isinstance(text, KeptText) and text.startswith("-") and not text[1:].isdigit():
            raise ConfigError(f"the text {text!r} of {name} begins as a flag: set it in a file.")
        if isinstance(text, KeptText):
            flags += [f"--{name}", text]  # as it is: what follows "=" is read as YAML
        else:
            flags.append(f"--{name}={value if isinstance(value, str) else json.dumps(value)}")
    cli = _ConfigCLI(flags, run=False)
    if cli.config["ckpt_path"] is not None:
        raise ConfigError(
            f"ckpt_path={cli.config['ckpt_path']!r} in {', '.join(map(str, files))}: leave it out "
            "and pass it to trainer.fit."
        )
    assert isinstance(cli.model, SegmentWisePPOModule)
    assert isinstance(cli.datamodule, RolloutDataModule)
    return cli.trainer, cli.model, cli.datamodule
