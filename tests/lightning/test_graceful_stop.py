"""Fits that are told to stop, that end by themselves, and that follow one another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

import sdp_lightning as sdp
from sdp_lightning.testing import FakeEngine
from support.paths import TESTS
from support.trainers import Recorder, make_data, make_module, make_rows, make_trainer

STOPPED = 3  # the version that is trained on when the signal comes
WAIT_S = 60.0


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No thread, and every signal as it was. Lightning leaves Ctrl-C ignored."""
    before, handlers = set(threading.enumerate()), handlers_now()
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(WAIT_S)
        assert not thread.is_alive(), thread
    now = handlers_now()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert now[signal.SIGTERM] == handlers[signal.SIGTERM]
    assert now[signal.SIGINT] in (handlers[signal.SIGINT], signal.SIG_IGN)


def handlers_now() -> dict[signal.Signals, Any]:
    return {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}


class CallAt(Callback):
    """Calls a function at one hook of one step."""

    def __init__(self, hook: str, function: Callable[[], object], *, step: int = STOPPED) -> None:
        self._hook, self._function, self._step = hook, function, step

    def _call(self, hook: str, trainer: L.Trainer) -> None:
        if hook == self._hook and trainer.global_step == self._step:
            self._function()

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        self._call("step", trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self._call("end", trainer)

    def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._call("validation", trainer)


def send(*signums: int) -> Callable[[], None]:
    return lambda: [signal.raise_signal(number) for number in signums] and None


class Run:
    """One process's worth of objects, on one engine that answers at once."""

    def __init__(
        self, model_folder: str, folder: Path, *callbacks: Callback, **settings: Any
    ) -> None:
        self.sync = sdp.WeightSyncCallback(**settings.pop("sync", {}))
        self.recorder, self.engine = Recorder(), settings.pop("engine", FakeEngine())
        rows = make_rows(40)
        data = {"val_prompts": None, "max_head_lag": 1} | settings.pop("data", {})
        self.data = make_data(rows=rows, engine=self.engine, **data)
        self.module = make_module(model_folder)
        settings = {"max_steps": 8, "enable_checkpointing": True} | settings
        if settings["enable_checkpointing"]:
            callbacks = (*callbacks, ModelCheckpoint(folder, every_n_train_steps=10**6))
        self.trainer = make_trainer(
            self.sync, self.recorder, *callbacks, default_root_dir=folder, **settings
        )

    def fit(self, **settings: Any) -> None:
        self.trainer.fit(self.module, self.data, weights_only=True, **settings)

    @property
    def rows(self) -> list[str]:
        return [row for step in self.recorder.steps for row in step.row_ids]


def saved_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.ckpt"))


CODES = {signal.SIGINT: 1, signal.SIGTERM: 128 + signal.SIGTERM}


@pytest.mark.parametrize("signum", CODES, ids=lambda s: signal.Signals(s).name)
@pytest.mark.parametrize("hook", ["step", "end", "validation"])
def test_a_signal_ends_the_fit_after_the_step_with_a_checkpoint_that_goes_on(
    model_folder: str, tmp_path: Path, signum: int, hook: str
) -> None:
    """In the step of version 3 the step is finished; after it, version 3 is what there is."""
    settings: dict[str, Any] = {"val_check_interval": STOPPED, "check_val_every_n_epoch": None}
    validated = {"data": {"val_prompts": make_rows(2)}} | settings
    first = Run(model_folder, tmp_path, CallAt(hook, send(signum)), **validated)
    with pytest.raises(SystemExit) as ended:
        first.fit()
    assert ended.value.code == CODES[signal.Signals(signum)]
    version = STOPPED + (hook == "step")
    assert first.sync.version == version == first.trainer.global_step
    assert saved_in(tmp_path) == [f"last-stopped-step={version}.ckpt"]
    second = Run(model_folder, tmp_path, **validated)
    with pytest.warns(UserWarning, match="is not empty"):
        second.fit(ckpt_path="last")
    assert [step.batch.version for step in second.recorder.steps] == list(range(version, 8))
    for name, value in first.recorder.weights[version].items():
        assert value.equal(second.recorder.weights[version][name])
    trained = first.rows[: 2 * version] + second.rows
    assert len(trained) == len(set(trained)) == 16


@pytest.mark.parametrize("signum", CODES, ids=lambda s: signal.Signals(s).name)
def test_a_signal_ends_a_wait_for_rollouts_with_a_checkpoint(
    model_folder: str, tmp_path: Path, signum: int
) -> None:
    """The engine stops answering; the wait's own deadline is far away."""

    class Stalls(FakeEngine):
        async def generate(self, request: Any, sink: Any) -> Any:
            if self.version == 2:
                if not told.is_set():
                    told.set()
                    signal.pthread_kill(threading.main_thread().ident or 0, signum)
                self.manual = True
            return await super().generate(request, sink)

    told = threading.Event()
    run = Run(model_folder, tmp_path, engine=Stalls(), data={"timeout_s": 1e6})
    with pytest.raises(SystemExit) as ended:
        run.fit()
    assert ended.value.code == CODES[signal.Signals(signum)]
    assert saved_in(tmp_path) == [f"last-stopped-step={run.sync.version}.ckpt"]


@pytest.mark.parametrize(
    "settings",
    [{"enable_checkpointing": False}, {"fast_dev_run": 5}],
    ids=["without checkpointing", "fast_dev_run"],
)
def test_nothing_is_saved_where_the_trainer_does_not_checkpoint(
    model_folder: str, tmp_path: Path, settings: dict[str, Any]
) -> None:
    run = Run(model_folder, tmp_path, CallAt("step", send(signal.SIGINT)), **settings)
    with pytest.raises(SystemExit):
        run.fit()
    assert run.sync.version == STOPPED + 1
    assert list(tmp_path.iterdir()) == []


def test_opted_out_ctrl_c_ends_the_step_at_once_and_saves_nothing(
    model_folder: str, tmp_path: Path
) -> None:
    call = CallAt("step", send(signal.SIGINT))
    run = Run(model_folder, tmp_path, call, sync={"save_on_stop": False})
    with pytest.raises(SystemExit):
        run.fit()
    assert run.sync.version == STOPPED
    assert saved_in(tmp_path) == []


def test_nothing_trained_is_nothing_saved(model_folder: str, tmp_path: Path) -> None:
    call = CallAt("end", send(signal.SIGINT), step=1)
    first = Run(model_folder, tmp_path, call)
    with pytest.raises(SystemExit):
        first.fit()
    assert saved_in(tmp_path) == ["last-stopped-step=1.ckpt"]
    (tmp_path / "last-stopped-step=1.ckpt").rename(tmp_path / "kept.ckpt")

    class AtStart(Callback):
        def on_train_start(self, *_: Any) -> None:
            signal.raise_signal(signal.SIGINT)

    second = Run(model_folder, tmp_path, AtStart())
    with pytest.raises(SystemExit), pytest.warns(UserWarning, match="is not empty"):
        second.fit(ckpt_path=tmp_path / "kept.ckpt")
    assert saved_in(tmp_path) == ["kept.ckpt"]


@pytest.mark.parametrize("second", CODES, ids=lambda s: signal.Signals(s).name)
@pytest.mark.parametrize("first", CODES, ids=lambda s: signal.Signals(s).name)
@pytest.mark.parametrize("hook", ["step", "end"])
def test_a_second_signal_ends_at_once_and_saves_nothing(
    model_folder: str, tmp_path: Path, first: int, second: int, hook: str
) -> None:
    run = Run(model_folder, tmp_path, CallAt(hook, send(first, second)))
    with pytest.raises(SystemExit) as ended:
        run.fit()
    assert ended.value.code == CODES[signal.Signals(second)]
    assert run.sync.version == STOPPED
    assert saved_in(tmp_path) == []


@pytest.mark.fault("hang", "train step")
def test_a_step_that_outlasts_the_grace_is_abandoned(model_folder: str, tmp_path: Path) -> None:
    def hang() -> None:
        signal.raise_signal(signal.SIGTERM)
        assert not threading.Event().wait(WAIT_S)
        raise AssertionError("the step was not ended")

    run = Run(model_folder, tmp_path, CallAt("step", hang), sync={"stop_grace_s": 0.2})
    with pytest.raises(SystemExit) as ended:
        run.fit()
    assert ended.value.code == 128 + signal.SIGTERM
    assert saved_in(tmp_path) == []


class SignalWhileSaving(TorchCheckpointIO):
    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        super().save_checkpoint(*args, **kwargs)


@pytest.mark.parametrize("signum", CODES, ids=lambda s: signal.Signals(s).name)
@pytest.mark.fault("exception", "checkpoint")
def test_a_signal_while_the_checkpoint_is_written_leaves_no_part_of_it(
    model_folder: str, tmp_path: Path, signum: int
) -> None:
    call = CallAt("end", send(signum))
    run = Run(model_folder, tmp_path, call, plugins=[SignalWhileSaving()])
    with pytest.raises(SystemExit) as ended:
        run.fit()
    assert ended.value.code == CODES[signal.Signals(signum)]
    assert list(tmp_path.rglob("*stopped*")) == []
    with pytest.raises(sdp.ConfigError, match="executor"):
        _ = run.data.executor


class FullDisk(TorchCheckpointIO):
    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")


@pytest.mark.fault("exception", "checkpoint")
def test_a_checkpoint_that_cannot_be_written_is_told_and_all_is_closed(
    model_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(model_folder, tmp_path, CallAt("end", send(signal.SIGTERM)), plugins=[FullDisk()])
    with pytest.raises(SystemExit) as ended:
        run.fit()
    assert ended.value.code == CODES[signal.SIGTERM]
    assert "version 3 could not be saved" in caplog.text and "no space left" in caplog.text
    with pytest.raises(sdp.ConfigError, match="executor"):
        _ = run.data.executor


def fail() -> None:
    raise ZeroDivisionError("here")


@pytest.mark.parametrize(("hook", "saved"), [("end", ["last-stopped-step=3.ckpt"]), ("step", [])])
@pytest.mark.fault("exception", "train step")
def test_an_error_is_saved_from_between_steps_only(
    model_folder: str, tmp_path: Path, hook: str, saved: list[str]
) -> None:
    run = Run(model_folder, tmp_path, CallAt(hook, fail))
    with pytest.raises(ZeroDivisionError):
        run.fit()
    assert saved_in(tmp_path) == saved


def test_lightnings_own_saving_on_exceptions_is_left_alone(
    model_folder: str, tmp_path: Path
) -> None:
    saver = ModelCheckpoint(tmp_path, "{step}", save_on_exception=True, every_n_epochs=1)
    call = CallAt("end", send(signal.SIGINT))
    run = Run(model_folder, tmp_path, call, saver)
    with pytest.raises(SystemExit):
        run.fit()
    assert saved_in(tmp_path) == ["step=3.ckpt"]


def test_a_signal_in_the_last_step_is_not_taken_for_an_end_by_itself(
    model_folder: str, tmp_path: Path
) -> None:
    run = Run(model_folder, tmp_path, CallAt("end", send(signal.SIGINT), step=8))
    with pytest.raises(SystemExit):
        run.fit()
    assert saved_in(tmp_path) == ["last-stopped-step=8.ckpt"]


# Ends that are no faults --------------------------------------------------------------------------


class Validations(Callback):
    """The versions that were evaluated, with what was logged."""

    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = trainer.callback_metrics.items()
        self.found.append({k: float(v) for k, v in metrics if k.startswith("val/")})

    @property
    def versions(self) -> list[float]:
        return [metrics["val/version"] for metrics in self.found]


@pytest.mark.parametrize(
    ("settings", "data", "versions"),
    [
        ({"max_steps": -1}, {"num_epochs": 1}, [20]),
        ({"max_steps": 5, "val_check_interval": 2}, {}, [2, 4, 5]),
        ({"max_steps": 4, "val_check_interval": 2}, {}, [2, 4]),
        ({"max_steps": 5, "limit_val_batches": 0}, {}, []),
    ],
    ids=["prompts that end", "between two validations", "at a validation", "switched off"],
)
def test_a_fit_ends_with_a_validation_of_its_last_version(
    model_folder: str,
    tmp_path: Path,
    settings: dict[str, Any],
    data: dict[str, Any],
    versions: list[float],
) -> None:
    seen = Validations()
    settings = {"num_sanity_val_steps": 0, "check_val_every_n_epoch": None} | settings
    settings["data"] = {"val_prompts": make_rows(2)} | data
    if settings["max_steps"] == -1:
        settings["max_epochs"] = 1
    run = Run(model_folder, tmp_path, seen, **settings)
    run.fit()
    assert seen.versions == versions
    assert run.trainer.state.finished


def test_early_stopping_on_the_reward_ends_a_fit(model_folder: str, tmp_path: Path) -> None:
    """The reward of the fake's validation never changes: two validations without patience."""
    seen = Validations()
    stop = EarlyStopping("val/reward", mode="max", patience=1, min_delta=2.0)
    settings = {"val_check_interval": 2, "check_val_every_n_epoch": None}
    data = {"val_prompts": make_rows(2)}
    run = Run(model_folder, tmp_path, seen, stop, data=data, num_sanity_val_steps=0, **settings)
    run.fit()
    assert run.sync.version == 4
    assert seen.versions == [2, 4]


def test_max_time_ends_a_wait_for_rollouts(model_folder: str, tmp_path: Path) -> None:
    """Lightning itself looks at the clock after a step only, and this step never comes."""
    data = {"timeout_s": 1e6}
    engine = FakeEngine(manual=True)
    run = Run(
        model_folder, tmp_path, engine=engine, data=data, max_steps=-1, max_time={"seconds": 1}
    )
    run.fit()
    assert run.sync.version == 0
    assert run.trainer.state.finished


def test_max_time_ends_a_fit_with_a_validation(model_folder: str, tmp_path: Path) -> None:
    seen = Validations()
    data = {"val_prompts": make_rows(2)}
    run = Run(model_folder, tmp_path, seen, data=data, max_steps=-1, max_time={"seconds": 1})
    run.fit()
    assert run.sync.version > 0
    assert seen.versions[-1] == run.sync.version


# Another fit in the same process ------------------------------------------------------------------


def fit_again(run: Run, *, max_steps: int = 3, **settings: Any) -> Recorder:
    recorder = Recorder()
    sync = settings.pop("sync", run.sync)
    trainer = make_trainer(sync, recorder, max_steps=max_steps)
    module = settings.pop("module", run.module)
    trainer.fit(module, run.data)
    return recorder


def rows_of(recorder: Recorder) -> list[str]:
    return [row for step in recorder.steps for row in step.row_ids]


def have_begun_again(rows: list[str], first: Run) -> bool:
    """Three batches of 2 at a lag of at most 1 are 6 of the first 8 rows: both times, 4 or more."""
    return len(set(rows) & set(first.rows)) >= 4


@pytest.fixture
def fitted(model_folder: str, tmp_path: Path) -> Run:
    run = Run(
        model_folder,
        tmp_path,
        engine="embedded",
        max_steps=3,
        enable_checkpointing=False,
        data={"val_prompts": make_rows(1)},
    )
    run.fit()
    return run


def test_a_second_fit_of_the_same_objects_goes_on_where_the_prompts_were(fitted: Run) -> None:
    make_trainer(fitted.sync).validate(fitted.module, fitted.data, verbose=False)
    second = fit_again(fitted)
    third = fit_again(fitted, max_steps=2)
    assert [s.batch.version for s in second.steps + third.steps] == [3, 4, 5, 6, 7]
    trained = fitted.rows + rows_of(second) + rows_of(third)
    assert len(trained) == len(set(trained)) == 16
    assert all(lag <= 1 for lags in second.lags for lag in lags)


def test_a_second_fit_of_the_same_trainer_goes_on_too(fitted: Run) -> None:
    fitted.trainer.fit_loop.epoch_loop.max_steps = 6
    fitted.fit()
    assert fitted.sync.version == fitted.trainer.global_step == 6
    assert len(fitted.rows) == len(set(fitted.rows)) == 12


@pytest.mark.parametrize("fresh", ["sync", "module"])
def test_with_another_policy_or_clock_the_prompts_begin_again(
    fitted: Run, model_folder: str, fresh: str
) -> None:
    """Rollouts of another policy, or of versions that are counted anew, are of no use."""
    made = {"sync": sdp.WeightSyncCallback(), "module": make_module(model_folder)}
    second = fit_again(fitted, **{fresh: made[fresh]})
    assert have_begun_again(rows_of(second), fitted)


def test_after_an_abandoned_step_the_prompts_begin_again(fitted: Run) -> None:
    """Its weights may have moved under the version of the rollouts that wait."""
    trainer = make_trainer(fitted.sync, CallAt("step", fail, step=1), max_steps=3)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(fitted.module, fitted.data)
    assert have_begun_again(rows_of(fit_again(fitted)), fitted)


def test_after_ctrl_c_a_fit_goes_on_in_the_same_notebook(fitted: Run) -> None:
    seen = Recorder()
    stop = CallAt("end", send(signal.SIGINT), step=2)
    with pytest.raises(SystemExit):
        make_trainer(fitted.sync, seen, stop, max_steps=9).fit(fitted.module, fitted.data)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    third = fit_again(fitted)
    assert [s.batch.version for s in third.steps] == [5, 6, 7]
    trained = fitted.rows + rows_of(seen) + rows_of(third)
    assert len(trained) == len(set(trained)) == 16


def test_prompts_that_had_ended_begin_again(model_folder: str, tmp_path: Path) -> None:
    settings = {"max_steps": -1, "max_epochs": 1, "data": {"num_epochs": 1}}
    run = Run(model_folder, tmp_path, engine="embedded", enable_checkpointing=False, **settings)
    run.fit()
    assert run.sync.version == 20
    assert len(rows_of(fit_again(run))) == 6
    assert run.sync.version == 23


def test_an_engine_object_serves_one_run_and_says_so(model_folder: str, tmp_path: Path) -> None:
    run = Run(model_folder, tmp_path, max_steps=1)
    run.fit()
    with pytest.raises(sdp.ConfigError, match=r"was closed at the end of the last run.*by name"):
        fit_again(run)


# Evaluation ---------------------------------------------------------------------------------------


def passes_for_some(completion: str, row: Any) -> float:
    """Row 0 fails; of row 1 at least the first sample passes."""
    if row["id"] == "row0":
        return 0.5
    first = row["id"] not in seen_rows
    seen_rows.add(row["id"])
    return 1.0 if first else 0.0


seen_rows: set[str] = set()


@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_an_evaluation_logs_reward_version_and_pass_at_k(
    model_folder: str, tmp_path: Path, stage: str, group_size: int
) -> None:
    """Of 4 samples of row 0 none passes, of row 1 one: mean (4 * 0.5 + 1) / 8, pass@4 1 / 2."""
    seen_rows.clear()
    seen = Validations()
    greedy = sdp.SamplingParams(max_new_tokens=4, temperature=0.0 if group_size == 1 else 1.0)
    data = sdp.RolloutDataModule(
        make_rows(),
        sdp.RLVRWorkflow(lambda text, row: len(text) / 9, group_size=2, sampling=greedy_off()),
        engine=FakeEngine(),
        rollout=sdp.RolloutConfig(batch_size=2, timeout_s=WAIT_S),
        val_prompts=make_rows(2),
        val_workflow=sdp.RLVRWorkflow(passes_for_some, group_size=group_size, sampling=greedy),
    )
    trainer = make_trainer(sdp.WeightSyncCallback(), seen, max_steps=2, num_sanity_val_steps=0)
    getattr(trainer, stage)(make_module(model_folder), data)
    version = 2.0 if stage == "fit" else 0.0
    if group_size == 1:
        assert seen.found == [{"val/reward": 0.75, "val/version": version}]
    else:
        expected = {"val/reward": 0.375, "val/pass_at_k": 0.5, "val/version": version}
        assert seen.found == [expected]


def greedy_off() -> sdp.SamplingParams:
    return sdp.SamplingParams(max_new_tokens=4)


# Two ranks, as users start them -------------------------------------------------------------------

RANKS = """
import sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from support.trainers import make_data, make_module, make_rows, make_trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
import sdp_lightning as sdp
from sdp_lightning.testing import FakeEngine

class Mark(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        print(f"MARK {{trainer.global_rank}} {{pl_module.policy is not None}}", flush=True)

if __name__ == "__main__":
    saver = ModelCheckpoint({saved!r}, every_n_train_steps=10**6)
    trainer = make_trainer(
        sdp.WeightSyncCallback(), Mark(), saver, max_steps={max_steps}, devices=2, strategy="ddp",
        enable_checkpointing=True,
    )
    data = make_data(engine=FakeEngine(), rows=make_rows(400))
    trainer.fit(make_module({folder!r}), data, ckpt_path={ckpt!r}, weights_only=True)
    print("ENDED", flush=True)
"""


def living_in_session(leader: int) -> list[str]:
    """Processes of the session that ``leader`` began, without zombies that nobody waits for."""
    found: list[str] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue  # it ended meanwhile
        if int(session) == leader and state != "Z":
            found.append(path.parent.name)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("signum", CODES, ids=lambda s: signal.Signals(s).name)
def test_two_ranks_stop_at_one_place_with_one_checkpoint(
    model_folder: str, tmp_path: Path, signum: int
) -> None:
    """Only the first rank is told; resumed from, the checkpoint goes on on both."""

    def start(max_steps: int, ckpt: str | None) -> subprocess.Popen[str]:
        script = tmp_path / f"run{max_steps}.py"
        tests = str(TESTS)
        saved = str(tmp_path / "saved")
        text = RANKS.format(
            tests=tests, saved=saved, folder=model_folder, max_steps=max_steps, ckpt=ckpt
        )
        script.write_text(text)
        return subprocess.Popen(
            [sys.executable, str(script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    with start(10**6, None) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("MARK"):
                    process.send_signal(signum)
                    break
            text, _ = process.communicate(timeout=WAIT_S)
        finally:
            process.kill()
    assert process.returncode == CODES[signal.Signals(signum)], text
    assert "ENDED" not in text and "Traceback" not in text, text
    assert living_in_session(process.pid) == []  # its standard output is closed by all of them
    (path,) = (tmp_path / "saved").iterdir()
    step = int(path.stem.removeprefix("last-stopped-step="))
    with start(step + 2, str(path)) as again:
        try:
            text, _ = again.communicate(timeout=WAIT_S)
        finally:
            again.kill()
    assert again.returncode == 0, text
    assert text.count("MARK") == 2 * 2 and text.count("ENDED") == 2
