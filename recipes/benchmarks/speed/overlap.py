"""Does generation overlap training? ``python recipes/benchmarks/speed/overlap.py``.

An engine whose replies take T_gen seconds and a trainer whose steps take T_train run once with
rollouts that go on while the trainer trains (max_head_lag=2), and once strictly in turn
(max_head_lag=0), in one process. The floor of a step is max(T_gen, T_train), not their sum.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import lightning as L

import sdp_lightning as sdp
from sdp_lightning.cli.quiet_logs import quiet_logs
from sdp_lightning.testing import FakeEngine, tiny_model, tiny_tokenizer


class TimedSteps(L.Callback):
    """Makes a training step last ``train_s``, and keeps the time from step to step."""

    def __init__(self, train_s: float) -> None:
        self.train_s = train_s
        self.steps: list[float] = []
        self._began = self._last = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self._began = time.monotonic()

    def on_train_batch_end(self, *_: Any) -> None:
        time.sleep(max(0.0, self.train_s - (time.monotonic() - self._began)))
        now = time.monotonic()
        self.steps.append(now - self._last)
        self._last = now


def measure(folder: str, *, gen_s: float, train_s: float, steps: int, max_head_lag: int) -> float:
    """Median seconds a step, without the first three."""
    workflow = sdp.RLVRWorkflow(
        lambda completion, row: float(len(completion) % 2),
        group_size=4,
        sampling=sdp.SamplingParams(max_new_tokens=8),
    )
    data = sdp.RolloutDataModule(
        [{"prompt": f"{n}+1="} for n in range(64)],
        workflow,
        engine=FakeEngine(8, latency_s=gen_s, chunks=8),  # 8 tokens: a reply takes all of gen_s
        rollout=sdp.RolloutConfig(batch_size=4, max_concurrent=4, max_head_lag=max_head_lag),
    )
    timed = TimedSteps(train_s)
    trainer = L.Trainer(
        max_steps=steps,
        callbacks=[timed, sdp.WeightSyncCallback()],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(sdp.SegmentWisePPOModule(folder), data)
    return statistics.median(timed.steps[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=15)
    options = parser.parse_args()
    quiet_logs()
    print("T_gen  T_train  step   of max  of sum   in turn: step  of sum")
    with tempfile.TemporaryDirectory() as folder:
        tiny_model().save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        for gen_s, train_s in ((0.4, 0.4), (0.6, 0.3), (0.3, 0.6)):
            times = {
                lag: measure(
                    folder, gen_s=gen_s, train_s=train_s, steps=options.steps, max_head_lag=lag
                )
                for lag in (2, 0)
            }
            floor, total = max(gen_s, train_s), gen_s + train_s
            print(
                f"{gen_s:5.2f}  {train_s:7.2f}  {times[2]:5.3f}  {times[2] / floor:6.2f}  "
                f"{times[2] / total:6.2f}  {times[0]:14.3f}  {times[0] / total:6.2f}"
            )


if __name__ == "__main__":
    main()
