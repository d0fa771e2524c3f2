"""Which evaluation is the one before training, and which are the fit's."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import Callback

from sdp_lightning.observability.evaluations import Evaluations
from support.metric_runs import Replay


class Versioned(Replay):
    """Logs the version that a step ends with, or that is evaluated."""

    def __init__(self, version: int = 0) -> None:
        super().__init__([])
        self.version = version

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.version += 1
        self.log("rollout/version", float(self.version))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/version", float(self.version), batch_size=1)


class Keep(Callback):
    def __init__(self) -> None:
        self.evaluations, self.returned = Evaluations(), list[Any]()

    def on_fit_start(self, *args: Any) -> None:
        self.evaluations.begin()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.returned.append(self.evaluations.see(trainer, pl_module))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        self.returned.append(self.evaluations.step(trainer, pl_module))

    @property
    def versions(self) -> list[float]:
        rows = self.evaluations.rows
        assert [row for row in self.returned if row is not None] == rows
        return [row["val/version"] for row in rows]


class Rows(L.LightningDataModule):
    def train_dataloader(self) -> list[int]:
        return [0, 0]

    def val_dataloader(self) -> list[int]:
        return [0, 0, 0]


def make(**settings: Any) -> tuple[Keep, L.Trainer]:
    keep = Keep()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    quiet |= {"enable_progress_bar": False, "accelerator": "cpu", "num_sanity_val_steps": 0}
    return keep, L.Trainer(callbacks=[keep], max_epochs=1, **(quiet | settings))


def test_what_was_validated_before_the_fit_is_its_first() -> None:
    keep, trainer = make()
    module, rows = Versioned(), Rows()
    trainer.validate(module, rows, verbose=False)
    trainer.fit(module, rows)
    assert keep.versions == [0, 2]


@pytest.mark.parametrize("other", ["module", "rows", "version", "nothing"])
def test_what_is_not_of_the_same_run_is_not(other: str) -> None:
    """As a validation of version 0 before a fit that resumes a checkpoint."""
    keep, trainer = make()
    module, rows = Versioned(), Rows()
    if other != "nothing":
        trainer.validate(module, rows, verbose=False)
    if other == "version":
        module.version = 30
    trainer.fit(Versioned() if other == "module" else module, Rows() if other == "rows" else rows)
    assert keep.versions == [module.version if other != "module" else 2]


@pytest.mark.parametrize(("batches", "versions"), [(-1, [0, 2]), (3, [0, 2]), (2, [2])])
def test_a_sanity_check_counts_if_it_is_of_all_rows(batches: int, versions: list[int]) -> None:
    keep, trainer = make(num_sanity_val_steps=batches)
    trainer.fit(Versioned(), Rows())
    assert keep.versions == versions


def test_another_fit_begins_anew_with_what_was_evaluated_between() -> None:
    keep, trainer = make()
    module, rows = Versioned(), Rows()
    trainer.fit(module, rows)
    trainer.validate(module, rows, verbose=False)
    trainer.fit_loop.max_epochs = 2
    keep.returned.clear()
    trainer.fit(module, rows)
    assert keep.versions == [2, 4]
