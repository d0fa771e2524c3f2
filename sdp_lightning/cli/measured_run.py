"""Speeds, lengths and outcomes of a finished run, as the simulator takes and compares them.

Of decoding a run tells one point: the seconds of a token at the number of rows that it had. Runs of
several concurrencies tell the line through their points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdp_lightning.config import RolloutConfig
from sdp_lightning.errors import ConfigError
from sdp_lightning.observability.recording.reader import Recording
from sdp_lightning.observability.report.files import RunConfigs, read_run
from sdp_lightning.observability.report.series import lag_tokens, values_of
from sdp_lightning.rollout.simulation.models import Lengths, TrainerModel
from sdp_lightning.rollout.simulation.summary import SimulationSummary
from sdp_lightning.training.metrics.names import MetricRow

DecodePoint = tuple[float, float]  # rows of a replica, seconds of a pass


@dataclass(frozen=True)
class MeasuredRun:
    """A finished run without its first steps, in which its pipeline filled.

    Attributes:
        rollout: its settings; the defaults if they were not kept.
        trainer: the trainer's mean times.
        decode: mean rows of all replicas while any sampled, and seconds of a token of one row.
        reward_s: mean seconds of a trajectory outside of its requests.
        summary: what it came to, as far as its metrics tell: not the engines' idle share.
    """

    rollout: RolloutConfig
    trainer: TrainerModel
    decode: DecodePoint
    reward_s: float
    summary: SimulationSummary


def read_measured(folder: str) -> MeasuredRun:
    """The speeds of the run in ``folder``, whose metrics ``RunReport`` or a ``CSVLogger`` wrote.

    Raises:
        ConfigError: if there is no run, or it has too few steps or metrics.
    """
    run = read_run(Path(folder))
    rollout = RunConfigs.read(run.settings).rollout or RolloutConfig()
    steps = run.steps[min(rollout.max_head_lag + 1, len(run.steps) // 2) :]
    needed = ("time/step_s", "speed/train_tokens_per_s", "rollout_time/sample_s", "train/length")
    missing = [name for name in needed if not any(name in row for row in steps)]
    if len(steps) < 2 or missing:
        what = f"no {', '.join(missing)}" if missing else f"{len(run.steps)} steps"
        raise ConfigError(
            f"the run in {folder} has {what}: speeds are measured over at least 4 steps of a fit "
            "with RunReport() or a CSVLogger."
        )
    return MeasuredRun(
        rollout=rollout,
        trainer=_trainer_of(steps, rollout),
        decode=_decode_of(steps),
        reward_s=_mean(steps, "rollout_time/reward_s") + _mean(steps, "rollout_time/tool_s"),
        summary=_summary_of(steps, rollout),
    )


def read_lengths(folder: str, *, prompt_tokens: int | None, seed: int) -> Lengths:
    """Lengths of the groups in a recording, which are those trained on, and none that was dropped.

    Args:
        folder: the recording's.
        prompt_tokens: tokens of a prompt; None is the recording's mean.
        seed: seed of the draws.
    """
    groups: list[list[int]] = []
    prompts: list[int] = []
    for batch in Recording(folder):
        for group in batch.groups:
            groups.append([each.num_sampled for each in group.trajectories])
            prompts += [each.num_tokens - each.num_sampled for each in group.trajectories]
    mean = round(sum(prompts) / max(1, len(prompts)))
    return Lengths.recorded(
        groups, prompt_tokens=mean if prompt_tokens is None else prompt_tokens, seed=seed
    )


def fit_decode(points: Sequence[DecodePoint]) -> tuple[float, float]:
    """``(a, b)`` of the line a + b rows through ``points``, by least squares, neither below 0.

    Raises:
        ConfigError: if there is no point, or one that is no time.
    """
    if not points or not all(
        0 < rows < np.inf and 0 < seconds < np.inf for rows, seconds in points
    ):
        raise ConfigError(
            f"--decode needs points ROWS:SECONDS of numbers above 0, got {list(points)}."
        )
    rows, seconds = np.array(points).T
    if np.ptp(rows) == 0:
        return float(seconds.mean()), 0.0
    slope = float(np.polyfit(rows, seconds, 1)[0])
    start = float((seconds - slope * rows).mean())
    if slope < 0:
        return float(seconds.mean()), 0.0
    if start < 0:
        return 0.0, float(rows @ seconds / (rows @ rows))
    return start, slope


def _trainer_of(steps: Sequence[MetricRow], rollout: RolloutConfig) -> TrainerModel:
    phases = [f"time/{name}_s" for name in ("wait", "train", "score", "publish", "evaluate")]
    rest = _mean(steps, "time/step_s") - sum(_mean(steps, name) for name in phases)
    paused_s = _mean(steps, "time/paused_s")
    stage_s = _mean(steps, "time/publish_s") - paused_s
    if rollout.overlap_publish:
        stage_s = _mean(steps, "publish/stage_s")
    work_s = sum(values_of(steps, "time/train_s")) + sum(values_of(steps, "time/score_s"))
    return TrainerModel(
        token_s=work_s / max(1.0, _total(steps, "speed/train_tokens_per_s")),
        step_s=max(0.0, rest),
        stage_s=max(0.0, stage_s),
        load_s=paused_s,
    )


def _decode_of(steps: Sequence[MetricRow]) -> DecodePoint:
    """By Little's law the rows at once are the tokens a second times the seconds of a token."""
    span_s = sum(values_of(steps, "time/step_s"))
    sampling_s = sum(values_of(steps, "time/sampling_s")) or span_s
    paused_s = sum(values_of(steps, "time/paused_s"))
    length = _mean(steps, "train/length")
    token_s = values_of(steps, "rollout_time/sample_s")[-1] / max(1.0, length)
    rows = _total(steps, "speed/generated_tokens_per_s") * token_s / sampling_s
    return rows, token_s * max(0.0, 1 - paused_s / sampling_s)


def _summary_of(steps: Sequence[MetricRow], rollout: RolloutConfig) -> SimulationSummary:
    span_s = sum(values_of(steps, "time/step_s"))
    by_lag = {int(lag.removesuffix("plus")): n for lag, n in lag_tokens(steps).items()}
    total = sum(by_lag.values())
    median, p90 = np.percentile(values_of(steps, "time/step_s"), [50, 90])
    first, last = steps[0], steps[-1]
    trained = _total(steps, "speed/train_tokens_per_s")
    dropped = _dropped(last) - _dropped(first)
    return SimulationSummary(
        steps=len(steps),
        tokens_per_s=trained / span_s,
        step_s=float(median),
        step_p90_s=float(p90),
        lag_shares={lag: n / total for lag, n in by_lag.items()} if total else {},
        mean_lag=_mean(steps, "lag/mean"),
        dropped_share=dropped / max(1.0, dropped + trained),
        dropped_groups=int(_dropped_groups(last) - _dropped_groups(first)),
        length_ratio=last.get("rollout/length_ratio", 1.0),
        masked_share=0.0,
        wait_share=sum(values_of(steps, "time/wait_s")) / span_s,
        train_share=_share(steps, span_s),
        publish_share=sum(values_of(steps, "time/publish_s")) / span_s,
        engine_idle_share=None,
        rows=_decode_of(steps)[0],
        concurrency=int(last.get("rollout/concurrency", rollout.concurrency)),
        max_pending=int(max(values_of(steps, "rollout/pending"), default=0)) + rollout.batch_size,
    )


def _share(steps: Sequence[MetricRow], span_s: float) -> float:
    """Share of the time that is neither waiting, nor publishing, nor an evaluation."""
    others = [f"time/{name}_s" for name in ("wait", "publish", "evaluate")]
    return 1 - sum(sum(values_of(steps, name)) for name in others) / span_s


def _dropped_groups(row: MetricRow) -> float:
    return row.get("rollout/dropped_stale", 0.0) + row.get("rollout/dropped_overdue", 0.0)


def _dropped(row: MetricRow) -> float:
    return _dropped_groups(row) * row.get("rollout/dropped_length", 0.0)


def _mean(steps: Sequence[MetricRow], name: str) -> float:
    values = values_of(steps, name)
    return sum(values) / len(values) if values else 0.0


def _total(steps: Sequence[MetricRow], speed: str) -> float:
    """Tokens of all steps, of a metric that is logged a second of the step."""
    return sum(row.get(speed, 0.0) * row["time/step_s"] for row in steps if "time/step_s" in row)
