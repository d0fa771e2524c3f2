"""The recipes do what their READMEs say, with real weights, in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from support.paths import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(960)]

SCRIPT = """
import json, sys
import lightning as L
import sdp_lightning as sdp

class Versions(L.Callback):
    def __init__(self):
        self.in_batches, self.mixed = [], 0

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        kept = [set(row[mask].tolist()) for row, mask in zip(batch.versions, batch.loss_mask)]
        self.in_batches.append(sorted({batch.version - v for row in kept for v in row}))
        self.mixed += sum(len(row) > 1 for row in kept)

if __name__ == "__main__":
    trainer, model, data = sdp.from_config(f"recipes/{sys.argv[1]}/config.yaml")
    versions = Versions()
    trainer.callbacks.insert(0, versions)
    before = trainer.validate(model, data, verbose=False)[0]["val/reward"]
    trainer.fit(model, data)
    after = float(trainer.callback_metrics["val/reward"])
    print(json.dumps([before, after, versions.in_batches, versions.mixed]))
"""


def run(recipe: str) -> tuple[float, float, list[list[int]], int]:
    """Accuracy before and after, the lags in every batch, trajectories of several versions."""
    command = [sys.executable, "-W", "error::UserWarning", "-c", SCRIPT, recipe]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stdout + done.stderr, done.stderr[-3000:]
    result: Any = json.loads(done.stdout.strip().splitlines()[-1])
    before, after, lags, mixed = result
    return before, after, lags, mixed


def test_the_main_job_raises_the_accuracy_of_a_real_model_on_batches_of_mixed_versions() -> None:
    before, after, lags, _ = run("arithmetic_cpu")
    assert after >= before + 0.15
    assert max(lag for batch in lags for lag in batch) <= 2
    assert any(len(batch) > 1 for batch in lags)


def test_the_tiny_recipe_raises_the_sampled_reward_with_trajectories_of_several_versions() -> None:
    before, after, lags, mixed = run("tiny_cpu")
    assert after >= before + 0.2
    assert max(lag for batch in lags for lag in batch) <= 2
    assert mixed > 0


def test_a_conversation_with_a_game_is_learned_by_a_tiny_model() -> None:
    before, after, lags, _ = run("multi_turn")
    assert after >= before + 0.1
    assert max(lag for batch in lags for lag in batch) <= 2


def test_a_task_of_reasoning_gym_is_learned_by_a_real_model() -> None:
    before, after, lags, _ = run("reasoning_gym")
    assert after >= before + 0.1
    assert max(lag for batch in lags for lag in batch) <= 2
