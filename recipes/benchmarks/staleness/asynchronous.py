"""Does the harness say what a real run does? The demo through Trainer.fit, on samples of one age.

    python recipes/benchmarks/staleness/asynchronous.py [--lags 2 8] [--seeds 3]

With a bound of k versions and as many groups at once as that allows, an engine that is faster than
the trainer fills the queue: every batch waits k versions. The same cells run in the harness (task
"all sums", 2 minibatches); compared is the mean reward of the batches of the last quarter. Some 5
minutes a pair of runs; what is in asynchronous.jsonl.gz is not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder of the package `staleness`

from staleness.plan import Results
from staleness.summary import estimate

RECIPE = "recipes/arithmetic_cpu"
FOLDER = Path(__file__).parent
STEPS, MINIBATCHES = 40, 2


def run_asynchronous(lag: int, seed: int, steps: int) -> dict[str, Any]:
    """Rewards and lags of every batch of the demo, consumed ``lag`` versions old."""
    import lightning as L

    import sdp_lightning as sdp
    from sdp_lightning.cli.quiet_logs import quiet_logs

    class Batches(L.Callback):
        """Keeps every batch's reward and lag; stands after WeightSyncCallback."""

        def __init__(self) -> None:
            self.rewards, self.lags = list[float](), list[float]()

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            self.rewards.append(round(float(trainer.callback_metrics["train/reward"]), 5))
            self.lags.append(round(float(trainer.callback_metrics["lag/mean"]), 3))

    quiet_logs()
    batches = Batches()
    trainer, model, data = sdp.from_config(
        f"{RECIPE}/config.yaml",
        {
            "seed_everything": seed,
            "trainer.max_steps": steps * MINIBATCHES,
            "trainer.callbacks": None,
            "trainer.logger": False,
            "trainer.enable_progress_bar": False,
            "model.update.num_minibatches": MINIBATCHES,
            "data.val_prompts": None,
            "data.rollout.max_head_lag": lag,
            "data.rollout.max_concurrent": 8 * (lag + 1),
        },
    )
    trainer.callbacks.append(batches)
    trainer.fit(model, data)
    return {"kind": "fit", "lag": lag, "seed": seed, "rewards": batches.rewards,
            "lags": batches.lags}  # fmt: skip


def run_in_harness(lag: int, seed: int, steps: int) -> dict[str, Any]:
    """The same of a cell of the harness."""
    import torch
    from staleness.real_model import LEARNING_RATE
    from staleness.task import real_model, real_task
    from staleness.training import Cell, Scale, run

    torch.set_num_threads(1)
    scale = Scale(steps, 8, learning_rate=LEARNING_RATE, evaluate_every=steps)
    cell = Cell("segment", "whole", lag, MINIBATCHES, seed, task="all sums")
    course = run(real_model(), cell, scale, real_task("all sums"))
    return {"kind": "harness", "lag": lag, "seed": seed, "lags": course.max_lags,
            "rewards": [round(reward, 5) for reward in course.sampled]}  # fmt: skip


KINDS = {"fit": run_asynchronous, "harness": run_in_harness}


def last_quarter(line: dict[str, Any], name: str = "rewards") -> float:
    """Mean over the last quarter of the batches."""
    values = line[name]
    return statistics.fmean(values[-(len(values) // 4) :])


def show(lines: Sequence[dict[str, Any]]) -> None:
    """Both kinds by lag, and the interval of their difference."""
    for lag in sorted({line["lag"] for line in lines}):
        ends = {
            kind: [last_quarter(x) for x in lines if (x["kind"], x["lag"]) == (kind, lag)]
            for kind in KINDS
        }
        ages = [last_quarter(x, "lags") for x in lines if x["lag"] == lag and x["kind"] == "fit"]
        for kind, values in ends.items():
            if values:
                mean = estimate(values)
                print(f"lag {lag}, {kind:8} {mean.mean:.3f} ± {mean.half:.3f} ({mean.count} seeds)")
        if all(len(values) > 1 for values in ends.values()):
            fit, harness = (estimate(ends[kind]) for kind in KINDS)
            half = (fit.half**2 + harness.half**2) ** 0.5
            verdict = "agree" if abs(fit.mean - harness.mean) <= half else "DISAGREE"
            print(
                f"lag {lag}: fit less harness {fit.mean - harness.mean:+.3f} ± {half:.3f}: "
                f"{verdict}; mean lag of the fits {statistics.fmean(ages):.2f}"
            )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lags", nargs="*", type=int, default=[2, 8])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS, help="batches of a run")
    parser.add_argument("--file", type=Path, default=FOLDER / "asynchronous.jsonl.gz")
    parser.add_argument("--one", choices=list(KINDS), help="print one run, of the first lag")
    options = parser.parse_args(argv)
    if options.one:
        print(json.dumps(KINDS[options.one](options.lags[0], options.seeds, options.steps)))
        return
    results = Results(options.file)
    done = {(line["kind"], line["lag"], line["seed"]) for line in results.runs}
    for seed in range(options.seeds):
        for lag in options.lags:
            for kind in KINDS:
                if (kind, lag, seed) not in done:
                    results.append(_in_a_process(kind, lag, seed, options.steps))
                    show(results.runs)
    show(results.runs)


def _in_a_process(kind: str, lag: int, seed: int, steps: int) -> dict[str, Any]:
    arguments = ["--one", kind, "--lags", str(lag), "--seeds", str(seed), "--steps", str(steps)]
    done = subprocess.run(
        [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
