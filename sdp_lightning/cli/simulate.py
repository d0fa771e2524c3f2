"""``sdp-lightning simulate`` and ``plan``: their options, and the tables that they print."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sdp_lightning.cli.measured_run import (
    DecodePoint,
    MeasuredRun,
    fit_decode,
    read_lengths,
    read_measured,
)
from sdp_lightning.config import RolloutConfig
from sdp_lightning.errors import ConfigError
from sdp_lightning.rollout.simulation.models import EngineModel, Lengths, TrainerModel
from sdp_lightning.rollout.simulation.plan import NEAR, Plan, Plans, Pool, make_plans
from sdp_lightning.rollout.simulation.simulate import simulate
from sdp_lightning.rollout.simulation.summary import SimulationSummary, summarize

MOST_PLANS = 20  # lines of a table
PAGE = "docs/how-to/plan.md says how to measure it"
_SETTINGS = ("batch_size", "max_head_lag", "max_concurrent", "on_overdue", "overlap_publish")


def run_simulate(arguments: Sequence[str]) -> str:
    """The table, or the JSON, of one simulated run."""
    parser = _parser("simulate", steps=100)
    parser.add_argument("--replicas", type=int, default=1, help="engines that sample (1)")
    options = parser.parse_args(arguments)
    inputs = _Inputs.read(options, options.replicas)
    trainer, engines = inputs.trainer, inputs.engines
    steps = simulate(
        inputs.rollout,
        engines,
        trainer,
        inputs.lengths,
        num_steps=options.steps,
        reward_s=inputs.reward_s,
    )
    summary = summarize(steps, inputs.rollout, engines, warmup=_warmup(options, inputs.rollout))
    measured = inputs.run.summary if inputs.run is not None else None
    if options.json:
        both = {"simulated": summary.as_dict(), "inputs": inputs.as_dict()}
        return json.dumps(both if measured is None else both | {"measured": measured.as_dict()})
    lines = [*inputs.notes, f"{summary.steps} steps on a virtual clock, after the warm-up:", ""]
    return "\n".join([*lines, *_summary_table(summary, measured)])


def run_plan(arguments: Sequence[str]) -> str:
    """The table, or the JSON, of how to split GPUs."""
    parser = _parser("plan", steps=30)
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
    options = parser.parse_args(arguments)
    inputs = _Inputs.read(options, replicas=1)
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
    plans = make_plans(
        pool,
        inputs.rollout,
        inputs.lengths,
        num_steps=options.steps,
        warmup=_warmup(options, inputs.rollout),
        reward_s=inputs.reward_s,
        on_plan=_progress,
    )
    if options.json:
        return json.dumps({"plans": [_plan_dict(plan, plans) for plan in plans.plans]})
    return "\n".join([*inputs.notes, *_plan_table(plans, options.gpus)])


@dataclass(frozen=True)
class _Inputs:
    """What is simulated, from the options and the runs that they name."""

    rollout: RolloutConfig
    engines: EngineModel
    trainer: TrainerModel
    lengths: Lengths
    reward_s: float
    decode: tuple[DecodePoint, ...]
    run: MeasuredRun | None
    notes: tuple[str, ...]

    @classmethod
    def read(cls, options: argparse.Namespace, replicas: int) -> _Inputs:
        runs = [read_measured(folder) for folder in options.run]
        run = runs[0] if runs else None
        points = options.decode or [(r.decode[0] / replicas, r.decode[1]) for r in runs]
        if not points:
            raise ConfigError(
                "--decode ROWS:SECONDS is not given: seconds of a token at a number of rows of one "
                f"engine, at two of them at least; or --run of a finished run. {PAGE}."
            )
        pass_s, row_s = fit_decode(points)
        engines = EngineModel(
            num_replicas=replicas,
            pass_s=pass_s,
            row_s=row_s,
            max_rows=options.max_rows,
            prefill_token_s=options.prefill_token_s,
            recompute_kv=options.recompute_kv,
        )
        notes = [f"decode pass: {pass_s:.4g} s + {row_s:.4g} s a row."]
        if len({rows for rows, _ in points}) < 2:
            notes.append(
                f"It was measured at {points[0][0]:.3g} rows only: with many more or fewer rows "
                "this run is wrong. Give a second point."
            )
        reward_s = options.reward_s if run is None or options.reward_s else run.reward_s
        return cls(
            rollout=_rollout(options, run),
            engines=engines,
            trainer=_trainer(options, run),
            lengths=_lengths(options),
            reward_s=reward_s,
            decode=tuple(points),
            run=run,
            notes=tuple(notes),
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            **{name: getattr(self.rollout, name) for name in _SETTINGS},
            **vars(self.engines),
            **vars(self.trainer),
            "reward_s": self.reward_s,
            "mean_group_tokens": self.lengths.mean_tokens,
            "prompt_tokens": self.lengths.prompt_tokens,
        }


def _parser(command: str, *, steps: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"sdp-lightning {command}",
        allow_abbrev=False,
        epilog="What is not given is taken from the first --run, as far as its metrics tell.",
    )
    add = parser.add_argument
    add("--run", metavar="RUN_DIR", action="append", default=[], help="a finished run: its speeds")
    add("--batch-size", type=int, help="groups of a training step")
    add("--max-head-lag", type=int, help="most versions that a token may be old")
    add("--max-concurrent", type=_concurrency, metavar="N|auto", help="most groups at once")
    add("--on-overdue", choices=("drop", "wait", "mask"))
    add("--overlap-publish", action="store_true", default=None)
    add("--recording", metavar="DIR", help="lengths: groups of a recording, with replacement")
    add("--median-tokens", type=float, help="lengths: median of the sampled tokens")
    add("--p95-tokens", type=float, help="lengths: 95th percentile, of a lognormal distribution")
    add("--max-tokens", type=int, help="lengths: the token budget, at which they are cut")
    add("--group-size", type=int, help="trajectories of a group")
    add("--prompt-tokens", type=int, help="tokens of a prompt (0, or the recording's mean)")
    add(
        "--decode",
        type=_point,
        nargs="+",
        metavar="ROWS:S",
        help="seconds of a token at so many rows of one engine",
    )
    add("--max-rows", type=int, default=256, help="most rows of one engine at once (256)")
    add("--prefill-token-s", type=float, default=0.0, help="seconds to prefill a token (0)")
    add("--recompute-kv", action="store_true", help="prefill rows in flight after each publish")
    add("--train-token-s", type=float, help="seconds of the trainer for a sampled token")
    add("--train-step-s", type=float, help="seconds of a training step beside its tokens (0)")
    add("--stage-s", type=float, help="seconds of a publish while engines sample")
    add("--load-s", type=float, help="seconds of a publish in which engines stand still")
    add("--reward-s", type=float, default=0.0, help="seconds of a group's reward")
    add("--steps", type=int, default=steps, help=f"training steps to simulate ({steps})")
    add("--warmup", type=int, help="first steps that are not measured (max_head_lag + 2)")
    add("--seed", type=int, default=0, help="seed of the lengths (0)")
    add("--json", action="store_true", help="print JSON in place of a table")
    return parser


def _point(text: str) -> DecodePoint:
    rows, _, seconds = text.partition(":")
    try:
        return float(rows), float(seconds)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not ROWS:SECONDS, as 64:0.02") from error


def _concurrency(text: str) -> int | str:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of groups nor auto")
    return text if text == "auto" else int(text)


def _rollout(options: argparse.Namespace, run: MeasuredRun | None) -> RolloutConfig:
    given = {name: getattr(options, name) for name in _SETTINGS}
    given = {name: value for name, value in given.items() if value is not None}
    if run is None and (missing := [n for n in _SETTINGS[:2] if n not in given]):
        flag = missing[0].replace("_", "-")
        raise ConfigError(f"--{flag} is not given: {missing[0]} of the rollout settings.")
    base = RolloutConfig() if run is None else replace(run.rollout, num_epochs=None)
    return replace(base, **given)


def _trainer(options: argparse.Namespace, run: MeasuredRun | None) -> TrainerModel:
    given = {
        "token_s": options.train_token_s,
        "step_s": options.train_step_s,
        "stage_s": options.stage_s,
        "load_s": options.load_s,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if run is not None:
        return replace(run.trainer, **given)
    for name, flag in (("token_s", "train-token-s"), ("stage_s", "stage-s"), ("load_s", "load-s")):
        if name not in given:
            raise ConfigError(f"--{flag} is not given; {PAGE}. Or --run of a finished run.")
    return TrainerModel(**given)


def _lengths(options: argparse.Namespace) -> Lengths:
    names = ("median_tokens", "p95_tokens", "max_tokens", "group_size")
    flags = {f"--{name.replace('_', '-')}": getattr(options, name) for name in names}
    if options.recording is not None:
        if both := [flag for flag, value in flags.items() if value is not None]:
            raise ConfigError(f"--recording has the lengths already: leave out {both[0]}.")
        return read_lengths(
            options.recording, prompt_tokens=options.prompt_tokens, seed=options.seed
        )
    if missing := [flag for flag, value in flags.items() if value is None]:
        raise ConfigError(
            f"{missing[0]} is not given: lengths are those of --recording DIR, or given by "
            f"{', '.join(flags)}."
        )
    return Lengths.lognormal(
        median=options.median_tokens,
        p95=options.p95_tokens,
        maximum=options.max_tokens,
        group_size=options.group_size,
        prompt_tokens=options.prompt_tokens or 0,
        seed=options.seed,
    )


def _warmup(options: argparse.Namespace, rollout: RolloutConfig) -> int:
    return rollout.max_head_lag + 2 if options.warmup is None else options.warmup


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
