"""A plain resume: new objects go on where a checkpoint was written, and no row is trained twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import sdp_lightning as sdp
from sdp_lightning.rollout.groups.ledger import RolloutStat
from sdp_lightning.testing import FakeEngine
from support.checkpoints import pending_in
from support.trainers import (
    AwaitIdleRollouts,
    Judge,
    Recorder,
    StagedWorkflow,
    VersionClock,
    executor_of,
    make_data,
    make_module,
    make_rows,
    make_trainer,
    weights_of,
)

SAVED = 3  # the step that is checkpointed


class StatAtStart(Callback):
    """The ledger when training begins: after the first publish, before the first batch."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.stat: RolloutStat = executor_of(trainer).stat
        self.live = executor_of(trainer).registry.snapshot()


class Run:
    """One process's worth of objects."""

    def __init__(
        self, folder: str, make: Callable[[VersionClock], sdp.RolloutDataModule], tmp: Path
    ) -> None:
        self.recorder, self.start = Recorder(), StatAtStart()
        self._folder, self._make, self._tmp = folder, make, tmp

    def fit(self, max_steps: int, ckpt_path: Path | None = None) -> sdp.SegmentWisePPOModule:
        clock, self.sync = VersionClock(), sdp.WeightSyncCallback()
        saver = ModelCheckpoint(self._tmp, "{step}", every_n_train_steps=SAVED, save_top_k=-1)
        self.trainer = make_trainer(
            self.sync,
            self.start,
            clock,
            AwaitIdle(),
            self.recorder,
            saver,
            max_steps=max_steps,
            enable_checkpointing=True,
        )
        model = make_module(self._folder, lr=1e-2)
        self.trainer.fit(model, self._make(clock), ckpt_path=ckpt_path, weights_only=True)
        return model

    def take_checkpoint(self) -> Path:
        """Out of the folder, which must be empty for the next run."""
        saved = self._tmp.with_name(f"{self._tmp.name}.ckpt")
        (self._tmp / f"step={SAVED}.ckpt").rename(saved)
        for other in self._tmp.iterdir():
            other.unlink()
        return saved

    @property
    def rows(self) -> list[list[str]]:
        return [step.row_ids for step in self.recorder.steps]


class AwaitIdle(AwaitIdleRollouts):
    """Waits for all but the rows that need a later version to go on."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        executor = executor_of(trainer)

        def is_idle() -> bool:
            live = [g for g in executor.registry.snapshot() if g.finished is None]
            return all(g.row.data.get("stages", 1) > 1 for g in live)

        with executor.registry.changed:
            assert executor.registry.changed.wait_for(is_idle, 60), executor.stat


def plain_data(clock: VersionClock) -> sdp.RolloutDataModule:
    return make_data(rows=make_rows(40), num_epochs=1, max_head_lag=2)


@pytest.fixture(scope="module")
def runs(model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run, Path]:
    """6 steps with a checkpoint after 3, and 3 more from that checkpoint on."""
    tmp = tmp_path_factory.mktemp("checkpoints")
    first, second = (Run(model_folder, plain_data, tmp) for _ in range(2))
    first.fit(6)
    saved = first.take_checkpoint()
    second.fit(6, saved)
    return first, second, saved


def test_a_checkpoint_holds_the_version_that_was_published_before_it(
    runs: tuple[Run, Run, Path],
) -> None:
    first, _, saved = runs
    state = torch.load(saved, weights_only=True)
    assert state["callbacks"]["WeightSyncCallback"] == {"version": SAVED}
    for name, value in first.recorder.weights[SAVED].items():
        torch.testing.assert_close(state["state_dict"][f"policy.{name}"], value, rtol=0, atol=0)


def test_our_part_of_a_checkpoint_is_plain_types_and_tensors(runs: tuple[Run, Run, Path]) -> None:
    state = torch.load(runs[2], weights_only=True)
    ours = [state["RolloutDataModule"], state["callbacks"]["WeightSyncCallback"]]
    assert pending_in(ours[0]["ranks"][0]) and all(is_plain(part) for part in ours)


def is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(type(key) is str and is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(is_plain(item) for item in value)
    return value is None or type(value) in (str, int, float, bool, torch.Tensor)


def test_versions_go_on_and_each_batch_is_one(runs: tuple[Run, Run, Path]) -> None:
    first, second, _ = runs
    assert first.recorder.engine_versions == [0, 1, 2, 3, 4, 5, 6]
    assert second.recorder.engine_versions == [3, 4, 5, 6]
    assert [step.batch.version for step in second.recorder.steps] == [3, 4, 5]
    assert second.sync.version == second.trainer.global_step == 6


def test_the_ledger_is_re_based_on_the_version(runs: tuple[Run, Run, Path]) -> None:
    """consumed := V B; the 4 groups that waited wait again; 2 more rows may run at H = 2."""
    _, second, _ = runs
    stat = second.start.stat
    assert stat.consumed == SAVED * 2 and stat.pending >= 4
    assert stat.submitted - stat.consumed <= 4 + 2  # the two may have finished by now


def test_waiting_groups_are_trained_next_as_they_were(runs: tuple[Run, Run, Path]) -> None:
    first, second, _ = runs
    assert second.rows[:2] == first.rows[SAVED : SAVED + 2]
    for one, other in zip(first.recorder.steps[SAVED:], second.recorder.steps[:2], strict=False):
        torch.testing.assert_close(one.batch.input_ids, other.batch.input_ids)
        torch.testing.assert_close(one.batch.versions, other.batch.versions)
        torch.testing.assert_close(one.batch.behavior_logprobs, other.batch.behavior_logprobs)
        assert one.batch.segment_scored.equal(other.batch.segment_scored)


def test_no_row_is_trained_twice_and_none_is_left_out(runs: tuple[Run, Run, Path]) -> None:
    """The order of rows is a permutation, dealt out without a gap over the resume."""
    first, second, _ = runs
    lineage = [row for rows in first.rows[:SAVED] + second.rows for row in rows]
    assert len(lineage) == len(set(lineage)) == 12
    assert lineage == [row for rows in first.rows for row in rows]


def test_lag_stays_within_its_bound_over_a_resume(runs: tuple[Run, Run, Path]) -> None:
    assert [max(lags) for lags in runs[1].recorder.lags] == [2, 2, 2]


def test_old_segments_of_restored_groups_have_exact_proximals(
    runs: tuple[Run, Run, Path], model_folder: str
) -> None:
    first, second, _ = runs
    weights = {v: w for v, w in first.recorder.weights.items() if v < SAVED}
    weights |= second.recorder.weights
    judge, old = Judge(model_folder), 0
    for version, step in enumerate(second.recorder.steps, SAVED):
        for trajectory in [t for group in step.groups for t in group.trajectories]:
            (segment,) = trajectory.segments
            assert segment.version == version - 2
            (expected,) = judge.segment_logprobs(weights[version - 1], trajectory)
            found = torch.tensor(segment.proximal.logprobs)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            old += 1
    assert old == 12


def test_the_weights_and_the_optimizer_go_on(runs: tuple[Run, Run, Path]) -> None:
    """The same batches after the resume give the same weights: moments were restored, too."""
    first, second, _ = runs
    for version in (SAVED, SAVED + 1, SAVED + 2):
        for name, value in first.recorder.weights[version].items():
            found = second.recorder.weights[version][name]
            torch.testing.assert_close(found, value, rtol=0, atol=1e-6)


def staged_data(clock: VersionClock) -> sdp.RolloutDataModule:
    rows = [row | {"stages": 5 if i == 1 else 1} for i, row in enumerate(make_rows(12))]
    return make_data(
        StagedWorkflow(clock),
        rows=rows,
        num_epochs=1,
        batch_size=1,
        max_head_lag=6,
        shuffle=False,
    )


def test_a_row_that_ran_when_the_checkpoint_was_written_goes_on_where_it_was(
    model_folder: str, tmp_path: Path
) -> None:
    first, second = (Run(model_folder, staged_data, tmp_path) for _ in range(2))
    first.fit(SAVED)
    assert "row1" not in [row for rows in first.rows for row in rows]
    second.fit(10, first.take_checkpoint())
    (group,) = [g for step in second.recorder.steps for g in step.groups if g.row_id == "row1"]
    weights, judge = first.recorder.weights | second.recorder.weights, Judge(model_folder)
    for trajectory in group.trajectories:
        assert [s.version for s in trajectory.segments] == [0, 1, 2, 3, 4]
        for segment in trajectory.segments:
            found = judge.segment_logprobs(weights[segment.version], trajectory)
            expected = found[trajectory.segments.index(segment)]
            torch.testing.assert_close(torch.tensor(segment.logprobs), expected, atol=1e-4, rtol=0)
            if segment.version < 4:  # the newest one is trained with its own step's
                assert segment.proximal.version == segment.version + 1
    assert group.created_version == 0
    lineage = [row for rows in first.rows + second.rows for row in rows]
    assert len(lineage) == len(set(lineage)) == 10
    assert "row1" in lineage
    assert all(max(lags) <= 6 for lags in second.recorder.lags)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # no ModelCheckpoint
def test_a_checkpoint_can_be_validated_with_other_prompts(
    runs: tuple[Run, Run, Path], model_folder: str
) -> None:
    """``validate(ckpt_path=)`` gives the version of the checkpoint, and its weights."""
    first, _, saved = runs
    data = make_data(val_prompts=make_rows(2))
    model = make_module(model_folder)
    trainer = make_trainer(sdp.WeightSyncCallback())
    (found,) = trainer.validate(model, data, ckpt_path=str(saved), verbose=False, weights_only=True)
    assert found["val/version"] == SAVED
    for name, value in first.recorder.weights[SAVED].items():
        torch.testing.assert_close(weights_of(model)[name], value, rtol=0, atol=0)


def test_a_checkpoint_made_after_the_fit_holds_the_position_in_the_prompts(
    model_folder: str, tmp_path: Path
) -> None:
    rows = make_rows(16)
    first, second = Recorder(), Recorder()
    data = make_data(rows=rows, val_prompts=rows[:1], engine=FakeEngine())
    module = make_module(model_folder)
    trainer = make_trainer(sdp.WeightSyncCallback(), first, max_steps=3)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    trainer = make_trainer(sdp.WeightSyncCallback(), second, max_steps=6)
    again = make_data(rows=rows, engine=FakeEngine())
    trainer.fit(make_module(model_folder), again, ckpt_path=tmp_path / "after.ckpt")
    trained = [row for step in (*first.steps, *second.steps) for row in step.row_ids]
    assert len(trained) == len(set(trained)) == 12
