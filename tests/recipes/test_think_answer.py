"""The task of docs/how-to/reward.md, think and answer, from its config with a tiny model."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import sdp_lightning as sdp
from sdp_lightning.distributed.reductions import RankSums
from sdp_lightning.observability.report.page import write_report
from sdp_lightning.testing import tiny_model
from sdp_lightning.training.batch import collate
from sdp_lightning.training.loss import batch_advantages
from support.paths import ROOT
from support.reports import Page
from support.thinking_engine import TOKENIZER, ThinkingEngine

pytestmark = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
)
NAMED = [
    {"correct": 1.0, "format": 1.0},
    {"correct": 0.0, "format": 1.0},
    {"correct": 0.0, "format": 0.0},
    {"correct": 1.0, "format": 1.0},
]
KINDS = ("group", "gdpo")


@dataclass
class Run:
    """A fit of two steps of groups of four samples, and a validation.

    Attributes:
        metrics: of the last step, and of the validation.
        advantages: of the recorded groups, by the fit's own settings.
    """

    metrics: dict[str, float]
    advantages: list[float]
    groups: list[sdp.TrajectoryGroup]
    page: str


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("think")
        patch.chdir(folder)
        page = (ROOT / "docs" / "how-to" / "reward.md").read_text()
        for title, text in re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```', page, re.M | re.S):
            Path(title).write_text(text)
        Path("few.py").write_text("import think\n\n\ndef rows():\n    return think.rows()[:2]\n")
        TOKENIZER.save_pretrained("model")
        tiny_model(vocab_size=len(TOKENIZER)).save_pretrained("model")
        return {kind: fit(folder / kind, kind) for kind in KINDS}


def fit(folder: Path, advantages: str) -> Run:
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger"}
    settings = {"save_dir": str(folder), "name": "", "version": "run"}
    overrides: dict[str, Any] = {
        "model.model": "model",
        "model.update.advantages": advantages,
        "data.val_prompts": "few.py:rows",
        "data.workflow.init_args.use_chat_template": False,
        "data.workflow.init_args.group_size": 4,
        "data.rollout.batch_size": 2,
        "data.rollout.timeout_s": 60,
        "trainer.max_steps": 2,
        "trainer.accelerator": "cpu",
        "trainer.logger": {**logger, "init_args": settings},
        "trainer.log_every_n_steps": 1,
        "trainer.enable_checkpointing": False,
        "trainer.enable_progress_bar": False,
    }
    trainer, model, data = sdp.from_config("think.yaml", overrides)
    data._engine_source = ThinkingEngine()
    recorder: Any = sdp.Recorder(str(folder / "recording"))
    trainer.callbacks.append(recorder)
    trainer.fit(model, data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    groups = [group for batch in sdp.Recording(folder / "recording") for group in batch.groups][:2]
    batch = collate(groups, version=0)
    sums = RankSums(batch.rewards.device)
    found: list[float] = batch_advantages(batch, model.loss, model.update, sums)[:, 0].tolist()
    report = write_report(Path(trainer.log_dir or "")).read_text()
    return Run(metrics, found, groups, report)


@pytest.mark.parametrize("kind", KINDS)
def test_both_rewards_are_logged_recorded_and_drawn(runs: dict[str, Run], kind: str) -> None:
    run = runs[kind]
    for stage in ("train", "val"):
        assert run.metrics[f"{stage}/reward/correct"] == 0.5
        assert run.metrics[f"{stage}/reward/format"] == 0.75
        assert run.metrics[f"{stage}/reward"] == pytest.approx(0.65)
    assert math.isfinite(run.metrics["train/loss"]) and run.metrics["train/grad_norm"] > 0
    for group in run.groups:
        assert [t.rewards for t in group.trajectories] == NAMED
        assert all(t.reward_weights == {"correct": 1.0, "format": 0.2} for t in group.trajectories)
    text = Page(run.page).text
    assert "Each reward" in text and "correct, validation" in text and "; format 1" in text


def test_the_advantages_are_those_of_the_sum_or_of_each_reward(runs: dict[str, Run]) -> None:
    """Of the sums 1.2, 0.2, 0, 1.2 the mean is 0.65, the deviation sqrt(0.3075) = 0.55453.

    Apart, correct is -1 or 1. Of format the mean is 0.75, the deviation sqrt(3) / 4: 0.57735 or
    -1.73205. Sums: 1.11547, -0.88453, -1.34641, 1.11547, with deviation 1.12736 over the batch.
    """
    of_sum = [(each - 0.65) / 0.55453 for each in (1.2, 0.2, 0.0, 1.2)]
    apart = [each / 1.12736 for each in (1.11547, -0.88453, -1.34641, 1.11547)]
    assert runs["group"].advantages == pytest.approx(of_sum * 2, abs=1e-4)
    assert runs["gdpo"].advantages == pytest.approx(apart * 2, abs=1e-4)
    assert runs["group"].metrics["train/loss"] != runs["gdpo"].metrics["train/loss"]
