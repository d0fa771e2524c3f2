"""Signals end a run in a process of its own, with a checkpoint and nothing left behind."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from support.fork_server import ForkServer
from support.forked_processes import Ended, forked
from support.paths import TESTS

DEADLINE_S = 200

SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from support.trainers import make_data, make_module, make_trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
import sdp_lightning as sdp
from sdp_lightning.testing import FakeEngine

class Mark(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 2:
            print("MARK", flush=True)

class Stalls(FakeEngine):
    async def generate(self, request, sink):
        if self.version == 2:
            print("MARK", flush=True)
            self.manual = True
        return await super().generate(request, sink)

data = make_data(engine=Stalls()) if {waiting} else make_data()
callbacks = [sdp.WeightSyncCallback(), ModelCheckpoint({saved!r}, every_n_train_steps=10**6)]
callbacks += [] if {waiting} else [Mark()]
trainer = make_trainer(*callbacks, max_steps=10**8, enable_checkpointing=True)
trainer.fit(make_module({folder!r}), data)
print("ENDED", flush=True)
"""


CASES = [f"{name} {where}" for name in ("SIGINT", "SIGTERM") for where in ("training", "waiting")]


@dataclass(frozen=True)
class Stopped(Ended):
    saved: list[Path]


@pytest.fixture(scope="module")
def stopped(
    fork_server: ForkServer, model_folder: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Stopped]:
    """Four runs at once, each sent its signal once it has printed its mark."""
    folders = {case: tmp_path_factory.mktemp("saved") for case in CASES}
    scripts = {
        case: SCRIPT.format(
            tests=str(TESTS),
            folder=model_folder,
            waiting=case.endswith("waiting"),
            saved=str(folders[case]),
        )
        for case in CASES
    }
    with forked(fork_server, scripts, tmp_path_factory.mktemp("errors")) as forks:
        for case, run in forks.running.items():
            for line in run.stdout:
                if line.startswith("MARK"):
                    os.kill(run.pid, signal.Signals[case.split()[0]])
                    break
        ended = forks.wait(DEADLINE_S)
        numbers = [run.pid for run in forks.running.values()]
    for number in numbers:
        with pytest.raises(ProcessLookupError):  # no child is left in its session
            os.killpg(number, 0)
    shared = os.listdir("/dev/shm")
    assert not [name for name in shared if any(str(number) in name for number in numbers)]
    return {
        case: Stopped(one.returncode, one.stdout, one.stderr, [*folders[case].iterdir()])
        for case, one in ended.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_a_signal_leaves_one_whole_checkpoint_and_says_where(
    stopped: dict[str, Stopped], case: str
) -> None:
    (path,) = stopped[case].saved
    assert f"go on with ckpt_path='{path}'" in stopped[case].stderr
    state = torch.load(path, weights_only=True)
    version = state["callbacks"]["WeightSyncCallback"]["version"]
    assert version == state["global_step"]
    assert version >= (2 if case.endswith("waiting") else 3)
    assert path.name == f"last-stopped-step={version}.ckpt"


@pytest.mark.parametrize("where", ["training", "waiting"])
def test_ctrl_c_ends_a_run_without_a_traceback(stopped: dict[str, Stopped], where: str) -> None:
    result = stopped[f"SIGINT {where}"]
    assert result.returncode == 1, result.stderr
    assert "ENDED" not in result.stdout
    assert "Detected KeyboardInterrupt" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Warning" not in result.stderr


@pytest.mark.parametrize("where", ["training", "waiting"])
def test_sigterm_ends_a_run_and_is_not_reported_as_success(
    stopped: dict[str, Stopped], where: str
) -> None:
    result = stopped[f"SIGTERM {where}"]
    assert result.returncode == 128 + signal.SIGTERM, result.stderr
    assert "ENDED" not in result.stdout
    assert "Received SIGTERM" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Warning" not in result.stderr
