"""A training run that may be killed at any moment, and the process that such runs are forked from.

``serve`` reads orders from its standard input, one JSON object a line, and forks ``size``
ranks for each, which train in ``folder`` from the last checkpoint there. It answers with their
process ids, and with their exit statuses once they have ended. Itself it runs no tensor operation,
so a fork finds no thread that it would have to go without.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers.models.llama.modeling_llama
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import sdp_lightning as sdp
from sdp_lightning.engines.protocol import NamedWeights, PublishReport
from sdp_lightning.testing import FakeEngine
from support.checkpoints import running_in
from support.kill_journal import BATCH_SIZE, NUM_ROWS, STEPS, Journal, Turns, make_rows
from support.rank_environment import free_port, rank_environment
from support.trainers import executor_of, make_module, make_trainer

# Loaded here, so that no child has to, and all run the same.
LOADED = [sdp.RolloutDataModule, sdp.WeightSyncCallback, transformers.models.llama.modeling_llama]


def last_checkpoint(folder: Path) -> Path | None:
    """The newest one. Whatever has the name of a checkpoint is whole."""

    def step(path: Path) -> int:
        return int(path.stem.removeprefix("step="))

    return max(folder.glob("step=*.ckpt"), key=step, default=None)


def came_back(checkpoint: Path | None, rank: int) -> dict[str, int]:
    """Segments of unfinished rollouts, and those in the middle of a call, that it has of a rank."""
    if checkpoint is None:
        return {"saved": 0, "halves": 0}
    state = torch.load(checkpoint, weights_only=True)["RolloutDataModule"]["ranks"][rank]
    logs = [log for group in running_in(state) for log in group["logs"]]
    return {
        "saved": sum("version" in event for log in logs for event in log),
        "halves": sum(bool(log) and "version" in log[-1] for log in logs),
    }


# Moments to be killed at --------------------------------------------------------------------------


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class MortalEngine(FakeEngine):
    """Is killed while it takes the weights of version ``at``: after the first, or after all.

    With ``spans`` the first call of two rows in ten is answered under two versions, so a checkpoint
    finds calls of which a part is sampled, however fast the engine and slow the trainer.
    """

    def __init__(self, at: int | None, half: bool, spans: bool, **settings: Any) -> None:
        super().__init__(lambda request: 10**6, **settings)  # to the full budget
        self._at, self._half, self._spans = at, half, spans

    def _sample(self, entry: Any, num_tokens: int) -> None:
        prompt = entry.request.token_ids
        is_first = prompt.size == 2 and (prompt[0] - 3) % 10 in (3, 6)
        if self._spans and is_first and entry.sampled and entry.num_closed == 0:
            return  # until the weights change
        super()._sample(entry, num_tokens)

    def update_weights(
        self, weights: NamedWeights, version: int, *, reset: bool = False
    ) -> PublishReport:
        if version == self._at and self._half:
            next(iter(weights))
            die()
        report = super().update_weights(weights, version, reset=reset)
        if version == self._at:
            die()
        return report


class DieWhileScoring(Callback):
    """In the first scoring at or after a version: in the middle of ``on_train_batch_start``."""

    def __init__(self, at: int) -> None:
        self._at = at

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        score = pl_module.score

        def die_after(trajectories: Any) -> Any:
            found = score(trajectories)
            if executor_of(trainer).version >= self._at:
                die()
            return found

        pl_module.score = die_after  # type: ignore[assignment]


class DieAt(Callback):
    def __init__(self, hook: str, at: int) -> None:
        self._hook, self._at = hook, at

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._hook == "start":
            die()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        if self._hook == "step" and trainer.global_step == self._at:
            die()


def die_while_writing(at: int, *, is_placed: bool) -> None:
    """When the ``at``-th checkpoint is half written, or as soon as it is in its place."""
    replace, count = os.replace, 0

    def torn(source: Path, target: Path) -> None:
        nonlocal count
        count += 1
        if count == at and is_placed:
            replace(source, target)
            die()
        if count == at:
            data = source.read_bytes()
            source.write_bytes(data[: len(data) // 2])
            die()
        replace(source, target)

    os.replace = torn  # type: ignore[assignment]


def train(order: Mapping[str, Any], rank: int) -> None:
    folder, kill, size = Path(order["folder"]), order["kill"], order["size"]
    torch.set_num_threads(1)
    kind, at = (kill["kind"], kill["at"]) if kill and kill["rank"] == rank else ("", 0)
    engine = MortalEngine(
        at if kind.startswith("publish") else None,
        kind == "publish half",
        order["max_head_lag"] > 0 and order["on_overdue"] != "wait",  # each for the other
        updates_in_flight=order["updates_in_flight"],
        latency_s=0.06,
        chunks=4,
    )
    data = sdp.RolloutDataModule(
        make_rows(),
        Turns(),
        engine=engine,
        rollout=sdp.RolloutConfig(
            batch_size=BATCH_SIZE * size,
            max_head_lag=order["max_head_lag"],
            on_overdue=order["on_overdue"],
            shuffle=False,
            num_epochs=1,
            max_failures=NUM_ROWS,
            timeout_s=90,
            drain_s=0.2,  # for requests that pass the gate and meet a paused engine
        ),
    )
    saved = last_checkpoint(folder)
    journal = Journal(folder / f"journal.{rank}", came_back(saved, rank))
    callbacks: list[Callback] = [sdp.WeightSyncCallback(), journal]
    if kind == "score":
        callbacks.append(DieWhileScoring(at))
    if kind in ("start", "step"):
        callbacks.append(DieAt(kind, at))
    if kind.startswith("write"):
        die_while_writing(at, is_placed=kind == "write placed")
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = make_trainer(
        *callbacks,
        saver,
        max_steps=STEPS,
        enable_checkpointing=True,
        devices=size,
        strategy="ddp" if size > 1 else "auto",
    )
    trainer.fit(make_module(order["model"]), data, ckpt_path=saved, weights_only=True)


def run_child(order: Mapping[str, Any], rank: int, port: int) -> None:
    """Train, and leave without a word to the parent's own file descriptors."""
    folder = Path(order["folder"])
    if order["size"] > 1:
        os.environ |= rank_environment(rank, order["size"], port)
    log = os.open(folder / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 1
    try:
        train(order, rank)
        status = 0
    finally:
        if status:
            import traceback

            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve() -> None:
    import warnings

    warnings.simplefilter("ignore")
    print(json.dumps({"ready": True}), flush=True)
    buffer, is_open = b"", True
    running: dict[int, int] = {}
    ended: dict[int, dict[int, int]] = {}
    pids: dict[int, list[int]] = {}
    while is_open or running:
        ready, _, _ = select.select([0] if is_open else [], [], [], 0.02)
        if ready:
            data = os.read(0, 65536)
            is_open, buffer = bool(data), buffer + data
        while b"\n" in buffer:
            line, buffer = buffer.split(b"\n", 1)
            order = json.loads(line)
            seed = order["seed"]
            pids[seed], ended[seed] = fork_ranks(order), {}
            running |= dict.fromkeys(pids[seed], seed)
            print(json.dumps({"seed": seed, "pids": pids[seed]}), flush=True)
        for pid in list(running):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                seed = running.pop(pid)
                ended[seed][pid] = os.waitstatus_to_exitcode(status)
                if len(ended[seed]) == len(pids[seed]):
                    codes = [ended[seed][pid] for pid in pids[seed]]
                    print(json.dumps({"seed": seed, "codes": codes}), flush=True)


def fork_ranks(order: Mapping[str, Any]) -> list[int]:
    port = free_port()
    pids: list[int] = []
    for rank in range(order["size"]):
        pid = os.fork()
        if pid == 0:
            run_child(order, rank, port)
        pids.append(pid)
    return pids
