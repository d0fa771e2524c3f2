"""The configs of the recipes for tasks: two steps of each with a tiny model, on the CPU."""

from __future__ import annotations

import csv
import doctest
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sdp_lightning as sdp
from sdp_lightning.cli.main import main
from sdp_lightning.config.import_path import load_object
from support.paths import ROOT

# Lightning calls functions of jsonargparse by their old names; Python shows that to nobody else.
pytestmark = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
)


@pytest.mark.parametrize("recipe", ["multi_turn", "reasoning_gym"])
def test_two_steps_of_a_config(
    recipe: str, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if recipe == "reasoning_gym":
        pytest.importorskip("reasoning_gym")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")  # a config names files from the root
    monkeypatch.chdir(tmp_path)
    overrides: dict[str, Any] = {
        "trainer.max_steps": 2,
        "trainer.limit_val_batches": 0,
        "model.model": model_folder,
        "model.trainable": ".*",
        "model.update.num_minibatches": 1,
        "data.rollout.batch_size": 2,
        "data.rollout.timeout_s": 60,
    }
    flags = [f"--{name}={value}" for name, value in overrides.items()]
    assert main(["fit", f"--config=recipes/{recipe}/config.yaml", *flags]) == 0
    with (tmp_path / "runs" / recipe / "version_0" / "metrics.csv").open() as file:
        steps = [row for row in csv.DictReader(file) if row["train/reward"]]
    assert len(steps) == 2
    for row in steps:
        assert 0 <= float(row["train/reward"]) <= 1 and math.isfinite(float(row["train/loss"]))


def test_the_examples_of_the_game_are_right() -> None:
    task: Any = load_object(f"{ROOT}/recipes/multi_turn/task.py:__dict__")
    results = [
        doctest.DocTestRunner().run(test)
        for name in ("UpOrDown", "make_rows")
        for test in doctest.DocTestFinder().find(task[name], name, globs=dict(task))
    ]
    assert sum(result.attempted for result in results) == 5
    assert not any(result.failed for result in results)


def test_players_that_are_shown_heed_every_answer_and_waste_some_turns() -> None:
    import random

    task: Any = load_object(f"{ROOT}/recipes/multi_turn/task.py:__dict__")
    player, wasted, won = random.Random(0), 0, 0
    for _ in range(300):
        parts = task["play"](player, 0.5)
        low, high = 0, 9
        for (text, is_mine), (answer, _) in zip(parts, [*parts[1:], ("", False)], strict=True):
            if not is_mine:
                continue
            wasted += answer == "no\n"
            if text[0].isdigit():
                assert low <= int(text) <= high
                low = int(text) + 1 if answer == "up\n" else low
                high = int(text) - 1 if answer == "down\n" else high
        won += parts[-1][1]
    assert 300 < wasted < 700 and 90 < won < 210


def test_every_train_py_prints_help_without_large_imports() -> None:
    scripts = sorted(ROOT.glob("recipes/*/train.py"))
    assert len(scripts) >= 5
    code = (
        "import runpy, sys\n"
        f"for script in {list(map(str, scripts))!r}:\n"
        "    sys.argv = [script, '--help']\n"
        "    try: runpy.run_path(script, run_name='__main__')\n"
        "    except SystemExit as done: assert not done.code\n"
        "    else: raise AssertionError(script)\n"
        "assert not {'torch', 'lightning', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: train.py") == len(scripts)


def test_flags_of_the_command_line_are_passed_on_to_from_config(
    model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    flags = ["--trainer.max_steps=3", "--data.rollout.batch_size", "4"]
    flags += [f"--model.model={model_folder}", "--model.trainable=.*"]
    trainer, _, data = sdp.from_config("recipes/multi_turn/config.yaml", flags)
    assert (trainer.max_steps, data.rollout.batch_size) == (3, 4)
