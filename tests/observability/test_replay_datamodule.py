"""Runs that are recorded and replayed, from end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny
from lightning.pytorch.callbacks import Callback

import sdp_lightning as sdp
from sdp_lightning.distributed.rank_group import RankGroup
from sdp_lightning.lightning.prediction_loader import Rollouts
from sdp_lightning.observability.recording.replay import ReplayLoader
from sdp_lightning.testing import FakeEngine
from support.failing_observers import At, Avenger, fail, set_aside
from support.recordings import Losses, make_recorded_module, record
from support.steps import StepRecorder
from support.trainers import make_data, make_rows, make_trainer, make_workflow, weights_of

STEPS = 8  # optimizer steps, 2 a batch
Again = tuple[sdp.SegmentWisePPOModule, Losses, StepRecorder]


class Recorded:
    """One run for all tests: what it trained on, what came of it."""

    def __init__(self, folder: str, target: Path) -> None:
        self.model, self.losses, self.seen = record(folder, target, steps=STEPS)
        self.folder, self.weights = target, weights_of(self.model)


@pytest.fixture(scope="module")
def run(model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return Recorded(model_folder, tmp_path_factory.mktemp("run") / "recording")


def replay(
    folder: str, recording: Path | sdp.Recording, *, steps: int | None = STEPS, **module: Any
) -> tuple[sdp.SegmentWisePPOModule, Losses, StepRecorder]:
    model, losses, seen = make_recorded_module(folder, **module), Losses(), StepRecorder()
    data = sdp.ReplayDataModule(recording)
    limit = {"max_epochs": 1} if steps is None else {"max_steps": steps}
    make_trainer(losses, seen, **limit).fit(model, datamodule=data)
    return model, losses, seen


@pytest.fixture(scope="module")
def again(model_folder: str, run: Recorded) -> Again:
    return replay(model_folder, run.folder)


def test_a_replay_has_the_losses_gradients_and_weights_of_the_run_bit_by_bit(
    again: Again, run: Recorded
) -> None:
    model, losses, seen = again
    lags = torch.cat([b.lags[b.loss_mask & b.segment_scored] for b in run.seen.batches])
    assert lags.max() >= 2, "the run trained on old segments that were scored"
    assert losses.steps == run.losses.steps and len(losses.steps) == STEPS // 2
    for one, other in zip(seen.gradients, run.seen.gradients, strict=True):
        assert all(torch.equal(one[name], value) for name, value in other.items())
    final = weights_of(model)
    assert all(torch.equal(final[name], value) for name, value in run.weights.items())


def test_a_replay_hands_out_the_batches_of_the_run(again: Again, run: Recorded) -> None:
    _, _, seen = again
    for one, other in zip(seen.batches, run.seen.batches, strict=True):
        assert (one.version, one.missing_proximal, one.max_lag) == (
            *(other.version, other.missing_proximal, other.max_lag),
        )
        for name in ("input_ids", "versions", "behavior_logprobs", "rewards", "group_ids"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        scored = other.segment_scored
        assert torch.equal(one.segment_scored, scored)
        assert torch.equal(one.segment_logprobs[scored], other.segment_logprobs[scored])


def test_another_loss_is_compared_on_the_same_data(model_folder: str, run: Recorded) -> None:
    loss = sdp.LossConfig(trust_region="behavior", clip_epsilon=0.1)
    _, losses, seen = replay(model_folder, run.folder, loss=loss)
    assert torch.equal(seen.batches[-1].input_ids, run.seen.batches[-1].input_ids)
    assert losses.steps[0]["train/reward"] == run.losses.steps[0]["train/reward"]
    assert losses.steps[-1] != run.losses.steps[-1]


@pytest.mark.slow
def test_a_replay_ends_with_its_recording_or_before(model_folder: str, run: Recorded) -> None:
    recording = sdp.Recording(run.folder)
    _, longer, _ = replay(model_folder, recording, steps=None)
    assert len(longer.steps) == len(recording) == STEPS // 2
    _, shorter, _ = replay(model_folder, recording, steps=4)
    assert len(shorter.steps) == 2


def test_a_recording_of_another_vocabulary_is_refused(
    run: Recorded, tmp_path: Path, model_folder: str
) -> None:
    from transformers import AutoTokenizer

    folder = save_tiny(tmp_path, seed=0)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(sdp.RecordingError, match=r"50 tokens, .* has another \(51 tokens"):
        replay(folder, run.folder)


def test_a_replay_refuses_what_needs_an_engine(model_folder: str, run: Recorded) -> None:
    data = sdp.ReplayDataModule(run.folder)
    trainer = make_trainer(sdp.WeightSyncCallback(), max_steps=2)
    with pytest.raises(sdp.ConfigError, match="leave WeightSyncCallback out"):
        trainer.fit(make_recorded_module(model_folder), datamodule=data)
    with pytest.raises(sdp.ConfigError, match=r"not for .*VALIDATING"):
        make_trainer().validate(make_recorded_module(model_folder), datamodule=data)
    with pytest.raises(sdp.ConfigError, match="Recorder needs fit"):
        make_trainer(sdp.Recorder(), max_steps=2).fit(
            make_recorded_module(model_folder), datamodule=data
        )


def test_a_callback_that_raises_about_an_error_does_not_hide_that_of_a_replay(
    model_folder: str, run: Recorded, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(Avenger(), At(fail, batch_idx=1), max_steps=STEPS)
    with pytest.raises(ValueError, match="the real error") as info:
        trainer.fit(make_recorded_module(model_folder), sdp.ReplayDataModule(run.folder))
    assert info.value.__context__ is None
    assert set_aside(caplog, "on_exception of Avenger") == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_share_the_groups_of_a_batch(run: Recorded, rank: int) -> None:
    recording = sdp.Recording(run.folder)
    ranks, trainer = RankGroup(rank=rank, size=2), make_trainer()
    loader = ReplayLoader(recording, length=1, pad_token_id=0, trainer=trainer, ranks=ranks)
    (sealed,) = loader
    mine = recording.read(0).groups[rank]
    assert sealed.batch.rewards.tolist() == pytest.approx([t.reward for t in mine.trajectories])
    third = ReplayLoader(
        recording, length=1, pad_token_id=0, trainer=trainer, ranks=RankGroup(rank=0, size=3)
    )
    with pytest.raises(sdp.RecordingError, match="2 groups, which 3 processes cannot share"):
        list(third)


@pytest.mark.slow
def test_the_mode_and_the_mask_of_the_run_are_those_of_its_replay(
    model_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, settings in (
        ("off", {"enable_segment_wise_ppo": False}),
        ("mask", {"on_overdue": "mask", "max_head_lag": 1}),
    ):
        model = make_recorded_module(model_folder, loss=sdp.LossConfig(trust_region="behavior"))
        callbacks = [
            sdp.WeightSyncCallback(),
            sdp.Recorder(tmp_path / name),
            seen := StepRecorder(),
        ]
        trainer = make_trainer(*callbacks, max_steps=2)
        trainer.fit(model, datamodule=make_data(engine=FakeEngine(), **settings))
        _, _, again = replay(model_folder, tmp_path / name, steps=2)
        (one,), (other,) = again.batches, seen.batches
        assert (one.missing_proximal, one.max_lag) == (other.missing_proximal, other.max_lag)
        assert "the recorded run had no segments scored" in caplog.text
        caplog.clear()
    past = make_recorded_module(model_folder, loss=sdp.LossConfig(trust_region="past"))
    with pytest.raises(sdp.ConfigError, match="trust_region='past' with enable_segment_wise_ppo"):
        make_trainer(max_steps=2).fit(past, sdp.ReplayDataModule(tmp_path / "off"))


# Starts, stops, folders ---------------------------------------------------------------------------


def start(
    folder: str,
    target: Path | None,
    *callbacks: Callback,
    steps: int,
    checkpoint: Path | None = None,
    **trainer: Any,
) -> Any:
    """One start of a run that is recorded, and its Trainer."""
    made = make_trainer(
        *(sdp.WeightSyncCallback(), sdp.Recorder(target, rows_per_file=1000), *callbacks),
        max_steps=steps,
        **trainer,
    )
    data = make_data(engine=FakeEngine(), max_head_lag=0)
    made.fit(make_recorded_module(folder), datamodule=data, ckpt_path=checkpoint)
    return made


def test_a_run_that_goes_on_goes_on_with_its_recording(model_folder: str, tmp_path: Path) -> None:
    target, checkpoint = tmp_path / "recording", tmp_path / "two.ckpt"
    trainer = start(model_folder, target, steps=4)
    trainer.save_checkpoint(checkpoint)
    whole: list[bool | None] = [sdp.Recording(target).is_whole]
    look = At(lambda: whole.append(sdp.Recording(target).is_whole))
    start(model_folder, target, look, steps=8, checkpoint=checkpoint)
    assert whole == [True, False], "while it goes on, it is not whole"
    before = sdp.Recording(target)
    assert before.versions == [0, 1, 2, 3]
    start(model_folder, target, steps=6, checkpoint=checkpoint)
    after = sdp.Recording(target)
    assert after.versions == [0, 1, 2], "version 3 has been undone"
    assert before.is_whole and after.is_whole
    assert [g.row_id for g in after.read(2).groups] == [g.row_id for g in before.read(2).groups]
    with pytest.raises(
        sdp.RecordingError, match="versions 0 to 2, and this run begins at version 0"
    ):
        start(model_folder, target, steps=2)


def test_what_was_trained_on_before_a_checkpoint_is_written_with_it(
    model_folder: str, tmp_path: Path
) -> None:
    class Look(Callback):
        def __init__(self) -> None:
            self.found: list[int] = []

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / "now.ckpt")
            self.found.append(len(sdp.Recording(tmp_path / "recording")))

    look = Look()
    recorder = sdp.Recorder(tmp_path / "recording", rows_per_file=1000)
    data = make_data(engine=FakeEngine())
    trainer = make_trainer(sdp.WeightSyncCallback(), recorder, look, max_steps=6)
    trainer.fit(make_recorded_module(model_folder), datamodule=data)
    assert look.found == [1, 2, 3]


def test_a_run_that_fails_leaves_what_it_had_trained_on(model_folder: str, tmp_path: Path) -> None:
    data = make_data(engine=FakeEngine(), num_epochs=1, rows=make_rows(4), max_failures=0)
    recorder = sdp.Recorder(tmp_path, rows_per_file=1000)

    class Fails(StepRecorder):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, idx: int) -> None:
            if batch.version == 1:
                raise RuntimeError("an accident")

    sync = sdp.WeightSyncCallback(failing_callbacks="raise")
    trainer = make_trainer(sync, recorder, Fails(), max_steps=8)
    with pytest.raises(RuntimeError, match="an accident"):
        trainer.fit(make_recorded_module(model_folder), datamodule=data)
    recording = sdp.Recording(tmp_path)
    assert recording.versions == [0] and recording.is_whole


def test_without_a_folder_the_recording_lies_beside_the_logs(
    model_folder: str, tmp_path: Path
) -> None:
    start(model_folder, None, steps=2, default_root_dir=tmp_path)
    assert sdp.Recording(tmp_path / "recording").versions == [0]
    with pytest.raises(sdp.RecordingError, match="Give Recorder another folder"):
        start(model_folder, None, steps=2, default_root_dir=tmp_path)


# Only generating ----------------------------------------------------------------------------------


def test_predicting_generates_and_records_what_a_replay_can_train_on(
    model_folder: str, tmp_path: Path
) -> None:
    model, data = make_recorded_module(model_folder), make_data(max_head_lag=1)
    trainer = make_trainer(
        sdp.WeightSyncCallback(), recorder := sdp.Recorder(tmp_path / "r"), limit_predict_batches=3
    )
    found: Any = trainer.predict(model, datamodule=data)
    assert [type(r) for r in found] == [Rollouts] * 3 and {r.version for r in found} == {0}
    rows = [group.row_id for r in found for group in r.groups]
    assert len(set(rows)) == 6
    assert recorder.written_to == tmp_path / "r" and sdp.Recording(tmp_path / "r").is_whole
    _, losses, seen = replay(model_folder, tmp_path / "r", steps=6)
    assert [b.version for b in seen.batches] == [0, 1, 2] and len(losses.steps) == 3
    assert [int(b.lags.max()) for b in seen.batches] == [0, 1, 2]


def test_the_rows_generated_are_those_that_a_fit_would_begin_with(model_folder: str) -> None:
    def make() -> sdp.RolloutDataModule:
        return make_data(make_workflow(max_new_tokens=3), max_head_lag=0, seed=5)

    seen = StepRecorder()
    trainer = make_trainer(sdp.WeightSyncCallback(), seen, max_steps=2)
    trainer.fit(make_recorded_module(model_folder), datamodule=make())
    trainer = make_trainer(sdp.WeightSyncCallback(), limit_predict_batches=1)
    found: Any = trainer.predict(make_recorded_module(model_folder), datamodule=make())
    tokens = [t.token_ids.tolist() for g in found[0].groups for t in g.trajectories]
    batch = seen.batches[0]
    trained = zip(batch.input_ids.tolist(), batch.lengths.tolist(), strict=True)
    assert tokens == [row[:length] for row, length in trained]


@pytest.mark.parametrize(
    ("settings", "limit", "sizes"),
    [
        ({}, 1.0, [2, 2, 1]),
        ({"num_epochs": 2}, 1.0, [2, 2, 2, 2, 2]),
        ({}, 4, [2, 2, 2, 2]),
        ({"num_epochs": 1}, 9, [2, 2, 1]),
    ],
    ids=["once through", "as often as asked", "as many as asked", "until the prompts end"],
)
def test_prompts_are_generated_for(
    settings: dict[str, Any], limit: Any, sizes: list[int], model_folder: str
) -> None:
    trainer = make_trainer(sdp.WeightSyncCallback(), limit_predict_batches=limit)
    data = make_data(engine=FakeEngine(), rows=make_rows(5), **settings)
    found: Any = trainer.predict(make_recorded_module(model_folder), datamodule=data)
    assert [len(r.groups) for r in found] == sizes


def test_rejected_prompts_are_replaced_and_endless_rejection_is_an_error(model_folder: str) -> None:
    from support.rollouts import Samples

    def predict(script: Any) -> Any:
        data = make_data(
            Samples(script=script), engine=FakeEngine(), rows=make_rows(8), max_rejected_in_a_row=4
        )
        trainer = make_trainer(sdp.WeightSyncCallback(), limit_predict_batches=2)
        return trainer.predict(make_recorded_module(model_folder), datamodule=data)

    odd = predict(lambda row: "reject" if int(row["id"][3:]) % 2 else None)
    assert [len(r.groups) for r in odd] == [2, 2]
    assert all(int(g.row_id[3:]) % 2 == 0 for r in odd for g in r.groups)
    with pytest.raises(sdp.RolloutError, match="groups in a row were rejected"):
        predict(lambda row: "reject")
