"""One recipe, from the command line: on one device, under DDP and under FSDP2, of two processes."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from support.paths import ROOT
from support.rank_runs import running_in_group

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

FLAGS = {
    "one device": (),
    "ddp": ("--trainer.devices=2", "--trainer.strategy=ddp"),
    "fsdp2": (
        "--trainer.devices=2",
        "--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy",
        "--trainer.strategy.data_parallel_size=2",
        "--trainer.strategy.tensor_parallel_size=1",
    ),
}


@dataclass(frozen=True)
class Ran:
    """What a run said, logged and saved."""

    words: str
    steps: list[dict[str, str]]
    evaluated: float
    checkpoint: Path


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """``sdp-lightning`` as a user types it, in a session of its own, of which nothing is left."""
    script = Path(sys.executable).with_name("sdp-lightning")
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    words, _ = process.communicate(timeout=600)
    assert not running_in_group(process.pid)
    return subprocess.CompletedProcess(arguments, process.returncode, words)


def fit(strategy: str, folder: Path, *flags: str) -> Ran:
    """Three batches of recipes/tiny_cpu, on policy."""
    done = command(
        "fit",
        "--config=recipes/tiny_cpu/config.yaml",
        "--trainer.max_steps=6",
        "--trainer.enable_checkpointing=true",
        f"--trainer.default_root_dir={folder}",
        f"--trainer.logger.init_args.save_dir={folder}",
        "--data.rollout.max_head_lag=0",
        *FLAGS[strategy],
        *flags,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "Warning" not in done.stdout and "sync_dist" not in done.stdout, done.stdout
    (log,) = folder.rglob("metrics.csv")
    with log.open() as file:
        rows = list(csv.DictReader(file))
    (checkpoint,) = folder.rglob("*.ckpt")
    steps = [row for row in rows if row["train/reward"]]
    return Ran(done.stdout, steps, float(rows[-1]["val/reward"]), checkpoint)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    return {strategy: fit(strategy, tmp_path_factory.mktemp("run")) for strategy in FLAGS}


def test_a_recipe_runs_under_every_strategy_and_begins_with_the_same_samples(
    ran: dict[str, Ran],
) -> None:
    for run in ran.values():
        assert [step["rollout/version"] for step in run.steps] == ["1.0", "2.0", "3.0"]
        assert {step["lag/max"] for step in run.steps} == {"0.0"}
        assert run.steps[0]["train/reward"] == ran["one device"].steps[0]["train/reward"]
        assert run.words.count("step 6/6") == 1, "said once, whatever the number of processes"
        assert abs(run.evaluated - ran["one device"].evaluated) < 0.1
    for sharded, whole in zip(ran["fsdp2"].steps, ran["ddp"].steps, strict=True):
        loss = float(whole["train/loss"])
        assert float(sharded["train/loss"]) == pytest.approx(loss, abs=0.05)


def test_what_each_saved_is_exported(ran: dict[str, Ran], tmp_path: Path) -> None:
    start: Any = None
    for strategy, run in ran.items():
        out = tmp_path / strategy.replace(" ", "-")
        done = command("export", str(run.checkpoint), str(out))
        assert done.returncode == 0, done.stdout
        weights = AutoModelForCausalLM.from_pretrained(out).state_dict()
        start = weights if start is None else start
        assert weights.keys() == start.keys()
        most = max(float((weights[name] - start[name]).abs().max()) for name in start)
        assert most < 2 * 6 * 1.5e-4 + 1e-6, "six steps of AdamW each way"


def test_groups_that_two_processes_cannot_share_are_refused_by_number() -> None:
    flag = "--data.rollout.max_concurrent=3"
    done = command("fit", "--config=recipes/tiny_cpu/config.yaml", *FLAGS["ddp"], flag)
    assert done.returncode == 2, done.stdout
    assert "max_concurrent=3 groups cannot be divided evenly over 2 processes" in done.stdout
