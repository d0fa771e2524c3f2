"""What several ranks save is what they, or another number of them, go on from."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sdp_lightning.cli.main import main
from support.rank_runs import Launcher, Results, assert_same_weights
from support.stopped_runs import CODES

STEPS, HALF = 5, 2
CASE: dict[str, Any] = {"kind": "rollouts", "batch_size": 4, "num_rows": 40}


@pytest.fixture(scope="module")
def straight(launcher: Launcher) -> dict[str, Any]:
    """One process that nobody stops; on policy, so that any number of ranks learns the same."""
    return launcher.run(1, {"it": {**CASE, "steps": STEPS}})[0]["it"]


def go_on(
    launcher: Launcher, strategy: str, resume: Path, *, size: int = 2, **settings: Any
) -> list[dict[str, Any]]:
    case = {**CASE, "steps": STEPS, "strategy": strategy, "resume": str(resume), **settings}
    return [rank["it"] for rank in launcher.run(size, {"it": case})]


def assert_goes_on(ranks: list[dict[str, Any]], straight: dict[str, Any], done: int) -> None:
    """The weights of the end, the rows of each step after ``done``, and every version."""
    for number, rank in enumerate(ranks):
        assert_same_weights(rank, straight)
        assert rank["versions"] == straight["versions"][done:]
        expected = [rows[number :: len(ranks)] for rows in straight["rows"][done:]]
        assert rank["rows"] == expected
        assert {lag for step in rank["lags"] for lag in step} == {0}


@pytest.mark.parametrize("strategy", ["fsdp shards", "fsdp", "ddp"])
def test_a_run_goes_on_from_what_its_ranks_saved(
    launcher: Launcher, straight: dict[str, Any], tmp_path: Path, strategy: str
) -> None:
    case = {**CASE, "steps": HALF, "strategy": strategy, "save_in": str(tmp_path)}
    launcher.run(2, {"it": case})
    saved = tmp_path / f"step={HALF}.ckpt"
    assert saved.is_dir() == (strategy == "fsdp shards")
    assert_goes_on(go_on(launcher, strategy, saved), straight, HALF)


def test_shards_are_exported_with_the_weights_that_were_trained(
    launcher: Launcher, tmp_path: Path
) -> None:
    case = {**CASE, "steps": HALF, "strategy": "fsdp shards", "save_in": str(tmp_path / "run")}
    ranks = launcher.run(2, {"it": case})
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "run" / f"step={HALF}.ckpt"), str(out)]) == 0
    exported = AutoModelForCausalLM.from_pretrained(out).state_dict()
    trained = ranks[0]["it"]["weights"]
    assert exported.keys() == trained.keys()
    for name, value in trained.items():
        assert torch.equal(exported[name], value), name


@pytest.mark.parametrize(
    ("strategy", "signum"),
    [("fsdp shards", signal.SIGTERM), ("ddp", signal.SIGTERM), ("ddp", signal.SIGINT)],
    ids=str,
)
@pytest.mark.fault("process killed", "gather", only="^ddp-")
def test_ranks_that_are_told_to_stop_save_and_go_on(
    launcher: Launcher,
    straight: dict[str, Any],
    tmp_path: Path,
    strategy: str,
    signum: signal.Signals,
) -> None:
    case = {
        **CASE,
        "steps": STEPS,
        "strategy": strategy,
        "save_in": str(tmp_path),
        "trouble": {"what": "told to stop", "rank": 0, "step": HALF, "signum": signum},
    }
    answer, logs, _ = launcher.launch(2, {"it": case})
    assert answer["late"] == [] and answer["codes"] == [CODES[signum]] * 2, logs
    saved = tmp_path / f"last-stopped-step={HALF + 1}.ckpt"
    assert saved.exists(), "\n".join(logs)[-3000:]
    assert f"version {HALF + 1} is saved" in logs[0]
    if signum == signal.SIGINT or strategy != "ddp":  # else it is the same checkpoint
        assert_goes_on(go_on(launcher, strategy, saved), straight, HALF + 1)


@pytest.mark.parametrize(
    ("strategy", "size"), [("ddp", 1), ("ddp", 3), ("fsdp shards", 1), ("fsdp shards", 3)]
)
def test_another_number_of_ranks_goes_on_with_every_row_once(
    launcher: Launcher, tmp_path: Path, strategy: str, size: int
) -> None:
    """Groups of both ranks are under way, finished or not, when they are saved."""
    settings = {
        "batch_size": 6,
        "max_head_lag": 1,
        "num_rows": 60,
        "num_epochs": 1,
        "engine": {"latency_s": 0.05, "chunks": 2},
    }
    case = {**CASE, **settings, "steps": HALF, "save_in": str(tmp_path), "strategy": strategy}
    before = launcher.run(2, {"it": case})
    saved = tmp_path / f"step={HALF}.ckpt"
    after = go_on(launcher, strategy, saved, size=size, **settings | {"steps": 0})
    rows = [row for rank in before for step in rank["it"]["rows"] for row in step]
    rows += [row for rank in after for step in rank["rows"] for row in step]
    assert len(rows) == len(set(rows)) and len(rows) >= 60 - 6, "a last batch that is not full"
    assert all(rank["versions"][0] == HALF + 1 for rank in after)
    assert max(lag for rank in after for step in rank["lags"] for lag in step) <= 1
    assert all(rank["digest"] == after[0]["digest"] for rank in after)


def test_shards_do_not_go_on_in_one_process_and_it_says_what_would(
    launcher: Launcher, tmp_path: Path
) -> None:
    case = {**CASE, "steps": 1, "strategy": "fsdp shards", "save_in": str(tmp_path)}
    launcher.run(2, {"it": case})
    saved = tmp_path / "step=1.ckpt"
    again = {**CASE, "steps": 2, "resume": str(saved)}
    answer, logs, _ = launcher.launch(1, {"it": again})
    assert answer["codes"] == [1]
    assert "is a folder of shards" in logs[0] and "ModelParallelStrategy" in logs[0], logs[0]
    assert str(saved) in logs[0]


def test_three_ranks_learn_what_one_process_learns(launcher: Launcher) -> None:
    case = {"kind": "recorded", "ranks": 3}
    alone: Results = launcher.run(1, {"it": case})
    for rank in launcher.run(3, {"it": case}):
        assert_same_weights(rank["it"], alone[0]["it"])
