"""What the steps of a simulated run come to, and the bound that no setting can beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sdp_lightning.config import RolloutConfig
from sdp_lightning.errors import ConfigError
from sdp_lightning.rollout.simulation.models import EngineModel, Lengths, TrainerModel
from sdp_lightning.rollout.simulation.simulate import SimulatedStep


@dataclass(frozen=True)
class SimulationSummary:
    """Measures of the steps after the warm-up. Shares are of 1, times in seconds.

    Attributes:
        steps: number of these steps.
        tokens_per_s: tokens trained on, with weight in the loss, a second.
        step_s: median step time.
        step_p90_s: 90th percentile of the step time.
        lag_shares: share of the trained tokens by their lag in versions.
        mean_lag: mean lag of the trained tokens.
        dropped_share: tokens of dropped groups, of those trained on or dropped.
        dropped_groups: number of these groups.
        length_ratio: mean tokens of a trained group over the mean of trained and dropped ones:
            below 1, long rollouts starve.
        masked_share: tokens of the batches beyond the lag bound, which are masked in the loss.
        wait_share: share of the time that the trainer waited for a batch: it is idle.
        train_share: share of the time that it trained.
        publish_share: share of the time that it waited for a publish.
        engine_idle_share: share of the time that a replica stood still, or had no row; None is not
            known.
        rows: mean rows of a replica while it had any.
        concurrency: most groups at once in the last step.
        max_pending: most finished groups that waited, those of the next batch included.
    """

    steps: int
    tokens_per_s: float
    step_s: float
    step_p90_s: float
    lag_shares: dict[int, float]
    mean_lag: float
    dropped_share: float
    dropped_groups: int
    length_ratio: float
    masked_share: float
    wait_share: float
    train_share: float
    publish_share: float
    engine_idle_share: float | None
    rows: float
    concurrency: int
    max_pending: int

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers by name, for JSON."""
        return asdict(self)


def summarize(
    steps: Sequence[SimulatedStep], rollout: RolloutConfig, engines: EngineModel, *, warmup: int
) -> SimulationSummary:
    """Measures of ``steps`` without the first ``warmup`` ones, in which the pipeline fills.

    Raises:
        ConfigError: if no step is left.
    """
    if not 0 <= warmup < len(steps):
        raise ConfigError(
            f"warmup={warmup} leaves none of {len(steps)} steps to measure: simulate more steps, "
            "or leave out fewer."
        )
    start = steps[warmup - 1] if warmup else None
    measured, last = steps[warmup:], steps[-1]
    span_s = last.end_s - (start.end_s if start else 0.0)
    busy_s = last.busy_s - (start.busy_s if start else 0.0)
    row_seconds = last.row_seconds - (start.row_seconds if start else 0.0)
    dropped = last.dropped - (start.dropped if start else 0)
    dropped_groups = last.dropped_groups - (start.dropped_groups if start else 0)
    num_groups = rollout.batch_size * len(measured)
    lags: dict[int, int] = {}
    for step in measured:
        for lag, count in step.tokens.items():
            lags[lag] = lags.get(lag, 0) + count
    most = rollout.max_token_lag if rollout.enable_segment_wise_ppo else None
    trained = {lag: n for lag, n in sorted(lags.items()) if most is None or lag <= most}
    num_batch, num_trained = sum(lags.values()), sum(trained.values())
    shares = {lag: n / max(1, num_trained) for lag, n in trained.items()}
    median, p90 = np.percentile([step.step_s for step in measured], [50, 90])
    return SimulationSummary(
        steps=len(measured),
        tokens_per_s=num_trained / span_s,
        step_s=float(median),
        step_p90_s=float(p90),
        lag_shares=shares,
        mean_lag=sum(lag * share for lag, share in shares.items()),
        dropped_share=dropped / max(1, dropped + num_batch),
        dropped_groups=dropped_groups,
        length_ratio=num_batch
        / num_groups
        / ((num_batch + dropped) / (num_groups + dropped_groups)),
        masked_share=1 - num_trained / num_batch,
        wait_share=sum(step.wait_s for step in measured) / span_s,
        train_share=sum(step.train_s for step in measured) / span_s,
        publish_share=sum(step.publish_s for step in measured) / span_s,
        engine_idle_share=1 - busy_s / (engines.num_replicas * span_s),
        rows=row_seconds / busy_s if busy_s else 0.0,
        concurrency=last.concurrency,
        max_pending=last.pending,
    )


def most_tokens_per_s(
    rollout: RolloutConfig, engines: EngineModel, trainer: TrainerModel, lengths: Lengths
) -> float:
    """Bound on the tokens trained a second: the slower one of sampling and training alone.

    Sampling: all rows at once, spread evenly, at every moment. Training: batches of the mean number
    of tokens, each with the part of its publish that the trainer cannot but wait for.
    """
    sampling = engines.tokens_per_s(rollout.concurrency * lengths.group_size)
    batch = rollout.batch_size * lengths.mean_tokens
    publish_s = trainer.stage_s + (0.0 if rollout.overlap_publish else trainer.load_s)
    return min(sampling, batch / (trainer.train_s(round(batch)) + publish_s))
