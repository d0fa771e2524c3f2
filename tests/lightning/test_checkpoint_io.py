"""Checkpoints are there whole or not at all."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

import sdp_lightning as sdp
from sdp_lightning.config import atomic_files
from sdp_lightning.lightning.checkpoint_io import AtomicCheckpointIO, use_atomic_checkpoints
from support.steps import Batches, make_batch
from support.trainers import make_module, make_trainer


def save(path: Path, number: int, size: int = 1000) -> None:
    AtomicCheckpointIO().save_checkpoint({"number": number, "data": torch.ones(size)}, path)


def load(path: Path) -> int:
    return AtomicCheckpointIO().load_checkpoint(path, weights_only=True)["number"]


def in_a_child(work: Callable[[], Any]) -> int:
    """The exit status of ``work`` in a process of its own; a signal's is negative."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def tear(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("torn", [True, False], ids=["half written", "written, not yet in place"])
@pytest.mark.fault("process killed", "checkpoint")
def test_a_kill_while_saving_leaves_the_one_before_and_nothing_after_the_next(
    tmp_path: Path, torn: bool
) -> None:
    path = tmp_path / "last.ckpt"
    save(path, 1)

    def die(source: Path, target: Path) -> None:
        if torn:
            tear(source)
        os.kill(os.getpid(), signal.SIGKILL)

    def killed() -> None:
        atomic_files.os.replace = die  # type: ignore[assignment]
        save(path, 2)

    assert in_a_child(killed) == -signal.SIGKILL
    assert load(path) == 1
    assert len(list(tmp_path.iterdir())) == 2 and len(list(tmp_path.glob("*.ckpt"))) == 1
    save(path, 3)
    assert load(path) == 3 and list(tmp_path.iterdir()) == [path]


@pytest.mark.fault("corrupted data", "resume")
@pytest.mark.parametrize("damage", ["torn", "garbage", "empty", "bit", "folder"])
def test_a_damaged_checkpoint_is_named_with_the_newest_whole_one_beside_it(
    tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "step=9.ckpt"
    for age, step in enumerate((9, 8, 7)):
        save(tmp_path / f"step={step}.ckpt", step)
        os.utime(tmp_path / f"step={step}.ckpt", (1e9 - age, 1e9 - age))
    tear(tmp_path / "step=8.ckpt")
    data = path.read_bytes()
    if damage == "torn":
        tear(path)
    elif damage == "bit":  # within the tensor
        place = data.index(torch.ones(8).numpy().tobytes()) + 9
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(b"" if damage == "empty" else b"no checkpoint at all")
    kind = "is a folder" if damage == "folder" else "is torn or damaged"
    with pytest.raises(sdp.CheckpointError, match=kind) as caught:
        load(path)
    assert str(path) in str(caught.value) and "step=7.ckpt" in str(caught.value)
    for step in (7, 8):
        (tmp_path / f"step={step}.ckpt").unlink()
    with pytest.raises(sdp.CheckpointError, match="no whole one beside it"):
        load(path)


def test_what_a_whole_file_may_not_hold_is_said_as_torch_says_it(tmp_path: Path) -> None:
    torch.save({"callback": Path}, tmp_path / "other.ckpt")
    with pytest.raises(sdp.CheckpointError, match=r"other\.ckpt', which is whole: Weights only"):
        load(tmp_path / "other.ckpt")
    with pytest.raises(
        FileNotFoundError, match=r"nowhere\.ckpt'\. Pass '.*other\.ckpt', or .*last"
    ):
        load(tmp_path / "nowhere.ckpt")
    with pytest.raises(FileNotFoundError, match=r"'registry:x'\. .* `pip install litmodels`"):
        load(Path("registry:x"))


def test_a_trainer_gets_it_unless_it_has_a_way_of_its_own() -> None:
    class Own(TorchCheckpointIO):
        pass

    plain, own = make_trainer(max_steps=1), make_trainer(max_steps=1, plugins=[Own()])
    for trainer in (plain, own):
        use_atomic_checkpoints(trainer)
    assert isinstance(plain.strategy.checkpoint_io, AtomicCheckpointIO)
    assert isinstance(own.strategy.checkpoint_io, Own)


class Atomic(L.Callback):
    """What WeightSyncCallback does, where there are no rollouts."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        use_atomic_checkpoints(trainer)


@pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint that ended before")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_fit_resumed_from_a_torn_file_says_which_to_take(
    model_folder: str, tmp_path: Path
) -> None:
    def fit(ckpt_path: Path | None, max_steps: int) -> L.Trainer:
        trainer = make_trainer(
            Atomic(),
            L.pytorch.callbacks.ModelCheckpoint(
                tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1
            ),
            max_steps=max_steps,
            enable_checkpointing=True,
            limit_val_batches=0,
        )
        data = Batches(*[make_batch(model_folder)] * 3)
        trainer.fit(make_module(model_folder), data, ckpt_path=ckpt_path, weights_only=True)
        return trainer

    fit(None, 2)
    tear(tmp_path / "step=2.ckpt")
    with pytest.raises(sdp.CheckpointError, match=r"step=2.ckpt.*torn.*Use .*step=1.ckpt"):
        fit(tmp_path / "step=2.ckpt", 3)
    assert fit(tmp_path / "step=1.ckpt", 3).global_step == 3
    assert not list(tmp_path.glob(".*"))
