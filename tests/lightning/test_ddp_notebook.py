"""DDP from a notebook: the kernel forks the ranks, and what they learned comes back to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nbformat
import pytest

from support.notebooks import execute, printed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SET_UP = """
import json, threading, warnings
import lightning as L
import sdp_lightning as sdp
from sdp_lightning.cli.quiet_logs import quiet_logs
quiet_logs()
warnings.filterwarnings("ignore", ".*litlogger.*")
rows = [{"id": f"row{i}", "prompt": f"{i}+{i}="} for i in range(40)]
workflow = sdp.RLVRWorkflow(
    lambda completion, row: sum(map(ord, completion)) % 97 / 97,
    group_size=2,
    sampling=sdp.SamplingParams(max_new_tokens=6),
)
data = sdp.RolloutDataModule(
    rows,
    workflow,
    engine_options={"device": "cpu"},
    rollout=sdp.RolloutConfig(batch_size=4, max_head_lag=1, timeout_s=120, shuffle=False),
)
module = sdp.SegmentWisePPOModule(FOLDER, optimizer=sdp.OptimizerConfig(lr=1e-3))

class Steps(L.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        live = [g for g in trainer.datamodule.executor.registry.snapshot() if g.in_training]
        step = [trainer.global_rank, batch.version, [g.row.row_id for g in live]]
        with open(f"steps.{fit}.{trainer.global_rank}", "a") as file:
            file.write(json.dumps(step) + "\\n")

def train():
    trainer = L.Trainer(
        strategy="ddp_notebook", devices=2, accelerator="cpu", max_steps=3, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[sdp.WeightSyncCallback(), Steps()],
    )
    trainer.fit(module, datamodule=data)
    return trainer

def weights():
    return {k: v.clone() for k, v in module.policy.state_dict().items()}
"""
FIRST = """
fit = 1
trainer = train()
first = weights()
print(float(trainer.callback_metrics["rollout/version"]))
"""
SECOND = """
fit = 2
train()
second = weights()
fresh = sdp.SegmentWisePPOModule(FOLDER)
fresh.configure_model()
start = fresh.policy.state_dict()

def distance(a, b):
    return max(float((a[k] - b[k]).abs().max()) for k in a)

print(json.dumps([distance(start, first), distance(first, second), distance(start, second)]))
print(json.dumps([thread.name for thread in threading.enumerate() if "sdp" in thread.name]))
"""


@pytest.fixture(scope="module")
def ran(model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.v4.new_notebook()
    sources = [f"FOLDER = {model_folder!r}{SET_UP}", FIRST, SECOND]
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in sources]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        execute(notebook, folder)
    return notebook, folder


def steps(folder: Path, fit: int) -> list[list[Any]]:
    """Rank, version and rows of every step."""
    files = [folder / f"steps.{fit}.{rank}" for rank in (0, 1)]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_two_ranks_train_in_a_notebook_and_each_row_is_one_ranks(ran: tuple[Any, Path]) -> None:
    notebook, folder = ran
    for fit in (1, 2):
        found = steps(folder, fit)
        assert [step[:2] for step in found] == [[r, v] for r in (0, 1) for v in (0, 1, 2)]
        rows = [row for step in found for row in step[2]]
        assert len(rows) == len(set(rows)) == 12
    assert printed(notebook).splitlines()[0] == "3.0"


def test_the_weights_come_back_and_a_second_fit_begins_with_them(ran: tuple[Any, Path]) -> None:
    notebook, _ = ran
    moved, further, whole = json.loads(printed(notebook).splitlines()[1])
    assert 1e-4 < moved <= 3.1e-3, "three steps of AdamW move no weight further"
    assert 1e-4 < further <= 3.1e-3 and whole > moved
    assert json.loads(printed(notebook).splitlines()[2]) == []
