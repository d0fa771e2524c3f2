"""``Trainer.fit`` from end to end: versions, lags, log-probs and proximals, all through the API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

import sdp_lightning as sdp
from sdp_lightning.testing import FakeEngine
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
    make_workflow,
    weights_of,
)


def fit(
    folder: str,
    *callbacks: Callback,
    max_steps: int,
    data: sdp.RolloutDataModule,
    trainer: dict[str, Any] | None = None,
    **module: Any,
) -> tuple[sdp.SegmentWisePPOModule, Recorder]:
    model, recorder = make_module(folder, **module), Recorder()
    order = [sdp.WeightSyncCallback(), *callbacks, recorder]
    make_trainer(*order, max_steps=max_steps, **(trainer or {})).fit(model, data)
    return model, recorder


def test_fit_moves_the_weights_and_one_version_for_each_batch(model_folder: str) -> None:
    model, recorder = fit(model_folder, max_steps=3, data=make_data())
    assert [step.batch.version for step in recorder.steps] == [0, 1, 2]
    assert recorder.engine_versions == [0, 1, 2, 3] == list(recorder.weights)
    for version in range(3):
        old, new = recorder.weights[version], recorder.weights[version + 1]
        assert any(not torch.equal(old[name], new[name]) for name in old)
    final = weights_of(model)
    assert all(torch.equal(final[name], value) for name, value in recorder.weights[3].items())
    assert recorder.metrics[-1]["rollout/version"] == 3
    assert all(len(step.groups) == 2 for step in recorder.steps)


@pytest.mark.parametrize(("num_minibatches", "num_epochs"), [(2, 1), (1, 3), (2, 2)])
def test_several_optimizer_steps_on_one_batch_are_one_version(
    model_folder: str, num_minibatches: int, num_epochs: int
) -> None:
    update = sdp.UpdateConfig(num_minibatches=num_minibatches, num_epochs=num_epochs)
    steps = update.steps_per_batch
    _, recorder = fit(
        model_folder, max_steps=3 * steps, data=make_data(engine=FakeEngine()), update=update
    )
    assert [step.batch.version for step in recorder.steps] == [0, 1, 2]
    assert recorder.engine_versions == [0, 1, 2, 3]


class PoisonGradients(Callback):
    """Makes the gradient of the batch of one version NaN."""

    def __init__(self, version: int) -> None:
        self._version, self._now = version, False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._now = batch.version == self._version

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for parameter in pl_module.parameters():
            if self._now and parameter.grad is not None:
                parameter.grad.fill_(torch.nan)


class PoisonEveryGradient(PoisonGradients):
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._now = True


@pytest.mark.fault("corrupted data", "train step")
def test_a_run_whose_gradients_are_never_finite_ends_with_an_error(model_folder: str) -> None:
    update = sdp.UpdateConfig(max_skipped_in_a_row=3)
    with pytest.raises(sdp.SDPError, match=r"not finite .* in 3 optimizer steps in a row"):
        fit(model_folder, PoisonEveryGradient(0), max_steps=2, data=make_data(), update=update)


@pytest.mark.parametrize("skipped", [0, 1])
@pytest.mark.fault("corrupted data", "train step")
def test_a_skipped_step_changes_no_weight_and_advances_the_version(
    model_folder: str, skipped: int
) -> None:
    _, recorder = fit(model_folder, PoisonGradients(skipped), max_steps=2, data=make_data())
    assert recorder.engine_versions == [0, 1, 2, 3]  # three batches make two steps
    for version, weights in list(recorder.weights.items())[1:]:
        before = recorder.weights[version - 1]
        same = all(torch.equal(before[name], weights[name]) for name in weights)
        assert same == (version == skipped + 1)
    assert [m["train/skipped"] for m in recorder.metrics][skipped] == 1.0
    assert all(torch.isfinite(w).all() for w in recorder.weights[3].values())


def test_with_no_lag_allowed_every_token_of_every_batch_has_lag_0(model_folder: str) -> None:
    _, recorder = fit(model_folder, max_steps=6, data=make_data(max_head_lag=0))
    assert len(recorder.steps) == 6
    assert all(set(lags) == {0} for lags in recorder.lags)


@pytest.mark.parametrize("max_head_lag", [1, 2])
@pytest.mark.fault("slow", "train step")
def test_lag_reaches_its_bound_and_never_passes_it(model_folder: str, max_head_lag: int) -> None:
    data = make_data(max_head_lag=max_head_lag)
    _, recorder = fit(model_folder, AwaitIdleRollouts(), max_steps=6, data=data)
    assert [max(lags) for lags in recorder.lags] == [min(c, max_head_lag) for c in range(6)]


def assert_exact(recorder: Recorder, judge: Judge) -> dict[str, int]:
    """Every segment under the weights of its version, every proximal under those of the next."""
    seen = {"segments": 0, "old": 0, "moved": 0, "spanning": 0}
    for version, step in enumerate(recorder.steps):
        for trajectory in [t for group in step.groups for t in group.trajectories]:
            scored: dict[int, list[Tensor]] = {
                v: judge.segment_logprobs(recorder.weights[v], trajectory)
                for v in range(trajectory.head_version or 0, version + 1)
            }
            for index, segment in enumerate(trajectory.segments):
                behavior = scored[segment.version][index]
                torch.testing.assert_close(
                    torch.tensor(segment.logprobs), behavior, rtol=0, atol=1e-5
                )
                if segment.version <= version - 2:
                    assert segment.proximal.version == segment.version + 1
                    proximal = scored[segment.version + 1][index]
                    found = torch.tensor(segment.proximal.logprobs)
                    torch.testing.assert_close(found, proximal, rtol=0, atol=1e-5)
                    seen["old"] += 1
                    seen["moved"] += bool((proximal - behavior).abs().max() > 1e-3)
                seen["segments"] += 1
            seen["spanning"] += len({s.version for s in trajectory.segments}) > 1
    return seen


def test_groups_older_than_1_hold_exact_proximals(model_folder: str) -> None:
    data = make_data(max_head_lag=2)
    _, recorder = fit(model_folder, AwaitIdleRollouts(), max_steps=6, data=data, lr=1e-2)
    seen = assert_exact(recorder, Judge(model_folder))
    # Each group waits until it is 2 versions old: from the third step on all 4 trajectories are.
    assert seen == {"segments": 24, "old": 16, "moved": 16, "spanning": 0}
    assert all(step.batch.segment_scored.any() for step in recorder.steps[2:])


def test_trajectories_of_several_turns_span_versions_and_are_scored_while_they_run(
    model_folder: str,
) -> None:
    clock = VersionClock()
    rows = [row | {"stages": 3 if i % 3 == 1 else 1} for i, row in enumerate(make_rows(9))]
    data = make_data(StagedWorkflow(clock), rows=rows, max_head_lag=3, batch_size=1, shuffle=False)
    _, recorder = fit(model_folder, clock, max_steps=9, data=data, lr=1e-2)
    seen = assert_exact(recorder, Judge(model_folder))
    assert seen["spanning"] >= 4 and seen["moved"] >= 4
    assert all(max(lags) <= 3 for lags in recorder.lags)


class PauseWhileTraining(Callback):
    """Stops the engine where it is when a batch is taken: the publish then cuts what it decodes."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        executor_of(trainer).engine.pause()


def test_a_publish_cuts_the_completion_that_is_being_decoded(model_folder: str) -> None:
    data = make_data(
        make_workflow(max_new_tokens=80),
        batch_size=1,
        max_head_lag=4,
        num_epochs=1,
        engine_options={"device": "cpu", "max_slots": 2},
    )
    _, recorder = fit(model_folder, PauseWhileTraining(), max_steps=10, data=data, lr=1e-2)
    seen = assert_exact(recorder, Judge(model_folder))
    assert seen["spanning"] >= 1


def test_after_a_publish_the_engine_scores_as_the_trainer_does(model_folder: str) -> None:
    _, recorder = fit(model_folder, max_steps=4, data=make_data(max_head_lag=0), lr=1e-2)
    judge = Judge(model_folder)
    for version, step in enumerate(recorder.steps):
        for trajectory in [t for group in step.groups for t in group.trajectories]:
            (segment,) = trajectory.segments
            (expected,) = judge.segment_logprobs(recorder.weights[version], trajectory)
            found = torch.tensor(segment.logprobs)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_mode_off_is_standard_decoupled_ppo(model_folder: str) -> None:
    """No purge, no recomputation, no capacity modifier; q is x."""
    data = make_data(max_head_lag=3, enable_segment_wise_ppo=False)
    _, recorder = fit(model_folder, AwaitIdleRollouts(), max_steps=6, data=data, lr=1e-2)
    assert [max(lags) for lags in recorder.lags] == [0, 1, 2, 3, 3, 3]
    for step, metrics in zip(recorder.steps, recorder.metrics, strict=True):
        assert not step.batch.segment_scored.any()
        assert step.batch.missing_proximal == "decoupled"
        assert metrics["bridge/abs_log_mean"] == 0.0
    assert recorder.metrics[-1]["rollout/dropped_stale"] == 0
    segments = [s for step in recorder.steps for group in step.groups for s in group.segments]
    assert not any(segment.proximal.is_set for segment in segments)


def test_mode_off_trains_groups_however_old_they_are(model_folder: str) -> None:
    """The 4-stage row is 3 versions old when it ends, under a bound of 1 on submission."""
    clock = VersionClock()
    rows = [row | {"stages": 4 if i == 1 else 1} for i, row in enumerate(make_rows(9))]
    data = make_data(
        StagedWorkflow(clock),
        rows=rows,
        max_head_lag=1,
        batch_size=1,
        shuffle=False,
        enable_segment_wise_ppo=False,
    )
    _, recorder = fit(model_folder, clock, max_steps=6, data=data)
    (old,) = [step for step in recorder.steps if "row1" in step.row_ids]
    assert int(old.batch.lags.max()) >= 3
    assert recorder.metrics[-1]["rollout/dropped_overdue"] == 0


def test_overdue_tokens_under_mask_get_weight_0_and_count_in_n(model_folder: str) -> None:
    """A 3-stage group of head lag 2 under a bound of 1: its first stage is masked."""
    clock = VersionClock()
    rows = [row | {"stages": 3 if i == 1 else 1} for i, row in enumerate(make_rows(9))]
    data = make_data(
        StagedWorkflow(clock),
        rows=rows,
        max_head_lag=1,
        batch_size=1,
        shuffle=False,
        on_overdue="mask",
    )
    _, recorder = fit(model_folder, clock, max_steps=6, data=data)
    (masked,) = [
        (step, metrics)
        for step, metrics in zip(recorder.steps, recorder.metrics, strict=True)
        if "row1" in step.row_ids
    ]
    step, metrics = masked
    lags = step.batch.lags[step.batch.loss_mask]
    assert lags.max() >= 2 and lags.min() <= 1
    assert metrics["train/tokens"] == lags.numel() == 18  # 2 samples, 3 stages, 3 tokens
    assert step.batch.max_lag == 1


def test_fit_twice_on_the_same_objects_goes_on(model_folder: str) -> None:
    model, data = make_module(model_folder), make_data()
    sync, recorder = sdp.WeightSyncCallback(), Recorder()
    for start in (0, 2):
        make_trainer(sync, recorder, max_steps=2).fit(model, data)
        assert sync.version == start + 2
    assert [step.batch.version for step in recorder.steps] == [0, 1, 2, 3]
    assert recorder.engine_versions == [0, 1, 2, 2, 3, 4]


def test_a_run_bounded_by_time_ends(model_folder: str) -> None:
    model, recorder = make_module(model_folder), Recorder()
    trainer = make_trainer(
        sdp.WeightSyncCallback(), recorder, max_time={"milliseconds": 300}, max_steps=-1
    )
    trainer.fit(model, make_data(engine=FakeEngine()))
    assert len(recorder.steps) >= 1
    assert recorder.engine_versions == list(range(len(recorder.steps) + 1))


@pytest.mark.parametrize("max_steps", [-1, 100])
def test_the_run_ends_when_the_prompts_do(model_folder: str, max_steps: int) -> None:
    """5 rows twice make 5 batches of 2; no batch is short, no row is left out."""
    data = make_data(rows=make_rows(5), num_epochs=2, engine=FakeEngine())
    _, recorder = fit(model_folder, max_steps=max_steps, data=data, trainer={"max_epochs": -1})
    assert len(recorder.steps) == 5
    rows = [row for step in recorder.steps for row in step.row_ids]
    assert sorted(rows) == sorted([f"row{i}" for i in range(5)] * 2)


def test_prompts_that_end_before_min_steps_are_an_error(model_folder: str) -> None:
    data = make_data(rows=make_rows(4), num_epochs=1, engine=FakeEngine())
    with pytest.raises(sdp.RolloutError, match=r"prompts have ended.*min_steps"):
        fit(model_folder, max_steps=9, data=data, trainer={"min_steps": 5})


def test_logger_checkpoints_bar_and_summary_warn_of_nothing(
    model_folder: str, tmp_path: Path
) -> None:
    """Warnings are errors here."""
    sync, recorder = sdp.WeightSyncCallback(), Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=2,
        callbacks=[sync, recorder],
        log_every_n_steps=1,
        logger=CSVLogger(tmp_path),
    )
    trainer.fit(make_module(model_folder), make_data(val_prompts=make_rows(2)))
    assert recorder.engine_versions == [0, 1, 2]
    assert list(tmp_path.rglob("*.ckpt"))
