"""Hooks: rollouts for callbacks, tables of completions, a further loss, texts of ``predict``."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sdp_lightning as sdp
from sdp_lightning.testing import FakeEngine
from support.failing_observers import set_aside
from support.paths import ROOT
from support.steps import Batches, StepRecorder, assert_same, gradients_of, make_batch
from support.trainers import Recorder, make_data, make_rows, make_trainer, make_workflow


class Sees(Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[Any, Any]] = []

    def on_rollouts(self, groups: Any, rows: Any) -> None:
        self.seen.append((groups, rows))


class SeesAll(Sees):
    def on_rollouts(self, trainer: Any, pl_module: Any, groups: Any, rows: Any) -> None:  # type: ignore
        assert trainer.lightning_module is pl_module
        if trainer.global_step == 1:
            raise ValueError("of the second batch")
        self.seen.append((groups, rows))


class PlainLogger(Logger):
    @property
    def name(self) -> str:
        return "plain"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...


class TableLogger(PlainLogger):
    """A logger with tables, as Lightning's WandbLogger has them."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[dict[str, Any]] = []

    def log_table(self, key: str, columns: Any, data: Any, step: int) -> None:
        self.tables.append({"key": key, "columns": columns, "data": data, "step": step})


def test_callbacks_get_the_batch_and_loggers_its_completions(
    model_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, sees, fails, recorder = (
        sdp.SegmentWisePPOModule(model_folder),
        Sees(),
        SeesAll(),
        Recorder(),
    )
    tables = TableLogger()
    loggers = [
        CSVLogger(tmp_path, name="", version="csv"),
        TensorBoardLogger(tmp_path, name="", version="tb"),
        tables,
        PlainLogger(),
    ]
    data = make_data(engine=FakeEngine(), log_completions=3)
    trainer = make_trainer(
        *(sees, fails, sdp.WeightSyncCallback(), recorder),
        max_steps=3,
        logger=loggers,
        log_every_n_steps=1,
    )
    trainer.fit(module, data)
    for (groups, rows), step in zip(sees.seen, recorder.steps, strict=True):
        assert [g.row_id for g in groups] == step.row_ids == [row["id"] for row in rows]
        assert [g.order for g in groups] == sorted(g.order for g in groups)
        assert all(g is h for g, h in zip(groups, step.groups, strict=True))
    assert fails.seen[0] == sees.seen[0] and len(fails.seen) == 1
    assert set_aside(caplog, "on_rollouts of SeesAll") == 1

    with (tmp_path / "csv" / "completions.csv").open(newline="") as file:
        lines = [*csv.DictReader(file)]
    first, second = sees.seen[0][0]
    members = [*first.trajectories, second.trajectories[0]]
    decode = module.tokenizer.decode
    for line, each, group in zip(lines[:3], members, (first, first, second), strict=True):
        assert line["row_id"] == group.row_id and float(line["reward"]) == each.reward
        assert line["prompt"] == decode(each.parts[0].token_ids.tolist())
        sampled = [int(t) for s in each.segments for t in s.token_ids]
        assert line["completion"] == decode(sampled, skip_special_tokens=True)
    assert [line["step"] for line in lines] == [str(i) for i in range(3) for _ in range(3)]
    assert [t["step"] for t in tables.tables] == [0, 1, 2]
    assert [[str(cell) for cell in row] for t in tables.tables for row in t["data"]] == [
        [*line.values()] for line in lines
    ]
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    texts = events.Tensors("completions/text_summary")
    assert [event.step for event in texts] == [0, 1, 2]
    (text,) = texts[0].tensor_proto.string_val
    assert text.decode().count("\n") == 4 and f"|{first.row_id}|" in text.decode()
    assert [m for m in caplog.messages if "has no tables" in m] == [
        "log_completions: PlainLogger has no tables."
    ]


# A further loss -----------------------------------------------------------------------------------


class Mixed(sdp.SegmentWisePPOModule):
    """With the loss of a text of its own."""

    def of_text(self) -> torch.Tensor:
        ids = torch.tensor([[3, 5, 8, 13, 21]], device=self.device)
        return 0.5 * self.policy(input_ids=ids, labels=ids).loss  # type: ignore

    def extra_loss(self, batch: Any) -> torch.Tensor | None:
        return self.of_text()


class Text(Mixed):
    def extra_loss(self, batch: Any) -> Any:
        return torch.ones(2)


class Nothing(Mixed):
    def extra_loss(self, batch: Any) -> None:
        return None


def fit(kind: type[sdp.SegmentWisePPOModule], folder: str) -> tuple[Any, StepRecorder]:
    unclipped = sdp.OptimizerConfig(lr=1e-3, gradient_clip_val=None)
    small = sdp.UpdateConfig(max_tokens_per_microbatch=64)
    module, recorder = kind(folder, optimizer=unclipped, update=small), StepRecorder()
    trainer = make_trainer(recorder, max_steps=1, limit_val_batches=0)
    trainer.fit(module, Batches(make_batch(folder, (3, 2))))
    return module, recorder


def test_the_gradient_of_an_extra_loss_is_added_to_the_policy_s(model_folder: str) -> None:
    _, without = fit(sdp.SegmentWisePPOModule, model_folder)
    _, of_none = fit(Nothing, model_folder)
    _, mixed = fit(Mixed, model_folder)
    fresh = Mixed(model_folder)
    fresh.configure_model()
    fresh.of_text().backward()
    extra = gradients_of(fresh.require_policy())
    expected = {name: value + extra[name] for name, value in without.gradients[0].items()}
    assert_same(mixed.gradients[0], expected)
    assert_same(of_none.gradients[0], without.gradients[0])
    assert mixed.metrics["train/extra_loss"] == pytest.approx(
        float(fresh.of_text().detach()), rel=1e-5
    )
    assert of_none.metrics["train/extra_loss"] == 0
    assert mixed.metrics["train/loss"] == pytest.approx(without.metrics["train/loss"], abs=1e-6)
    assert "train/extra_loss" not in without.metrics


def test_an_extra_loss_that_is_no_number_with_a_gradient_is_refused(model_folder: str) -> None:
    with pytest.raises(sdp.ConfigError, match=r"one of shape \[2\], requires_grad=False"):
        fit(Text, model_folder)


# Predict and Fabric -------------------------------------------------------------------------------


def test_predict_returns_texts_and_rows(model_folder: str) -> None:
    module, rows = sdp.SegmentWisePPOModule(model_folder), make_rows(5)
    trainer = make_trainer(sdp.WeightSyncCallback(weight_check_every=0))
    batches: Any = trainer.predict(module, make_data(rows=rows, engine=FakeEngine()))
    assert sorted(row["id"] for batch in batches for row in batch.rows) == [r["id"] for r in rows]
    for batch in batches:
        assert [row["id"] for row in batch.rows] == [group.row_id for group in batch.groups]
        for texts, group in zip(batch.texts, batch.groups, strict=True):
            for text, each in zip(texts, group.trajectories, strict=True):
                (segment,) = each.segments
                ids = segment.token_ids.tolist()
                assert text == module.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("is_one_shot", [True, False])
def test_predict_reads_a_stream_until_it_has_the_good_rows_that_it_needs(
    model_folder: str, is_one_shot: bool
) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        for number in range(40):
            yield {"id": f"r{number}", "prompt": f"{number}=" if number % 4 == 3 else ""}

    data = make_data(
        rows=rows() if is_one_shot else rows,  # type: ignore[arg-type]
        engine=FakeEngine(),
        prompts_check="drop",
        shuffle=False,
    )
    trainer = make_trainer(sdp.WeightSyncCallback(weight_check_every=0), limit_predict_batches=4)
    batches: Any = trainer.predict(sdp.SegmentWisePPOModule(model_folder), data)
    names = [row["id"] for batch in batches for row in batch.rows]
    assert names == [f"r{number}" for number in range(3, 32, 4)]


def test_the_loop_without_a_trainer_trains(model_folder: str) -> None:
    path = ROOT / "docs" / "assets" / "fabric_loop.py"
    assert len(path.read_text().splitlines()) <= 65
    spec = importlib.util.spec_from_file_location("fabric_loop", path)
    assert spec is not None and spec.loader is not None
    loop = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loop)
    rewards = loop.train(model_folder, make_rows(), make_workflow(), 3)
    assert len(rewards) == 3 and all(0 <= reward <= 1 for reward in rewards)
