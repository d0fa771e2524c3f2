"""What agreement costs on two ranks.

    OMP_NUM_THREADS=1 python recipes/benchmarks/speed/ranks.py

Steps of 100 ms (asleep) on a fake engine. Printed is the share of such a step that each rank spends
on agreeing with the other one, counted from when both have arrived: waiting for the other's work is
not included, and gradients are not. Agreement and ledger are ``RankGroup.all_gather`` (batches,
publishes, ends, errors, the ledger's counters) and ``RankSums.table`` (tokens and micro-batches of
a step, an all-gather too); summing the metrics of a step is apart. Times are medians and need
idle cores: beside other jobs both ranks wait for their turn.

With ``--shared`` the ranks' engines share their servers: a publish then has five more all-gathers,
which order what the ranks do with them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import distributed

import sdp_lightning as sdp
from sdp_lightning.distributed.rank_group import RankGroup
from sdp_lightning.distributed.reductions import RankSums
from sdp_lightning.testing import FakeEngine, tiny_model, tiny_tokenizer
from sdp_lightning.training.metrics import LagMetrics

STEP_S, NUM_STEPS, WARM_UP = 0.1, 60, 5
SPREAD_S = 1e-3  # longer than both need to hear when the last one came
METRICS = ("LagMetrics.pool",)
spent: dict[str, list[float]] = defaultdict(list)
waited: list[float] = []
within: list[str] = []  # the calls under way: one inside another is a part of it


def timed(owner: Any, name: str) -> None:
    """Note how long each call of ``owner.name`` takes once both ranks are there."""
    function: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        if within:
            return function(*args, **kwargs)
        if distributed.is_initialized():
            waited.append(start_together())
        within.append(name)
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[f"{owner.__name__}.{name}"].append(time.perf_counter() - start)
            within.pop()

    setattr(owner, name, call)


def start_together() -> float:
    """Return at the same instant on both ranks, and how long this one waited for the other.

    A barrier lets one of them go before the other one, by as much as a meeting takes. Both are on
    one host, where they share a clock; and both come busy, as from work, not from sleep.
    """
    came = time.perf_counter()
    last = torch.tensor([came], dtype=torch.float64)
    distributed.all_reduce(last, op=distributed.ReduceOp.MAX)
    while time.perf_counter() < float(last) + SPREAD_S:
        pass
    return float(last) - came


class Pace(Callback):
    """Makes every step last ``STEP_S``, and forgets the first ones."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == WARM_UP:
            spent.clear()
            waited.clear()
            self.start = time.perf_counter()
        time.sleep(STEP_S)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.step_s = (time.perf_counter() - self.start) / (NUM_STEPS - WARM_UP)


class SharedEngine(FakeEngine):
    """A fake that behaves as if another rank led its servers."""

    server_urls: Sequence[str] = ()
    lora_alpha: float | None = None

    def join(self, urls: Sequence[str]) -> None:
        self.start()

    def drain(self) -> None:
        """Nothing is sent to the fake while the gate is closed."""

    def follow(self, version: int, urls: Sequence[str]) -> None:
        self._version = version


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", action="store_true", help="engines of the same servers")
    engine = SharedEngine() if parser.parse_args().shared else FakeEngine()
    for owner, name in (
        (RankGroup, "all_gather"),
        (RankSums, "table"),
        (LagMetrics, "pool"),
    ):
        timed(owner, name)
    with tempfile.TemporaryDirectory() as folder:
        tiny_model().save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        rows = [{"prompt": f"{i}+{i}="} for i in range(1000)]
        workflow = sdp.RLVRWorkflow(
            lambda completion, row: len(completion) % 7,
            group_size=2,
            sampling=sdp.SamplingParams(max_new_tokens=4),
        )
        data = sdp.RolloutDataModule(
            rows, workflow, engine=engine, rollout=sdp.RolloutConfig(batch_size=4)
        )
        pace = Pace()
        trainer = L.Trainer(
            callbacks=[sdp.WeightSyncCallback(), pace],
            max_steps=NUM_STEPS,
            accelerator="cpu",
            devices=2,
            strategy="ddp",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(sdp.SegmentWisePPOModule(folder), data)
    steps = NUM_STEPS - WARM_UP
    shares = {
        name: len(times) / steps * statistics.median(times) / STEP_S
        for name, times in spent.items()
    }
    every: list[Any] = [None] * trainer.world_size
    distributed.all_gather_object(every, shares)
    if trainer.is_global_zero:
        for name, times in spent.items():
            number, each_s = len(times) / steps, statistics.median(times)
            print(f"{name}: {number:.0f} a step of {1000 * each_s:.2f} ms on rank 0")
        totals = [sum(v for name, v in one.items() if name not in METRICS) for one in every]
        each = ", ".join(f"rank {rank} {total:.2%}" for rank, total in enumerate(totals))
        metrics = ", ".join(METRICS)
        print(f"agreement and ledger: {each} of {1000 * STEP_S:.0f} ms (without {metrics})")
        print(f"beside {sum(waited) / steps * 1000:.1f} ms of waiting for the other rank's work")


if __name__ == "__main__":
    main()
