"""Which estimator learns from old samples.

    python recipes/benchmarks/staleness/ablation.py [--stage STAGE]

Trains the task of recipes/tiny_cpu with samples 0 to 8 policy versions old, by every estimator of
the library, on one core, some 6 s a run. Results are added to results.jsonl.gz, a line a run; runs
that are in it are not repeated, so an interrupted job goes on. Tables and figure show what the file
holds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder of the package `staleness`

from staleness import figure, report
from staleness.methods import DEFAULT, METHODS
from staleness.plan import Results, controls, engines, fill, stage_1, stage_2
from staleness.probe import probe
from staleness.task import warm_model
from staleness.training import Cell, Run, Scale, record, run

STAGES = ("1", "2", "controls", "engines", "probe", "report")
FOLDER = Path(__file__).parent
FIGURE = Path(__file__).parents[3] / "docs" / "assets" / "staleness.png"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=STAGES, default="1")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--lags", nargs="*", type=int, help="only these; all unless given")
    parser.add_argument("--minibatches", nargs="*", type=int, default=[1, 2, 4])
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of results and tables")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="the file to draw")
    parser.add_argument("--steps", type=int, default=Scale.num_steps)
    parser.add_argument("--groups", type=int, default=Scale.num_groups)
    return parser.parse_args(argv)


def chosen_cells(options: argparse.Namespace) -> Iterable[Cell]:
    """What to run, in order."""
    seeds = range(options.seeds)
    cells = {
        "1": lambda: stage_1(seeds),
        "2": lambda: stage_2(options.methods, seeds),
        "controls": lambda: controls(options.methods, seeds),
        "engines": lambda: engines(options.methods, seeds),
        "report": lambda: iter(()),
    }[options.stage]()
    return (
        cell
        for cell in cells
        if cell.method in options.methods
        and cell.minibatches in options.minibatches
        and (options.lags is None or cell.lag in options.lags)
    )


def main(argv: Sequence[str] | None = None, model: Any = None) -> None:
    options = parse(argv)
    torch.set_num_threads(1)
    scale = Scale(num_steps=options.steps, num_groups=options.groups)
    results = Results(options.folder / "results.jsonl.gz")
    start = time.monotonic()
    if options.stage == "probe":
        run_probe(model or warm_model(), scale, options, results)
    elif options.stage != "report":
        model = model or warm_model()

        def compute(cell: Cell) -> dict[str, Any]:
            begin = time.process_time()
            line = record(cell, scale, run(model, cell, scale))
            line["cpu_s"] = round(time.process_time() - begin, 1)
            print(json.dumps({**vars(cell), "final": line["final"], "cpu_s": line["cpu_s"]}))
            return line

        fill(
            results,
            chosen_cells(options),
            compute,
            may_go_on=lambda: time.monotonic() - start < 60 * options.minutes,
        )
    runs = results.runs
    report.write(runs, options.folder / "tables.md", results.gradients)
    figure.draw(report.exact(runs), options.figure)


def run_probe(model: Any, scale: Scale, options: argparse.Namespace, results: Results) -> None:
    """Gradients of all methods along runs of the default one, those that are not there yet."""
    done = {(line["lag"], line["seed"]) for line in results.gradients}
    for seed in range(options.seeds):
        for lag in options.lags or (4, 8):
            if (lag, seed) in done:
                continue
            this = Run(model, Cell(DEFAULT, "whole", lag, seed=seed), scale)
            results.append(*probe(this, (12, 24), num_batches=10, num_fresh=20))


if __name__ == "__main__":
    main()
