"""A metric with a slash in its name makes no folder in the name of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from sdp_lightning.lightning.checkpoint_names import keep_names_flat
from support.trainers import make_trainer

METRICS = {
    name: torch.tensor(value)
    for name, value in {"step": 2, "epoch": 0, "val/reward": 0.5364, "train/kl/k3": 0.1}.items()
}


@pytest.mark.parametrize(
    ("filename", "last", "names"),
    [
        ("{step}-{val/reward:.3f}", "last", ("step=2-val_reward=0.536.ckpt", "last.ckpt")),
        (
            "a/{train/kl/k3:.1f}_{epoch:02d}",
            "{step}-last",
            ("a/train_kl_k3=0.1_epoch=00.ckpt", "step=2-last.ckpt"),
        ),
        ("{step}", "last", ("step=2.ckpt", "last.ckpt")),
        (None, "last", ("epoch=0-step=2.ckpt", "last.ckpt")),
    ],
)
def test_names_hold_metrics_without_their_slashes(
    filename: str | None, last: str, names: tuple[str, str], tmp_path: Path
):
    saving = ModelCheckpoint(dirpath=tmp_path, filename=filename)
    saving.CHECKPOINT_NAME_LAST = last  # type: ignore
    keep_names_flat(make_trainer(saving, enable_checkpointing=True))
    keep_names_flat(make_trainer(saving, enable_checkpointing=True))  # of another fit
    written = [
        saving.format_checkpoint_name(METRICS),
        saving.format_checkpoint_name(METRICS, saving.CHECKPOINT_NAME_LAST),
    ]
    assert written == [str(tmp_path / name) for name in names]


def test_a_name_that_its_author_has_written_stays(tmp_path: Path):
    saving = ModelCheckpoint(tmp_path, "r={val/reward:.1f}", auto_insert_metric_name=False)
    keep_names_flat(make_trainer(saving, enable_checkpointing=True))
    assert saving.format_checkpoint_name(METRICS) == str(tmp_path / "r=0.5.ckpt")
