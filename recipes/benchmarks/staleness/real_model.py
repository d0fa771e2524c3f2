"""Which estimator learns from old samples, on SmolLM2-135M, as the demo trains it.

    python recipes/benchmarks/staleness/real_model.py [--task sums] [--stage 1]
    python recipes/benchmarks/staleness/real_model.py --methods segment --lags 8 --seeds 1

Samples of a known age come from a history of weights, as in ablation.py; the layers that are not
trained are computed once a token. Runs are added to real_model.jsonl.gz as they end, and those that
are in it are not repeated: it may be stopped at any moment. Two runs go side by side, one thread
each; one of sums takes 80 to 130 s of CPU, most of it waiting for memory, and one of counting more.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder of the package `staleness`

from staleness import regimes
from staleness.methods import ON_REAL_MODELS
from staleness.plan import STALENESS, Results, representative
from staleness.policies import Shared
from staleness.probe import probe
from staleness.report import exact, expanded
from staleness.summary import Table
from staleness.task import REAL_TASKS, Task, real_model, real_task
from staleness.training import Cell, Run, Scale, record, run

FOLDER = Path(__file__).parent
FIGURE = Path(__file__).parents[3] / "docs" / "assets" / "drift.png"
LEARNING_RATE = 5e-5  # of the recipe
BEST = ("segment", "past", "behavior", "proximal", "origin", "bridge^0.5", "tempered bridge")
MANY = [
    *BEST, "bridge^0.25", "bridge^0.75", "segment, log-linear q", "TIS", "segment, ESS rate",
    "uncorrected",
]  # fmt: skip
KEEPING_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}  # of glibc
LAGS = {"1": (2, 8), "2": (0, 2, 4, 8, 16)}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=REAL_TASKS, default="sums")
    parser.add_argument("--stage", choices=("1", "2", "probe", "report"), default="1")
    parser.add_argument("--methods", nargs="*", choices=list(ON_REAL_MODELS), help="only these")
    parser.add_argument("--lags", nargs="*", type=int, help="only these; those of the stage else")
    parser.add_argument("--rates", nargs="*", type=float, default=[1.0, 2.0], help="of 5e-5")
    parser.add_argument("--minibatches", nargs="*", type=int, default=[2])
    parser.add_argument("--staleness", nargs="*", choices=STALENESS, help="only these")
    parser.add_argument("--engine-bits", type=int, help="of its mantissa: 8 is bfloat16's")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on")
    parser.add_argument("--steps", type=int, default=40, help="batches of a run")
    parser.add_argument("--groups", type=int, default=8, help="prompts of a batch")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side")
    parser.add_argument("--file", type=Path, default=FOLDER / "real_model.jsonl.gz")
    parser.add_argument("--tables", type=Path, default=FOLDER / "real_model.md")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="the file to draw")
    return parser.parse_args(argv)


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """What to run: a seed after the other, methods that share their first samples in a row."""
    methods = options.methods or (MANY if options.stage == "1" else BEST)
    lags = LAGS.get(options.stage, ()) if options.lags is None else options.lags
    kinds = options.staleness or (STALENESS if options.stage == "2" else STALENESS[:1])
    places = itertools.product(range(options.seeds), lags, kinds, options.minibatches)
    for seed, lag, staleness, minibatches in places:
        if lag == 0 and staleness != kinds[0]:
            continue
        for rate, method in itertools.product(options.rates, methods):
            yield Cell(
                method, staleness, lag, minibatches, seed, rate, options.engine_bits, options.task
            )


@cache
def _ready(name: str, group_size: int) -> tuple[Any, Task, Shared]:
    """Model, task, and what runs share, in this process."""
    torch.set_num_threads(1)
    model, task = real_model(), real_task(name)
    return model, task, Shared(model, task, group_size)


def _end_with_the_parent() -> None:
    """A run of minutes does not outlive the driver that would write it down."""
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def compute(cell: Cell, scale: Scale) -> dict[str, Any]:
    """A line of results."""
    model, task, shared = _ready(cell.task, scale.group_size)
    begin = time.process_time()
    line = record(cell, scale, run(model, cell, scale, task, shared))
    return line | {"cpu_s": round(time.process_time() - begin, 1)}


def compute_gradients(cell: Cell, scale: Scale) -> list[dict[str, Any]]:
    """A line for each method: its gradient halfway against that of fresh samples."""
    model, task, shared = _ready(cell.task, scale.group_size)
    this = Run(model, cell, scale, task, shared)
    step = scale.num_steps // 2
    return list(probe(this, (step,), num_batches=8, num_fresh=24, methods=MANY))


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    scale = Scale(
        num_steps=options.steps,
        num_groups=options.groups,
        learning_rate=LEARNING_RATE,
    )
    results = Results(options.file)
    if options.stage == "probe":
        _probe_all(scale, results, options)
    elif options.stage != "report":
        wanted, done = dict.fromkeys(map(representative, cells(options))), results.done
        _compute_all([cell for cell in wanted if cell not in done], scale, results, options)
    regimes.write(results, FOLDER / "results.jsonl.gz", options.tables, options.figure, MANY)
    _show(results, options.task)


def _compute_all(
    left: list[Cell], scale: Scale, results: Results, options: argparse.Namespace
) -> None:
    """Compute cells side by side; each is written as it ends."""
    start, number = time.monotonic(), len(left)
    os.environ.update(KEEPING_MEMORY)  # a fresh page costs as much as what is written to it
    spawn = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(options.workers, spawn, _end_with_the_parent) as pool:
        running: set[Future[dict[str, Any]]] = set()
        done = 0
        while left or running:
            is_over = time.monotonic() - start > 60 * options.minutes
            while left and not is_over and len(running) < options.workers:
                running.add(pool.submit(compute, left.pop(0), scale))
            if not running:
                return
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for line in (future.result() for future in ended):
                results.append(line)
                done += 1
                each = (time.monotonic() - start) / done
                what = f"{line['method']}, {line['staleness']} {line['lag']}, rate {line['rate']}"
                print(
                    f"{done}/{number} {what}, seed {line['seed']}: {line['final']:.3f}; "
                    f"{each * (number - done) / 60:.0f} min left",
                    flush=True,
                )


def _probe_all(scale: Scale, results: Results, options: argparse.Namespace) -> None:
    """Take the gradients along runs of the default that are not there yet, one run at a time."""
    there = [line for line in results.gradients if line.get("task") == options.task]
    done = {(line["lag"], line["seed"], line["rate"]) for line in there}
    lags = options.lags or [8]
    for place in itertools.product(lags, range(options.seeds), options.rates):
        if place not in done:
            lag, seed, rate = place
            cell = Cell("segment", "whole", lag, seed=seed, rate=rate, task=options.task)
            results.append(*compute_gradients(cell, scale))


def _show(results: Results, task: str) -> None:
    """The mean over seeds at the end, of every method and place."""
    lines = exact(line for line in results.runs if line.get("task") == task)
    table = Table(expanded(lines, MANY))
    for place in table.places:
        ends = {name: table.level(place, name) for name in table.methods(place)}
        print(f"\n{task}, {place}")
        for name, end in sorted(ends.items(), key=lambda item: -item[1].mean if item[1] else 0):
            assert end is not None
            print(f"  {name:26} {end.mean:.3f} +- {end.error:.3f} ({end.count} seeds)")


if __name__ == "__main__":
    main()
