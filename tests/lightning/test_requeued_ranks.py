"""Two ranks of a SLURM job are requeued together, between two steps, whoever of them was told."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest
import torch

from support.paths import TESTS
from support.stopped_runs import WAIT_S

END, MIDDLE = 8, 3  # optimizer steps; the second one of the batch of version 1
RANK = """
import sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback
import sdp_lightning as sdp
from sdp_lightning.testing import FakeEngine
from support.trainers import Recorder, make_data, make_module, make_rows, make_trainer

class Told(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == {middle} and {is_told}:
            print("MIDDLE", flush=True)
            sys.stdin.readline()  # the signal is there

recorder = Recorder()
trainer = make_trainer(
    sdp.WeightSyncCallback(), recorder, Told(), max_steps={end}, devices=2, strategy="ddp",
    default_root_dir={folder!r}, plugins=[SLURMEnvironment()],
)
module = make_module({model!r}, update=sdp.UpdateConfig(num_minibatches=2))
data = make_data(engine=FakeEngine(), rows=make_rows(40), batch_size=4)
trainer.fit(module, data, weights_only=True)
print("ROWS", *(row for step in recorder.steps for row in step.row_ids), flush=True)
"""


def start(script: str, environment: dict[str, str], rank: int) -> subprocess.Popen[str]:
    own = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env=os.environ | environment | own,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def said(process: subprocess.Popen[str]) -> IO[str]:
    assert process.stdout is not None
    return process.stdout


def job(folder: Path, model: str, *, told: int | None) -> list[list[str]]:
    """Rows that each of two ranks trained on; the rank ``told`` gets SLURM's signal in a step."""
    script = RANK.format(
        tests=str(TESTS), middle=MIDDLE, is_told=told is not None, end=END, folder=str(folder),
        model=model,
    )  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    slurm = {
        "NTASKS": "2",
        "NTASKS_PER_NODE": "2",
        "JOB_ID": "77",
        "JOB_NAME": "train",
        "NODEID": "0",
    }
    common = {f"SLURM_{name}": value for name, value in slurm.items()}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    common["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"
    with contextlib.ExitStack() as stack:
        ranks = [stack.enter_context(start(script, common, rank)) for rank in range(2)]
        for process in ranks:
            stack.callback(process.kill)
        for rank, process in enumerate(ranks if told is not None else []):
            lines = list(itertools.takewhile(lambda line: line != "MIDDLE\n", said(process)))
            assert process.poll() is None, "".join(lines)
            if rank == told:
                process.send_signal(signal.SIGUSR1)
        for process in ranks:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # what it printed tells why it ended
                process.stdin.write("\n")
                process.stdin.close()
        for process in ranks:
            process.wait(timeout=WAIT_S)
        texts = [said(process).read() for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(texts)
    return [text.rpartition("ROWS ")[2].split() for text in texts]


@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1])
def test_ranks_are_requeued_at_the_end_of_one_step_and_lose_no_row(
    model_folder: str, tmp_path: Path, told: int
) -> None:
    (tmp_path / "bin").mkdir()
    scontrol, asked = tmp_path / "bin" / "scontrol", tmp_path / "asked"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    scontrol.chmod(0o755)
    first = job(tmp_path, model_folder, told=told)
    assert asked.read_text() == "requeue 77\n"
    saved = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)
    (state,) = [s for name, s in saved["callbacks"].items() if "WeightSync" in name]
    assert (state["version"], saved["global_step"]) == (2, 4)
    second = job(tmp_path, model_folder, told=None)
    trained = len(first[0]) // 2
    assert [rows[trained:] for rows in first] == second and trained > 0
    assert len({*first[0], *first[1]}) == 2 * len(first[0])
