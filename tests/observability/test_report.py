"""A run's page: what the callback keeps, what the page says, and what is logged where."""

from __future__ import annotations

import csv
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import Tensor

import sdp_lightning as sdp
from sdp_lightning.cli.main import main
from sdp_lightning.observability.report import write_report
from sdp_lightning.observability.report.callback import run_folder
from sdp_lightning.observability.report.files import read_run
from sdp_lightning.observability.report.learning import SIGNALS
from sdp_lightning.testing import FakeEngine
from sdp_lightning.training.batch import Batch
from sdp_lightning.training.metrics.names import AGENTS, AUTO, POOL, SEVERAL, logged_names
from support.reports import Page, make_step, write_run
from support.trainers import Recorder, make_data, make_module, make_rows, make_trainer

SECTIONS = [
    *("advice", "reward", "learning", "time", "floor", "lag", "rollouts", "trajectories", "all")
]


class WithExtraLoss(sdp.SegmentWisePPOModule):
    """Adds a small loss of its own."""

    def extra_loss(self, batch: Batch) -> Tensor:
        return 1e-6 * self.require_policy().get_input_embeddings().weight.square().sum()


@dataclass
class Fit:
    """A fit with everything on, what was seen of it, and where it left its files."""

    folder: Path
    metrics: list[dict[str, float]]
    tensorboard: Path
    validated: float


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory, model_folder: str) -> Fit:
    folder, recorder = tmp_path_factory.mktemp("runs"), Recorder()
    module = WithExtraLoss(
        model_folder,
        loss=sdp.LossConfig(kl_coefficient=0.01),
        optimizer=sdp.OptimizerConfig(lr=1e-3, scale_lr_by_ess=True),
    )
    data = make_data(val_prompts=make_rows(3), max_head_lag=2)
    board = TensorBoardLogger(folder, name="board", version=0)
    trainer = make_trainer(
        *(sdp.WeightSyncCallback(weight_check_every=1), recorder, sdp.RunReport(save_every_s=0.0)),
        max_steps=6,
        logger=[CSVLogger(folder, name="csv", version=0), board],
        log_every_n_steps=1,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=-1,
    )
    trainer.fit(module, data)
    validated = float(trainer.callback_metrics["val/reward"])
    return Fit(folder / "csv" / "version_0", recorder.metrics, Path(board.log_dir), validated)


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text())


# Names and loggers ----------------------------------------------------------------------------


def csv_rows(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def test_a_run_with_everything_on_logs_every_name_that_is_documented(fit: Fit) -> None:
    logged = {name for row in csv_rows(fit.folder) for name in row} - {"epoch", "step"}
    elsewhere = (POOL, SEVERAL, AUTO, AGENTS)
    assert logged == {name for name, when in logged_names().items() if when not in elsewhere}


def test_a_plain_run_logs_the_names_that_need_nothing(tmp_path: Path, model_folder: str) -> None:
    logger = CSVLogger(tmp_path, name="", version=0)
    make_trainer(sdp.WeightSyncCallback(), max_steps=1, logger=logger, log_every_n_steps=1).fit(
        make_module(model_folder), make_data(engine=FakeEngine())
    )
    logged = {name for row in csv_rows(Path(logger.log_dir)) for name in row} - {"epoch", "step"}
    assert logged == {name for name, when in logged_names().items() if not when}


def test_the_rest_of_the_names_are_what_pools_of_rewards_and_agents_count() -> None:
    workflow = sdp.RLVRWorkflow("support.trainers:weigh_letters", reward_workers=1)
    counted = {f"rollout/{name}" for name in workflow.counts}
    workflow.close()
    assert counted == {name for name, when in logged_names().items() if when == POOL}
    agents = sdp.AgentWorkflow(lambda row, endpoint: 1.0)
    counted = {f"rollout/{name}" for name in agents.counts}
    assert counted == {name for name, when in logged_names().items() if when == AGENTS}


def test_tensorboard_holds_what_the_csv_file_does(fit: Fit) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TensorBoard's own
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        board = EventAccumulator(str(fit.tensorboard))
        board.Reload()
    rows = [row for row in csv_rows(fit.folder) if "train/reward" in row]
    for name in ("train/reward", "lag/mean", "time/step_s", "rollout/version", "ess/token_0"):
        told = [event.value for event in board.Scalars(name)]
        assert told == pytest.approx([row[name] for row in rows if name in row], rel=1e-5)
    assert set(board.Tags()["scalars"]) - {"epoch", "hp_metric"} == {
        name for row in csv_rows(fit.folder) for name in row
    } - {"epoch", "step"}


def test_the_progress_bar_has_three_short_names(model_folder: str) -> None:
    class Look(Callback):
        shown: dict[str, float]

        def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
            self.shown = dict(trainer.progress_bar_metrics)

    look = Look()
    trainer = make_trainer(sdp.WeightSyncCallback(), look, max_steps=1)
    trainer.fit(make_module(model_folder), make_data(engine=FakeEngine()))
    assert set(look.shown) == {"reward", "lag", "wait"}
    assert look.shown["reward"] == pytest.approx(float(trainer.callback_metrics["train/reward"]))
    assert 0 <= look.shown["wait"] <= 1


# The page -------------------------------------------------------------------------------------


def test_every_section_is_there_and_nothing_comes_from_elsewhere(fit: Fit) -> None:
    text = (fit.folder / "report.html").read_text()
    page = Page(text)
    assert page.ids == SECTIONS
    assert set(page.samples) >= {"best", "worst", "random"}
    assert page.links == ["data:,"]
    assert "script" not in page.tags
    assert "http" not in text.replace("http-equiv", "") and "@import" not in text
    assert "url(" not in text


def test_numbers_on_the_page_are_those_of_the_metrics(fit: Fit) -> None:
    page, rows = page_of(fit.folder), fit.metrics
    assert len(rows) == page.values["steps"] == 6
    times = {name: sum(row[name] for row in rows) for name in rows[0] if name.startswith("time/")}
    total = times["time/step_s"]
    assert page.values["wait.share"] == pytest.approx(times["time/wait_s"] / total, rel=1e-4)
    assert page.values["phase.forward and backward"] == pytest.approx(
        times["time/train_s"] / total, rel=1e-4
    )
    assert page.values["phase.all"] == pytest.approx(1.0)
    assert page.shown["phase.all"] == "100.0%"
    assert page.values["reward.last"] == pytest.approx(
        sum(row["train/reward"] for row in rows[-5:]) / 5, rel=1e-5
    )
    assert page.values["val.last"] == pytest.approx(fit.validated, rel=1e-5)
    tokens = [sum(row[f"lag/tokens_{lag}"] for row in rows) for lag in "012"]
    for lag, count in zip("012", tokens, strict=True):
        if count:
            key = f"lag.{lag}.share"
            assert page.values[key] == pytest.approx(count / sum(tokens), rel=1e-4)
    last = {name: value for name, value in rows[-1].items() if "/" in name and name[:4] != "val/"}
    for name, value in last.items():
        assert page.values[name] == pytest.approx(value, rel=1e-5, abs=1e-12)


def test_evaluations_are_in_the_file_once_each(fit: Fit) -> None:
    versions = [row["val/version"] for row in read_run(fit.folder).evaluations]
    assert versions == [0, 3, 6]  # that of 0 is the sanity check's


def test_a_sample_has_the_fields_of_its_row_and_a_signal_its_chart(fit: Fit) -> None:
    kinds: dict[str, Any] = read_run(fit.folder).state["samples"]
    rows = {row["id"]: row for row in make_rows()}
    assert all(s["row"] == rows[s["row_id"]] for samples in kinds.values() for s in samples)
    text = page_of(fit.folder).text
    assert f"prompt {rows[kinds['best'][0]['row_id']]['prompt']}" in text
    assert all(signal.title in text for signal in SIGNALS)


def test_what_was_spent_on_evaluations_is_its_own_phase(fit: Fit) -> None:
    spent = [row["time/evaluate_s"] for row in fit.metrics]
    assert spent[3] > 0  # the step after the evaluation of version 3
    assert spent[0] == spent[1] == spent[2] == 0


def test_the_page_says_what_keeping_it_took(fit: Fit) -> None:
    share = read_run(fit.folder).state["own_share"]
    assert 0 < share < 1
    assert f"took {share:.2%} of the run's time" in page_of(fit.folder).text


@pytest.mark.fault("process killed", "observer")
def test_a_run_that_is_killed_can_be_reported_from_its_files(
    tmp_path: Path, model_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What is there after three steps is all that a kill leaves; its last line may be torn."""
    left = tmp_path / "left"

    class Kill(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
            if trainer.global_step == 3:
                shutil.copytree(tmp_path / "run" / "report", left / "report")

    trainer = make_trainer(
        *(sdp.WeightSyncCallback(), sdp.RunReport(save_every_s=0.0), Kill()),
        max_steps=4,
        default_root_dir=tmp_path / "run",
    )
    trainer.fit(make_module(model_folder), make_data(engine=FakeEngine()))
    with (left / "report" / "steps.jsonl").open("a") as file:
        file.write('{"rollout/version": 4.0, "train/rew')
    assert main(["report", str(left)]) == 0
    page = Page((left / "report.html").read_text())
    assert page.values["steps"] == 3
    assert "still running, or killed" in page.text
    torn, whole = (record.getMessage() for record in caplog.records[-2:])
    assert "steps.jsonl: its last line was written by half" in torn
    assert "is not whole: it has 3 steps. The run is still running, or killed" in whole
    assert page.samples
    whole = Page((tmp_path / "run" / "report.html").read_text())
    assert whole.values["steps"] == 4 and "finished" in whole.text


def test_a_run_that_fails_has_its_page_and_says_so(tmp_path: Path, model_folder: str) -> None:
    class Fail(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
            if trainer.global_step == 2:
                raise RuntimeError("no <more> power")

    report = sdp.RunReport()
    sync = sdp.WeightSyncCallback(failing_callbacks="raise")
    trainer = make_trainer(sync, report, Fail(), max_steps=4, default_root_dir=tmp_path)
    with pytest.raises(RuntimeError, match="power"):
        trainer.fit(make_module(model_folder), make_data(engine=FakeEngine()))
    assert report.path == tmp_path / "report.html"
    page = Page(report.path.read_text())
    assert "failed: RuntimeError: no <more> power" in page.text and page.values["steps"] == 2


# Files ----------------------------------------------------------------------------------------


def test_without_the_callback_the_csv_file_gives_the_page(fit: Fit, tmp_path: Path) -> None:
    shutil.copy(fit.folder / "metrics.csv", tmp_path)
    page = page_of(tmp_path)
    assert page.ids == [name for name in SECTIONS if name != "trajectories"]
    assert page.values["steps"] == 6
    full = page_of(fit.folder).values
    for key in ("wait.share", "reward.last", "val.last", "floor.share", "lag.0.share"):
        assert page.values[key] == pytest.approx(full[key], rel=1e-4)


def test_a_folder_without_a_run_is_an_error_that_names_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "version_0", [make_step(1)])
    assert main(["report", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "put RunReport() among the Trainer's callbacks" in said
    assert f"Did you mean {tmp_path.resolve() / 'version_0'}?" in said


def test_a_run_without_a_step_has_a_page(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, []))
    assert page.values["steps"] == 0 and page.advice == ["too_short"]


def test_what_others_wrote_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    state = {
        "status": evil,
        "rejections": {evil: 3},
        "slowest": [
            {
                "row_id": evil,
                "seconds": 1.0,
                "num_sampled": 3,
                "fate": "trained",
                "versions": [1, 2],
                "reward_s": 0.1,
            }
        ],
    }
    settings = {"model": evil, "loss": {evil: evil}}
    page = page_of(write_run(tmp_path, [make_step(1)], settings=settings, state=state))
    assert "script" not in page.tags and page.text.count(evil) == 7


def test_the_lag_table_weighs_batches_by_their_tokens(tmp_path: Path) -> None:
    small = {"lag/tokens_1": 10.0, "ess/token_1": 0.5}
    steps = [make_step(1), make_step(2) | small]
    page = page_of(write_run(tmp_path, steps))
    assert page.values["lag.1.share"] == 60 / 160
    assert page.values["lag.1.ess/token"] == pytest.approx((0.9 * 50 + 0.5 * 10) / 60)
    assert page.values["lag.1.clip"] == 0.25


def test_a_report_needs_our_module_and_data(tmp_path: Path) -> None:
    with pytest.raises(sdp.ConfigError, match="RunReport needs fit"):
        sdp.RunReport().on_fit_start(make_trainer(default_root_dir=tmp_path), L.LightningModule())
    with pytest.raises(sdp.ConfigError, match="save_every_s must be 0 or more, got -1"):
        sdp.RunReport(save_every_s=-1)


class ElsewhereLogger(Logger):
    """Of a service: it has no folder of its own."""

    name, version, save_dir = "project", "run7", "."

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None: ...
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...


def test_every_run_has_a_folder_of_its_own(tmp_path: Path) -> None:
    assert run_folder(make_trainer(default_root_dir=tmp_path)) == tmp_path
    logger = CSVLogger(tmp_path, name="a", version=3)
    assert run_folder(make_trainer(logger=logger)) == tmp_path / "a" / "version_3"
    assert run_folder(make_trainer(logger=ElsewhereLogger())) == Path("project", "run7")


def test_a_report_before_the_metrics_is_refused(tmp_path: Path, model_folder: str) -> None:
    trainer = make_trainer(
        sdp.RunReport(), sdp.WeightSyncCallback(), max_steps=1, default_root_dir=tmp_path
    )
    with pytest.raises(sdp.ConfigError, match="RunReport must come after WeightSyncCallback"):
        trainer.fit(make_module(model_folder), make_data(engine=FakeEngine()))


def test_infrastructure_errors_are_drawn_by_cause_with_what_they_cost(tmp_path: Path) -> None:
    counts = [{"rollout__error__judge_timed_out": n, "rollout__left_out": n // 2} for n in (2, 6)]
    steps = [make_step(version, **count) for version, count in enumerate(counts)]
    page = page_of(write_run(tmp_path, steps))
    assert page.shown["error.judge timed out"] == "6"
    assert "Infrastructure errors" in page.text and "3 samples were left out" in page.text
    assert "Errors so far" in page.text
    assert "Infrastructure errors" not in page_of(write_run(tmp_path / "b", [make_step(0)])).text
