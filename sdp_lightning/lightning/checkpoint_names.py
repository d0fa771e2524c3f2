"""Names of checkpoints: a metric with a slash in its name makes no folder."""

from __future__ import annotations

import logging
import re

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint

logger = logging.getLogger(__name__)

_KEY = re.compile(r"\{([^{}:!]+)")


def keep_names_flat(trainer: L.Trainer) -> None:
    """Write ``val_reward=`` where Lightning writes ``val/reward=`` in names of checkpoints."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(callback, ModelCheckpoint) or not callback.auto_insert_metric_name:
            continue
        name = callback.filename
        if name is None or not any("/" in key for key in _KEY.findall(name)):
            continue
        callback.auto_insert_metric_name = False
        callback.filename = _named(name)
        last = _named(callback.CHECKPOINT_NAME_LAST)
        callback.CHECKPOINT_NAME_LAST = last  # type: ignore # "last" is its default
        logger.info("checkpoints are named %r: a slash would make a folder.", callback.filename)


def _named(template: str) -> str:
    return _KEY.sub(lambda key: f"{key[1].replace('/', '_')}={key[0]}", template)
