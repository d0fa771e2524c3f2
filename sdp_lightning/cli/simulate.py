"""``sdp-lightning simulate`` and ``plan``: what they run, and the tables that they print."""

from __future__ import annotations

import contextlib
import gc
import json
import sys
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

from sdp_lightning.cli.plan_page import write_plan_page
from sdp_lightning.cli.simulation_options import PAGE, Inputs, option_parser
from sdp_lightning.errors import ConfigError
from sdp_lightning.rollout.simulation.plan import NEAR, Plan, Plans, Pool, make_plans
from sdp_lightning.rollout.simulation.simulate import simulate
from sdp_lightning.rollout.simulation.summary import SimulationSummary, summarize

MOST_PLANS = 20  # lines of a table


def run_simulate(arguments: Sequence[str]) -> str:
    """The table, or the JSON, of one simulated run."""
    parser = option_parser("simulate", steps=100)
    parser.add_argument("--replicas", type=int, default=1, help="engines that sample (1)")
    options = parser.parse_args(arguments)
    inputs = Inputs.read(options, options.replicas)
    trainer, engines = inputs.trainer, inputs.engines
    with _modules_set_aside():
        steps = simulate(
            inputs.rollout,
            engines,
            trainer,
            inputs.lengths,
            num_steps=options.steps,
            reward_s=inputs.reward_s,
        )
    summary = summarize(steps, inputs.rollout, engines, warmup=inputs.warmup)
    measured = inputs.run.summary if inputs.run is not None else None
    if options.json:
        both = {"simulated": summary.as_dict(), "inputs": inputs.as_dict()}
        return json.dumps(both if measured is None else both | {"measured": measured.as_dict()})
    lines = [*inputs.notes, f"{summary.steps} steps on a virtual clock, after the warm-up:", ""]
    return "\n".join([*lines, *_summary_table(summary, measured)])


def run_plan(arguments: Sequence[str]) -> str:
    """The table, or the JSON, of how to split GPUs."""
    parser = option_parser("plan", steps=30)
    parser.add_argument(
        "--gpus", type=int, required=True, help="all GPUs, of sampling and training"
    )
    parser.add_argument("--replica-gpus", type=int, default=1, help="GPUs of one engine (1)")
    parser.add_argument(
        "--trainer-gpus", type=int, default=1, help="GPUs at which --train-token-s holds (1)"
    )
    parser.add_argument(
        "--least-train-gpus", type=int, default=1, help="fewest GPUs that hold the trainer (1)"
    )
    parser.add_argument("--html", metavar="FILE", help="write charts of all plans to a page")
    options = parser.parse_args(arguments)
    inputs = Inputs.read(options, replicas=1)
    if len({rows for rows, _ in inputs.decode}) < 2:
        raise ConfigError(
            "plan needs the seconds of a decode pass at two numbers of rows at least, as more "
            f"groups at once would cost nothing otherwise: give --decode 1:S 64:S, or --run of two "
            f"runs of different concurrency; {PAGE}."
        )
    pool = Pool(
        num_gpus=options.gpus,
        replica=inputs.engines,
        trainer=inputs.trainer,
        replica_gpus=options.replica_gpus,
        trainer_gpus=options.trainer_gpus,
        least_train_gpus=options.least_train_gpus,
    )
    if options.max_concurrent is None:
        inputs = replace(inputs, rollout=replace(inputs.rollout, max_concurrent=None))
    with _modules_set_aside():
        plans = make_plans(
            pool,
            inputs.rollout,
            inputs.lengths,
            num_steps=options.steps,
            warmup=inputs.warmup,
            reward_s=inputs.reward_s,
            on_plan=_progress,
        )
    if options.html is not None:
        write_plan_page(plans, options.html, f"Plans for {options.gpus} GPUs")
    if options.json:
        return json.dumps({"plans": [_plan_dict(plan, plans) for plan in plans.plans]})
    return "\n".join([*inputs.notes, *_plan_table(plans, options.gpus)])


@contextlib.contextmanager
def _modules_set_aside() -> Generator[None]:
    """Keep the garbage collector from what is imported: a fifth of the time goes into that."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


# Tables -------------------------------------------------------------------------------------------


def _summary_table(summary: SimulationSummary, measured: SimulationSummary | None) -> list[str]:
    columns = [_cells(summary)] + ([] if measured is None else [_cells(measured)])
    heads = ["", "simulated"] + ([] if measured is None else ["measured"])
    rows = [heads, *([name, *(column[name] for column in columns)] for name in columns[0])]
    widths = [max(len(row[n]) for row in rows) for n in range(len(heads))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _cells(summary: SimulationSummary) -> dict[str, str]:
    lags = ", ".join(f"{lag}: {share:.0%}" for lag, share in summary.lag_shares.items())
    idle = summary.engine_idle_share
    return {
        "tokens trained a second": f"{summary.tokens_per_s:,.4g}",
        "step, median": f"{summary.step_s:.4g} s",
        "step, 90th percentile": f"{summary.step_p90_s:.4g} s",
        "mean lag of trained tokens": f"{summary.mean_lag:.3g}",
        "lags": lags or "-",
        "dropped, of sampled tokens": f"{summary.dropped_share:.1%}",
        "dropped groups": f"{summary.dropped_groups:,}",
        "length of trained / all": f"{summary.length_ratio:.3g}",
        "masked, of trained tokens": f"{summary.masked_share:.1%}",
        "trainer waits": f"{summary.wait_share:.1%}",
        "trainer trains": f"{summary.train_share:.1%}",
        "trainer publishes": f"{summary.publish_share:.1%}",
        "engines idle": "-" if idle is None else f"{idle:.1%}",
        "rows of an engine": f"{summary.rows:.3g}",
        "groups at once": f"{summary.concurrency:,}",
        "most groups in the queue": f"{summary.max_pending:,}",
    }


def _plan_table(plans: Plans, num_gpus: int) -> list[str]:
    shown = plans.plans[:MOST_PLANS]
    head = (
        "  sample  train  groups at once  tokens/s  step s  90 %    lag  dropped  trainer waits  "
        "engines idle"
    )
    lines = [head, *(_plan_line(p, plans) for p in shown)]
    if plans.best not in shown:
        lines.append(_plan_line(plans.best, plans))
    best, left = plans.best, len(plans.plans) - len(shown)
    return [
        *lines,
        *([f"... and {left} slower ones"] if left > 0 else []),
        "",
        f"* {best.sample_gpus} of {num_gpus} GPUs sample, max_concurrent={best.max_concurrent}: "
        f"the least stale plan within {NEAR:.0%} of the fastest.",
        f"{plans.num_skipped} plans were not simulated: they cannot come near it.",
    ]


def _plan_line(plan: Plan, plans: Plans) -> str:
    s = plan.summary
    return (
        f"{'*' if plan is plans.best else ' '} {plan.sample_gpus:6,}  {plan.train_gpus:5,}  "
        f"{plan.max_concurrent:14,}  {s.tokens_per_s:8,.0f}  {s.step_s:6.4g}  {s.step_p90_s:5.4g}  "
        f"{s.mean_lag:5.3g}  {s.dropped_share:7.1%}  {s.wait_share:13.1%}  "
        f"{s.engine_idle_share or 0:12.1%}"
    )


def _plan_dict(plan: Plan, plans: Plans) -> dict[str, Any]:
    split = {"sample_gpus": plan.sample_gpus, "train_gpus": plan.train_gpus}
    rest = {"max_concurrent": plan.max_concurrent, "is_best": plan is plans.best}
    return split | rest | plan.summary.as_dict()


def _progress(done: int, of: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done} of {of} plans", end="\r", file=sys.stderr)
