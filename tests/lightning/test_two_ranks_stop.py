"""Two ranks that Lightning starts as users start them stop together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import TESTS
from support.stopped_runs import (
    CODES,
    WAIT_S,
)
from support.waiting import wait_for

RANKS = """
import sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from support.trainers import make_data, make_module, make_rows, make_trainer
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
import sdp_lightning as sdp
from sdp_lightning.testing import FakeEngine

_ChildProcessObserver.__init__.__defaults__ = (0.01,)  # s between its looks: it misses no end

class Mark(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        print(f"MARK {{trainer.global_rank}} {{pl_module.policy is not None}}", flush=True)

if __name__ == "__main__":
    saver = ModelCheckpoint({saved!r}, every_n_train_steps=10**6)
    trainer = make_trainer(
        sdp.WeightSyncCallback(), Mark(), saver, max_steps={max_steps}, devices=2, strategy="ddp",
        enable_checkpointing=True,
    )
    data = make_data(engine=FakeEngine(), rows=make_rows(400))
    trainer.fit(make_module({folder!r}), data, ckpt_path={ckpt!r}, weights_only=True)
    print("ENDED", flush=True)
"""


def living_in_session(leader: int) -> list[str]:
    """Processes of the session that ``leader`` began, without zombies that nobody waits for."""
    found: list[str] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue  # it ended meanwhile
        if int(session) == leader and state != "Z":
            found.append(path.parent.name)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("signum", CODES, ids=lambda s: signal.Signals(s).name)
def test_two_ranks_stop_at_one_place_with_one_checkpoint(
    model_folder: str, tmp_path: Path, signum: int
) -> None:
    """Only the first rank is told; resumed from, the checkpoint goes on on both."""

    def start(max_steps: int, ckpt: str | None) -> subprocess.Popen[str]:
        script = tmp_path / f"run{max_steps}.py"
        tests = str(TESTS)
        saved = str(tmp_path / "saved")
        text = RANKS.format(
            tests=tests, saved=saved, folder=model_folder, max_steps=max_steps, ckpt=ckpt
        )
        script.write_text(text)
        return subprocess.Popen(
            [sys.executable, str(script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    with start(10**6, None) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("MARK"):
                    process.send_signal(signum)
                    break
            text, _ = process.communicate(timeout=WAIT_S)
        finally:
            process.kill()
    assert process.returncode == CODES[signal.Signals(signum)], text
    assert "ENDED" not in text and "Traceback" not in text, text
    # A process closes its output a moment before it has ended.
    wait_for(lambda: not living_in_session(process.pid), lambda: living_in_session(process.pid))
    (path,) = (tmp_path / "saved").iterdir()
    step = int(path.stem.removeprefix("last-stopped-step="))
    with start(step + 2, str(path)) as again:
        try:
            text, _ = again.communicate(timeout=WAIT_S)
        finally:
            again.kill()
    assert again.returncode == 0, text
    assert text.count("MARK") == 2 * 2 and text.count("ENDED") == 2
