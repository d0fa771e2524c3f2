"""Random steps, and what ``LagMetrics`` should say of them: NumPy on all tokens, without bins."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from sdp_lightning.config import LossConfig
from sdp_lightning.objective import PolicyLoss, segment_wise_ppo_loss
from sdp_lightning.training.batch import Batch
from sdp_lightning.training.loss import BatchLoss
from sdp_lightning.training.metrics import LagMetrics

VERSION = 7
LAGS = ("0", "1", "2", "3", "4plus")
BIN_ERROR = 0.04


@dataclass
class Step:
    """What ``update`` takes."""

    batch: Batch
    proximal: Tensor
    segment: Tensor
    entropy: Tensor
    advantages: Tensor
    target: Tensor

    @classmethod
    def random(cls, seed: int, rows: int = 4, columns: int = 9, drift: float = 0.8) -> Step:
        generator = torch.Generator().manual_seed(seed)
        shape = (rows, columns)

        def normal(scale: float) -> Tensor:
            return scale * torch.randn(shape, generator=generator)

        mask = torch.rand(shape, generator=generator) < 0.7
        mask[0, 1] = True
        behavior = -2 + normal(0.5)
        zeros = torch.zeros(rows, dtype=torch.long)
        batch = Batch(
            version=VERSION,
            input_ids=torch.zeros(shape, dtype=torch.long),
            position_ids=torch.zeros(shape, dtype=torch.long),
            lengths=zeros + columns,
            loss_mask=mask,
            versions=torch.randint(0, VERSION + 1, shape, generator=generator),
            behavior_logprobs=behavior,
            segment_logprobs=behavior,
            segment_scored=torch.rand(shape, generator=generator) < 0.5,
            temperatures=torch.ones(shape),
            rewards=torch.zeros(rows),
            group_ids=zeros,
            truncated=zeros.bool(),
        )
        proximal = behavior + normal(drift)
        return cls(
            batch=batch,
            proximal=proximal,
            segment=proximal + normal(0.3),
            entropy=normal(1.0).abs(),
            advantages=normal(1.0),
            target=proximal + normal(0.2),
        )

    def select(self, rows: list[int]) -> Step:
        tensors = (self.proximal, self.segment, self.entropy, self.advantages, self.target)
        return Step(self.batch.select(rows), *(tensor[rows] for tensor in tensors))

    def loss(self) -> PolicyLoss:
        return segment_wise_ppo_loss(
            self.target,
            self.proximal,
            self.segment,
            self.batch.behavior_logprobs,
            self.advantages,
            self.batch.loss_mask,
            config=LossConfig(behavior_weight_cap=2.0),
        )

    def add_to(self, metrics: LagMetrics) -> None:
        policy = self.loss()
        kl = torch.zeros_like(self.proximal)
        result = BatchLoss(policy.loss, policy, self.proximal, self.segment, kl)
        metrics.update(self.batch, result, self.entropy)


def computed(*steps: Step) -> dict[str, float]:
    metrics = LagMetrics()
    for step in steps:
        step.add_to(metrics)
    return {name: float(value) for name, value in metrics.compute().items()}


def oracle(*steps: Step) -> dict[str, float]:
    """Every statistic of the steps together, under its name."""
    tokens: dict[str, list[float]] = {}
    sequences: list[float] = []
    parts: dict[str, list[float]] = {name: [] for name in LAGS}
    for step in steps:
        for name, values in _arrays(step).items():
            tokens.setdefault(name, []).extend(values)
        sequences += _sequence_logs(step)
        for name, logs in parts.items():
            logs += _sequence_logs(step, lag=name)
    columns = {name: np.asarray(values, np.float64) for name, values in tokens.items()}
    everything = np.ones(len(columns["lag"]), bool)
    binned = np.minimum(columns["lag"], 4)
    found = {
        "lag/mean": _mean(columns["lag"]),
        "lag/max": float(max(columns["lag"], default=0)),
        **_of(columns, everything),
        "ess/sequence": _ess(np.clip(sequences, -20, 20)),
        "ess/clamped_sequences": _mean(np.abs(sequences) > 20),
        "drift/clamped_share": _mean(np.abs(columns["drift"]) > 20),
    }
    by_lag = {name: _of(columns, binned == lag) for lag, name in enumerate(LAGS)}
    for lag, name in enumerate(LAGS):
        found[f"lag/tokens_{name}"] = float((binned == lag).sum())
        found[f"lag/share_{name}"] = _mean(binned == lag)
        found[f"ess/sequence_{name}"] = _ess(np.clip(parts[name], -20, 20))
        for key, value in by_lag[name].items():
            if key in ("loss/behavior_weight", "loss/clip_fraction"):
                continue
            if lag >= 2 or not key.startswith("bridge/"):
                found[f"{key}_{name}"] = value
    for key in ("abs_log_mean", "abs_log_p99", "k1"):
        found[f"mismatch/{key}"] = by_lag["0"][f"drift/{key}"]
    return found


def assert_agree(actual: Mapping[str, float], expected: Mapping[str, float]) -> None:
    """Equal, percentiles within the error of a bin."""
    assert set(actual) == set(expected)
    for name, value in expected.items():
        is_binned = "_p9" in name
        tolerance = BIN_ERROR if is_binned else 1e-4
        assert actual[name] == pytest.approx(value, rel=tolerance, abs=2e-6), name


def _arrays(step: Step) -> dict[str, list[float]]:
    batch, loss = step.batch, step.loss()
    result: dict[str, list[float]] = {}
    for row, column in batch.loss_mask.nonzero().tolist():
        lag = VERSION - int(batch.versions[row, column])
        token = {
            "lag": lag,
            "entropy": step.entropy[row, column],
            "drift": step.proximal[row, column] - batch.behavior_logprobs[row, column],
            "bridge": step.proximal[row, column] - step.segment[row, column],
            "known": lag < 2 or bool(batch.segment_scored[row, column]),
            "kept": loss.kept[row, column],
            "clipped": loss.clipped[row, column],
            "ratio": loss.log_ratio[row, column].exp(),
            "log_weight": loss.log_weight[row, column],
        }
        for name, value in token.items():
            result.setdefault(name, []).append(float(value))
    names = ("lag", "entropy", "drift", "bridge", "known", "kept", "clipped", "ratio", "log_weight")
    return result or {name: [] for name in names}


def _sequence_logs(step: Step, lag: str | None = None) -> list[float]:
    """The sum over each row, or over its tokens of that lag; rows without any are left out."""
    drift = (step.proximal - step.batch.behavior_logprobs).double().numpy()
    mask = step.batch.loss_mask.numpy()
    if lag is not None:
        lags = VERSION - step.batch.versions.numpy()
        mask = mask & ((lags >= 4) if lag == "4plus" else (lags == int(lag)))
    rows = zip(drift, mask, strict=True)
    return [float(row[mask].sum()) for row, mask in rows if mask.any()]


def _of(columns: Mapping[str, np.ndarray], chosen: np.ndarray) -> dict[str, float]:
    """The statistics of some tokens."""
    at = {name: values[chosen] for name, values in columns.items()}
    kept, known = at["kept"] == 1, at["known"] == 1
    drift, ratio, clipped = at["drift"], at["ratio"][kept], at["clipped"][kept] == 1
    weights = np.abs(at["log_weight"][kept])
    bounded = np.clip(drift, -20, 20)
    bridge = np.abs(at["bridge"][known])
    return {
        "loss/behavior_weight": _mean(np.exp(at["log_weight"][kept])),
        "loss/clip_fraction": _mean(clipped),
        "loss/clip_fraction_high": _mean(clipped & (ratio > 1)),
        "loss/clip_fraction_low": _mean(clipped & (ratio < 1)),
        "loss/rejected_fraction": _mean(~kept),
        "loss/entropy": _mean(at["entropy"]),
        "weight/abs_log_mean": _mean(weights),
        "weight/abs_log_p99": _percentile(weights, 99),
        "ess/token": _ess(bounded),
        "drift/abs_log_mean": _mean(np.abs(drift)),
        "drift/abs_log_p99": _percentile(np.abs(drift), 99),
        "drift/k1": -_mean(drift),
        "drift/k3": _mean(np.exp(bounded) - 1 - bounded),
        "drift/chi2": _mean(np.exp(2 * bounded)) - 1 if len(drift) else 0.0,
        "bridge/abs_log_mean": _mean(bridge),
        "bridge/abs_log_p95": _percentile(bridge, 95),
        "bridge/approximated_share": _mean(~known),
    }


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def _percentile(values: np.ndarray, percent: int) -> float:
    """The smallest value that at least so many percent are not above."""
    if not len(values):
        return 0.0
    found = float(np.sort(values)[math.ceil(percent * len(values) / 100) - 1])
    return min(found, 103.7)  # the middle of the bin for all that is farther


def _ess(logs: np.ndarray) -> float:
    if not len(logs):
        return 0.0
    shares = np.exp(logs - logs.max())
    return float(shares.sum() ** 2 / (shares**2).sum() / len(logs))


def with_outlier(step: Step, size: float) -> Step:
    """The step with one token of the mask whose drift is ``size``."""
    row, column = step.batch.loss_mask.nonzero()[0].tolist()
    proximal = step.proximal.clone()
    proximal[row, column] = step.batch.behavior_logprobs[row, column] + size
    return dataclasses.replace(step, proximal=proximal)
