"""``ckpt_path="last"`` is the newest checkpoint of this run by version, and of no other run."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import sdp_lightning as sdp
from sdp_lightning.errors import CheckpointError
from sdp_lightning.lightning.run_record import RunRecord, is_learned, read_record
from sdp_lightning.testing import FakeEngine
from support.stopped_runs import CallAt, send
from support.trainers import make_data, make_module, make_rows, make_trainer

pytestmark = [
    pytest.mark.usefixtures("nothing_is_left"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


class Job:
    """What a job script runs: always with ``ckpt_path="last"``, in one folder."""

    def __init__(self, model_folder: str, folder: Path) -> None:
        self._model, self.folder = model_folder, folder

    def run(
        self, max_steps: int, *callbacks: Any, last: Any = "last", **settings: Any
    ) -> tuple[int, int]:
        """The steps at which it began and ended."""
        lr = settings.pop("lr", 1e-3)
        data = {"batch_size": 2} | settings.pop("data", {})
        saver = settings.pop("saver", {"dirpath": self.folder})
        callbacks = (*callbacks, ModelCheckpoint(**saver))
        settings = {"enable_checkpointing": True, "default_root_dir": self.folder} | settings
        begun: list[int] = []
        begin = CallAt("end", lambda: None)
        begin.on_train_start = lambda trainer, *_: begun.append(trainer.global_step)  # type: ignore
        trainer = make_trainer(
            sdp.WeightSyncCallback(), begin, *callbacks, max_steps=max_steps, **settings
        )
        module = make_module(self._model, lr=lr)
        trainer.fit(
            module,
            make_data(rows=make_rows(40), engine=FakeEngine(), **data),
            ckpt_path=last,
            weights_only=True,
        )
        return (begun or [trainer.global_step])[0], trainer.global_step


@pytest.fixture
def job(model_folder: str, tmp_path: Path) -> Job:
    return Job(model_folder, tmp_path)


def newest_first(folder: Path, *names: str) -> None:
    """Make the order of the files' times another one than that of their versions."""
    for age, name in enumerate(names):
        os.utime(folder / name, (1e9 - age, 1e9 - age))


def test_a_stopped_and_resumed_run_is_extended_from_its_newest_version(job: Job) -> None:
    with pytest.raises(SystemExit):
        job.run(6, CallAt("end", send(signal.SIGINT), step=2), last=None)
    assert job.run(6) == (2, 6)
    newest_first(job.folder, "last-stopped-step=2.ckpt", "epoch=0-step=6.ckpt")
    assert job.run(8) == (6, 8)


def test_another_experiment_in_the_folder_begins_anew_and_each_goes_on_with_its_own(
    job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    """Also the third, whose settings of rollouts differ, and where the files have one name."""
    assert job.run(2, last=None) == (0, 2)
    assert job.run(3, lr=1e-4) == (0, 3)
    assert "no checkpoint here is of this run, which begins anew" in caplog.text
    assert "model.optimizer.lr  0.001  0.0001" in caplog.text
    assert f"pass ckpt_path='{job.folder / 'epoch=0-step=2.ckpt'}'" in caplog.text
    assert job.run(4, data={"max_head_lag": 0}) == (0, 4)
    assert job.run(5) == (2, 5)
    assert job.run(6, lr=1e-4) == (3, 6)


def test_settings_that_say_where_and_how_fast_it_runs_leave_a_run_itself(
    job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    job.run(1, last=None)
    assert job.run(2, data={"timeout_s": 33.0, "max_concurrent": 4}) == (1, 2)
    assert "data.rollout.timeout_s       60.0  33.0" in caplog.text
    assert is_learned("model.update.num_epochs") and not is_learned("data.rollout.num_epochs")


def test_a_run_that_was_begun_again_is_not_continued_from_the_one_before(job: Job) -> None:
    job.run(4, last=None)
    job.run(2, last=None)
    assert job.run(5) == (2, 5)


def test_a_run_that_trains_nothing_says_why(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    job.run(2, last=None)
    assert "trained nothing" not in caplog.text
    assert job.run(2) == (2, 2)
    assert "this fit trained nothing: it began at step 2, and max_steps=2" in caplog.text
    assert "not those of the checkpoint" not in caplog.text
    job.run(0, last=None)
    assert "it began at step 0, and max_steps=0" in caplog.text


@pytest.mark.parametrize(
    ("saver", "is_said"),
    [({}, True), ({"every_n_train_steps": 9}, True), ({"every_n_train_steps": 1}, False)],
    ids=["at the end", "beyond the end", "every step"],
)
def test_a_fit_whose_checkpoints_all_come_at_its_end_says_so(
    job: Job, caplog: pytest.LogCaptureFixture, saver: dict[str, Any], is_said: bool
) -> None:
    job.run(2, last=None, saver={"dirpath": job.folder} | saver)
    assert ("no checkpoint is saved before the end" in caplog.text) is is_said
    assert (
        "ModelCheckpoint(every_n_train_steps=1)" in caplog.text
    ) is is_said  # saves before step 2


def test_a_fit_of_one_batch_has_no_time_to_save_on_its_way(
    job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    job.run(1, last=None, saver={"dirpath": job.folder})
    assert "no checkpoint is saved" not in caplog.text


def test_a_logger_with_a_folder_for_each_run_hides_none(job: Job) -> None:
    def logged() -> dict[str, Any]:
        return {"logger": CSVLogger(job.folder, name=None), "saver": {}, "log_every_n_steps": 1}

    assert job.run(2, last=None, **logged()) == (0, 2)
    assert job.run(3, lr=1e-4, **logged()) == (0, 3)
    assert job.run(4, **logged()) == (2, 4)


@pytest.mark.fault("corrupted data", "resume")
def test_a_damaged_checkpoint_is_named_and_left_out(
    job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    job.run(2, last=None)
    job.run(3)
    (path,) = job.folder.glob("*step=3.ckpt")
    path.write_bytes(b"half")
    assert job.run(4) == (2, 4)
    assert f"{path.name}' cannot be read" in caplog.text


def test_a_record_is_read_without_running_what_the_file_holds(tmp_path: Path) -> None:
    import torch

    class Bomb:
        def __reduce__(self) -> Any:
            return os.abort, ()

    record = RunRecord({"model.loss.clip_epsilon": 0.2})
    torch.save({"bomb": Bomb(), "sdp_run": record.text(7)}, tmp_path / "a.ckpt")
    found = read_record(tmp_path / "a.ckpt")
    assert found is not None and (found.id, found.version) == (record.id, 7)
    assert found.digest == record.digest != RunRecord({"model.loss.clip_epsilon": 0.3}).digest
    torch.save({}, tmp_path / "plain.ckpt")
    assert read_record(tmp_path / "plain.ckpt") is None
    (tmp_path / "text.ckpt").write_text("none")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_record(tmp_path / "text.ckpt")


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # another saver
def test_a_resumed_fit_that_saves_at_a_multiple_on_its_way_says_nothing(
    job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    saver = {"dirpath": job.folder, "every_n_train_steps": 3}
    job.run(2, last=None, saver=saver | {"every_n_train_steps": 1})
    caplog.clear()
    assert job.run(4, saver=saver) == (2, 4)  # saved at 3, although only 2 steps are left
    assert "no checkpoint is saved" not in caplog.text
    assert job.run(6, saver=saver) == (3, 6)
    assert "no checkpoint is saved" in caplog.text
