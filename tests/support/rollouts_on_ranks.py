"""Training on rollouts of a fake engine or of servers, on several ranks, with trouble."""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import json
import os
import signal
import socket
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import peft  # noqa: F401  (loaded here, once)
import torch
import transformers.models.llama.modeling_llama  # noqa: F401  (loaded here, once)
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import distributed
from torch.utils.data import IterableDataset

import sdp_lightning as sdp
import sdp_lightning.lightning.startup
from sdp_lightning.distributed.failure_detector import FailureDetector
from sdp_lightning.distributed.rank_group import RankGroup
from sdp_lightning.engines.connect import connect_engine
from sdp_lightning.engines.protocol import (
    GenerationRequest,
    NamedWeights,
    PublishReport,
    SharedServerEngine,
)
from sdp_lightning.errors import EngineError
from sdp_lightning.observability.summary import RunSummary
from sdp_lightning.testing import FakeEngine
from sdp_lightning.training.batch import Batch
from sdp_lightning.types import Row, Trajectory
from sdp_lightning.workflows.workflow import RolloutSession
from support.fake_servers import QUICK
from support.listening import listening, scan, siblings
from support.rank_place import CountingModule, Metrics, Place, make_strategy, weights_of
from support.trainers import Recorder, executor_of, make_trainer, weigh_letters


class Collectives(Callback):
    """What every step asks of the other ranks, from the end of the one before. Goes last.

    Meetings by their first word, and collectives that Python asks torch.distributed for: no
    gradients, and no shards of weights.
    """

    NAMES = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "barrier")

    def __init__(self) -> None:
        self.steps: list[list[str]] = []
        self._found: list[str] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._watch(RankGroup, "_meet", lambda args: args[1].split()[0])
        for name in self.NAMES:
            self._watch(distributed, name, lambda _, name=name: name)

    def _watch(self, owner: Any, name: str, word: Callable[[Sequence[Any]], str]) -> None:
        function = getattr(owner, name)

        def call(*args: Any, **settings: Any) -> Any:
            self._found.append(word(args))
            return function(*args, **settings)

        setattr(owner, name, call)  # for the rest of the process: later cases have their own

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.steps.append(self._found.copy())
        self._found.clear()


@dataclass(frozen=True)
class Trouble:
    """What goes wrong: ``what`` happens on ``rank``, from step ``step`` on; ``signum`` tells to
    stop."""

    what: str = ""
    rank: int = 1
    step: int = 1
    signum: int = signal.SIGTERM


class Letters(sdp.RolloutWorkflow):
    """Two samples; rows may say "slow_s" (the reward), "reject" and "turns"."""

    sampling = sdp.SamplingParams(max_new_tokens=8)

    def __init__(self, place: Place, trouble: Trouble) -> None:
        self.seen: list[str] = []
        self._place, self._trouble = place, trouble

    async def run(self, row: Row, session: RolloutSession) -> list[Trajectory] | None:
        self.seen.append(row["id"])
        episodes = [session.open() for _ in range(2)]
        for number, episode in enumerate(episodes):
            prompt = row["prompt"] + "+" * number
            episode.add_context(session.tokenizer.encode(prompt, add_special_tokens=False))
        for _ in range(row.get("turns", 1)):
            await asyncio.gather(*(episode.generate(self.sampling) for episode in episodes))
        await asyncio.sleep(row.get("slow_s", 0.0))
        if self._trouble.rank == self._place.rank and row["step"] >= self._trouble.step:
            if self._trouble.what == "reward":
                raise ValueError("no such letter")
            if self._trouble.what == "rollout hangs":
                await asyncio.sleep(3600)
        if row.get("reject"):
            return None
        return [
            episode.finish(weigh_letters("x" * (episode.sampled_token_ids.sum() % 50 + i), row))
            for i, episode in enumerate(episodes)
        ]


class Troublemaker(Callback):
    """Fails, dies, scans ports or ruins the last server at the beginning of a step, on a rank."""

    def __init__(
        self, place: Place, trouble: Trouble, servers: Sequence[Mapping[str, Any]]
    ) -> None:
        self._place, self._trouble, self._servers = place, trouble, servers
        self.scanned: list[int] = []
        self._silent: list[socket.socket] = []  # a stranger's, open to the end of the run

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if (self._trouble.rank, self._trouble.step) != (self._place.rank, batch_idx):
            return
        if self._trouble.what == "training step":
            time.sleep(0.5)  # the others wait in the first collective of the step by then
            raise ValueError("no such gradient")
        if self._trouble.what == "port scan":
            places = listening(*siblings())
            self.scanned = sorted(port for _, port in places)
            self._silent = scan(places)
        if self._trouble.what == "kill":
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        if self._trouble.what == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self._trouble.what == "told to stop":
            os.kill(os.getpid(), self._trouble.signum)
        if self._trouble.what == "server killed":
            os.kill(self._servers[-1]["pid"], signal.SIGKILL)
        if self._trouble.what == "load fails":
            fault = {"path": "/collective_rpc", "kind": "load", "times": 1}
            body = json.dumps({"faults": [fault]}).encode()
            url = self._servers[-1]["url"] + "/fake/do"
            kind = {"Content-Type": "application/json"}
            urllib.request.urlopen(urllib.request.Request(url, body, kind), timeout=30).close()


class StreamedRows(IterableDataset[Row]):
    """Rows that come one after another."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)


class Engine(FakeEngine):
    """Replies of a length that the prompt decides; fails where it is told to."""

    def __init__(self, place: Place, trouble: Trouble, **settings: Any) -> None:
        super().__init__(_length_of, **settings)
        self._place, self._trouble = place, trouble

    def update_weights(
        self, weights: NamedWeights, version: int, *, reset: bool = False
    ) -> PublishReport:
        trouble = self._trouble
        if (trouble.rank, trouble.step) == (self._place.rank, version):
            if trouble.what == "publish":
                next(iter(weights))  # some of them were gathered from all ranks
                raise EngineError("no such weight")
            if trouble.what == "publish hangs":
                ctypes.CDLL(None).sleep(3600)  # in C, as in a collective
        return super().update_weights(weights, version, reset=reset)


def _length_of(request: GenerationRequest) -> int:
    return 1 + int(request.token_ids.sum()) % 7


def rollouts(
    place: Place,
    *,
    strategy: str = "ddp",
    steps: int = 4,
    num_rows: int = 40,
    rows: Mapping[str, Mapping[str, Any]] | None = None,
    trouble: Mapping[str, Any] | None = None,
    engine: Mapping[str, Any] | None = None,
    servers: Sequence[Mapping[str, Any]] = (),
    launch: str = "",
    num_val: int = 0,
    summary: bool = False,
    margin_s: float = 30.0,
    minibatches: int = 1,
    lora: Mapping[str, Any] | None = None,
    save_in: str = "",
    resume: str = "",
    stream: bool = False,
    flags: Mapping[str, Any] | None = None,
    **rollout: Any,
) -> dict[str, Any]:
    """A fit on a fake engine. ``rows``: what is said in those rows, by index.

    A ``stream`` of rows has no length. Every step is saved in ``save_in``, and the fit goes on
    from the checkpoint ``resume``. ``flags`` are of the Trainer.
    """
    sdp_lightning.lightning.startup.MARGIN_S = margin_s
    quick = {"grace_s": 1.0, "look_s": 0.01}
    FailureDetector.__init__.__kwdefaults__ |= quick  # type: ignore[operator]
    what = Trouble(**trouble or {})
    workflow = Letters(place, what)
    batch_size = rollout.setdefault("batch_size", 4)
    prompts = [
        {"id": f"row{i}", "prompt": f"{i}+{'1' * (i % 5)}=", "step": i // batch_size}
        | dict((rows or {}).get(str(i), {}))
        for i in range(num_rows)
    ]
    val = [{"id": f"val{i}", "prompt": f"{i}*{i}=", "step": 0} for i in range(num_val)]
    val_workflow = Letters(place, Trouble())
    hosts = ",".join(server["url"].removeprefix("http://") for server in servers)
    data = sdp.RolloutDataModule(
        StreamedRows(prompts) if stream else prompts,
        workflow,
        engine=(
            launch
            or (servers and connect_engine("vllm://" + hosts, **QUICK))
            or Engine(place, what, **engine or {})
        ),
        engine_options=QUICK if launch else None,
        rollout=sdp.RolloutConfig(
            **{"timeout_s": 60.0, "max_head_lag": 0, "shuffle": False} | rollout
        ),
        val_prompts=val or None,
        val_workflow=val_workflow,
    )
    torch.manual_seed(place.rank)  # of adapters; all ranks get rank 0's
    module = CountingModule(
        place.folder,
        lora=None if lora is None else sdp.LoRAConfig(**lora),
        optimizer=sdp.OptimizerConfig(lr=1e-3),
        update=sdp.UpdateConfig(num_minibatches=minibatches, max_tokens_per_microbatch=30),
    )
    seen, metrics, collectives = Steps(), Metrics(), Collectives()
    troublemaker = Troublemaker(place, what, servers)
    saver = ModelCheckpoint(save_in, "{step}", every_n_train_steps=1, save_top_k=-1)
    page = tempfile.mkdtemp(dir=Path(place.folder).parent)
    trainer = make_trainer(
        sdp.WeightSyncCallback(weight_check_every=0 if servers or launch else None),
        troublemaker,
        seen,
        metrics,
        collectives,
        *([RunSummary()] if summary else []),
        *([saver] if save_in else []),
        default_root_dir=page,
        enable_checkpointing=bool(save_in),
        max_steps=steps * minibatches if steps else -1,
        devices=place.size,
        strategy=make_strategy(strategy, place.size),
        num_sanity_val_steps=0,
        **flags or ({"val_check_interval": 1, "check_val_every_n_epoch": None} if num_val else {}),
    )
    trainer.fit(module, data, ckpt_path=resume or None, weights_only=True)
    weights = weights_of(module)
    return {
        "weights": weights,
        "digest": hashlib.sha256(b"".join(w.numpy().tobytes() for w in weights.values())).digest(),
        "metrics": metrics.steps,
        "collectives": collectives.steps,
        "rows": seen.rows,
        "lags": seen.lags,
        "versions": seen.versions,
        "exact": seen.exact,
        "servers": seen.servers,
        "listening": seen.listening,
        "MASTER_PORT": int(os.environ["MASTER_PORT"]),
        "page": os.listdir(page),
        "scanned": troublemaker.scanned,
        "val_rows": val_workflow.seen,
        "val": seen.evaluations,
        "scored": module.num_scored,
        "score_calls": module.num_calls,
    }


@dataclass(eq=False)
class Steps(Callback):
    """Rows, lags, versions and servers of every step, every evaluation, and open ports."""

    rows: list[list[str]] = field(default_factory=list[list[str]])
    lags: list[list[int]] = field(default_factory=list[list[int]])
    versions: list[int | None] = field(default_factory=list[int | None])
    exact: list[bool] = field(default_factory=list[bool])
    servers: list[list[str]] = field(default_factory=list[list[str]])
    evaluations: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    listening: set[tuple[str, int]] = field(default_factory=set[tuple[str, int]])

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self.listening = listening()
        recorder = Recorder()
        recorder.on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.rows.append(recorder.steps[0].row_ids)
        self.lags.append(recorder.lags[0])
        wrong = (batch.behavior_logprobs + (batch.versions + 1) / 10)[batch.loss_mask]
        self.exact.append(bool((wrong.abs() < 1e-5).all()))  # both fakes say so

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        engine = executor_of(trainer).engine
        self.versions.append(engine.version)
        shared = isinstance(engine, SharedServerEngine)
        self.servers.append(list(engine.server_urls) if shared else [])

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        found = trainer.callback_metrics
        self.evaluations.append((float(found["val/reward"]), float(found["val/version"])))
