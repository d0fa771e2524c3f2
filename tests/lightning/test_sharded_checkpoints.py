"""What several ranks save is what they, or another number of them, go on from."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sdp_lightning.cli.export import open_checkpoint
from sdp_lightning.cli.main import main
from sdp_lightning.training.policy.lora import is_adapter
from support.rank_runs import Launcher, Results, assert_same_weights
from support.stopped_runs import CODES

STEPS, HALF = 5, 2
STRATEGIES = ("fsdp shards", "fsdp", "ddp")
CASE: dict[str, Any] = {"kind": "rollouts", "batch_size": 4, "num_rows": 40}
ADAPTER: dict[str, Any] = {**CASE, "lora": {"rank": 4, "alpha": 8.0}}
# Groups of both ranks are under way, finished or not, when they are saved.
UNDER_WAY: dict[str, Any] = {
    **CASE,
    "batch_size": 6,
    "max_head_lag": 1,
    "num_rows": 60,
    "num_epochs": 1,
    "engine": {"latency_s": 0.05, "chunks": 2},
}


@dataclass(frozen=True)
class Saved:
    """What two ranks saw of each case, and the folder in which each saved every step."""

    ranks: Results
    folders: dict[str, Path]


@pytest.fixture(scope="module")
def straight(launcher: Launcher) -> dict[str, Any]:
    """One process that nobody stops; on policy, so that any number of ranks learns the same."""
    return launcher.run(1, {"it": {**CASE, "steps": STEPS}})[0]["it"]


@pytest.fixture(scope="module")
def straight_adapter(launcher: Launcher) -> dict[str, Any]:
    """The same, of an adapter."""
    return launcher.run(1, {"it": {**ADAPTER, "steps": STEPS}})[0]["it"]


@pytest.fixture(scope="module")
def saved(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Under each strategy, the first half of that run, and of one with groups under way."""
    cases = {strategy: {**CASE, "strategy": strategy} for strategy in STRATEGIES}
    cases |= {f"{one}, adapter": {**ADAPTER, "strategy": one} for one in STRATEGIES}
    cases |= {f"{one}, under way": {**UNDER_WAY, "strategy": one} for one in ("fsdp shards", "ddp")}
    folders = {name: tmp_path_factory.mktemp("saved") for name in cases}
    for name, case in cases.items():
        case |= {"steps": HALF, "save_in": str(folders[name])}
    return Saved(launcher.run(2, cases), folders)


@pytest.fixture(scope="module")
def gone_on(launcher: Launcher, saved: Saved) -> dict[int, Results]:
    """By the number of ranks, what each saw when they went on."""
    half = {name: str(folder / f"step={HALF}.ckpt") for name, folder in saved.folders.items()}
    two = {
        strategy: {**CASE, "strategy": strategy, "steps": STEPS, "resume": half[strategy]}
        for strategy in STRATEGIES
    } | {
        f"{strategy}, adapter": {
            **ADAPTER,
            "strategy": strategy,
            "steps": STEPS,
            "resume": half[f"{strategy}, adapter"],
        }
        for strategy in STRATEGIES
    }
    others = {
        name: {**UNDER_WAY, "strategy": name.split(",")[0], "steps": 0, "resume": half[name]}
        for name in half
        if name.endswith("under way")
    }
    return {2: launcher.run(2, two)} | {size: launcher.run(size, others) for size in (1, 3)}


def assert_goes_on(ranks: list[dict[str, Any]], straight: dict[str, Any], done: int) -> None:
    """The weights of the end, the rows of each step after ``done``, and every version."""
    for number, rank in enumerate(ranks):
        assert_same_weights(rank, straight)
        assert rank["versions"] == straight["versions"][done:]
        expected = [rows[number :: len(ranks)] for rows in straight["rows"][done:]]
        assert rank["rows"] == expected
        assert {lag for step in rank["lags"] for lag in step} == {0}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_goes_on_from_what_its_ranks_saved(
    saved: Saved, gone_on: dict[int, Results], straight: dict[str, Any], strategy: str
) -> None:
    checkpoint = saved.folders[strategy] / f"step={HALF}.ckpt"
    assert checkpoint.is_dir() == (strategy == "fsdp shards")
    assert_goes_on([rank[strategy] for rank in gone_on[2]], straight, HALF)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_adapter_goes_on_from_a_checkpoint_without_its_base(
    saved: Saved,
    gone_on: dict[int, Results],
    straight_adapter: dict[str, Any],
    strategy: str,
    tmp_path: Path,
) -> None:
    name = f"{strategy}, adapter"
    checkpoint = saved.folders[name] / f"step={HALF}.ckpt"
    layout = open_checkpoint(checkpoint).layout
    assert len(layout) == 28 and all(map(is_adapter, layout))
    assert_goes_on([rank[name] for rank in gone_on[2]], straight_adapter, HALF)
    assert main(["export", str(checkpoint), str(tmp_path / "out")]) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    trained = saved.ranks[0][name]["weights"]
    part = "model.layers.1.mlp.up_proj."
    a, b = (trained[f"{part}lora_{kind}.default.weight"] for kind in "AB")
    expected = trained[f"{part}base_layer.weight"] + 2.0 * b @ a
    torch.testing.assert_close(exported[f"{part}weight"], expected, atol=1e-6, rtol=0)


def test_shards_are_exported_with_the_weights_that_were_trained(
    saved: Saved, tmp_path: Path
) -> None:
    out, checkpoint = tmp_path / "out", saved.folders["fsdp shards"] / f"step={HALF}.ckpt"
    assert main(["export", str(checkpoint), str(out)]) == 0
    exported = AutoModelForCausalLM.from_pretrained(out).state_dict()
    trained = saved.ranks[0]["fsdp shards"]["weights"]
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
        case = {**CASE, "steps": STEPS, "strategy": strategy, "resume": str(saved)}
        ranks = [rank["it"] for rank in launcher.run(2, {"it": case})]
        assert_goes_on(ranks, straight, HALF + 1)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp shards"])
def test_another_number_of_ranks_goes_on_with_every_row_once(
    saved: Saved, gone_on: dict[int, Results], strategy: str, size: int
) -> None:
    name = f"{strategy}, under way"
    after = [rank[name] for rank in gone_on[size]]
    rows = [row for rank in saved.ranks for step in rank[name]["rows"] for row in step]
    rows += [row for rank in after for step in rank["rows"] for row in step]
    assert len(rows) == len(set(rows)) and len(rows) >= 60 - 6, "a last batch that is not full"
    assert all(rank["versions"][0] == HALF + 1 for rank in after)
    assert max(lag for rank in after for step in rank["lags"] for lag in step) <= 1
    assert all(rank["digest"] == after[0]["digest"] for rank in after)


def test_shards_do_not_go_on_in_one_process_and_it_says_what_would(
    launcher: Launcher, saved: Saved
) -> None:
    checkpoint = saved.folders["fsdp shards"] / f"step={HALF}.ckpt"
    again = {**CASE, "steps": STEPS, "resume": str(checkpoint)}
    answer, logs, _ = launcher.launch(1, {"it": again})
    assert answer["codes"] == [1]
    assert "is a folder of shards" in logs[0] and "ModelParallelStrategy" in logs[0], logs[0]
    assert str(checkpoint) in logs[0]


def test_three_ranks_learn_what_one_process_learns(launcher: Launcher) -> None:
    case = {"kind": "recorded", "ranks": 3}
    alone: Results = launcher.run(1, {"it": case})
    for rank in launcher.run(3, {"it": case}):
        assert_same_weights(rank["it"], alone[0]["it"])
