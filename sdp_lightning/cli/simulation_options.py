"""Options of ``sdp-lightning simulate`` and ``plan``: no speed or length is made up."""

from __future__ import annotations

import argparse
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

PAGE = "docs/how-to/plan.md says how to measure it"
_SETTINGS = ("batch_size", "max_head_lag", "max_concurrent", "on_overdue", "overlap_publish")


@dataclass(frozen=True)
class Inputs:
    """What is simulated, from the options and the runs that they name.

    Attributes:
        rollout: settings of the rollouts.
        engines: the replicas.
        trainer: the trainer's times.
        lengths: lengths of the groups.
        reward_s: seconds of a group's reward.
        decode: the points through which the line of a decode pass goes.
        run: the first run that was named; None if none was.
        notes: what a user should know of it, as sentences.
        warmup: first steps that are not measured.
    """

    rollout: RolloutConfig
    engines: EngineModel
    trainer: TrainerModel
    lengths: Lengths
    reward_s: float
    decode: tuple[DecodePoint, ...]
    run: MeasuredRun | None
    notes: tuple[str, ...]
    warmup: int

    @classmethod
    def read(cls, options: argparse.Namespace, replicas: int) -> Inputs:
        """Inputs of a run with so many ``replicas``. ``ConfigError`` names what is not given."""
        runs = [read_measured(folder) for folder in options.run]
        run = runs[0] if runs else None
        points = options.decode or [(r.decode[0] / replicas, r.decode[1]) for r in runs]
        if not points:
            raise ConfigError(
                "--decode ROWS:SECONDS is not given: seconds of a token at a number of rows of one "
                f"engine, at two of them at least; or --run of a finished run. {PAGE}."
            )
        if options.decode and runs[1:]:
            raise ConfigError("a second --run tells the speed of decoding only: --decode has it.")
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
        if options.prompt_tokens and not options.prefill_token_s:
            notes.append("--prompt-tokens has no effect: --prefill-token-s is 0.")
        if run is not None and run.rollout.missing_proximal == "drop":
            notes.append("missing_proximal='drop' of the run is left out: no segment is scored.")
        reward_s = options.reward_s if run is None or options.reward_s else run.reward_s
        rollout = _rollout(options, run)
        return cls(
            rollout=rollout,
            engines=engines,
            trainer=_trainer(options, run),
            lengths=_lengths(options),
            reward_s=reward_s,
            decode=tuple(points),
            run=run,
            notes=tuple(notes),
            warmup=rollout.max_head_lag + 2 if options.warmup is None else options.warmup,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers by name, for JSON."""
        return {
            **{name: getattr(self.rollout, name) for name in _SETTINGS},
            **vars(self.engines),
            **vars(self.trainer),
            "reward_s": self.reward_s,
            "mean_group_tokens": self.lengths.mean_tokens,
            "prompt_tokens": self.lengths.prompt_tokens,
        }


def option_parser(command: str, *, steps: int) -> argparse.ArgumentParser:
    """The options that both commands have.

    Args:
        command: name of the command.
        steps: default number of steps.
    """
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
    base = (
        RolloutConfig()
        if run is None
        else replace(run.rollout, num_epochs=None, missing_proximal="behavior")
    )
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
